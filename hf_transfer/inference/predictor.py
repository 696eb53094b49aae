"""A trained model at work: loaded from a run, it answers inputs and is measured on labeled data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from hf_transfer.adapters.files import merge_checked
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.config.arguments.model import MAIN, ModelArguments
from hf_transfer.config.arguments.views import Views
from hf_transfer.config.values import coerce, read_config_file
from hf_transfer.data.labels import SINGLE_LABEL, Labels
from hf_transfer.data.record import Record
from hf_transfer.errors import UserError, nearest, one_line, typed
from hf_transfer.evaluation.conformal import COVERAGE, ENTRY, limit_of
from hf_transfer.inference.answering import BATCH_SIZE
from hf_transfer.inference.exported import check_weights, export_of, load_export
from hf_transfer.inference.reviewing import Reviewing
from hf_transfer.layers.forward_pass import example as example_of
from hf_transfer.models.load import Loaded
from hf_transfer.models.source import read_config
from hf_transfer.run_folder import EXAMPLES, RUN_FILE, refuse_model, weights_in
from hf_transfer.settings import keys
from hf_transfer.tasks import TASKS, task_of
from hf_transfer.training.checkpoints import checkpoints


@dataclass
class Predictor(Reviewing):
    """A model with what it needs to read inputs and to name its answers.

    Attributes:
        task: what it reads.
        model: with its head.
        processor: the tokenizer or image processor.
        labels: problem type and names, in the order of the outputs.
        data: the data keys of the run that trained it.
        batch_size: examples per forward pass.
        precision: `bf16` or `fp16` where it was trained and evaluated under autocast, else None.
        seed: of the run's splits.
        views: how it looks at an example.
        limit: largest score of a label in a prediction set; None without sets.
        record: the examples that its run trained on and held out, by content; None if they are not known.
        folder: of its run; None of a model from a hub.
    """

    @classmethod
    def load(cls, run: str | Path, **changes: Any) -> Predictor:
        """The model of a run's folder, of any folder that `save_pretrained` wrote, or of a hub id.

        Args:
            run: the folder or id; of an exported model also its file.
            **changes: keys to use instead of the run's own, for example `per_device_eval_batch_size`; `tta`,
                `stride` and `pool` (see `Views`); and `model_revision`, the branch, tag or commit of a hub id, for
                which `owner/name@revision` may be written too.

        Raises:
            UserError: there is no such model, or it has no trained head.
        """
        others = ("per_device_eval_batch_size", "trust_remote_code", "model_revision", "allow_pickle")
        changeable = {*DataArguments.__dataclass_fields__, *Views.__dataclass_fields__, *others}
        for name in set(changes) - changeable:
            raise UserError(f"{name} is no key of a trained model.{nearest(name, changeable)}")
        with _named_run():
            return cls._load(str(run), changes)

    @classmethod
    def _load(cls, run: str, changes: dict[str, Any]) -> Predictor:
        if not run:
            raise UserError("RUN: it is empty.", "Give the folder of a run, or a hub id.")
        exported = export_of(run)
        run = run if exported is None else str(exported)
        values = _keys_of_run(run) | {k: v for k, v in changes.items() if v is not None}
        data = DataArguments(**{f.name: values[f.name] for f in fields(DataArguments) if f.name in values})
        model_args = ModelArguments(
            run,
            model_revision=changes.get("model_revision") or MAIN,
            trust_remote_code=bool(changes.get("trust_remote_code")),
            allow_pickle=bool(changes.get("allow_pickle")),
        )
        if exported is not None:
            task, loaded, processor = load_export(exported, model_args, data)
        else:
            _refuse_unfinished(run)
            task, loaded, processor = saved_model(model_args, data)
        data = replace(data, task=task)
        if loaded.fresh:
            raise UserError(
                f"RUN: {run!r} holds no trained head ({', '.join(loaded.fresh[:2])} would be random).",
                f"Train one with `hf-transfer train --model_name_or_path {run}`.",
            )
        if loaded.grown:
            raise UserError(
                f"RUN: the tokenizer of {run!r} has {loaded.grown} more tokens than the model has embeddings.",
                "Train it with its tokenizer (`hf-transfer train` adds embeddings), or restore the tokenizer's files.",
            )
        precision = next((p for p in ("bf16", "fp16") if values.get(p)), None)
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        return cls(
            task=TASKS[task],
            model=loaded.model.to(device).eval(),
            processor=processor,
            labels=loaded.labels,
            data=data,
            batch_size=int(values.get("per_device_eval_batch_size") or BATCH_SIZE),
            precision=precision,
            seed=int(next((values[k] for k in ("data_seed", "seed") if values.get(k) is not None), 0)),
            views=Views.of(changes),
            record=Record.load(Path(run) / EXAMPLES),
            folder=Path(run) if Path(run).is_dir() else None,
        )

    def looking(self, **views: Any) -> Predictor:
        """The same model, looking at an example as `tta`, `stride` and `pool` say (see `Views`).

        Raises:
            UserError: it is no such key, or not a value of it.
        """
        for name in views:
            if name not in Views.__dataclass_fields__:
                raise UserError(f"{name} is no key of how a model looks.{nearest(name, Views.__dataclass_fields__)}")
        return _with_sets(replace(self, views=Views.of(views)), self.limit)

    def abstaining(self, coverage: float = COVERAGE) -> Predictor:
        """The same model, answering with sets of labels, and with a label only where the set has exactly one.

        Args:
            coverage: probability that a set contains the true label, on examples like those of the validation split.

        Raises:
            UserError: the model is not one of single labels, or its run had too few validation examples.
        """
        if self.labels.problem_type != SINGLE_LABEL:
            raise UserError(
                f"sets of labels are for classes of which one is right, and the model's problem type is "
                f"{self.labels.problem_type}.",
                "Leave it out.",
                key="abstain",
            )
        return _with_sets(self, limit_of(getattr(self.model.config, ENTRY, None), coverage))

    def save_merged(self, folder: str | Path, batch: dict[str, Any] | None = None) -> Path:
        """Write a plain model, an adapter merged into its backbone, with its tokenizer or image processor.

        Args:
            folder: is made.
            batch: what the model reads, to compare merged and unmerged answers on (default: a made-up example).

        Raises:
            UserError: its kind of adapter cannot be merged, or the folder holds a model already.
            WorkFailed: the merged weights answer otherwise than the adapter.
        """
        check_weights(self.model, "merge")
        refuse_model(Path(folder), "folder")
        model = merge_checked(self.model, batch or example_of(self.model) or {})
        Path(folder).mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        return Path(folder)


def _with_sets(predictor: Predictor, limit: float | None) -> Predictor:
    """The predictor with a limit for its sets.

    Raises:
        UserError: it pools the logits of several views, which the stored scores are not of.
    """
    if limit is not None and predictor.views.several:
        raise UserError(
            "the model's scores were computed on one view of each example, and tta and stride pool several.",
            "Leave out tta and stride.",
            key="abstain",
        )
    return replace(predictor, limit=limit)


def load(run: str | Path, **changes: Any) -> Predictor:
    """A trained model at work: `Predictor.load`.

    Args:
        run: a run's folder, any folder that `save_pretrained` wrote, or a hub id.
        **changes: as of `Predictor.load`.

    Raises:
        UserError: there is no such model, or it has no trained head.
    """
    return Predictor.load(run, **changes)


def merge(run: str | Path, folder: str | Path, **changes: Any) -> Path:
    """Write a run with an adapter as a plain model, the adapter in the backbone's weights. Any library loads it, unless
    its head is an MLP.

    Args:
        run: a run's folder or a hub id.
        folder: where the plain model goes, with its tokenizer or image processor.
        **changes: as of `Predictor.load`.

    Raises:
        UserError: there is no such run, its kind of adapter cannot be merged (prompts, prefixes, bottlenecks), or
            `folder` holds a model already.
        WorkFailed: the merged weights answer otherwise than the adapter.
    """
    return Predictor.load(run, **changes).save_merged(folder)


def saved_model(args: ModelArguments, data: DataArguments) -> tuple[str, Loaded, Any]:
    """(task, model, tokenizer or image processor) as a saved model's own files describe them.

    Args:
        args: where it is.
        data: keys of the run that trained it.

    Raises:
        UserError: it cannot be loaded.
    """
    config = read_config(args)
    task = data.task or task_of(config, str(args.model_name_or_path))
    own = replace(data, task=task, image_size=None, max_seq_length=None)  # what was saved holds its size and length
    return task, *TASKS[task].load(args, own, Labels.of(config))


# ---- details ----


@contextlib.contextmanager
def _named_run() -> Iterator[None]:
    """Context in which errors about the model name `RUN`, as the command line does, instead of the key."""
    try:
        yield
    except UserError as error:
        named = {"model_name_or_path": "RUN", **({"model_revision": "revision"} if typed() else {})}
        if error.key not in named:
            raise
        raise error.with_key(named[error.key]) from error


def _refuse_unfinished(run: str) -> None:
    """Raises:
    UserError: it is the folder of a run that has checkpoints, and no model yet.
    """
    folder = Path(run).expanduser()
    saved = checkpoints(folder) if not weights_in(folder) else []
    if saved:
        raise UserError(
            f"RUN: {run!r} holds an unfinished run: {saved[0].name} and no model.",
            f"Finish it with `hf-transfer train --config {folder / RUN_FILE} --resume_from_checkpoint auto`, or give "
            f"{str(saved[0])!r}.",
        )


def _keys_of_run(run: str) -> dict[str, Any]:
    """The keys that a run's folder recorded; none for another model's folder or a hub id."""
    path = Path(run) / RUN_FILE
    if not path.is_file():
        return {}
    try:
        values = {k: coerce(v, keys()[k]) for k, v in read_config_file(str(path)).items() if k in keys()}
        if values.get("task") not in (None, *TASKS):
            raise ValueError(f"task: {values['task']!r} is not one of {', '.join(TASKS)}.")
    except ValueError as error:
        raise UserError(f"RUN: {str(path)!r} is not what a run writes ({one_line(error)}).") from error
    return values
