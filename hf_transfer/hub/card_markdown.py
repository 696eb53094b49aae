"""The parts of a model card: text from users made harmless, tables, and code that loads the model."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MODEL_ID = 'model_id = "."  # this folder, or the id that it is pushed under'
_LONGEST = 200  # characters of a name or an example
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_AUTO = {"text-classification": "AutoModelForSequenceClassification"}


# ---- text from users -----------------------------------------------------------------------------------------------


def plain(text: Any, longest: int = _LONGEST) -> str:
    """`text` on one line, without characters that control or hide, and not too long."""
    spaced = " ".join(str(text).split())
    kept = "".join(c for c in spaced if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    return kept if len(kept) <= longest else kept[: longest - 1] + "…"


def escape(text: Any, longest: int = _LONGEST) -> str:
    """`text` as it is, wherever it stands in Markdown: no markup, no HTML, no link, no end of a table's cell."""
    shown = re.sub(r"([\\`*_{}\[\]#!|~$^]|:(?=//)|(?<=www)\.)", r"\\\1", plain(text, longest))
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def is_hub_id(name: str | None) -> bool:
    """Whether it can be linked to and named in a card's metadata."""
    return bool(name) and _HUB_ID.fullmatch(str(name)) is not None


def link(name: str | None, shown: str, kind: str = "") -> str:
    """`shown` as a link to what huggingface.co has under `name`; plain where it has nothing."""
    return f"[{escape(shown)}](https://huggingface.co/{kind}{name})" if is_hub_id(name) else escape(shown)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table. Cells are Markdown already."""
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows),
    ]


# ---- how to load ---------------------------------------------------------------------------------------------------


def loading(results: Mapping[str, Any], keys: Mapping[str, Any], merged: bool) -> list[str]:
    """What a stranger copies to get an answer, with plain libraries."""
    adapter = "none" if merged else results["adapter"]
    if _is_bottleneck(adapter, keys):
        return [
            "Adapters of this kind are no part of peft: it loads where `hf-transfer-toolkit` is installed.",
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
            "base = PeftConfig.from_pretrained(model_id).base_model_name_or_path",
            "config = AutoConfig.from_pretrained(model_id)",
            f"model = {auto}.from_pretrained(",
            "    base, config=config, dtype=torch.float32, ignore_mismatched_sizes=True",
            ")",
            "model = PeftModel.from_pretrained(model, model_id).eval()",
        ]
    lines += _inputs(is_text, keys)
    lines += ["with torch.no_grad():", "    logits = model(**inputs).logits[0]", *_answer(results)]
    return _code(lines)


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
    texts = '"a text", "and its other half"' if isinstance(columns, list) and len(columns) == 2 else '"a text"'
    return [
        "tokenizer = AutoTokenizer.from_pretrained(model_id)",
        f'inputs = tokenizer({texts}, truncation=True, return_tensors="pt")',
    ]


def _answer(results: Mapping[str, Any]) -> list[str]:
    if results["problem_type"] == "regression":
        return ["print(logits.item())"]
    turn = "sigmoid()" if results["problem_type"] == "multi_label_classification" else "softmax(-1)"
    return [f"print({{model.config.id2label[i]: p for i, p in enumerate(logits.{turn}.tolist())}})"]


def _try(results: Mapping[str, Any], predictor: str) -> list[str]:
    what = "a text" if results["task"] == "text-classification" else "photo.jpg"
    return [f'print({predictor}.predict("{what}"))']


def _code(lines: Sequence[str]) -> list[str]:
    return ["```python", *lines, "```"]
