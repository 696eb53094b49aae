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
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_transfer import __version__
from hf_transfer.features.column_digests import ColumnDigests
from hf_transfer.features.hashing import CHUNK, THREADS, Undecidable, hasher, key, tensor_digest, tensor_kind
from hf_transfer.features.object_digests import object_digest

_PACKAGES = (
    "torch", "transformers", "timm", "peft", "accelerate", "datasets", "torchvision", "pillow", "tokenizers", "numpy",
)  # fmt: skip
_ROWS = 4096  # read at once, at most
_DRAWN_TWICE = 8  # items that are read twice, to notice a dataset with random items


def weights_digest(model: nn.Module, names: Iterable[str] | None = None) -> str:
    """Of names, dtypes, shapes and bytes of parameters and buffers, non-persistent buffers included.

    Args:
        model: that they belong to.
        names: of the parameters and buffers to take; all by default.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    chosen = sorted(tensors if names is None else set(names))
    distinct = {id(tensors[name]): tensors[name] for name in chosen}
    with ThreadPoolExecutor(THREADS) as pool:
        digests = dict(zip(distinct, pool.map(tensor_digest, distinct.values()), strict=True))
    return key({name: f"{tensor_kind(tensors[name])} {digests[id(tensors[name])]}" for name in chosen})


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


def _arrow_digest(dataset: Any) -> str:
    formatted = sorted(dataset.column_names if dataset._format_columns is None else dataset._format_columns)
    names = sorted(dataset.column_names) if dataset._output_all_columns else formatted
    columns = ColumnDigests(texts_may_be_paths=dataset._format_type == "custom")
    if names:
        raw = dataset.with_format("arrow", columns=names)
        row_bytes = dataset.data.nbytes / max(dataset.data.num_rows, 1)
        step = int(min(max(CHUNK / max(row_bytes, 1), 1), _ROWS))
        for start in range(0, len(dataset), step):
            table = raw[start : start + step]
            for name in names:
                whole = table.column(name).combine_chunks()
                for array in getattr(whole, "chunks", [whole]):
                    columns.add(name, array)
    features = dataset.features.to_dict()
    parts = {
        "rows": str(len(dataset)),
        "features": json.dumps({name: features[name] for name in names}, sort_keys=True, default=repr),
        "format": f"{dataset._format_type} {formatted}",
        "transform": object_digest(dataset._format_kwargs),
    }
    return key(parts | {f"column {name}": digest for name, digest in columns.digests().items()})


def _items_digest(dataset: Any) -> str:
    digest = hasher()
    with _random_state_restored():
        for i in range(len(dataset)):
            item = object_digest(dataset[i])
            if i < _DRAWN_TWICE and item != object_digest(dataset[i]):
                raise Undecidable("random items")
            digest.update(item.encode())
    return key({"rows": str(len(dataset)), "items": digest.hexdigest()})


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
            values = {k: v for k, v in config.to_dict().items() if k != "_name_or_path"}
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
