"""Labels that were flipped on purpose: how many are found, and next to what cleanlab says of the same probabilities.

    python benchmarks/label_issues.py [--quick] [--again] [--table]

A tenth of the labels of a small training set is flipped to another class, at random, in five draws. AUROC: the
probability that a flipped label has a lower score than a right one. Finished cells are kept; writes
benchmarks/results/label_issues.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
TEXT, IMAGE = ("bundled:minilm-l6", {}), ("bundled:efficientnet-lite0", {"image_size": 64})
# name: (dataset, examples per class, (model, keys))
SETS = {
    "Rotten Tomatoes, 64 per class": ("bundled:rotten-tomatoes", 64, TEXT),
    "digits, 40 per class": ("bundled:digits", 40, IMAGE),
    "Fashion-MNIST, 40 per class": ("bundled:fashion-mnist", 40, IMAGE),
}
NOISE = 0.1
DRAWS = 5
METHODS = ("self_confidence", "normalized_margin", "confidence_weighted_entropy")


def drawn(data: Any, per_class: int, seed: int) -> Any:
    chance, labels = np.random.default_rng(seed), np.array(data["label"])
    rows = [chance.permutation(np.flatnonzero(labels == c))[:per_class] for c in np.unique(labels)]
    return data.select(chance.permutation(np.concatenate(rows)))


def flip(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(labels of which some are another class, whether each one is)"""
    chance, classes, wrong = np.random.default_rng(1000 + seed), labels.max() + 1, np.zeros(len(labels), bool)
    wrong[chance.permutation(len(labels))[: round(NOISE * len(labels))]] = True
    return np.where(wrong, (labels + chance.integers(1, classes, len(labels))) % classes, labels), wrong


def cell(name: str, seed: int) -> dict[str, Any]:
    """What is found in one draw."""
    import torch
    from cleanlab.rank import get_label_quality_scores
    from datasets import DatasetDict
    from sklearn.metrics import roc_auc_score

    from hf_transfer.analysis.label_issues import judge, judge_features
    from hf_transfer.analysis.out_of_fold import out_of_fold
    from hf_transfer.data.bundled import load_dataset
    from hf_transfer.runs.frozen import frozen_splits

    data, per_class, (model, keys) = SETS[name]
    examples = drawn(load_dataset(data)["train"], per_class, seed)
    splits = DatasetDict(train=examples, validation=examples.select(range(8)))
    began = time.perf_counter()
    features = frozen_splits(model, splits, use_cpu=True, log_level="error", report_to="none", **keys)["train"]
    seconds = {"features": time.perf_counter() - began}
    given, wrong = flip(np.array(examples["label"]), seed)
    labels, began = torch.from_numpy(given), time.perf_counter()
    found, layers = judge_features(features, labels, seed)
    seconds["judging"] = time.perf_counter() - began
    first = features.matrix("last", "cls") if "cls" in features.poolings else features.matrix("head")

    def auroc(scores: Any) -> float:
        return float(roc_auc_score(wrong, -scores))

    def averaged(*matrices: Any, **keys: Any) -> np.ndarray:
        return np.mean([out_of_fold(x, labels, seed=seed, **keys).probabilities for x in matrices], axis=0)

    ours = [features.matrix(layer, None if layer == "head" else "mean") for layer in layers]
    probabilities = {"same": averaged(*ours), "default": averaged(first, repeats=1)}
    named = {
        kind: [i.row for i in found.issues if i.looks_wrong == (kind == "wrong")] for kind in ("wrong", "doubtful")
    }
    return {
        "layers": layers,
        "agreement": found.agreement,
        "auroc": auroc(found.scores),
        "auroc_default_features": auroc(judge([first], labels, seed).scores),
        **{
            f"auroc_cleanlab_{kind}_{method}": auroc(get_label_quality_scores(given, p, method=method))
            for kind, p in probabilities.items()
            for method in METHODS
        },
        **{kind: len(rows) for kind, rows in named.items()},
        **{f"{kind}_right": int(wrong[rows].sum()) for kind, rows in named.items()},
        "flipped": int(wrong.sum()),
        "seconds": seconds,
    }


def page(cells: dict[str, dict[str, Any]]) -> str:
    lines = [
        "# Labels that were flipped on purpose",
        "",
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, one thread, `benchmarks/label_issues.py`.",
        f"{NOISE:.0%} of the labels are flipped to another class; means over draws. AUROC of the score for the flipped",
        "labels: ours; cleanlab's default score (self-confidence) on the same probabilities; that score on those of",
        "default features: the first token's, or the head's input where there is none.",
        "",
        "| data | draws | held-out accuracy | ours | cleanlab, same probabilities | cleanlab, default features "
        "| looks wrong: named, of them flipped | doubtful: named, of them flipped | flipped |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in SETS:
        own = [found for key, found in cells.items() if key.rpartition(" #")[0] == name]
        if own:
            mean = {k: float(np.mean([c[k] for c in own])) for k in own[0] if isinstance(own[0][k], int | float)}
            lines.append(
                f"| {name} | {len(own)} | {mean['agreement']:.0%} | {mean['auroc']:.3f} "
                f"| {mean['auroc_cleanlab_same_self_confidence']:.3f} "
                f"| {mean['auroc_cleanlab_default_self_confidence']:.3f} "
                f"| {mean['wrong']:.1f}, {mean['wrong_right']:.1f} "
                f"| {mean['doubtful']:.1f}, {mean['doubtful_right']:.1f} | {mean['flipped']:.1f} |"
            )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one draw of each set; nothing is written")
    parser.add_argument("--again", action="store_true", help="measure what is there already")
    parser.add_argument("--table", action="store_true", help="only write the page")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    from hf_transfer.errors import UserError

    path = RESULTS / "label_issues.json"
    cells = json.loads(path.read_text()) if path.is_file() and not options.quick and not options.again else {}
    for name in SETS if not options.table else ():
        for seed in range(1 if options.quick else DRAWS):
            key = f"{name} #{seed}"
            if key in cells:
                continue
            try:
                cells[key] = cell(name, seed)
            except UserError as error:
                print(f"{name}: left out, {error}")
                break
            print(key, json.dumps(cells[key]), flush=True)
            if not options.quick:
                path.write_text(json.dumps(cells, indent=1) + "\n")
    print(page(cells))
    if not options.quick:
        path.with_suffix(".md").write_text(page(cells))


if __name__ == "__main__":
    main()
