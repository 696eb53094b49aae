"""Which weights a run has kept, among those that it evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_transfer.evaluation.metric_table import LEADING, greater_is_better
from hf_transfer.training.best_metric import best_of, watched
from hf_transfer.training.course import Drop
from hf_transfer.training.early_stopping import ended_by
from hf_transfer.training.trainer import TransferTrainer


def kept(
    trainer: TransferTrainer, problem_type: str, validation: Mapping[str, float], drop: Drop | None
) -> dict[str, Any] | None:
    """Which weights the trained model has.

    Args:
        trainer: has trained.
        problem_type: as in `transformers` configurations.
        validation: metrics of the weights on the validation split.
        drop: how much worse they are than the best ones, if they are.

    Returns:
        `weights` (`last`, `best`, or `solution` for a solved head), their `step` and `epoch`, the `metric` that they
        are judged by, its `value` on the validation split, and `best_step`, `best_epoch` and `best_value` of
        the best evaluation, None without one; `drop`, see `training.course.Drop`; `stopped`, the `step` and `epoch` at
        which `early_stopping_patience` ended the run, None if it did not. None if nothing was trained.
    """
    args, state = trainer.args, trainer.state
    if args.probe_solver == "lbfgs":
        return {"weights": "solution"}
    if not state.global_step:
        return None
    name, greater = watched(args)
    if args.metric_for_best_model is None:  # the loss is nobody's own choice
        name = f"eval_{LEADING[problem_type][0]}"
        greater = bool(greater_is_better(name))
    best = best_of(state.log_history, name, greater)
    is_best = bool(args.load_best_model_at_end and state.best_global_step)
    step = int(state.best_global_step if is_best else state.global_step)
    metric = name.removeprefix("eval_")
    own = (log[name] for log in state.log_history if log["step"] == step and name in log)
    return {
        "weights": "best" if is_best else "last",
        "step": step,
        "epoch": _epoch_of(state, step),
        "metric": metric,
        "is_chosen": args.metric_for_best_model is not None,
        "value": next(own, validation.get(metric)),
        "best_step": best["step"] if best else None,
        "best_epoch": best["epoch"] if best else None,
        "best_value": best[name] if best else None,
        "drop": drop.to_dict() if drop is not None and not is_best else None,
        "stopped": _stopped(trainer),
    }


def _stopped(trainer: TransferTrainer) -> dict[str, Any] | None:
    """Where early stopping ended the run, and the `patience` that it did so with; None if it did not."""
    state, stop = trainer.state, ended_by(trainer.callback_handler.callbacks)
    if stop is None or state.global_step >= state.max_steps:
        return None
    step = int(state.global_step)
    return {"step": step, "epoch": _epoch_of(state, step), "patience": stop.early_stopping_patience}


def _epoch_of(state: Any, step: int) -> float:
    """The epoch in which an evaluation of `step` took place, else the run's own count."""
    return next((log["epoch"] for log in state.log_history if log.get("step") == step and "epoch" in log), state.epoch)
