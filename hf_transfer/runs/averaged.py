"""The folder of a model that was made from the weights of others: as of a run, with a card that says what it is of."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_transfer.evaluation.standing import verdict
from hf_transfer.files import write_json
from hf_transfer.hub import card
from hf_transfer.inference.predictor import Predictor
from hf_transfer.run_folder import EXAMPLES, RESULTS, RUN_FILE, refuse_model
from hf_transfer.runs.calibrating import forget
from hf_transfer.runs.candidates import Candidate, Judge


@dataclass
class Souped:
    """An average that was written.

    Attributes:
        folder: of the model, as of a run.
        results: what its `results.json` holds.
        lines: what there is to say.
    """

    folder: Path
    results: dict[str, Any]
    lines: list[str] = field(default_factory=list)


def new_folder(output_dir: str | Path) -> Path:
    """The folder that an average is written to.

    Raises:
        UserError: it holds a model.
    """
    folder = Path(output_dir)
    refuse_model(folder, "output_dir")
    return folder


def written(
    judge: Judge, first: Candidate, folder: Path, about: dict[str, Any], lines: list[str], split: str | None = None
) -> Souped:
    """Write the model of a judge as a run's folder, with its card where the first run has one.

    Args:
        judge: holds the averaged weights.
        first: whose data, keys and facts the folder takes over.
        folder: of `new_folder`.
        about: what `results.json` says of the average.
        lines: what there is to say so far.
        split: that is measured (default: test where there is one, else validation).
    """
    predictor = judge.predictor
    forget(predictor.model)  # thresholds and scores of other weights
    folder.mkdir(parents=True, exist_ok=True)
    predictor.model.save_pretrained(folder)
    predictor.processor.save_pretrained(folder)
    for name in (RUN_FILE, EXAMPLES):
        if (first.run / name).is_file():
            shutil.copyfile(first.run / name, folder / name)
    again = Predictor.load(folder)
    validation = again.evaluate(split="validation")["metrics"]
    measured = again.evaluate(split=split)
    results, metrics = first.results(), measured["metrics"]
    kept = ("task", "problem_type", "model", "backbone", "strategy", "head", "dataset", "labels", "num_train_examples")
    others = ("pooling", "data_facts", "versions", "seed", "card")
    facts = {name: results[name] for name in (*kept, *others) if name in results}
    baseline = results.get("baseline")
    if baseline is not None:
        name = baseline["compared_by"]
        baseline = {**baseline, "verdict": verdict(name, baseline["metrics"], measured["intervals"])}
    results = {
        **{n: measured[n] for n in ("metrics", "intervals", "metrics_split", "num_examples")},
        "validation_metrics": validation,
        "baseline": baseline,
        **facts,
        "adapter": "none",
        **about,
    }
    write_json(folder / RESULTS, results)
    if "card" in results:  # else the first is a checkpoint of a run that has not finished
        card.write(folder)
    shown = ", ".join(f"{n} {metrics[n]:.4f}" for n in ("loss", judge.metric) if n in metrics)
    lines.append(f"{measured['metrics_split']}: {shown}. Written to {folder}.")
    return Souped(folder, results, lines)
