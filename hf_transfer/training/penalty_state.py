"""What penalties train (a discriminator), in a file of its own in each checkpoint: it is no part of the model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hf_transfer.errors import UserError
from hf_transfer.objectives.objective import Objective

FILE = "penalties.safetensors"


def write(objective: Objective, folder: Path) -> None:
    """Write the file, if a penalty trains anything."""
    if own := objective.named_parameters():
        save_file({name: p.detach().cpu().contiguous().clone() for name, p in own.items()}, folder / FILE)


def restore(objective: Objective, folder: str | Path) -> None:
    """Load the file of a checkpoint, if a penalty trains anything.

    Raises:
        UserError: there is none, or it is that of other penalties.
    """
    own, path = objective.named_parameters(), Path(folder) / FILE
    if not own:
        return
    saved = load_file(path) if path.is_file() else {}
    if {name: p.shape for name, p in own.items()} != {name: tensor.shape for name, tensor in saved.items()}:
        held = "others" if saved else "none"
        raise UserError(
            f"resume_from_checkpoint: the run's penalties have parameters, and {str(folder)!r} has {held}.",
            "Resume with the domain_adaptation keys of the original run.",
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])
