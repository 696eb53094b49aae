"""Building blocks of a model card: escaped text, tables, and example code."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_transfer.models.heads import MLP, POOLED

MODEL_ID = 'model_id = "."  # this folder, or the hub id of the model'
EXAMPLE_LENGTH = 300  # characters of an example text
_LONGEST = 200  # characters of other user-provided text
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_AUTO = {"text-classification": "AutoModelForSequenceClassification"}


# ---- user-provided text --------------------------------------------------------------------------------------------


def plain(text: Any, longest: int = _LONGEST) -> str:
    """`text` on one line, truncated to `longest` characters, without control and invisible characters."""
    spaced = " ".join(str(text).split())
    kept = "".join(c for c in spaced if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    return kept if len(kept) <= longest else kept[: longest - 1] + "…"


def escape(text: Any, longest: int = _LONGEST) -> str:
    """`text` escaped so that Markdown renders it literally anywhere, including in table cells."""
    shown = re.sub(r"([\\`*_{}\[\]#!|~$^]|:(?=//)|(?<=www)\.)", r"\\\1", plain(text, longest))
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def key_value(value: Any) -> Any:
    """The value of a key as the card shows it: of a path on this machine, its last part."""
    if isinstance(value, bool):
        return str(value).lower()
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def is_hub_id(name: str | None) -> bool:
    """Whether `name` has the form `owner/name`, and can be linked to."""
    return bool(name) and _HUB_ID.fullmatch(str(name)) is not None


def link(name: str | None, shown: str, kind: str = "") -> str:
    """`shown` as a link to `name` on huggingface.co; plain text if `name` is not a hub id."""
    return f"[{escape(shown)}](https://huggingface.co/{kind}{name})" if is_hub_id(name) else escape(shown)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table; cells are Markdown."""
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows),
    ]


# ---- example code --------------------------------------------------------------------------------------------------


def loading(results: Mapping[str, Any], keys: Mapping[str, Any], merged: bool) -> list[str]:
    """Code that loads the model and predicts, without `hf_transfer` where possible."""
    adapter = "none" if merged else results["adapter"]
    if why := _needs_this_package(results, adapter, keys):
        return [
            why,
            "",
            *_code(["from hf_transfer import Predictor", "", MODEL_ID, *_try(results, "Predictor.load(model_id)")]),
        ]
    is_text = results["task"] == "text-classification"
    auto = _AUTO.get(results["task"], "AutoModelForImageClassification")
    names = sorted(
        [auto, "AutoTokenizer" if is_text else "AutoImageProcessor", *([] if adapter == "none" else ["AutoConfig"])]
    )
    lines = ["import torch"] if is_text else ["import torch", "from PIL import Image"]
    if adapter != "none":
        lines.append("from peft import PeftConfig, PeftModel")
    lines += [f"from transformers import {', '.join(names)}", "", MODEL_ID]
    if adapter == "none":
        lines.append(f"model = {auto}.from_pretrained(model_id).eval()")
    else:
        lines += [
            "adapter = PeftConfig.from_pretrained(model_id)",
            "base, revision = adapter.base_model_name_or_path, adapter.revision",
            "config = AutoConfig.from_pretrained(model_id)",
            f"model = {auto}.from_pretrained(",
            "    base, revision=revision, config=config, dtype=torch.float32, ignore_mismatched_sizes=True",
            ")",
            "model = PeftModel.from_pretrained(model, model_id).eval()",
        ]
    lines += _inputs(is_text, keys)
    lines += ["with torch.no_grad():", "    logits = model(**inputs).logits[0]", *_answer(results)]
    return _code(lines)


def _needs_this_package(results: Mapping[str, Any], adapter: Any, keys: Mapping[str, Any]) -> str:
    """Why other libraries cannot load the model; empty if they can."""
    if has_mlp_head(results):
        return (
            "The head of this model is an MLP, which `AutoModelFor…` does not build: plain transformers stops with an "
            "error about the shape of a weight. Loading it requires `hf-transfer-toolkit`; `Predictor.load(model_id)"
            ".model` is the `torch` model."
        )
    if has_pooled_head(results):
        return (
            "The head of this model reads a pooled layer, which `AutoModelFor…` does not build: plain transformers "
            "stops with an error about the shape of a weight. Loading it requires `hf-transfer-toolkit`; "
            "`Predictor.load(model_id).model` is the `torch` model."
        )
    if _is_bottleneck(adapter, keys):
        return "This kind of adapter is not part of peft; loading it requires `hf-transfer-toolkit`."
    return ""


def has_mlp_head(results: Mapping[str, Any]) -> bool:
    """Whether the head is an MLP; runs of earlier versions do not say, and had none."""
    return bool(results.get("head", {}).get("type") == MLP)


def has_pooled_head(results: Mapping[str, Any]) -> bool:
    """Whether the head reads a pooled layer in a way that the architecture does not offer."""
    return bool(results.get("head", {}).get("type") == POOLED)


def _is_bottleneck(adapter: Any, keys: Mapping[str, Any]) -> bool:
    written = keys.get("adapter")
    kind = written.get("peft_type", "") if isinstance(written, Mapping) else written
    return adapter != "none" and "bottleneck" in (str(adapter).lower(), str(kind).lower())


def _inputs(is_text: bool, keys: Mapping[str, Any]) -> list[str]:
    if not is_text:
        return [
            "processor = AutoImageProcessor.from_pretrained(model_id)",
            'inputs = processor(Image.open("photo.jpg").convert("RGB"), return_tensors="pt")',
        ]
    columns = keys.get("text_column_name")
    is_pair = isinstance(columns, list) and len(columns) == 2
    texts = '"first text", "second text"' if is_pair else '"some text"'
    return [
        "tokenizer = AutoTokenizer.from_pretrained(model_id)",
        f'inputs = tokenizer({texts}, truncation=True, return_tensors="pt")',
    ]


def _answer(results: Mapping[str, Any]) -> list[str]:
    if results["problem_type"] == "regression":
        return ["print(logits.item())"]
    activation = "sigmoid()" if results["problem_type"] == "multi_label_classification" else "softmax(-1)"
    return [f"print({{model.config.id2label[i]: p for i, p in enumerate(logits.{activation}.tolist())}})"]


def _try(results: Mapping[str, Any], predictor: str) -> list[str]:
    value = "some text" if results["task"] == "text-classification" else "photo.jpg"
    return [f'print({predictor}.predict("{value}"))']


def _code(lines: Sequence[str]) -> list[str]:
    return ["```python", *lines, "```"]
