"""`refit`: a head that was solved for is solved for again on all labels, once the validation split is measured.

A validation split that was drawn from the training data has done its work when the head of the other examples has been
measured on it. With few labels it is a fifth of them, which the saved head need not do without. What was measured on
that split stays: the metrics, the temperature, offsets, thresholds and scores of prediction sets are those of the first
head, whose logits the saved one's resemble, and the examples are recorded as trained on. The name is scikit-learn's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hf_transfer.errors import UserError
from hf_transfer.evaluation.calibration import Calibration
from hf_transfer.evaluation.logit_adjustment import LogitAdjustment
from hf_transfer.runs.calibrating import OFF, Choice
from hf_transfer.runs.prepare import Prepared
from hf_transfer.runs.saving import save_model
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
        UserError: `refit: true`, and there is nothing to solve for again, or nothing to add.
    """
    wanted = trainer.args.refit
    if wanted is False:
        return OFF
    why, fix = _why_not(prepared, trainer)
    if wanted is True and why:
        raise UserError(f"true is not possible: {why}.", fix, KEY)
    if not why and wanted == "auto" and is_one_of_several:
        why = "runs that are compared need the validation split"
    trainer.solves_again = not why
    return Choice(not why, why)


def _why_not(prepared: Prepared, trainer: TransferTrainer) -> tuple[str, str]:
    """(why a head is not solved for again, as part of a sentence, what to do instead); empty if it can be."""
    data, values = prepared.data, prepared.config.values
    if trainer.args.probe_solver != "lbfgs":
        return "the head is not solved for", "Remove it, or use strategy: linear-probe with probe_solver: lbfgs."
    if data.drawn_from is None:
        return "the validation split is the data's own", "Remove it, or put those examples into the training split."
    most, total = values[_LIMIT], len(data.train) + len(data.validation)
    if most is not None and total > most:
        return (
            f"{total:,} examples with those held out would be more than {_LIMIT}: {most:,}",
            f"Remove it, or {_LIMIT}.",
        )
    return "", ""


def line(choice: Choice, prepared: Prepared, trainer: TransferTrainer) -> str:
    """What a run says before it trains; empty where no head is solved for."""
    if trainer.args.probe_solver != "lbfgs" or trainer.args.refit is False:
        return ""
    if not choice.value:
        return f"refit: off: {choice.why}"
    train, held_out = len(prepared.data.train), len(prepared.data.validation)
    return (
        f"refit: on: measured on the {held_out:,} validation examples, the head is solved for again on all "
        f"{train + held_out:,}"
    )


def refit(
    trainer: TransferTrainer,
    validation: Any,
    output_dir: Path,
    calibration: Calibration | None,
    adjustment: LogitAdjustment | None,
) -> Refit:
    """Solve for the head again, change its logits as those of the first head were, and save the model.

    Args:
        trainer: has solved for the first head.
        validation: the prepared examples that were held out.
        output_dir: of the run.
        calibration: of the first head, if it was calibrated.
        adjustment: of its logits, if they were adjusted.
    """
    done, layer = solve_again(trainer, validation), find_head(trainer)
    with torch.no_grad():
        if calibration is not None:
            for parameter in layer.parameters():
                parameter.div_(calibration.temperature)
        if adjustment is not None and adjustment.strength:
            layer.bias.add_(torch.tensor(adjustment.offsets).to(layer.bias))
    save_model(trainer, output_dir)
    return done


def results_of(choice: Choice, done: Refit | None) -> dict[str, Any]:
    """For `results.json`: what `refit` came to, and the second solution; None without one."""
    return {**choice.to_dict(), "solution": done.to_dict() if done else None}
