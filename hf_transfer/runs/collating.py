"""How a run's training examples become batches, and whether they are the same in each epoch."""

from __future__ import annotations

from typing import Any

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.augment import Augmentation, Chance, Mixed
from hf_transfer.data.labels import Labels
from hf_transfer.errors import UserError
from hf_transfer.tasks.base import Task


def collator(task: Task, processor: Any, args: DataArguments, labels: Labels, chance: Chance) -> Any:
    """The task's collator, with mixup and cutmix.

    Raises:
        UserError: a key does not apply to the task's inputs.
    """
    plain = task.collator(processor)
    images_only = {"augmentation": "none", "random_erasing": None, "mixup_alpha": 0.0, "cutmix_alpha": 0.0}
    wanted = [k for k, nothing in images_only.items() if getattr(args, k) not in (nothing, 0.0)]
    if wanted and not task.mixes:
        raise UserError(
            f"it applies to images only, and the task is {task.name}.", f"Remove {wanted[0]}.", key=wanted[0]
        )
    if args.token_masking and task.mixes:
        raise UserError("it applies to texts only, and the data contains images.", "Remove it.", key="token_masking")
    needs_mixing = Mixed.wanted(args) or Augmentation.wanted(args)  # it also drops the numbers of the examples
    return Mixed(plain, args, labels, chance) if needs_mixing else plain


def live_changes(args: DataArguments) -> list[str]:
    """Why training examples differ between epochs."""
    reasons = []
    if Mixed.wanted(args):
        reasons.append("mixup and cutmix blend other images in each epoch")
    elif Augmentation.wanted(args) and args.augmented_views is None:
        reasons.append("each epoch augments images anew; augmented_views: 4 keeps four views of each")
    if args.token_masking:
        reasons.append("token_masking masks other tokens in each epoch")
    return reasons
