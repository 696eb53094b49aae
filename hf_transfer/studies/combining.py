"""One answer from all runs of a comparison: a soup of their weights, or the mean of their probabilities.

Judged on the validation split alone. The test split is for the row that is chosen, and not measured here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit, log_softmax, logit, logsumexp

from hf_transfer.data.labels import LABELS, MULTI_LABEL, REGRESSION
from hf_transfer.data.record import content_of
from hf_transfer.errors import UserError, nearest
from hf_transfer.evaluation import metrics
from hf_transfer.evaluation.metric_table import METRIC_TABLE
from hf_transfer.inference.predictor import Predictor
from hf_transfer.run_folder import RESULTS
from hf_transfer.runs.soup import soup

SOUP, ENSEMBLE = "soup", "ensemble"
WAYS = (SOUP, ENSEMBLE)
OBJECT = "in memory"  # in place of data that is no name


def check_combine(way: str | None, seeds: Sequence[int], given: Mapping[str, Any]) -> None:
    """Raises:
    UserError: there is no such way, or the runs would not have the same validation split.
    """
    if way is None:
        return
    if way not in WAYS:
        raise UserError(f"{way!r} is not one of {', '.join(WAYS)}.{nearest(way, WAYS)}", key="combine")
    if OBJECT in given.values():
        raise UserError(
            "runs are loaded again to be combined, and then their data must have a name.",
            "Save the data to a file and give its name.",
            key="combine",
        )
    if len(seeds) > 1 and given.get("data_seed") is None and given.get("validation_file") is None:
        raise UserError(
            "runs are combined on one validation split, and without data_seed every seed may draw its own.",
            "Give data_seed, for example 0, or validation_file.",
            key="combine",
        )


def combine(way: str, folders: Sequence[Path], output_dir: Path, metric: str) -> dict[str, Any]:
    """Combine finished runs; what came of it, for JSON.

    Args:
        way: soup: the greedy one of `runs.soup`, written to `output_dir`; ensemble: the mean of all probabilities.
        folders: of the runs.
        output_dir: of the soup.
        metric: of the validation split.

    Raises:
        UserError: the runs do not belong together: architecture, labels or validation split differ.
    """
    if len(folders) < 2:
        raise UserError(f"{len(folders)} finished run cannot be combined.", key="combine")
    return (_soup if way == SOUP else _ensemble)(folders, output_dir, metric)


def _soup(folders: Sequence[Path], output_dir: Path, metric: str) -> dict[str, Any]:
    place = output_dir / SOUP
    names = [folder.as_posix() for folder in folders]
    found = json.loads((place / RESULTS).read_text(encoding="utf-8")) if (place / RESULTS).is_file() else None
    if found is None or [one["name"] for one in found["soup"]["candidates"]] != names:
        shutil.rmtree(place, ignore_errors=True)  # of other runs
        found = soup(folders, place, metric=metric, split="validation").results
    about = found["soup"]
    chosen = [one["name"] for one in about["candidates"] if one["chosen"]]
    kept = {name: about[name] for name in ("metric", "value", "best_single")}
    return {"way": SOUP, "folder": str(place), "runs": len(folders), "chosen": chosen, **kept}


def _ensemble(folders: Sequence[Path], output_dir: Path, metric: str) -> dict[str, Any]:
    first = Predictor.load(folders[0])
    held_out = first._held_out(None, "validation")
    kind, labels = first.labels.problem_type, np.array(held_out.examples[LABELS][:])
    content, outputs = content_of(held_out.examples, held_out.inputs), list[Any]()
    for folder in folders:
        one = Predictor.load(folder)
        own = one._held_out(None, "validation")
        if one.labels != first.labels or not np.array_equal(content_of(own.examples, own.inputs), content):
            raise UserError(
                f"{folder.as_posix()!r} has other labels or another validation split than {folders[0].as_posix()!r}.",
                "Vary nothing that changes the data, and give data_seed.",
                key="combine",
            )
        outputs.append(one._logits_of(own.examples, own.inputs))
    singles = [metrics.compute(kind, one, labels)[metric] for one in outputs]
    value = metrics.compute(kind, mean_answer(kind, outputs), labels)[metric]
    best: Callable[[Sequence[float]], float] = max if METRIC_TABLE[metric].greater_is_better else min
    return {"way": ENSEMBLE, "runs": len(folders), "metric": metric, "value": value, "best_single": best(singles)}


def mean_answer(kind: str, outputs: Sequence[Any]) -> Any:
    """Logits of the mean of probabilities; of regression the mean of values.

    Args:
        kind: problem type.
        outputs: (examples, outputs) logits of each model.
    """
    stacked = np.stack(outputs).astype(float)
    if kind == REGRESSION:
        return stacked.mean(0)
    if kind == MULTI_LABEL:
        return logit(expit(stacked).mean(0))
    return logsumexp(log_softmax(stacked, -1), axis=0) - np.log(len(outputs))
