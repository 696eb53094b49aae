"""Names and readers of the files that a run leaves in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_transfer.config.values import load_yaml

CARD = "README.md"
RESULTS = "results.json"
EXAMPLES = "examples.npz"  # hashes of the examples, see `data.record`; never pushed


def read_results(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(results, keys) of a run."""
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    return results, load_yaml((folder / RUN_FILE).read_text(encoding="utf-8"))


NONFINITE = "nonfinite.jsonl"
RUN_FILE = "run.yaml"
HISTORY = "history.jsonl"
