"""The tensors of an adapter: read without pickle, and put into a model only if every one of them has its place."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from hf_transfer.errors import UserError, listed, one_line, option
from hf_transfer.layers.wrappers import core_of, plain_name

SAFE, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
_KEY = "model_name_or_path"
_PREFIX = "base_model.model."


def read(place: str, allow_pickle: bool) -> dict[str, torch.Tensor]:
    """The tensors by the names that they have in the file.

    Args:
        place: folder of the adapter.
        allow_pickle: whether a pickle may be read; code in it is never run.

    Raises:
        UserError: there are none, or they cannot be read, or only from a pickle.
    """
    path = Path(place) / SAFE
    if path.is_file():
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{SAFE} of {place!r} cannot be read ({one_line(error)}).", key=_KEY) from error
    path = Path(place) / PICKLED
    if not path.is_file():
        raise UserError(f"the adapter in {place!r} has no {SAFE}.", "Restore the file.", key=_KEY)
    if not allow_pickle:
        raise UserError(
            f"the adapter in {place!r} has its weights in a pickle ({PICKLED}), a format that can run code when it is "
            "read.",
            f"Save it as {SAFE}; or, if you trust its source, {option('allow_pickle', True)} loads it.",
            key=_KEY,
        )
    return _unpickled(path, place)


def _unpickled(path: Path, place: str) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, ValueError, EOFError, AttributeError) as error:
        raise UserError(
            f"{PICKLED} of {place!r} holds more than tensors, or is damaged, and is not read.",
            f"Save the adapter as {SAFE}.",
            key=_KEY,
        ) from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise UserError(f"{PICKLED} of {place!r} holds no named tensors.", f"Save the adapter as {SAFE}.", key=_KEY)
    return state


def check_whole(model: nn.Module, config: PeftConfig, state: Collection[str], place: str) -> None:
    """Check that the file has every parameter of the modules that are saved whole (the head).

    Args:
        model: the backbone.
        config: of the adapter.
        state: names in the file.
        place: for the message.

    Raises:
        UserError: it lacks some, with their names.
    """
    wanted = tuple(getattr(config, "modules_to_save", None) or ())
    inside = [n for n, m in model.named_modules() if any(n == w or n.endswith(f".{w}") for w in wanted) and n]
    names = dict.fromkeys(n for n in model.state_dict() if any(n.startswith(f"{i}.") for i in inside))
    prefix = "base_model." if config.is_prompt_learning else _PREFIX
    lacking = [name for name in names if f"{prefix}{name}" not in state]
    if config.is_prompt_learning and "prompt_embeddings" not in state:
        lacking.append("prompt_embeddings")
    if lacking:
        raise _unfit(place, lacks=lacking)


def put(model: PeftModel, state: dict[str, torch.Tensor], place: str, head: Collection[str]) -> None:
    """Put an adapter's tensors into a model, all of them and into all of its adapter.

    Args:
        model: with a new adapter.
        state: what `read` gave.
        place: for the message.
        head: plain names of parameters that may have another shape than in the file, and then stay as they are.

    Raises:
        UserError: tensors are missing, unexpected or have another shape, with their names.
    """
    result = set_peft_model_state_dict(model, state, ignore_mismatched_sizes=True)
    prefix, own, absent = core_of(model)[0], model.state_dict(), set(result.missing_keys)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    saved = _storages(expected.values())
    filled = _storages(tensor for name, tensor in own.items() if name not in absent)
    lacks, reshaped = [], []
    for name in absent:
        storage = own[name].untyped_storage()._cdata
        # A prompt is loaded apart, see `check_whole`; several layers may share a tensor.
        if storage not in saved or storage in filled or name.startswith("prompt_encoder."):
            continue
        in_file = name.replace(".modules_to_save.default.", ".").replace(".default", "")
        if in_file not in state:
            lacks.append(in_file.removeprefix(_PREFIX))
        elif plain_name(name, prefix) not in head:
            shapes = f"{tuple(state[in_file].shape)} instead of {tuple(own[name].shape)}"
            reshaped.append(f"{in_file.removeprefix(_PREFIX)} {shapes}")
    # peft itself writes some names twice (`bias: all`).
    more = [name for name in result.unexpected_keys if name.replace(".default", "") not in expected]
    if lacks or reshaped or more:
        raise _unfit(place, lacks, [name.removeprefix(_PREFIX) for name in more], reshaped)


def _storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def _unfit(
    place: str, lacks: Collection[str] = (), more: Collection[str] = (), reshaped: Collection[str] = ()
) -> UserError:
    """The error for tensors that do not fit the model."""
    said = {"it lacks": lacks, "the model has no": more, "of another shape:": reshaped}
    what = [f"{words} {listed(sorted(names), 3)}" for words, names in said.items() if names]
    return UserError(
        f"the adapter in {place!r} does not fit its adapter_config.json and its backbone: {'; '.join(what)}.",
        "Restore the file that was saved with this adapter_config.json, and the backbone that it names.",
        key=_KEY,
    )
