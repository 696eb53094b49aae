"""Where the best checkpoint of a run is, also after the run was moved or copied, or the checkpoint deleted.

Trainer records its absolute path. After a move the path leads nowhere, and after a copy into another run's folder;
Trainer then keeps the last weights, without a word. Here the step decides: the best checkpoint is the folder of that
step next to the one that is resumed, or in the run's own folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_transfer.training import checkpoints
from hf_transfer.training.best_metric import best_of, watched
from hf_transfer.training.checkpoint_contents import WEIGHTS_ONLY


def settle(state: Any, args: Any, places: Sequence[Path]) -> str:
    """Let the state's best checkpoint be one that is there; what to say if it is not the best evaluation's.

    Args:
        state: `TrainerState`; `best_model_checkpoint` is set, and where the best one is gone, `best_global_step` and
            `best_metric` are those of the best that is left, None without any.
        args: of the trainer.
        places: folders with checkpoints of the run, the first that has one counts.
    """
    step = _best_step(state)
    if step is None:
        state.best_model_checkpoint = None
        return ""
    if not args.load_best_model_at_end:  # nothing loads it; rotation keeps it
        state.best_model_checkpoint = next((str(f) for f in _folders(step, places) if f.is_dir()), None)
        return ""
    here = _usable(step, places)
    if here is not None:
        state.best_model_checkpoint = str(here)
        return ""
    name, greater = watched(args)
    value = "" if state.best_metric is None else f" ({name} {state.best_metric:.4g})"
    gone = f"{PREFIX_CHECKPOINT_DIR}-{step}, the best of the run{value}, is damaged or not there any more"
    logs = [log for log in state.log_history if name in log and _usable(log["step"], places) is not None]
    best = best_of(logs, name, greater)
    if best is None:
        state.best_global_step = state.best_metric = state.best_model_checkpoint = None
        return f"{gone}, and no other checkpoint that was evaluated is left."
    state.best_global_step, state.best_metric = best["step"], best[name]
    state.best_model_checkpoint = str(_usable(best["step"], places))
    return f"{gone}. Of those that are left, {PREFIX_CHECKPOINT_DIR}-{best['step']} is the best ({best[name]:.4g})."


def adopt(state: Any, output_dir: Path, copies: bool) -> None:
    """Let a best checkpoint of another folder be one of the run's own, so that the run does not depend on that folder.

    Args:
        state: with a settled best checkpoint.
        output_dir: of the run.
        copies: whether this process is the one that copies it.
    """
    best = Path(state.best_model_checkpoint)
    own = output_dir / best.name
    if copies and not own.exists():
        with checkpoints.temporary_folder(output_dir) as folder:
            shutil.copytree(best, folder / best.name)
            checkpoints.publish(folder / best.name, own)
    if own.is_dir():
        state.best_model_checkpoint = str(own)


def _best_step(state: Any) -> int | None:
    if state.best_global_step is not None or state.best_model_checkpoint is None:
        return None if state.best_global_step is None else int(state.best_global_step)
    number = Path(state.best_model_checkpoint).name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdigit() else None  # an older Trainer recorded the path alone


def _folders(step: int, places: Sequence[Path]) -> list[Path]:
    return [place / f"{PREFIX_CHECKPOINT_DIR}-{step}" for place in places]


def _usable(step: int, places: Sequence[Path]) -> Path | None:
    """The checkpoint of a step whose weights are whole; None without one."""
    folders = [folder for folder in _folders(step, places) if folder.is_dir()]
    return next((f for f in folders if checkpoints.problem(f) in (None, WEIGHTS_ONLY)), None)
