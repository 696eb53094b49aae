"""Digests of Python objects: data, and functions and objects of packages whose code is known by their version."""

from __future__ import annotations

import enum
import inspect
import json
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_utils import RemoveColumnsCollator

from hf_transfer.layers.hashing import Undecidable, hasher, key, tensor_digest, tensor_kind

# The code of these is known: by their version or, for this package, by a hash. Of other functions nobody knows what
# code they call.
_TRUSTED_PACKAGES = {
    "hf_transfer", "torch", "transformers", "timm", "datasets", "torchvision", "PIL", "tokenizers", "numpy", "builtins",
    "functools", "collections", "operator",
}  # fmt: skip


def collator_digest(collate: Any) -> str | None:
    """Of a collator: what it holds or, for a function of another package, its source; None if neither says it all."""
    if isinstance(collate, RemoveColumnsCollator):
        inner = collator_digest(collate.data_collator)
        if inner is None:
            return None
        return key({"collator": inner, "columns": repr(sorted(collate.signature_columns or ()))})
    try:
        return object_digest(collate)
    except Undecidable:
        if not inspect.isfunction(collate) or collate.__closure__ or collate.__defaults__ or collate.__kwdefaults__:
            return None
    try:
        return key({"name": f"{collate.__module__}.{collate.__qualname__}", "source": inspect.getsource(collate)})
    except (OSError, TypeError):
        return None


def object_digest(value: Any) -> str:
    """Of numbers, texts, arrays and containers, and of functions and objects of trusted packages by what they hold.

    Raises:
        Undecidable: for anything else.
    """
    digest = hasher()
    _walk(value, digest.update, ())
    return str(digest.hexdigest())


def _walk(value: Any, update: Any, parents: tuple[int, ...]) -> None:
    """Pass a value to `update`: its type, then its parts, each within brackets."""
    if id(value) in parents:
        raise Undecidable("a cycle")
    within = (*parents, id(value))
    update(f"<{type(value).__module__}.{type(value).__qualname__} ".encode())
    content = _content(value)
    if isinstance(content, bytes):
        update(f"{len(content)} ".encode())
        update(content)
    else:
        for part in content:
            _walk(part, update, within)
    update(b">")


def _content(value: Any) -> Any:
    """A value as bytes, or as a list of simpler values."""
    if value is None or isinstance(value, bool | int | float | complex | str | torch.dtype | torch.device | slice):
        return repr(value).encode()
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, enum.Enum):
        return [value.name, _trusted_name(type(value))]
    if isinstance(value, Path):
        return str(value).encode()
    if isinstance(value, np.dtype):
        return str(value).encode()
    if isinstance(value, torch.Tensor):
        return f"{tensor_kind(value)} {tensor_digest(value)}".encode()
    if isinstance(value, np.ndarray | np.generic):
        return _array_bytes(np.asarray(value))
    if isinstance(value, Mapping):
        pairs = sorted(((k, v) for k, v in value.items()), key=lambda pair: repr(pair[0]))
        return [_trusted_name(type(value)), *pairs]
    if isinstance(value, list | tuple):
        if type(value) in (list, tuple) and {type(part) for part in value} <= {int, float, bool, str}:
            return repr(value).encode()
        return [_trusted_name(type(value)), *value]
    if isinstance(value, set | frozenset):
        return sorted(object_digest(one) for one in value)
    return _code(value) if _is_code(value) else _state(value)


def _array_bytes(value: Any) -> bytes:
    if value.dtype.hasobject:
        raise Undecidable(value.dtype)
    return f"{value.dtype.str} {value.shape} ".encode() + np.ascontiguousarray(value).tobytes()


def _is_code(value: Any) -> bool:
    kinds = (partial, types.FunctionType, types.MethodType, types.BuiltinFunctionType, type)
    return isinstance(value, kinds)


def _code(value: Any) -> list[Any]:
    """What a function or class is known by, and what it holds."""
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, types.FunctionType):
        if value.__name__ == "<lambda>":
            raise Undecidable(value)
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [_trusted_name(value), cells, value.__defaults__, value.__kwdefaults__]
    return [_trusted_name(value)]


def _trusted_name(value: Any) -> str:
    """Qualified name of a class or function of a trusted package.

    Raises:
        Undecidable: it is of another package.
    """
    module = getattr(value, "__module__", None) or ""
    if module.split(".")[0] not in _TRUSTED_PACKAGES or module.startswith("transformers_modules"):
        raise Undecidable(value)
    return f"{module}.{value.__qualname__}"


def _state(value: Any) -> list[Any]:
    """What an object of a trusted package consists of."""
    from hf_transfer.data.augment import Chance

    name = _trusted_name(type(value))
    if isinstance(value, Chance):
        if value.views is None:  # differs in every epoch
            raise Undecidable(value)
        return [name, value.seed, value.views]
    if hasattr(value, "tobytes") and hasattr(value, "mode") and hasattr(value, "size"):  # a PIL image
        palette = value.getpalette() if value.mode in ("P", "PA") else None
        return [name, value.mode, value.size, palette, value.info.get("transparency"), value.tobytes()]
    if hasattr(value, "backend_tokenizer"):
        state = json.loads(value.backend_tokenizer.to_str())
        state |= {"truncation": None, "padding": None}  # these are of its last call
        sides = [value.padding_side, value.truncation_side, value.model_max_length, value.model_input_names]
        return [name, json.dumps(state, sort_keys=True), sides]
    if is_dataclass(value):
        return [name, {field.name: getattr(value, field.name) for field in fields(value)}]
    if not hasattr(value, "__dict__"):
        raise Undecidable(value)
    return [name, dict(vars(value))]
