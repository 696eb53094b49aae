"""One model from the weights of several: a soup of runs or checkpoints, or an interpolation with the pretrained model.

A soup (Wortsman et al. 2022, arXiv:2203.05482) is the mean of the weights of models that were fine-tuned from the same
pretrained ones: all of them (uniform), or greedily those that do not make the validation metric worse (their recipe 1).
An interpolation (Wortsman et al. 2022, arXiv:2109.01903, WiSE-FT) goes from the pretrained weights (alpha 0) to the
fine-tuned ones (alpha 1), and gives back part of what fine-tuning forgot.

Everything is chosen on the validation split; the test split is measured once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.config.values import load_yaml
from hf_transfer.errors import UserError
from hf_transfer.evaluation.metric_table import METRIC_TABLE
from hf_transfer.files import say, write_bytes
from hf_transfer.hub.card import shown_data
from hf_transfer.inference.predictor import Predictor
from hf_transfer.layers.identity import identity_of
from hf_transfer.models.averaging import Mean, State, interpolate, moved_statistics
from hf_transfer.report.curve_plot import draw
from hf_transfer.run_folder import INTERPOLATION_PNG, RESULTS, RUN_FILE, read_results
from hf_transfer.runs.averaged import Souped, new_folder, written
from hf_transfer.runs.candidates import Candidate, Judge, candidate_of, candidates_of, differences
from hf_transfer.runs.own_task import OwnTask
from hf_transfer.settings import keys
from hf_transfer.tasks import TASKS

GREEDY, UNIFORM = "greedy", "uniform"
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
TOLERANCE = 0.01  # of the validation metric, that is given up for the old task
_RULE = "the best validation metric; the smallest alpha in a tie"
_RULE_FOR_BOTH = (
    f"the best metric of the old task, among alphas whose validation metric is within {TOLERANCE:g} of the best; the "
    "smallest alpha in a tie"
)


def soup(
    runs: Sequence[str | Path],
    output_dir: str | Path,
    method: str = GREEDY,
    metric: str | None = None,
    talks: bool = False,
    split: str | None = None,
    **changes: Any,
) -> Souped:
    """Average the weights of runs, or of the checkpoints of one run, into a new folder.

    Args:
        runs: folders of runs or checkpoints; of a single run, all its checkpoints.
        output_dir: a folder that holds no model.
        method: greedy or uniform.
        metric: of the validation split, that decides (default: accuracy, f1_micro or rmse, by problem type).
        talks: whether to print what is measured.
        split: that is measured at the end (default: test where there is one, else validation).
        **changes: as of `Predictor.load`.

    Raises:
        UserError: they do not belong together (architecture, labels, backbone, validation split), or `output_dir` holds
            a model.
    """
    folder = new_folder(output_dir)
    if method not in (GREEDY, UNIFORM):
        raise UserError(f"{method!r} is not one of {GREEDY}, {UNIFORM}.", key="method")
    candidates = candidates_of([str(run) for run in runs])
    judge = Judge(candidates[0], metric, **changes)
    judge.check(candidates, split, **changes)

    def load(one: Candidate) -> State:
        return _state(one.load(**changes))

    statistics = moved_statistics(judge.predictor.model, map(load, candidates))
    tell = say if talks else _silent
    tell(f"{judge.metric} on the {len(judge.prepared):,} validation examples of {candidates[0].run}:")
    measured = []
    for one in candidates:
        measured.append(judge.measure(load(one)))
        tell(f"  {one.name}  {measured[-1][judge.metric]:.4f}")
    chosen, state, value = (_greedy if method == GREEDY else _uniform)(judge, candidates, measured, load, statistics)
    best = _best(judge, [m[judge.metric] for m in measured])
    lines = [
        f"{method.capitalize()} soup of {len(chosen)} of {len(candidates)}: {judge.metric} {value:.4f} on validation; "
        f"the best single one, {candidates[best].name}, has {measured[best][judge.metric]:.4f}.",
    ]
    if statistics:
        lines.append(f"BatchNorm: statistics of {len(statistics)} layers were computed anew on training examples.")
    about = {
        "method": method,
        "metric": judge.metric,
        "split": "validation",
        "value": value,
        "best_single": measured[best][judge.metric],
        "recomputed_batchnorm": len(statistics),
        "candidates": [
            {"name": one.name, "chosen": i in chosen, "metrics": measured[i], "adapter": adapter, "keys": own}
            for i, (one, adapter, own) in enumerate(zip(candidates, *differences(candidates), strict=True))
        ],
    }
    judge.put(state, statistics)
    return written(judge, candidates[0], folder, {"soup": about}, lines, split)


def _greedy(
    judge: Judge,
    candidates: Sequence[Candidate],
    measured: Sequence[dict[str, float]],
    load: Callable[[Candidate], State],
    statistics: Sequence[str],
) -> tuple[list[int], State, float]:
    """(numbers of those in the soup, its weights, its validation metric); the best comes first, then each that does
    not make it worse."""
    values = [m[judge.metric] for m in measured]
    order = sorted(range(len(values)), key=lambda i: -values[i] if judge.greater else values[i])
    order = [i for i in order if values[i] == values[i]] or order
    chosen, mean, value = [order[0]], Mean().including(load(candidates[order[0]])), values[order[0]]
    for i in order[1:]:
        tried = mean.including(load(candidates[i]))
        reached = judge.measure(tried.state(), statistics)[judge.metric]
        if judge.better(reached, value, or_equal=True):
            chosen, mean, value = [*chosen, i], tried, reached
    return sorted(chosen), mean.state(), value


def _uniform(
    judge: Judge,
    candidates: Sequence[Candidate],
    measured: Sequence[dict[str, float]],
    load: Callable[[Candidate], State],
    statistics: Sequence[str],
) -> tuple[list[int], State, float]:
    mean = Mean()
    for one in candidates:
        mean = mean.including(load(one))
    return list(range(len(candidates))), mean.state(), judge.measure(mean.state(), statistics)[judge.metric]


def with_pretrained(
    run: str | Path,
    output_dir: str | Path,
    alphas: Sequence[float] = ALPHAS,
    metric: str | None = None,
    talks: bool = False,
    forgetting_dataset_name: str | None = None,
    **changes: Any,
) -> Souped:
    """Interpolate between the weights that a run started from and those that it ended with, into a new folder.

    The alpha with the best validation metric is kept, the smallest in a tie; with data of the old task the one that is
    best there, among those at most `TOLERANCE` worse than the best on validation. A head that was new in the run has no
    pretrained weights and is the fine-tuned one for every alpha.

    Args:
        run: folder of a run or of a checkpoint.
        output_dir: a folder that holds no model.
        alphas: weights of the fine-tuned model, from 0 to 1.
        metric: as of `soup`, like the others.
        talks: likewise.
        forgetting_dataset_name: labeled data of the checkpoint's own task, measured with its own head (default: the
            run's).
        **changes: as of `Predictor.load`.

    Raises:
        UserError: the weights that the run started from are not there or not the same any more, or an alpha is not
            between 0 and 1.
    """
    folder = new_folder(output_dir)
    if not alphas or not all(0 <= alpha <= 1 for alpha in alphas):
        raise UserError(f"{list(alphas)}: expected numbers from 0 to 1.", "Write --alphas 0,0.5,1.", key="alphas")
    one = candidate_of(str(run))
    judge = Judge(one, metric, **changes)
    tuned = _state(one.load(**changes))
    start, fresh = _pretrained(one, judge.predictor, **changes)
    unlike = sorted(n for n, t in start.items() if n not in tuned or tuned[n].shape != t.shape)
    if left := [n for n in unlike if n not in fresh]:
        raise UserError(f"RUN: the run's model has no {left[0]} of the shape that it was pretrained with.")
    start = {n: t for n, t in start.items() if n not in unlike}
    statistics = moved_statistics(judge.predictor.model, ({**tuned, **start}, tuned))
    old = _old_task(one, forgetting_dataset_name, judge, **changes)
    tell, curve = say if talks else _silent, list[dict[str, Any]]()
    tell(f"{judge.metric} on the {len(judge.prepared):,} validation examples of {one.run}:")
    for alpha in sorted(set(alphas)):
        mixed = interpolate(start, tuned, alpha, fresh)
        inner = statistics if 0 < alpha < 1 else ()
        curve.append({"alpha": alpha, "metrics": judge.measure(mixed, inner)})
        line = f"  alpha {alpha:<5g} {curve[-1]['metrics'][judge.metric]:.4f}"
        if old is not None:  # with the statistics that were just computed
            curve[-1]["old_metrics"] = old.measure(judge.predictor.model.state_dict())
            line += f"   old task {old.metric} {curve[-1]['old_metrics'][old.metric]:.4f}"
        tell(line)
    best = _best(judge, [point["metrics"][judge.metric] for point in curve])
    if old is not None:
        best = _best_for_both(judge, old, curve, best)
    alpha, value = curve[best]["alpha"], curve[best]["metrics"][judge.metric]
    judge.put(interpolate(start, tuned, alpha, fresh), statistics if 0 < alpha < 1 else ())
    about = {
        "metric": judge.metric,
        "split": "validation",
        "alpha": alpha,
        "value": value,
        "rule": _RULE if old is None else _RULE_FOR_BOTH,
        "old_task": None if old is None else _about(old),
        "fine_tuned_only": sorted(fresh),
        "recomputed_batchnorm": len(statistics),
        "curve": curve,
    }
    lines = [f"Kept alpha {alpha:g}, {judge.metric} {value:.4f} on validation (0: pretrained, 1: fine-tuned)."]
    done = written(judge, one, folder, {"interpolation": about}, lines)
    series = {f"new task, {judge.metric}": [point["metrics"][judge.metric] for point in curve]}
    if old is not None:
        series[f"old task, {old.metric}"] = [point["old_metrics"][old.metric] for point in curve]
    write_bytes(folder / INTERPOLATION_PNG, draw([p["alpha"] for p in curve], series, "alpha", "metric", mark=alpha))
    return done


def _old_task(one: Candidate, dataset: str | None, judge: Judge, **changes: Any) -> OwnTask | None:
    """The task of the checkpoint that a run started from; None if no data of it is named."""
    values = load_yaml((one.run / RUN_FILE).read_text(encoding="utf-8"))
    dataset = dataset or values.get("forgetting_dataset_name")
    if dataset is None:
        return None
    revision = {"model_revision": values.get("model_revision")}
    old = OwnTask(values["model_name_or_path"], dataset, values.get("max_forgetting_samples"), **changes, **revision)
    old.check(judge.predictor.model)
    return old


def _about(old: OwnTask) -> dict[str, str]:
    return {"dataset": old.dataset, "shown": shown_data(old.dataset), "split": old.split, "metric": old.metric}


def _best_for_both(judge: Judge, old: OwnTask, curve: Sequence[dict[str, Any]], best: int) -> int:
    """Number of the point that is best for the old task, among those almost as good as the best for the new one."""
    limit, greater = curve[best]["metrics"][judge.metric], METRIC_TABLE[old.metric].greater_is_better
    near = [i for i, p in enumerate(curve) if i == best or abs(p["metrics"][judge.metric] - limit) <= TOLERANCE + 1e-12]
    sign = 1 if greater else -1
    return max(near, key=lambda i: (sign * curve[i]["old_metrics"][old.metric], -i))


def _pretrained(one: Candidate, predictor: Predictor, **changes: Any) -> tuple[State, set[str]]:
    """(the state that a run started from, names of what was new in it).

    Raises:
        UserError: it is not what the run started from.
    """
    results, values = read_results(one.run) if (one.run / RESULTS).is_file() else ({}, {})
    digest = (results.get("backbone") or {}).get("weights")
    if not digest:
        raise UserError(
            f"RUN: {one.run.as_posix()!r} does not say which weights it started from.",
            "It is not a finished run, or one of an earlier version, or was trained from scratch.",
        )
    args = ModelArguments(
        **{n: values[n] for n in ModelArguments.__dataclass_fields__ if n in values and n in keys()},
    )
    args.trust_remote_code = bool(changes.get("trust_remote_code"))
    args.allow_pickle = bool(changes.get("allow_pickle"))
    loaded, _ = TASKS[predictor.task.name].load(args, predictor.data, predictor.labels)
    if identity_of(loaded.model, loaded.fresh)["weights"] != digest:
        raise UserError(
            f"RUN: the weights of {args.model_name_or_path!r} are not those that the run started from.",
            "Restore them, or name the revision with model_revision when training.",
        )
    return dict(loaded.model.state_dict()), set(loaded.fresh)


def _state(predictor: Predictor) -> State:
    return dict(predictor.model.state_dict())


def _best(judge: Judge, values: Sequence[float]) -> int:
    """The first of the best values; NaN is never one, unless all are."""
    best = 0
    for i, value in enumerate(values):
        if judge.better(value, values[best]) or (values[best] != values[best] and value == value):
            best = i
    return best


def _silent(text: str = "") -> None:
    """Say nothing."""
