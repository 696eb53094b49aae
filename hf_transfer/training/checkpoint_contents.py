"""What a checkpoint holds: whether a run can be resumed from it, and whether its weights are those of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from hf_transfer.adapters.attach import is_adapted, peft_type
from hf_transfer.errors import UserError, listed

WEIGHTS_ONLY = "it holds no optimizer (save_only_model: true writes weights only)"
_SHARDS = "global_step*"  # DeepSpeed keeps everything there
# By part, in the layouts of Trainer, FSDP and DeepSpeed; and the file to name where none of them is there.
_WEIGHTS = ("model.safetensors*", "pytorch_model*", "adapter_model.*", "*/adapter_model.*", _SHARDS)
_OPTIMIZER = (OPTIMIZER_NAME, "optimizer.bin", "optimizer_*", _SHARDS)
_REST = {
    SCHEDULER_NAME: (SCHEDULER_NAME, _SHARDS),
    "rng_state.pth": ("rng_state*.pth",),
    TRAINER_STATE_NAME: (TRAINER_STATE_NAME,),
}


def missing(folder: Path) -> str | None:
    """Which part a checkpoint lacks that resuming needs; `WEIGHTS_ONLY` if it was never meant for that, else None."""
    if not _has(folder, _WEIGHTS):
        return "it holds no weights"
    if not _has(folder, _OPTIMIZER):
        return WEIGHTS_ONLY
    return next((f"{name} is missing" for name, patterns in _REST.items() if not _has(folder, patterns)), None)


def is_weights_only(folder: Path) -> bool:
    """Whether a checkpoint holds weights and no optimizer."""
    return missing(folder) == WEIGHTS_ONLY


def _has(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(any(folder.glob(pattern)) for pattern in patterns)


# ---- weights -------------------------------------------------------------------------------------------------------


def check_adapter(folder: Path, model: nn.Module) -> None:
    """Check that a checkpoint holds exactly the tensors that the adapter of a model saves, in their shapes.

    peft loads what fits and leaves the rest as it is, with a warning.

    Raises:
        UserError: tensors are missing, unexpected, or of another shape; with their names.
    """
    path = folder / ADAPTER_SAFE_WEIGHTS_NAME
    if not is_adapted(model) or not path.is_file():
        return
    state: Mapping[str, Any] = get_peft_model_state_dict(model, save_embedding_layers=False)
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    with safe_open(path, framework="pt") as file:
        held = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if peft_type(model) == "ADALORA":  # its ranks shrink while it trains
        wanted, held = dict.fromkeys(wanted, ()), dict.fromkeys(held, ())
    refuse_misfit(
        folder,
        missing=[n for n in wanted if n not in held],
        # peft adds embeddings whose size was changed
        unexpected=[n for n in held if n not in wanted and "embed" not in n],
        reshaped=[f"{n} {held[n]} instead of {wanted[n]}" for n in wanted if n in held and held[n] != wanted[n]],
    )


def refuse_misfit(folder: Path, missing: list[str], unexpected: list[str], reshaped: list[str]) -> None:
    """Raises:
    UserError: one of the lists of tensor names is not empty.
    """
    lists = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    told = [f"{what}: {listed(sorted(names), 3)}" for what, names in lists.items() if names]
    if told:
        raise UserError(
            f"resume_from_checkpoint: the weights in {str(folder)!r} are not those of this model ({'; '.join(told)}).",
            "Resume with the model and the keys of the run that wrote them.",
        )
