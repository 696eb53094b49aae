"""Hashes of bytes, tensors and named parts: 128-bit BLAKE2b, as hexadecimal digits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

CHUNK = 64 * 2**20  # bytes read at once
THREADS = 8  # hashing releases the GIL


class Undecidable(Exception):
    """It cannot be decided whether two such values are the same."""


def hasher() -> Any:
    """An empty hash."""
    return hashlib.blake2b(digest_size=16)


def key(parts: Mapping[str, str]) -> str:
    """32 hexadecimal digits for named digests, in whatever order they come."""
    return hashlib.blake2b(json.dumps(dict(parts), sort_keys=True).encode(), digest_size=16).hexdigest()


def tensor_kind(tensor: torch.Tensor) -> str:
    """Its dtype and shape, as text."""
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def tensor_digest(tensor: torch.Tensor) -> str:
    """Of the bytes of its elements, in row-major order."""
    digest, flat = hasher(), tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for chunk in flat.split(CHUNK):
        digest.update(memoryview(chunk.cpu().numpy()))
    return str(digest.hexdigest())
