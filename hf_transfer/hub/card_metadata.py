"""The metadata of a model card, for the hub and for programs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hf_transfer.hub import card_average
from hf_transfer.hub.card_markdown import EXAMPLE_LENGTH, has_mlp_head, has_pooled_head, is_hub_id, plain
from hf_transfer.hub.card_sections import title

# Hub ids of metrics; other metrics keep their own name.
METRIC_IDS = {
    "f1_macro": "f1",
    "f1_micro": "f1",
    "precision_macro": "precision",
    "recall_macro": "recall",
    "mcc": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}


def metadata(results: Mapping[str, Any], keys: Mapping[str, Any], merged: bool = False) -> ModelCardData:
    """The YAML header of the card; see `hf_transfer.hub.card.text` for the arguments."""
    own, adapter = results["card"], "none" if merged else results["adapter"]
    base = own["base_model"] if is_hub_id(own["base_model"]) or _is_bare(own["base_model"]) else None
    tags = [
        "hf_transfer",
        "transfer-learning",
        results["task"],
        results["strategy"],
        adapter,
        card_average.tag(results),
    ]
    values = {k: v for k, v in results["metrics"].items() if v is not None}
    more: dict[str, Any] = {"base_model_relation": "adapter" if adapter != "none" else "finetune"} if base else {}
    if own["examples"]:
        more["widget"] = [{"text": plain(example, EXAMPLE_LENGTH)} for example in own["examples"]]
    return ModelCardData(
        base_model=base,
        library_name=_library(results, adapter),
        pipeline_tag=results["task"],
        license=own["license"],
        language=own["language"],
        datasets=[own["dataset"]] if is_hub_id(own["dataset"]) or _is_bare(own["dataset"]) else None,
        metrics=list(dict.fromkeys(METRIC_IDS.get(name, name) for name in values if name != "loss")),
        tags=[tag for tag in tags if tag not in (None, "none", "")],
        model_name=title(results),
        eval_results=_evaluations(results, keys, values) or None,
        **more,
    )


def _library(results: Mapping[str, Any], adapter: str) -> str:
    """What loads the model: the hub shows its code next to the card."""
    if has_mlp_head(results) or has_pooled_head(results):
        return "hf_transfer"
    return "transformers" if adapter == "none" else "peft"


def _evaluations(results: Mapping[str, Any], keys: Mapping[str, Any], values: Mapping[str, float]) -> list[EvalResult]:
    """The metrics as entries of the `model-index`."""
    own = results["card"]
    shown = plain(own["dataset_shown"])
    is_on_hub = own["dataset"] == own["dataset_shown"]  # a bundled dataset's test split differs from the hub's
    return [
        EvalResult(
            task_type=results["task"],
            task_name=results["task"].replace("-", " ").capitalize(),
            dataset_type=own["dataset"] if is_on_hub else re.sub(r"[^\w.-]+", "-", shown).strip("-") or "data",
            dataset_name=shown,
            dataset_config=keys.get("dataset_config_name"),
            dataset_split=results["metrics_split"],
            metric_type=METRIC_IDS.get(name, name),
            metric_name=name,
            metric_value=value,
        )
        for name, value in values.items()
    ]


def _is_bare(name: str | None) -> bool:
    """Whether `name` is a hub id without an owner, such as `bert-base-uncased`."""
    return name is not None and re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) is not None
