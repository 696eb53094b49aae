"""What several files here need: a small table, a small model, and a saved model as others load it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from tests.helpers import tiny_bert
from tests.runs.test_preflight import words_tokenizer


def sentences(path: Path, count: int = 44) -> str:
    """A table of sentences of which a word says the class, at any place but the first."""
    words = [f"{'a ' * (i % 3)}film {i % 5} {'fine' if i % 2 else 'dull'}" for i in range(count)]
    path.write_text("\n".join(["text,label", *(f"{w},{'xy'[i % 2]}" for i, w in enumerate(words))]) + "\n")
    return str(path)


def three_layers(folder: Path) -> str:
    """A random BERT that reads them, without a head."""
    tiny_bert(layers=3).base_model.save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return str(folder)


def plain_logits(folder: object, texts: Sequence[str], base: str | None = None) -> torch.Tensor:
    """(texts, classes), as plain transformers loads the folder, or plain peft on the backbone `base`."""
    options = {"config": AutoConfig.from_pretrained(folder), "ignore_mismatched_sizes": True}
    model = AutoModelForSequenceClassification.from_pretrained(base or folder, **(options if base else {}))
    model = PeftModel.from_pretrained(model, folder) if base else model
    batch = AutoTokenizer.from_pretrained(folder)(list(texts), padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits
