"""Folders of runs that nobody trained: files as a run writes them, from made-up logits and the real functions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import Dataset

from hf_transfer.data.images import data_url
from hf_transfer.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL, Labels
from hf_transfer.data.splits import ROW
from hf_transfer.evaluation import metrics
from hf_transfer.evaluation.by_class import most_confused, named, per_class
from hf_transfer.evaluation.calibration import fit_temperature
from hf_transfer.evaluation.diagnostics import Change, diagnose
from hf_transfer.evaluation.scores import all_finite
from hf_transfer.evaluation.standing import against_baseline
from hf_transfer.files import write_json
from hf_transfer.inference.reviewing import errors_csv, errors_frame
from hf_transfer.runs.mistakes import SIDE, SMALL_SIDE

GROUPS = ("embeddings", *(f"layer.{i}" for i in range(6)), "head")


def write_run(
    folder: Path,
    problem_type: str = SINGLE_LABEL,
    names: Sequence[str] = ("negative", "positive"),
    examples: int = 120,
    has_pictures: bool = False,
    texts: Sequence[str] = (),
    split: str = "test",
) -> Path:
    """A folder with everything but a model.

    Args:
        folder: is made.
        problem_type: as in `transformers` configurations.
        names: of the classes.
        examples: that were measured on.
        has_pictures: whether inputs are images.
        texts: inputs, in turns; made up if there are none.
        split: that was measured on.
    """
    rng, size = np.random.default_rng(0), len(names)
    if problem_type == REGRESSION:
        labels = rng.normal(size=examples)
        logits = (labels + rng.normal(scale=0.4, size=examples))[:, None]
    elif problem_type == MULTI_LABEL:
        labels = (rng.random((examples, size)) < 0.3).astype(np.float64)
        logits = 3 * labels - 1.5 + rng.normal(scale=1.2, size=(examples, size))
    else:
        labels = rng.integers(size, size=examples)
        logits = rng.normal(scale=1.4, size=(examples, size))
        logits[np.arange(examples), labels] += 3.5
        logits[np.arange(examples), (labels + 1) % size] += 1.0  # the next class is confused most
    folder.mkdir(parents=True)
    results = _results(problem_type, names, logits, labels, split, has_pictures)
    write_json(folder / "results.json", results)
    (folder / "run.yaml").write_text(yaml.safe_dump({"output_dir": str(folder), "model_name_or_path": "acme/tiny"}))
    (folder / "history.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in _history(problem_type)))
    given = [texts[i % len(texts)] if texts else f"a made-up text, number {i}" for i in range(examples)]
    cells = [{"path": f"pictures/{i}.png", "bytes": None} for i in range(examples)] if has_pictures else given
    data = Dataset.from_dict({"input": cells, ROW: list(range(examples))})
    frame, positions = errors_frame(data, ["input"], Labels(problem_type, tuple(names)), logits, labels, ())
    (folder / "errors.csv").write_text(errors_csv(frame))
    pixels = rng.integers(256, size=(200, 160, 3), dtype=np.uint8)
    shown = data_url(pixels, SIDE) if has_pictures else None
    near = {"place": "data.csv line 7", "label": names[0], "cosine": 0.87}
    near |= {"picture": data_url(pixels, SMALL_SIDE)} if has_pictures else {"text": given[0]}
    entries = [{"picture": shown, "nearest": [near] * 3 if problem_type != REGRESSION else []} for _ in positions[:24]]
    write_json(folder / "mistakes.json", entries)
    if problem_type != REGRESSION:
        lines = [f"data.csv line {i},wrong,{names[0]},{names[-1]},0.04,0.09,{json.dumps(given[i])}" for i in range(9)]
        (folder / "label_issues.csv").write_text(
            "\n".join(["place,verdict,given,suggested,probability,score,text", *lines])
        )
    return folder


def _results(
    problem_type: str, names: Sequence[str], logits: Any, labels: Any, split: str, has_pictures: bool
) -> dict[str, Any]:
    is_class, count = problem_type != REGRESSION, len(labels)
    temperature = fit_temperature(logits[: count // 2], labels[: count // 2]) if is_class else None
    saved = logits / temperature.temperature if temperature else logits
    change = Change(temperature.temperature) if temperature else None
    assert all_finite(saved)
    values = {"loss": 0.42, **metrics.compute(problem_type, saved, labels)}
    intervals = {name: [value - 0.05, value + 0.05] for name, value in values.items() if name != "loss"}
    confusion = metrics.confusion(problem_type, saved, labels, 0.0)
    rates = {name: 1e-4 * 0.8 ** (len(GROUPS) - i) for i, name in enumerate(GROUPS)}
    plan = [
        {"name": "head", "epochs": 1.0, "groups": ["head"], "trainable_parameters": 770,
         "learning_rates": {"head": 1e-3}},
        {"name": "all groups", "epochs": 2.0, "groups": list(GROUPS), "trainable_parameters": 9000,
         "learning_rates": rates},
    ]  # fmt: skip
    cached = {"kept": "memory", "at": "layer.5", "bytes": 2_400_000, "record_seconds": 1.4, "expected_gain": 6.1,
              "step_gain": 7.0, "measured_gain": 5.2, "largest_difference": 0.0}  # fmt: skip
    ran = {"loss": 0.5, "metrics": {"eval_accuracy": 0.8, "eval_loss": 0.5}, "best_step": None}
    stages = [
        {"name": "head", "start": 0, "steps": 20, "seconds": 3.0, **ran, "cache": cached},
        {"name": "all groups", "start": 20, "steps": 40, "seconds": 30.0, **ran,
         "cache": {"kept": "off", "why": "embeddings, the input layer, trains"}},
    ]  # fmt: skip
    classes = dict.fromkeys(names, 12) if is_class else {}
    facts = {"examples": count, "examined": count, "classes": classes, "values": [],
             "sizes": {"characters": [4, 9, 30, 80]}, "duplicates": {"exact": 1, "near": 2},
             "conflicts": 1}  # fmt: skip
    train = labels if is_class else labels.astype(float)
    return {
        "metrics": values,
        "metrics_split": split,
        "validation_metrics": values,
        "intervals": intervals,
        "baseline": against_baseline(problem_type, names, train, labels, values, intervals),
        "per_class": named(names, per_class(problem_type, saved, labels)),
        "confusion": confusion,
        "diagnostics": diagnose(problem_type, names, saved, labels, change),
        "confusions": [{"true": names[i], "predicted": names[j], "count": n} for i, j, n in most_confused(confusion)]
        if problem_type == SINGLE_LABEL
        else [],
        "kept": {"weights": "last", "step": 60, "epoch": 3.0, "metric": "accuracy", "value": 0.8, "best_step": 60,
                 "best_epoch": 3.0, "best_value": 0.8, "drop": None, "stopped": None},
        "calibrate": {"value": is_class, "why": "" if is_class else "a regression has no probabilities"},
        "calibration": {**temperature.to_dict(), "split": "validation"} if temperature else None,
        "logit_adjustment": None,
        "task": "image-classification" if has_pictures else "text-classification",
        "problem_type": problem_type,
        "model": "acme/tiny",
        "backbone": {"architecture": "BertForSequenceClassification", "commit": "0123abc", "revision": "main"},
        "strategy": "two-phase",
        "adapter": "none",
        "head": {"type": "linear"},
        "dataset": "data.csv",
        "labels": list(names),
        "num_train_examples": 240,
        "plan": plan,
        "layer_groups": list(GROUPS),
        "stages": stages,
        "train_seconds": 33.0,
        "time_budget": None,
        "train_samples_per_second": 21.0,
        "trainable_parameters": 9000,
        "total_parameters": 9000,
        "seed": 42,
        "versions": {"python": "3.11", "torch": "2.14"},
        "device": "cpu (1 threads)",
        "cost": {"device_hours": 0.01, "usd": 0.02},
        "auto": {"strategy": {"value": "two-phase", "why": "240 training examples"}},
        "data_facts": {"splits": {"train": facts, split: facts}, "leaks": [], "bad": [], "dropped": {},
                       "group_leaks": [], "cut": [0.02, 128], "decided": ["Columns: input 'text'."], "pixels": None,
                       "misfits": [], "seconds": 0.1, "imbalance": 1.0},
        "label_issues": {"wrong": 9, "doubtful": 0, "judged": 240},
        "card": {"examples": []},
    }  # fmt: skip


def _history(problem_type: str) -> list[dict[str, Any]]:
    lines = []
    for step in range(5, 65, 5):
        stage = int(step > 20)
        decayed = 1 - step / 64
        rates = {name: 1e-4 * 0.8 ** (7 - i) * decayed if stage else 0.0 for i, name in enumerate(GROUPS)}
        rates["head"] = 1e-3 * decayed
        lines.append({"step": step, "loss": 1 / step + 0.2, "learning_rate": rates, "stage": stage, "epoch": step / 20,
                      "samples_per_second": 20.0, "memory_bytes": 1.5e9})  # fmt: skip
        if step % 20 == 0:
            metric = "eval_rmse" if problem_type == REGRESSION else "eval_accuracy"
            lines.append({"step": step, "eval_loss": 1 / step + 0.3, metric: 0.6 + step / 300, "stage": stage})
    return lines
