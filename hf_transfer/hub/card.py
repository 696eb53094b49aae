"""The model card: `README.md`, which every run writes from its results and keys.

The metadata follow huggingface_hub's `ModelCardData`, with metrics in the `model-index`. User-provided text (labels,
dataset names, examples) is escaped, and local paths are left out. The card depends on nothing but the run, so that it
can be written again anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_transfer.config.arguments.model import MAIN
from hf_transfer.data import bundled
from hf_transfer.data.labels import LABELS
from hf_transfer.data.locate import IN_MEMORY
from hf_transfer.data.splits import Data
from hf_transfer.hub import card_average, card_sections
from hf_transfer.hub.card_markdown import EXAMPLE_LENGTH, is_hub_id, loading, plain
from hf_transfer.hub.card_metadata import metadata
from hf_transfer.models import bundled as bundled_models
from hf_transfer.run_folder import CARD, RESULTS, read_results

_DOWNLOAD = "from huggingface_hub import snapshot_download\n\n"

# ---- what a run records for its card -------------------------------------------------------------------------------


def facts(
    values: Mapping[str, Any],
    data: Data,
    base: str | None,
    split: str,
    *,
    model_origin: Mapping[str, Any],
    data_origin: Mapping[str, Any],
) -> dict[str, Any]:
    """What the card needs in addition to the rest of `results.json`.

    Args:
        values: the run's keys.
        data: the splits.
        base: what the model was loaded from (for an adapter, its backbone); None for random weights.
        split: the split that the metrics were computed on.
        model_origin: license and language that the base model's repository states.
        data_origin: license and language that the dataset's repository states.
    """
    dataset = values["dataset_name"] or values["train_file"]
    base_on_hub, bundled_data = hub_name(base), bundled.HUB.get(str(dataset))
    is_hub_dataset = values["dataset_name"] and not _is_local(dataset)
    dataset_on_hub = bundled_data.name if bundled_data else dataset if is_hub_dataset else None
    bundled_base = bundled.HUB.get(str(base)) or bundled.HUB.get(bundled_models.named_by(str(base)) or "")
    held_out, is_text = data.splits[split], values["task"] == "text-classification"
    is_shown = dataset_on_hub or bundled_data or dataset == IN_MEMORY
    return {
        "base_model": base_on_hub,
        "dataset": dataset_on_hub,
        "dataset_shown": str(dataset) if is_shown else Path(str(dataset)).name,
        "license": (bundled_base and bundled_base.license) or model_origin.get("license"),
        "language": (bundled_data and bundled_data.language)
        or data_origin.get("language")
        or model_origin.get("language"),
        "examples": _examples(held_out, data.inputs, values["card_examples"]) if is_text else [],
    }


def shown_data(dataset: Any) -> str:
    """The name of a dataset as a card shows it: of a local one, the last part of its path."""
    return Path(str(dataset)).name if _is_local(dataset) else str(dataset)


def hub_name(model: str | None) -> str | None:
    """The hub id of a model or bundled name; None if it is only a local folder.

    The folder of a run has the hub id of that run's base model.
    """
    if model is None:
        return None
    name = model if model.startswith("bundled:") else bundled_models.named_by(model)
    if name is not None:
        return bundled.HUB[name].name
    if not _is_local(model):
        return model
    try:
        base = json.loads((Path(model).expanduser() / RESULTS).read_text(encoding="utf-8"))["card"]["base_model"]
    except (OSError, ValueError, LookupError, TypeError):  # not the folder of a run
        return None
    return base if isinstance(base, str) else None


def _is_local(name: Any) -> bool:
    return Path(str(name)).expanduser().exists() or not (is_hub_id(str(name)) or re.fullmatch(r"[\w.-]+", str(name)))


def _examples(split: Any, inputs: Sequence[str], most: int) -> list[str]:
    """Up to `most` short texts, each with a different label."""
    if len(inputs) != 1:
        return []
    by_label: dict[str, str] = {}
    for row in split.select(range(min(len(split), 200))).select_columns([inputs[0], LABELS]):
        by_label.setdefault(str(row[LABELS]), plain(row[inputs[0]], EXAMPLE_LENGTH))
        if len(by_label) >= most:
            break
    return list(by_label.values())[:most]


# ---- the card ------------------------------------------------------------------------------------------------------


def write(folder: Path) -> Path:
    """Write the card of the finished run in `folder` atomically."""
    new = folder / f".{CARD}.new"
    new.write_text(text(*read_results(folder)), encoding="utf-8")
    return new.replace(folder / CARD)


def at(hub_model_id: str, revision: str | None) -> str:
    """How a model on a hub is named: `owner/name`, or `owner/name@revision` on another branch than main."""
    return f"{hub_model_id}@{revision}" if revision and revision != MAIN else hub_model_id


def with_id(card: str, hub_model_id: str) -> str:
    """`card` with example code that loads the model from the hub; the owner's other edits are kept.

    Args:
        card: Markdown.
        hub_model_id: see `at`. Plain libraries take a revision in each of their calls, so the code downloads it once.
    """
    name, _, revision = hub_model_id.partition("@")
    line = f'model_id = "{name}"'
    if revision:
        line = f'{_DOWNLOAD}model_id = snapshot_download("{name}", revision={json.dumps(revision)})'
    own = rf'^(?:{re.escape(_DOWNLOAD)})?model_id = (?:"[^"\n]*"|snapshot_download\().*$'
    return re.sub(own, lambda _: line, card, flags=re.MULTILINE)


def text(results: Mapping[str, Any], keys: Mapping[str, Any], merged: bool = False) -> str:
    """The whole card as Markdown.

    Args:
        results: contents of `results.json`.
        keys: contents of `run.yaml`.
        merged: describe the plain model with the adapter merged into it.
    """
    sections = {
        "": card_sections.head(results, merged),
        "Results": card_sections.results_table(results),
        "Averaged weights": card_average.section(results),
        "Transfer": card_sections.transfer(results),
        "How to use": loading(results, keys, merged),
        "Labels": card_sections.labels_table(results),
        "Data": card_sections.data(results, keys),
        "Training": card_sections.training(results, keys),
        "Confusion matrix": card_sections.confusion(results),
        "Training cost": card_sections.cost(results),
        "Limitations": [f"- {line}" for line in card_sections.limitations(results)],
        "Framework versions": [", ".join(f"{name} {v}" for name, v in results["versions"].items() if v) + "."],
    }
    body = ["\n".join([*([f"## {title}"] if title else []), *lines]) for title, lines in sections.items() if lines]
    front = metadata(results, keys, merged).to_yaml(line_break="\n")
    return f"---\n{front}\n---\n\n" + "\n\n".join(body) + "\n"
