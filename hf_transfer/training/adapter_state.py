"""What peft's files leave out of an adapter in training, in a file of its own in each checkpoint.

peft saves what computes the answer: of a prompt behind a network (P-tuning, a projected prefix) what comes out of the
network, of AdaLoRA the ranks within the budget. Training goes on from more, so a checkpoint holds every tensor that
trains under its own name, and AdaLoRA's scores. Such a run is resumed, and its best model loaded, from this file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_transfer.adapters.attach import is_adapted, saved_parameters
from hf_transfer.errors import UserError, listed
from hf_transfer.training import adalora

FILE = "adapter_training.safetensors"
_SCORES = "scores/"


def write(model: Any, trainable: Iterable[str], folder: Path) -> None:
    """Write the file, if peft's files leave something out.

    Args:
        model: in training.
        trainable: names of the parameters that may train.
        folder: of the checkpoint.
    """
    if not is_adapted(model):
        return
    names = set(trainable) | {n for n, p in model.named_parameters() if p.requires_grad}
    if names <= saved_parameters(model) and not adalora.is_adalora(model):
        return
    state = model.state_dict()
    names |= {n for n in state if ".modules_to_save." in n}  # also statistics of BatchNorm
    scores, pattern = adalora.state_of(model)
    tensors = {n: state[n] for n in names} | {f"{_SCORES}{n}": t for n, t in scores.items()}
    tensors = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    save_file(tensors, folder / FILE, metadata={"rank_pattern": json.dumps(pattern)})


def restore(model: Any, folder: str | Path) -> bool:
    """Load the file of a checkpoint into a model with the same adapter; whether there is one.

    Raises:
        UserError: it is that of another adapter.
    """
    path = Path(folder) / FILE
    if not is_adapted(model) or not path.is_file():
        return False
    with safe_open(path, framework="pt") as file:
        pattern = json.loads((file.metadata() or {}).get("rank_pattern", "{}"))
    tensors = load_file(path)
    scores = {n.removeprefix(_SCORES): t for n, t in tensors.items() if n.startswith(_SCORES)}
    own, state = model.state_dict(), {n: t for n, t in tensors.items() if not n.startswith(_SCORES)}
    needed = {n for n, p in model.named_parameters() if p.requires_grad}
    other = sorted(needed - set(state)) + sorted(n for n, t in state.items() if n not in own or own[n].shape != t.shape)
    if other:
        raise UserError(
            f"resume_from_checkpoint: {str(folder)!r} holds another adapter than the run trains ({listed(other, 3)} "
            "differ).",
            "Resume with the adapter keys of the original run.",
        )
    model.load_state_dict(state, strict=False)
    adalora.restore(model, scores, pattern)
    return True
