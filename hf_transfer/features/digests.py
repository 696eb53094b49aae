"""Digests of everything that the frozen part's outputs depend on: weights, examples, code.

A store under a key of these digests is never stale: a digest differs wherever its subject may differ, and where that
cannot be decided there is none.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_transfer import __version__
from hf_transfer.features.column_digests import ColumnDigests, row_digests
from hf_transfer.features.object_digests import object_digest
from hf_transfer.layers.hashing import CHUNK, THREADS, Undecidable, hasher, key, tensor_digest, tensor_kind

_PACKAGES = (
    "torch", "transformers", "timm", "peft", "accelerate", "datasets", "torchvision", "pillow", "tokenizers", "numpy",
)  # fmt: skip
_NAMES = ("_name_or_path", "architectures")  # of a configuration: where it is from; the class, once it was saved
_ROWS = 4096  # read at once, at most
_DRAWN_TWICE = 8  # items that are read twice, to notice a dataset with random items


def weights_digest(model: nn.Module, names: Iterable[str] | None = None) -> str:
    """Of names, dtypes, shapes and bytes of parameters and buffers, non-persistent buffers included.

    Args:
        model: that they belong to.
        names: of the parameters and buffers to take; all by default.
    """
    return key(tensor_digests(model, names))


def tensor_digests(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, str]:
    """{name: dtype, shape and digest of the bytes}, as in `weights_digest`."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    chosen = sorted(tensors if names is None else set(names))
    distinct = {id(tensors[name]): tensors[name] for name in chosen}
    with ThreadPoolExecutor(THREADS) as pool:
        digests = dict(zip(distinct, pool.map(tensor_digest, distinct.values()), strict=True))
    return {name: f"{tensor_kind(tensors[name])} {digests[id(tensors[name])]}" for name in chosen}


# ---- datasets --------------------------------------------------------------------------------------------------------


def dataset_digest(dataset: Any) -> str | None:
    """Of everything that a map-style dataset returns: examples and their order, files that they name, the transform.

    Equal content has an equal digest however it is stored (chunks, slices, the indices of a selection). None where it
    cannot be decided whether another dataset returns the same: a stream, a transform of another package, items of
    unknown types, random items.
    """
    from datasets import Dataset

    try:
        if isinstance(dataset, Dataset):
            return _arrow_digest(dataset)
        if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
            return _items_digest(dataset)
    except Undecidable:
        pass
    return None


def example_digests(dataset: Any, without: frozenset[str] = frozenset()) -> list[bytes] | None:
    """For each example of a map-style dataset, 16 bytes: of what it returns, files that it names, and the transform.

    If one example changes, one digest does. None where it cannot be decided whether an example is the same: items of
    unknown types, random items. Examples whose transform is of another package are read, and their items digested.

    Args:
        dataset: of the examples.
        without: columns, or keys of an item, that do not count.
    """
    from datasets import Dataset

    if isinstance(dataset, Dataset):
        try:
            names = [name for name in _columns(dataset) if name not in without]
            shared = key(_reading(dataset, names)).encode()
            rows = [row for columns in _tables(dataset, names) for row in row_digests(columns, _has_transform(dataset))]
            return [hashlib.blake2b(shared + row, digest_size=16).digest() for row in rows]
        except Undecidable:
            pass
    try:
        return [bytes.fromhex(digest) for digest in _item_digests(dataset, without)]
    except Undecidable:
        return None


def _arrow_digest(dataset: Any) -> str:
    names = _columns(dataset)
    columns = ColumnDigests(_has_transform(dataset))
    for arrays in _tables(dataset, names):
        for name, array in arrays.items():
            columns.add(name, array)
    parts = {"rows": str(len(dataset)), **_reading(dataset, names)}
    return key(parts | {f"column {name}": digest for name, digest in columns.digests().items()})


def _has_transform(dataset: Any) -> bool:
    return bool(dataset._format_type == "custom")


def _columns(dataset: Any) -> list[str]:
    """The columns that examples are made from."""
    formatted = dataset.column_names if dataset._format_columns is None else dataset._format_columns
    return sorted(dataset.column_names if dataset._output_all_columns else formatted)


def _reading(dataset: Any, names: Sequence[str]) -> dict[str, str]:
    """What examples depend on besides their cells: types, format, transform."""
    features = dataset.features.to_dict()
    formatted = sorted(dataset.column_names if dataset._format_columns is None else dataset._format_columns)
    return {
        "features": json.dumps({name: features[name] for name in names}, sort_keys=True, default=repr),
        "format": f"{dataset._format_type} {formatted}",
        "transform": object_digest(dataset._format_kwargs),
    }


def _tables(dataset: Any, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """{column: array} of a limited number of rows at a time."""
    if not names:
        return
    raw = dataset.with_format("arrow", columns=list(names))
    row_bytes = dataset.data.nbytes / max(dataset.data.num_rows, 1)
    step = int(min(max(CHUNK / max(row_bytes, 1), 1), _ROWS))
    for start in range(0, len(dataset), step):
        table = raw[start : start + step].combine_chunks()
        for batch in table.to_batches():
            yield {name: batch.column(name) for name in names}


def _items_digest(dataset: Any) -> str:
    digest = hasher()
    for item in _item_digests(dataset):
        digest.update(item.encode())
    return key({"rows": str(len(dataset)), "items": digest.hexdigest()})


def _item_digests(dataset: Any, without: frozenset[str] = frozenset()) -> Iterator[str]:
    def of(i: int) -> str:
        item = dataset[i]
        return object_digest({k: v for k, v in item.items() if k not in without} if isinstance(item, dict) else item)

    for i in range(len(dataset)):
        with _random_state_restored():
            item = of(i)
            if i < _DRAWN_TWICE and item != of(i):
                raise Undecidable("random items")
        yield item


@contextmanager
def _random_state_restored() -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


# ---- code ------------------------------------------------------------------------------------------------------------


def code_digest(model: nn.Module | None = None) -> str | None:
    """Of the packages' versions, this package's code, and a model's code, structure and configuration.

    None if the source of one of the model's modules cannot be read (it was typed at a prompt).
    """
    parts = {name: _version(name) for name in _PACKAGES}
    parts |= {"python": sys.version, "hf_transfer": __version__}
    sources = _package_sources()
    if model is not None:
        for kind in {base for module in model.modules() for base in type(module).__mro__}:
            if kind.__module__.split(".")[0] in ("builtins", "torch", "abc", "typing"):
                continue
            try:
                sources[f"module {kind.__module__}"] = Path(inspect.getsourcefile(kind) or "")
            except (OSError, TypeError):
                return None
        parts["structure"] = repr(model)
        config = getattr(model, "config", None)
        if config is not None:
            values = {k: v for k, v in config.to_dict().items() if k not in _NAMES}
            attention = getattr(config, "_attn_implementation", None)
            parts["configuration"] = json.dumps([values, attention], sort_keys=True, default=repr)
    try:
        parts |= {name: hashlib.blake2b(path.read_bytes()).hexdigest() for name, path in sources.items()}
    except OSError:
        return None
    return key(parts)


def _package_sources() -> dict[str, Path]:
    """{path within this package: path} of all its modules."""
    package = Path(__file__).parents[1]
    return {path.relative_to(package).as_posix(): path for path in sorted(package.rglob("*.py"))}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
