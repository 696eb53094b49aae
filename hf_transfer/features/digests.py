"""Digests of all that the frozen part's results depend on: weights, examples, code.

What is kept under a key that is made of them is never stale: a digest differs wherever its subject may differ, and
where that cannot be told there is none.
"""

from __future__ import annotations

import enum
import hashlib
import inspect
import json
import random
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.trainer_utils import RemoveColumnsCollator

from hf_transfer import __version__

_PACKAGES = (
    "torch", "transformers", "timm", "peft", "accelerate", "datasets", "torchvision", "pillow", "tokenizers", "numpy",
)  # fmt: skip
# Their code is what their version says, or, ours, hashed; of a user's function neither is known of all that it calls.
_KNOWN = {
    "hf_transfer", "torch", "transformers", "timm", "datasets", "torchvision", "PIL", "tokenizers", "numpy", "builtins",
    "functools", "collections", "operator",
}  # fmt: skip
_CHUNK = 64 * 2**20  # bytes read at once
_ROWS = 4096  # read at once, at most
_THREADS = 8
_LONGEST_PATH = 4096
_DRAWN_TWICE = 8  # items of a data set that may be random


class _Unknown(Exception):
    """It cannot be told whether two of these are the same."""


def _blake() -> Any:
    return hashlib.blake2b(digest_size=16)


def key(parts: Mapping[str, str]) -> str:
    """32 hexadecimal digits of named digests, whatever their order."""
    return hashlib.blake2b(json.dumps(dict(parts), sort_keys=True).encode(), digest_size=16).hexdigest()


# ---- weights -------------------------------------------------------------------------------------------------------


def weights_digest(model: nn.Module, names: Iterable[str] | None = None) -> str:
    """Of names, types, shapes and bytes of parameters and buffers, also those that are not saved.

    Args:
        model: whose they are.
        names: of those that count; all by default.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    chosen = sorted(tensors if names is None else set(names))
    distinct = {id(tensors[name]): tensors[name] for name in chosen}
    with ThreadPoolExecutor(_THREADS) as pool:  # hashing lets go of the interpreter
        digests = dict(zip(distinct, pool.map(_bytes_digest, distinct.values()), strict=True))
    return key({name: f"{_kind(tensors[name])} {digests[id(tensors[name])]}" for name in chosen})


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _bytes_digest(tensor: torch.Tensor) -> str:
    made, flat = _blake(), tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for chunk in flat.split(_CHUNK):
        made.update(memoryview(chunk.cpu().numpy()))
    return str(made.hexdigest())


# ---- data ----------------------------------------------------------------------------------------------------------


def dataset_digest(dataset: Any) -> str | None:
    """Of everything that a map-style data set gives: examples, their order, files that they name, the transform.

    Equal content has equal digests however it is stored: chunks, slices, a selection's indices. None where it cannot
    be told whether another data set gives the same: a stream, a transform that is not this package's, items of
    unknown types, items that are random.
    """
    from datasets import Dataset

    try:
        if isinstance(dataset, Dataset):
            return _arrow_digest(dataset)
        if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
            return _items_digest(dataset)
    except _Unknown:
        pass
    return None


def _arrow_digest(dataset: Any) -> str:
    formatted = sorted(dataset.column_names if dataset._format_columns is None else dataset._format_columns)
    columns = sorted(dataset.column_names) if dataset._output_all_columns else formatted
    streams = _Streams(texts_may_be_paths=dataset._format_type == "custom")
    if columns:
        raw = dataset.with_format("arrow", columns=columns)
        row_bytes = dataset.data.nbytes / max(dataset.data.num_rows, 1)
        step = int(min(max(_CHUNK / max(row_bytes, 1), 1), _ROWS))
        for start in range(0, len(dataset), step):
            table = raw[start : start + step]
            for name in columns:
                whole = table.column(name).combine_chunks()
                for array in getattr(whole, "chunks", [whole]):
                    streams.add(name, array)
    features = dataset.features.to_dict()
    parts = {
        "rows": str(len(dataset)),
        "features": json.dumps({name: features[name] for name in columns}, sort_keys=True, default=repr),
        "format": f"{dataset._format_type} {formatted}",
        "transform": object_digest(dataset._format_kwargs),
    }
    return key(parts | {f"column {name}": digest for name, digest in streams.digests().items()})


class _Streams:
    """Digests of columns that come in pieces, whatever the pieces.

    A column of lists, texts or records is taken apart into streams of plain numbers: the positions of what is null,
    lengths, and values, in each of which a longer column only goes on.

    Args:
        texts_may_be_paths: a text that names a file stands for the file too, not only the path of a picture.
    """

    def __init__(self, texts_may_be_paths: bool):
        self.texts_may_be_paths = texts_may_be_paths
        self._hashes: dict[str, Any] = {}
        self._counts: dict[str, int] = {}

    def digests(self) -> dict[str, str]:
        counts = {f"{name}.count": str(count) for name, count in self._counts.items()}
        return {name: made.hexdigest() for name, made in self._hashes.items()} | counts

    def _update(self, name: str, values: Any) -> None:
        if len(values):  # a piece without any is as good as none
            self._hashes.setdefault(name, _blake()).update(values)

    def add(self, name: str, array: Any) -> None:
        """Go on with column `name`."""
        import pyarrow
        import pyarrow.types as kinds

        if isinstance(array, pyarrow.ExtensionArray):
            array = array.storage
        before = self._counts.get(name, 0)
        self._counts[name] = before + len(array)
        if kinds.is_null(array.type):
            return
        if kinds.is_dictionary(array.type):
            array = array.dictionary_decode()
        if array.null_count:
            nulls = np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False)) + before
            self._update(f"{name}.null", nulls.astype(np.int64).tobytes())
            array = array.drop_null()
        if kinds.is_struct(array.type):
            children = dict(zip((field.name for field in array.type), array.flatten(), strict=True))
            for child, values in children.items():
                self.add(f"{name}.{child}", values)
            if set(children) == {"bytes", "path"} and not self.texts_may_be_paths:
                self._add_files(f"{name}.file", children["path"].filter(children["bytes"].is_null()))
        elif kinds.is_list(array.type) or kinds.is_large_list(array.type) or kinds.is_fixed_size_list(array.type):
            self._update(f"{name}.lengths", array.value_lengths().to_numpy().astype(np.int64).tobytes())
            self.add(f"{name}.item", array.flatten())
        else:
            self._add_plain(name, array)

    def _add_plain(self, name: str, array: Any) -> None:
        import pyarrow.types as kinds

        kind = array.type
        if kinds.is_string(kind) or kinds.is_binary(kind):
            self._add_texts(name, array, np.int32)
        elif kinds.is_large_string(kind) or kinds.is_large_binary(kind):
            self._add_texts(name, array, np.int64)
        elif kinds.is_boolean(kind):
            self._update(name, array.to_numpy(zero_copy_only=False).tobytes())
        elif kinds.is_primitive(kind) or kinds.is_decimal(kind) or kinds.is_fixed_size_binary(kind):
            width, values = kind.bit_width // 8, array.buffers()[1]
            if values is not None:
                self._update(name, memoryview(values)[array.offset * width : (array.offset + len(array)) * width])
        else:
            raise _Unknown(kind)

    def _add_texts(self, name: str, array: Any, offset_type: Any) -> None:
        if not len(array):
            return
        _, offsets, values = array.buffers()
        bounds = np.frombuffer(offsets, offset_type)[array.offset : array.offset + len(array) + 1]
        self._update(f"{name}.lengths", np.diff(bounds.astype(np.int64)).tobytes())
        if values is not None:
            self._update(name, memoryview(values)[bounds[0] : bounds[-1]])
        if self.texts_may_be_paths and "binary" not in str(array.type):
            self._add_files(f"{name}.file", array)

    def _add_files(self, name: str, paths: Any) -> None:
        """The content of files: neither size nor time tells whether it is the same."""
        places = [path for path in paths.to_pylist() if path and len(path) < _LONGEST_PATH]
        with ThreadPoolExecutor(_THREADS) as pool:
            for digest in pool.map(_file_digest, places):
                self._update(name, digest)


def _file_digest(path: str) -> bytes:
    if "://" in path and "\n" not in path and " " not in path:
        raise _Unknown(path)  # what a server gives today
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, _blake).digest()
    except (OSError, ValueError):
        return bytes(16)


def _items_digest(dataset: Any) -> str:
    made = _blake()
    with _random_numbers_kept():
        for i in range(len(dataset)):
            digest = object_digest(dataset[i])
            if i < _DRAWN_TWICE and digest != object_digest(dataset[i]):
                raise _Unknown("random")
            made.update(digest.encode())
    return key({"rows": str(len(dataset)), "items": made.hexdigest()})


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    ours, numpys = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpys)


# ---- Python objects ------------------------------------------------------------------------------------------------


def collator_digest(collate: Any) -> str | None:
    """Of a collator: what it holds, or, of a function that is nobody's we know, its source; None where neither says
    all."""
    if isinstance(collate, RemoveColumnsCollator):
        inner = collator_digest(collate.data_collator)
        return (
            None
            if inner is None
            else key({"collator": inner, "columns": repr(sorted(collate.signature_columns or ()))})
        )
    try:
        return object_digest(collate)
    except _Unknown:
        if not inspect.isfunction(collate) or collate.__closure__ or collate.__defaults__ or collate.__kwdefaults__:
            return None
    try:
        return key({"name": f"{collate.__module__}.{collate.__qualname__}", "source": inspect.getsource(collate)})
    except (OSError, TypeError):
        return None


def object_digest(value: Any) -> str:
    """Of numbers, texts, arrays, containers, and of functions and objects of known packages by what they hold.

    Raises:
        _Unknown: of anything else.
    """
    made = _blake()
    _walk(value, made.update, ())
    return str(made.hexdigest())


def _walk(value: Any, update: Any, above: tuple[int, ...]) -> None:
    """Tell `update` of a value, type first, each part between marks."""
    if id(value) in above:
        raise _Unknown("a cycle")
    within = (*above, id(value))
    update(f"<{type(value).__module__}.{type(value).__qualname__} ".encode())
    plain = _plain(value)
    if isinstance(plain, bytes):
        update(f"{len(plain)} ".encode())
        update(plain)
    else:
        for part in plain:
            _walk(part, update, within)
    update(b">")


def _plain(value: Any) -> Any:
    """A value as bytes, or as a list of simpler ones."""
    if value is None or isinstance(value, bool | int | float | complex | str | torch.dtype | torch.device | slice):
        return repr(value).encode()
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, enum.Enum):
        return [value.name, _named(type(value))]
    if isinstance(value, Path):
        return str(value).encode()
    if isinstance(value, np.dtype):
        return str(value).encode()
    if isinstance(value, torch.Tensor):
        return f"{_kind(value)} {_bytes_digest(value)}".encode()
    if isinstance(value, np.ndarray | np.generic):
        return _array(np.asarray(value))
    if isinstance(value, Mapping):
        return [_named(type(value)), *sorted(((k, v) for k, v in value.items()), key=lambda pair: repr(pair[0]))]
    if isinstance(value, list | tuple):
        if type(value) in (list, tuple) and {type(part) for part in value} <= {int, float, bool, str}:
            return repr(value).encode()
        return [_named(type(value)), *value]
    if isinstance(value, set | frozenset):
        return sorted(object_digest(one) for one in value)
    return _code(value) if _is_code(value) else _held(value)


def _array(value: Any) -> bytes:
    if value.dtype.hasobject:
        raise _Unknown(value.dtype)
    return f"{value.dtype.str} {value.shape} ".encode() + np.ascontiguousarray(value).tobytes()


def _is_code(value: Any) -> bool:
    kinds = (partial, types.FunctionType, types.MethodType, types.BuiltinFunctionType, type)
    return isinstance(value, kinds)


def _code(value: Any) -> list[Any]:
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, types.FunctionType):
        if value.__name__ == "<lambda>":
            raise _Unknown(value)
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [_named(value), cells, value.__defaults__, value.__kwdefaults__]
    return [_named(value)]


def _named(value: Any) -> str:
    """Where a class or function is defined, if its code is known by that."""
    module = getattr(value, "__module__", None) or ""
    if module.split(".")[0] not in _KNOWN or module.startswith("transformers_modules"):
        raise _Unknown(value)
    return f"{module}.{value.__qualname__}"


def _held(value: Any) -> list[Any]:
    """What an object of a known package consists of."""
    from hf_transfer.data.augment import Chance

    name = _named(type(value))
    if isinstance(value, Chance):
        if value.views is None:  # another result every epoch
            raise _Unknown(value)
        return [name, value.seed, value.views]
    if hasattr(value, "tobytes") and hasattr(value, "mode") and hasattr(value, "size"):  # a picture
        palette = value.getpalette() if value.mode in ("P", "PA") else None
        return [name, value.mode, value.size, palette, value.info.get("transparency"), value.tobytes()]
    if hasattr(value, "backend_tokenizer"):
        state = json.loads(value.backend_tokenizer.to_str())
        state |= {"truncation": None, "padding": None}  # of its last call
        sides = [value.padding_side, value.truncation_side, value.model_max_length, value.model_input_names]
        return [name, json.dumps(state, sort_keys=True), sides]
    if is_dataclass(value):
        return [name, {field.name: getattr(value, field.name) for field in fields(value)}]
    if not hasattr(value, "__dict__"):
        raise _Unknown(value)
    return [name, dict(vars(value))]


# ---- code ----------------------------------------------------------------------------------------------------------


def code_digest(model: nn.Module | None = None) -> str | None:
    """Of the packages' versions, this package's code, and a model's code, structure and configuration.

    None where the code of one of the model's modules cannot be read: it was typed at a prompt.
    """
    parts = {name: _version(name) for name in _PACKAGES}
    parts |= {"python": sys.version, "hf_transfer": __version__}
    own = Path(__file__).parent
    sources = {path.relative_to(own).as_posix(): path for path in sorted(own.rglob("*.py"))}
    if model is not None:
        for kind in {base for module in model.modules() for base in type(module).__mro__}:
            package = kind.__module__.split(".")[0]
            if package in ("builtins", "torch", "abc", "typing"):
                continue
            try:
                sources[f"module {kind.__module__}"] = Path(inspect.getsourcefile(kind) or "")
            except (OSError, TypeError):
                return None
        parts["structure"] = repr(model)
        config = getattr(model, "config", None)
        if config is not None:
            known = {k: v for k, v in config.to_dict().items() if k != "_name_or_path"}
            attention = getattr(config, "_attn_implementation", None)
            parts["configuration"] = json.dumps([known, attention], sort_keys=True, default=repr)
    try:
        parts |= {name: hashlib.blake2b(path.read_bytes()).hexdigest() for name, path in sources.items()}
    except OSError:
        return None
    return key(parts)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
