"""Names and readers of the files that a run leaves in its folder."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from hf_transfer.config.values import load_yaml
from hf_transfer.errors import UserError

CARD = "README.md"
RESULTS = "results.json"
PASSED = ".stream"  # while a stream trains: what it gave, see `data.stream_record`
LABEL_ISSUES = "label_issues.csv"  # labels that look wrong; holds training examples, never pushed
ERRORS = "errors.csv"  # wrong answers on the split that was measured; holds examples, never pushed
RANGE_TEST_CSV, RANGE_TEST_PNG = "find_lr.csv", "find_lr.png"  # the losses of a learning-rate range test
FORGETTING_PNG = "forgetting.png"  # the checkpoint's own task while training
INTERPOLATION_PNG = "interpolation.png"  # metrics between the pretrained and the fine-tuned weights
REPORT = "report.html"  # holds examples
MISTAKES = "mistakes.json"  # small pictures, and the nearest training examples, of the first rows of `ERRORS`
COMPARISON = "compare.json"  # of several runs, with the folders of all of them
EXPLANATIONS = "explanations.json"  # what the first of these rest on
TRAIN_BATCH_PNG = "train_batch.png"  # training examples as the model saw them
CONFUSION_PNG, CURVES_PNG = "confusion_matrix.png", "curves.png"
SHOWING = (REPORT, ERRORS, LABEL_ISSUES, TRAIN_BATCH_PNG, CONFUSION_PNG, CURVES_PNG)  # pushed with `with_report` only
DOMAINS_PNG = "domain_distance.png"  # source and target of domain adaptation, before and after training
EXPORT = "export.json"  # next to an exported model: what it is, how it was checked
EXAMPLES = "examples.npz"  # hashes of the examples, see `data.record`; never pushed


def new_folder(model: str, data: str) -> Path:
    """`runs/<data>-<model>-<n>`, with the first number of which there is no such folder.

    Args:
        model: hub id, folder or `bundled:<name>`.
        data: likewise, or a file.
    """

    def short(name: str) -> str:
        last = Path(name.partition(":")[2] or name)
        plain = last.name if last.is_dir() else last.stem if last.is_file() else last.name
        return re.sub(r"[^\w.]+", "-", plain or last.absolute().name).strip("-") or "data"

    names = (Path("runs") / f"{short(data)}-{short(model)}-{number}" for number in count(1))
    return next(path for path in names if not path.exists())


def run_file(
    head: str, values: Mapping[str, Any], given: Collection[str], defaults: Mapping[str, Any], why: Mapping[str, str]
) -> str:
    """The text of `run.yaml`: what was given, what was chosen for the run, with the reason as a comment, and the rest.

    Args:
        head: comment lines.
        values: by key, in their order.
        given: names of the keys that were given. If that is all of them, an earlier `run.yaml` was, and those that
            have their default value count as the rest.
        defaults: by key.
        why: by key that was chosen, the reason, which may be empty.
    """
    is_repeated = set(values) <= set(given)
    sections: dict[str, dict[str, Any]] = {"Given": {}, "Chosen for this run": {}, "Defaults": {}}
    for name, value in values.items():
        is_default = value == defaults[name]
        if name in given and name not in why and not (is_default and (is_repeated or value is None)):
            sections["Given"][name] = value
        elif name in why or not is_default:
            sections["Chosen for this run"][name] = value
        else:
            sections["Defaults"][name] = value
    text = head
    for title, entries in sections.items():
        text += f"\n# {title}\n" if entries else ""
        text += "".join(_entry(name, value, why.get(name, "")) for name, value in entries.items())
    return text


def _entry(name: str, value: Any, reason: str) -> str:
    """A key in YAML, with a comment after it, or above it if it takes several lines."""
    entry, reason = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True), " ".join(reason.split())
    if not reason:
        return str(entry)
    return f"{entry.rstrip()}  # {reason}\n" if entry.count("\n") == 1 else f"# {reason}\n{entry}"


def read_results(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(results, keys) of a run."""
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    return results, load_yaml((folder / RUN_FILE).read_text(encoding="utf-8"))


NONFINITE = "nonfinite.jsonl"
RUN_FILE = "run.yaml"
HISTORY = "history.jsonl"
FISHER = "fisher.safetensors"  # the Fisher information of `ewc_dataset_name`
# What a run leaves next to its model, and the next run in the folder would mix up with its own.
OF_ONE_RUN = (
    RESULTS,
    ERRORS,
    EXAMPLES,
    LABEL_ISSUES,
    HISTORY,
    NONFINITE,
    FISHER,
    RANGE_TEST_CSV,
    RANGE_TEST_PNG,
    FORGETTING_PNG,
    INTERPOLATION_PNG,
    REPORT,
    MISTAKES,
    EXPLANATIONS,
    TRAIN_BATCH_PNG,
    CONFUSION_PNG,
    CURVES_PNG,
    DOMAINS_PNG,
)
REPLACED = "replaced-run"  # folder of the earlier run, inside of the one that replaces it, until that one is complete
# Files of a model, as patterns: of an adapter, of a whole model, of its tokenizer or image processor.
BACKBONE = "backbone.json"  # next to an adapter: the identity of its backbone, see `layers.identity`
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", BACKBONE, "config.json")
WHOLE = ("config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
PROCESSOR = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
MODEL_FILES = (*ADAPTER, *WHOLE, *PROCESSOR)
# What decides which model a folder holds: an adapter wins over a whole model, safetensors over other formats.
_OF_ADAPTER = ("adapter_config.json", "adapter_model.*", BACKBONE)
_OF_WHOLE = (*WHOLE[1:], "pytorch_model*.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack")


def model_files(folder: Path) -> list[Path]:
    """All files of a folder's model: weights, configuration, tokenizer or image processor."""
    return weights_in(folder, (*_OF_ADAPTER, *_OF_WHOLE, *MODEL_FILES))


def weights_in(folder: Path, patterns: Collection[str] = (*_OF_ADAPTER, *_OF_WHOLE)) -> list[Path]:
    """The files of a folder that a model would be loaded from; none if there is no such folder."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in files if any(fnmatch(path.name, pattern) for pattern in patterns)]


def remove_model(folder: Path, but: Collection[str] = ()) -> None:
    """Remove a folder's model, so that another one which is saved there is the only one.

    Args:
        folder: may not exist.
        but: names of files that stay, because the other model has them too.
    """
    for path in model_files(folder):
        if path.name not in but:
            path.unlink()


def remove_other_kind(folder: Path, is_adapter: bool) -> None:
    """Remove a whole model from the folder of an adapter that was just saved, or the other way round."""
    for path in weights_in(folder, _OF_WHOLE if is_adapter else _OF_ADAPTER):
        path.unlink()


def refuse_model(folder: Path, key: str) -> None:
    """Check that nothing is saved in a folder in whose place, or next to which, a model would be written.

    Args:
        folder: may not exist.
        key: that names it, for the message.

    Raises:
        UserError: it holds a model or a run.
    """
    held = [path.name for path in weights_in(folder)] or [n for n in (RESULTS, RUN_FILE) if (folder / n).is_file()]
    if held:
        raise UserError(
            f"{str(folder)!r} holds a model already ({', '.join(held[:3])}).",
            "Choose another folder, or remove it.",
            key=key,
        )


def same_folder(one: Path, other: Path) -> bool:
    """Whether two paths lead to one folder that exists."""
    one, other = one.expanduser(), other.expanduser()
    return one.is_dir() and other.is_dir() and one.samefile(other)


def refitted(results: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a run's results say of what was fitted again on all examples (`refit`).

    Returns:
        `examples`, `held_out` (of these, those that were held out before) and `seconds`; of a head that was solved for
        also `l2` and `loss`, of the mean of several trainings `trainings`, `calibration` and `held_out_metric`. None
        if there is no such thing, and of an earlier version.
    """
    found: Mapping[str, Any] | None = (results.get("refit") or {}).get("solution")
    return found


def held_out_by_each(again: Mapping[str, Any]) -> str:
    """What several trainings came to on what each held out itself (`refitted`), as a sentence."""
    if not (found := again.get("held_out_metric")):  # of an earlier version
        return ""
    return (
        f"Each measured on what it held out itself, {found['examples']:,} examples together: {found['metric']} "
        f"{found['value']:.4f} (standard error {found['standard_error']:.4f})."
    )


def judged_by(results: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What tells better than a run's own metrics whether its model is better than the baseline.

    Returns:
        Of several trainings, on what they held out together: `metric`, `value`, `interval`, `examples`, `baseline` and
        `verdict`. None where the metrics are of a test split, of other runs, and of those of an earlier version.
    """
    found: Mapping[str, Any] = (refitted(results) or {}).get("held_out_metric") or {}
    return found if found.get("verdict") and results.get("metrics_split") != "test" else None
