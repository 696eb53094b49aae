"""Names and readers of the files that a run leaves in its folder."""

from __future__ import annotations

import json
import re
from itertools import count
from pathlib import Path
from typing import Any

from hf_transfer.config.values import load_yaml

CARD = "README.md"
RESULTS = "results.json"
PASSED = ".stream"  # while a stream trains: what it gave, see `data.stream_record`
LABEL_ISSUES = "label_issues.csv"  # labels that look wrong; holds training examples, never pushed
ERRORS = "errors.csv"  # wrong answers on the split that was measured; holds examples, never pushed
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


def read_results(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(results, keys) of a run."""
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    return results, load_yaml((folder / RUN_FILE).read_text(encoding="utf-8"))


NONFINITE = "nonfinite.jsonl"
RUN_FILE = "run.yaml"
HISTORY = "history.jsonl"
# Files of a model, as patterns: of an adapter, of a whole model, of its tokenizer or image processor.
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "config.json")
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
