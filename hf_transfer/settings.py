"""A checked configuration: the values of all keys, and the objects that a run reads them from.

Every key is a field of one of three dataclasses, which hold its default and its help text: `ModelArguments`,
`DataArguments` and `TransferArguments`. Values from YAML, the command line and Python go through the same `coerce`;
precedence is default < YAML < command line; all problems are collected and raised together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from hf_transfer.config.arguments.adaptation import weight_of
from hf_transfer.config.arguments.adapter import with_adapter
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.config.arguments.forgetting import PLACES
from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.config.arguments.plan import AUTO, learning_rate_of
from hf_transfer.errors import UserError, one_line
from hf_transfer.keys import COMMAND_LINE_ONLY, RUN_DEFAULTS, keys, read_values
from hf_transfer.run_folder import run_file
from hf_transfer.tasks import TASKS
from hf_transfer.training.arguments import TransferArguments

__all__ = ["Config", "keys"]


@dataclass
class Config:
    """A checked configuration.

    Attributes:
        model, data, training: the three groups of keys.
        values: every key with its value, flat.
        given: names of the keys that were given, in a file or otherwise, without a `learning_rate` that is `auto`.
        finds_rate: whether `learning_rate` is `auto`; until it is found, the key has its default.
    """

    model: ModelArguments
    data: DataArguments
    training: TransferArguments
    values: dict[str, Any]
    given: frozenset[str] = frozenset()
    finds_rate: bool = False

    @classmethod
    def from_sources(
        cls,
        file: Mapping[str, Any],
        given: Mapping[str, Any],
        problems: Sequence[str] = (),
        needs: Collection[str] = ("model", "output", "data"),
    ) -> Config:
        """Merge defaults, a file's keys and keys given on the command line or in Python; `needs` must be among them.

        Raises:
            UserErrors: every unknown key, wrong value and contradiction, in one message.
        """
        read = read_values(file, given, problems, needs, TASKS)
        values = read.values
        if values["stages"] is not None:
            values["num_train_epochs"] = float(sum(s["epochs"] for s in values["stages"]))
        values["from_scratch"] |= values["strategy"] == "scratch"
        values["adapter"] = with_adapter(values["strategy"], values["adapter"])
        finds_rate = values["learning_rate"] == AUTO
        values["learning_rate"] = learning_rate_of(values["learning_rate"], values["strategy"], values["adapter"])
        values["domain_adaptation_weight"] = weight_of(values["domain_adaptation_weight"], values["domain_adaptation"])
        model, data, training = (
            _build(section, values) for section in (ModelArguments, DataArguments, TransferArguments)
        )
        # Of `owner/name@revision`.
        values |= {name: getattr(model, name) for name in ("model_name_or_path", "model_revision")}
        if values["mixed_precision"] is not None:  # `run.yaml` says what it came to
            values |= {"mixed_precision": None, "fp16": training.fp16, "bf16": training.bf16}
        given_keys = read.given - ({"learning_rate"} if finds_rate else set())
        return cls(model, data, training, values, given_keys, finds_rate)

    @property
    def split_seed(self) -> int:
        """The seed of splits and draws."""
        return self.training.seed if self.training.data_seed is None else self.training.data_seed

    def resolved(self, **data: Any) -> Config:
        """With what was seen from the data in place of nothing, for `run.yaml` and for what comes after training."""
        return replace(self, data=replace(self.data, **data), values={**self.values, **data})

    def to_yaml(self, why: Mapping[str, str] | None = None) -> str:
        """A file that repeats this run, see `run_file`; keys that a file may not hold stand in a comment."""
        left_out = (*COMMAND_LINE_ONLY, "resume_from_checkpoint", "overwrite_output_dir")
        values = {k: v for k, v in self.values.items() if k not in left_out}
        values |= {name: _from_anywhere(values[name]) for name in _DATA_PATHS}
        only = [f"--{k}" for k in COMMAND_LINE_ONLY if self.values[k]]
        note = f"# The run was also given, on the command line only: {' '.join(only)}\n" if only else ""
        head = "# Repeats this run: hf-transfer train --config run.yaml --output_dir again\n"
        return run_file(head + note, values, self.given, {n: key.default for n, key in keys().items()}, why or {})


_DATA_PATHS = (
    *("dataset_name", "train_file", "validation_file", "test_file", "target_dataset_name", "forgetting_dataset_name"),
    *PLACES,
)


def _from_anywhere(path: str | None) -> str | None:
    """A path of data that is relative to here as an absolute one, so that `run.yaml` works from another folder."""
    if path is None or path.startswith("bundled:"):
        return path
    is_pattern = any(c in path for c in "*?[") and Path(path).parent != Path()
    return str(Path(path).expanduser().absolute()) if is_pattern or Path(path).expanduser().exists() else path


def _build(section: type, values: Mapping[str, Any]) -> Any:
    own = {f.name: values[f.name] for f in fields(section) if f.init and f.name in values}
    if section is TransferArguments:
        own |= {"remove_unused_columns": RUN_DEFAULTS["remove_unused_columns"]}
    try:
        return section(**own)
    except UserError:
        raise
    except (ValueError, TypeError, ImportError, OSError) as error:  # TrainingArguments' own checks
        raise UserError(one_line(error)) from error
