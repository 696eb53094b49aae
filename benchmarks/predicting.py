"""`predict` against a bare loop: the same model and texts, sorted by length, in batches of the same size.

    python benchmarks/predicting.py [--quick] [--examples 2048] [--repeats 7] [--batch_size 32]

The bare loop is what one writes by hand: tokenize all texts, sort them by length, pad a batch, `model(**batch)` under
`torch.inference_mode`, softmax, and the best class of each text, back in order. `predict` sorts within windows of 50
batches, and answers with the probability of every class. A third side does not sort. They take turns in one process,
each beginning a round equally often, after a round that is not counted. The labels of both must be the same. Writes
benchmarks/results/predicting.json and .md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers.timing import report

from hf_transfer import Predictor, fine_tune
from hf_transfer.data import bundled

DATA, WITHIN = "bundled:rotten-tomatoes", 1.05
BARE, OURS, UNSORTED = "bare loop, sorted", "`predict`", "bare loop, not sorted"


def bare(predictor: Predictor, texts: list[str], is_sorted: bool) -> list[str]:
    """The label of each text."""
    model, tokenizer, size = predictor.model.eval(), predictor.processor, predictor.batch_size
    encoded = tokenizer(texts, truncation=True)
    order = list(range(len(texts)))
    if is_sorted:
        order.sort(key=lambda i: -len(encoded["input_ids"][i]))
    labels = [""] * len(texts)
    with torch.inference_mode():
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            batch = tokenizer.pad({k: [v[i] for i in rows] for k, v in encoded.items()}, return_tensors="pt")
            scores = model(**batch.to(model.device)).logits.softmax(-1)
            for row, best in zip(rows, scores.argmax(-1).tolist(), strict=True):
                labels[row] = predictor.labels.names[best]
    return labels


def trained(folder: str, batch_size: int) -> Predictor:
    """A model with a head; how good it is does not matter."""
    keys: dict[str, Any] = {
        "strategy": "linear-probe",
        "max_train_samples": 64,
        "max_eval_samples": 16,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "label_issues": False,
        "preflight": False,
        "log_level": "error",
    }
    fine_tune("bundled:minilm-l6", DATA, output_dir=str(Path(folder) / "out"), **keys)
    return Predictor.load(Path(folder) / "out", per_device_eval_batch_size=batch_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--examples", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="few texts, nothing is written")
    options = parser.parse_args()
    if options.quick:
        options.examples, options.repeats = 128, 3
    with tempfile.TemporaryDirectory() as folder:
        predictor = trained(folder, options.batch_size)
    texts = bundled.load_dataset(DATA)["train"]["text"][: options.examples]
    sides: dict[str, Callable[[], list[str]]] = {
        BARE: lambda: bare(predictor, texts, is_sorted=True),
        OURS: lambda: [answer["label"] for answer in predictor.predict(texts)],
        UNSORTED: lambda: bare(predictor, texts, is_sorted=False),
    }
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(options.repeats + 1):
        names = list(sides)
        turn = number % len(names)
        labels = {}
        for name in names[turn:] + names[:turn]:
            began = time.perf_counter()
            labels[name] = sides[name]()
            if number:
                taken[name].append(time.perf_counter() - began)
        if differ := sum(a != b for a, b in zip(labels[BARE], labels[OURS], strict=True)):
            raise SystemExit(f"The labels of {differ} texts differ.")
    ratio = statistics.median(o / b for o, b in zip(taken[OURS], taken[BARE], strict=True))
    said = "reached" if ratio <= WITHIN else "missed"
    device = predictor.model.device.type
    about = (
        f"{{on}}; all-MiniLM-L6-v2 on {device}, {torch.get_num_threads()} threads, {len(texts):,} reviews, batches of "
        f"{options.batch_size}, {options.repeats} rounds. `predict` takes {ratio:.3f} of the time of the sorted loop "
        f"(median of the rounds; within {WITHIN - 1:.0%}: {said})."
    )
    report("predicting", "`predict` against a bare loop", about, taken, writes=not options.quick, ratio=ratio)


if __name__ == "__main__":
    main()
