"""`refit` of a run that fine-tunes: the mean of the weights of several trainings, each of which holds out others.

On few examples, trainings that see them in another order and hold out another part differ by points of accuracy. They
begin with the same weights and stay near them, so that the mean of their weights is a model too, and about as accurate
as their vote (Wortsman et al. 2022, arXiv:2203.05482, section 3; of votes, Breiman 1996). The mean is calibrated on the
answers of each to what it held out itself: on the examples of all folds together, not of one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import concatenate_datasets
from torch import nn
from transformers import PrinterCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_transfer.data.labels import LABELS, SINGLE_LABEL
from hf_transfer.evaluation import conformal, metrics
from hf_transfer.evaluation.calibration import Calibration, fit_temperature
from hf_transfer.evaluation.logit_adjustment import LogitAdjustment
from hf_transfer.evaluation.metric_table import LEADING, greater_is_better
from hf_transfer.evaluation.noise import contributions, difference_error
from hf_transfer.evaluation.scores import all_finite
from hf_transfer.evaluation.standing import verdict
from hf_transfer.evaluation.thresholds import logits_of
from hf_transfer.features.budget import available_memory
from hf_transfer.features.cross_validation import fold_numbers, strata
from hf_transfer.files import say
from hf_transfer.layers.frozen import running_statistics
from hf_transfer.models.averaging import Mean, State
from hf_transfer.runs.adjusting import put
from hf_transfer.runs.calibrating import divide, expected_loss
from hf_transfer.runs.decisions import with_decisions
from hf_transfer.runs.prepare import Prepared, make_trainer
from hf_transfer.runs.solvable import has_adapter
from hf_transfer.training.course import BEYOND_CHANCE
from hf_transfer.training.trainer import TransferTrainer

TRAININGS = 5  # at most, the first included: with a fifth held out, each example is held out by one of them
ENOUGH = 100  # answers, from which their likelihood decides the temperature
_COPIES = 8  # times the model's bytes: three states of it, and two sums in float64
_ALONE = (  # keys of what ends a training, or of other weights or data, which would be another one each time
    "load_best_model_at_end",
    "early_stopping_patience",
    "max_hours",
    "max_usd",
    "ema_decay",
    "replay_dataset_name",
    "ewc_dataset_name",
    "teacher_model_name_or_path",
)
_QUIET = {
    "eval_strategy": IntervalStrategy.NO,
    "save_strategy": SaveStrategy.NO,
    "logging_strategy": IntervalStrategy.NO,
    "report_to": [],
    "save_on_signal": False,  # a checkpoint of one of these would be taken for one of the run
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class Trained:
    """The trainings whose weights were averaged.

    Attributes:
        examples: number of all that some training saw.
        held_out: number of those that the first one held out.
        trainings: number of them.
        calibration: of the mean; None without `calibrate`.
        seconds: of all but the first.
        held_out_metric: that runs of this kind are judged by (`metric`), each training measured on what it held out
            itself: `value` on `examples` together, its `standard_error` and 95% `interval`, the constant `baseline`
            on the same examples, and the `verdict` (`evaluation.standing`).
    """

    examples: int
    held_out: int
    trainings: int
    calibration: Calibration | None
    seconds: float
    held_out_metric: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """For `results.json`."""
        return asdict(self)


def why_not(prepared: Prepared) -> str:
    """Why several trainings of a run cannot be averaged, as part of a sentence; empty if they can be."""
    config, model = prepared.config, prepared.loaded.model
    args, values = config.training, config.values
    named = next((f"{name}: {values[name]}" for name in _ALONE if values[name] not in (None, False)), "")
    reasons = (
        (has_adapter(prepared), "the mean of adapters is not the adapter of the mean"),
        (args.world_size > 1 or args.fsdp or args.deepspeed, "it is built for one process"),
        (prepared.task.mixes or config.data.streaming, "it is built for texts that are read as a whole"),
        (running_statistics(model), "the model has BatchNorm, whose running statistics have no mean"),
        (prepared.target is not None, "a target has no labels to hold out"),
        (named, f"{named} is for one training"),
        (values["split_group_column_name"], "parts that are held out later would divide groups"),
        (_lacks_memory(args, model), "the weights of several trainings do not fit the memory that is free"),
    )
    return next((why for holds, why in reasons if holds), "")


def _lacks_memory(args: Any, model: Any) -> bool:
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return args.device.type == "cpu" and _COPIES * size > available_memory() / 2


def are_wanted(args: Any) -> bool:
    """Whether a run is asked to train several times; it may still be that it cannot."""
    return args.refit is True and args.probe_solver != "lbfgs"


def beginning(trainer: TransferTrainer) -> State:
    """A copy of the weights before training."""
    return _state(trainer.model)


def _state(model: nn.Module) -> State:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}


def train_again(
    prepared: Prepared,
    trainer: TransferTrainer,
    splits: dict[str, Any],
    start: State,
    calibration: Calibration | None,
    adjustment: LogitAdjustment | None,
    talks: bool,
) -> Trained | None:
    """Train as often as there are parts to hold out, and give the trainer's model the mean of the weights.

    Args:
        prepared: the run.
        trainer: has trained, been calibrated and adjusted.
        splits: prepared examples by split.
        start: of `beginning`.
        calibration: of the first training; None without `calibrate`.
        adjustment: of its logits, which the others get too.
        talks: whether each is announced.

    Returns:
        None if the mean is worse than the first training on the validation split, by more than chance, or a training
        has diverged: the model then has the weights of the first.
    """
    began, model, problem_type = time.perf_counter(), trainer.model, prepared.loaded.labels.problem_type
    every = concatenate_datasets([splits["train"], splits["validation"]])
    first, own = _state(model), trainer.predict(splits["validation"])
    _undo(trainer, calibration, adjustment)
    mean, answers = Mean().including(_state(model)), [trainer.predict(splits["validation"])]
    parts = list(_parts(splits["train"], len(splits["validation"]), problem_type, prepared.config.split_seed))
    for number, apart in enumerate(parts, start=2):
        since = time.perf_counter()
        model.load_state_dict(start)
        kept = np.setdiff1d(np.arange(len(every)), apart)
        again = _trainer(prepared, every.select(kept), every.select(apart), number)
        again.train()
        mean = mean.including(_state(model))
        answers.append(again.predict(every.select(apart)))
        if talks:
            took = time.perf_counter() - since
            say(f"refit: training {number} of {len(parts) + 1}, which holds out {len(apart)} others ({took:.0f} s)")
    model.load_state_dict(mean.state())
    logits = np.concatenate([logits_of(one.predictions) for one in answers])
    labels = np.concatenate([one.label_ids for one in answers])
    fitted = _redo(trainer, logits, labels, calibration, adjustment) if all_finite(logits) else None
    if not all_finite(logits) or _is_worse(problem_type, trainer.predict(splits["validation"]), own):
        model.load_state_dict(first)
        return None
    logits = logits / (fitted.temperature if fitted else 1.0)
    if adjustment is not None and adjustment.strength:
        logits = logits + np.array(adjustment.offsets)
    if problem_type == SINGLE_LABEL:
        setattr(model.config, conformal.ENTRY, conformal.record_of(logits, labels))
    metric = _together(problem_type, len(prepared.loaded.labels.names), splits["train"][LABELS], logits, labels)
    seconds, count = time.perf_counter() - began, len(splits["validation"])
    return Trained(len(every), count, len(parts) + 1, fitted, seconds, metric)


def _undo(trainer: TransferTrainer, calibration: Calibration | None, adjustment: LogitAdjustment | None) -> None:
    """Give the first training's logits back what it was trained to."""
    if adjustment is not None:
        put(trainer, adjustment, times=-1)
    if calibration is not None:
        divide(trainer, 1 / calibration.temperature)


def _redo(
    trainer: TransferTrainer,
    logits: Any,
    labels: Any,
    calibration: Calibration | None,
    adjustment: LogitAdjustment | None,
) -> Calibration | None:
    """Calibrate the mean, and adjust its logits as the first training's were.

    A mean of weights is less sure than each of them. So the loss that is expected of a training is too high for it, and
    counts only where there are few answers; see `docs/calibration.md`.
    """
    loss = expected_loss(trainer) if len(labels) < ENOUGH else None
    fitted = None if calibration is None else fit_temperature(logits, labels, loss)
    if fitted is not None:
        divide(trainer, fitted.temperature)
    if adjustment is not None:
        put(trainer, adjustment)
    return fitted


def more(prepared: Prepared) -> int:
    """Number of trainings after the first: as many as there are further parts of its validation split's size."""
    return min(TRAININGS - 1, _folds(prepared.data.train, len(prepared.data.validation)))


def held_out(prepared: Prepared) -> int:
    """Number of examples that some training holds out."""
    count, own = len(prepared.data.train), len(prepared.data.validation)
    return own + count * more(prepared) // _folds(prepared.data.train, own)


def _folds(train: Any, size: int) -> int:
    return max(2, round(len(train) / size))


def _parts(train: Any, size: int, problem_type: str, seed: int) -> Iterator[Any]:
    """Numbers of training examples that each further training holds out: about as many as the first, and others."""
    folds = _folds(train, size)
    numbers = fold_numbers(strata(problem_type, torch.as_tensor(np.asarray(train[LABELS]))), folds, seed)
    for fold in range(min(folds, TRAININGS - 1)):
        yield np.flatnonzero(numbers == fold)


def _trainer(prepared: Prepared, train: Any, held_out: Any, number: int) -> TransferTrainer:
    """A trainer of the same plan with other random numbers, which says nothing and saves nothing."""
    args = prepared.config.training
    seeds = {"seed": args.seed + number, "data_seed": prepared.config.split_seed + number}
    config = with_decisions(prepared.config, _QUIET, seeds)
    config = replace(config, given=config.given | {"logging_steps"})  # it was decided for the first
    again = make_trainer(replace(prepared, config=config), train, held_out)
    again.shows_plan = False
    for callback in (DEFAULT_PROGRESS_CALLBACK, ProgressCallback, PrinterCallback):
        again.remove_callback(callback)
    again.boundary.decide()
    return again


def _together(problem_type: str, outputs: int, train: Any, logits: Any, labels: Any) -> dict[str, Any]:
    """`Trained.held_out_metric` of answers."""
    measured = contributions(problem_type, logits, labels)
    error = float(measured.std(ddof=1)) / math.sqrt(len(measured))
    metric, intervals = LEADING[problem_type][0], metrics.intervals(problem_type, logits, labels)
    constant = metrics.baseline(problem_type, np.asarray(train), labels, outputs)
    return {
        "metric": metric,
        "value": float(measured.mean()),
        "standard_error": error,
        "examples": len(measured),
        "interval": intervals.get(metric),
        "baseline": constant.get(metric),
        "verdict": verdict(metric, constant, intervals),
    }


def _is_worse(problem_type: str, prediction: Any, before: Any) -> bool:
    """Whether a prediction is worse than another one, of the same examples, by more than chance."""
    now, other = (
        contributions(problem_type, logits_of(one.predictions), one.label_ids) for one in (prediction, before)
    )
    sign = 1 if greater_is_better(LEADING[problem_type][0]) else -1
    return bool(sign * (other.mean() - now.mean()) > BEYOND_CHANCE * difference_error(now, other))
