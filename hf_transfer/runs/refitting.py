"""`refit`: once the validation split is measured, it is trained on too.

A head that was solved for is solved for again on all labels; a model that was fine-tuned becomes the mean of several
trainings (`trainings`). A validation split that was drawn from the training data has done its work when the first fit
has been measured on it. With few labels it is a fifth of them, which the saved model need not do without. What was
measured on that split stays: the metrics, the temperature, offsets, thresholds and scores of prediction sets are those
of the first fit, whose logits the saved one's resemble, and the examples are recorded as trained on. The name is
scikit-learn's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hf_transfer.analysis.pace import Pace, in_time
from hf_transfer.errors import UserError
from hf_transfer.evaluation.calibration import HELD_OUT, Calibration
from hf_transfer.evaluation.logit_adjustment import LogitAdjustment
from hf_transfer.models.averaging import State
from hf_transfer.runs import trainings
from hf_transfer.runs.calibrating import OFF, Choice
from hf_transfer.runs.prepare import Prepared
from hf_transfer.runs.saving import save_model
from hf_transfer.runs.trainings import Trained
from hf_transfer.training.console import is_silent
from hf_transfer.training.linear_probe import Refit, find_head, solve_again
from hf_transfer.training.trainer import TransferTrainer

KEY = "refit"
_LIMIT = "max_train_samples"


def choose(prepared: Prepared, trainer: TransferTrainer, is_one_of_several: bool = False) -> Choice:
    """What `refit` comes to for a trainer that has not trained yet, which is told.

    Args:
        prepared: the run.
        trainer: made for it.
        is_one_of_several: whether the run is compared with others on the validation split, and may be combined with
            them by it.

    Raises:
        UserError: `refit: true`, and there is nothing to fit again, or nothing to add.
    """
    wanted, solves = trainer.args.refit, trainer.args.probe_solver == "lbfgs"
    if wanted is False:
        return OFF
    is_given = wanted is True and KEY not in prepared.chosen.keys
    why, fix = _why_not(prepared)
    if is_given and why:
        raise UserError(f"true is not possible: {why}.", fix, KEY)
    if not why and is_one_of_several and not is_given:
        why = "runs that are compared need the validation split"
    if not why and wanted == "auto" and not solves:
        why = "the head is not solved for"
    trainer.solves_again = solves and not why
    return Choice(not why, why)


def _why_not(prepared: Prepared) -> tuple[str, str]:
    """(why nothing is fitted again, as part of a sentence, what to do instead); empty if something is."""
    if why := nothing_to_add(prepared):
        return why, f"Remove it, {_LIMIT}, or the validation split, so that one is drawn from the training data."
    if prepared.config.training.probe_solver != "lbfgs" and (why := trainings.why_not(prepared)):
        return why, "Remove it."
    return "", ""


def nothing_to_add(prepared: Prepared) -> str:
    """Why the validation examples cannot be trained on too, as part of a sentence; empty if they can be."""
    data, most = prepared.data, prepared.config.values[_LIMIT]
    if data.drawn_from is None:
        return "the validation split is the data's own"
    total = len(data.train) + len(data.validation)
    if most is not None and total > most:
        return f"{total:,} examples with those held out would be more than {_LIMIT}: {most:,}"
    return ""


def calibrates_on(choice: Choice, prepared: Prepared, trainer: TransferTrainer) -> int | None:
    """Number of examples that the saved model will be calibrated on; None for those of the validation split."""
    return trainings.held_out(prepared) if choice.value and trainings.are_wanted(trainer.args) else None


def line(choice: Choice, prepared: Prepared, trainer: TransferTrainer, pace: Pace | None = None) -> str:
    """What a run says before it trains; empty where nothing would be fitted again.

    Args:
        choice: what `refit` came to.
        prepared: the run.
        trainer: made for it.
        pace: of its training, where that was measured.
    """
    solves = trainer.args.probe_solver == "lbfgs"
    if trainer.args.refit is False or (not solves and KEY not in prepared.chosen.keys and not choice.value):
        return ""
    if not choice.value:
        return f"refit: off: {choice.why}"
    train, held_out = len(prepared.data.train), len(prepared.data.validation)
    if solves:
        return (
            f"refit: on: measured on the {held_out:,} validation examples, the head is solved for again on all "
            f"{train + held_out:,}"
        )
    more = trainings.more(prepared)
    takes = "" if pace is None else f" (about {in_time(more * pace.seconds)})"
    return (
        f"refit: on: after the {held_out:,} validation examples are measured, {more} more trainings{takes} hold out "
        "others, and the mean of the weights is saved"
    )


def refit(
    prepared: Prepared,
    trainer: TransferTrainer,
    splits: dict[str, Any],
    start: State | None,
    calibration: Calibration | None,
    adjustment: LogitAdjustment | None,
) -> Refit | Trained | None:
    """Fit again, change the logits as those of the first fit were, and save the model.

    Args:
        prepared: the run.
        trainer: has solved for the first head, or trained.
        splits: prepared examples by split.
        start: the weights before training; None if the head was solved for.
        calibration: of the first fit, if it was calibrated.
        adjustment: of its logits, if they were adjusted.

    Returns:
        None if the mean of several trainings was worse, and the first one is kept.
    """
    folder = Path(str(prepared.config.training.output_dir))
    if start is not None:
        talks = trainer.is_world_process_zero() and not is_silent(trainer.args)
        done: Refit | Trained | None = trainings.train_again(
            prepared, trainer, splits, start, calibration, adjustment, talks
        )
    else:
        done = _solve_again(trainer, splits["validation"], calibration, adjustment)
    save_model(trainer, folder)
    return done


def _solve_again(
    trainer: TransferTrainer, validation: Any, calibration: Calibration | None, adjustment: LogitAdjustment | None
) -> Refit:
    done, layer = solve_again(trainer, validation), find_head(trainer)
    with torch.no_grad():
        if calibration is not None:
            for parameter in layer.parameters():
                parameter.div_(calibration.temperature)
        if adjustment is not None and adjustment.strength:
            layer.bias.add_(torch.tensor(adjustment.offsets).to(layer.bias))
    return done


def calibrated(first: Calibration | None, done: Refit | Trained | None) -> Calibration | None:
    """How a model was calibrated after its first fit, or after the second."""
    return done.calibration if isinstance(done, Trained) else first


def calibration_of(first: Calibration | None, done: Refit | Trained | None) -> dict[str, Any] | None:
    """For `results.json`: how the saved model was calibrated, and on which examples."""
    own = calibrated(first, done)
    split = HELD_OUT if isinstance(done, Trained) else "validation"
    return None if own is None else {**own.to_dict(), "split": split}


def results_of(choice: Choice, done: Refit | Trained | None) -> dict[str, Any]:
    """For `results.json`: what `refit` came to, and the second fit; None without one."""
    return {**choice.to_dict(), "solution": done.to_dict() if done else None}
