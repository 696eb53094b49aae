"""Exact duplicates by a hash of the content; near-duplicates by a hash of the normalized text or a perceptual hash."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
HASH_BYTES = 8
_WORDS = re.compile(r"\w+")
HASH_BITS = 256
HASH_RADIUS = 15  # bits; JPEG quality 30 at half size flips up to 16, any two scikit-learn digits differ in at least 22
_COLOR_RADIUS = 16  # of 255, per channel mean
_FLAT = 3.0  # images whose gray levels have a smaller standard deviation get no perceptual hash
_GRID, _SIDE = 16, 64  # coefficients and pixels per side
_BANDS = HASH_RADIUS + 1  # hashes that differ in at most 15 bits agree in at least one of 16 bands
_MAX_BUCKET = 5000  # a band value shared by more images is uninformative and is skipped


@dataclass(frozen=True)
class Trace:
    """Hashes and sizes of one example.

    Attributes:
        exact: hash of the content, `HASH_BYTES` bytes.
        near: hash that is equal (texts) or within `HASH_RADIUS` bits (images) for near-duplicates; None if it has none.
        sizes: measured sizes by name, e.g. `characters`, or `width` and `height` in pixels.
    """

    exact: bytes
    near: bytes | None
    sizes: dict[str, int]


def content_hash(*parts: bytes) -> bytes:
    """8-byte BLAKE2b hash of the parts, each prefixed with its length."""
    state = hashlib.blake2b(digest_size=HASH_BYTES)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()


def normalized(text: str) -> str:
    """`text` in NFKC form, case-folded, without punctuation, words separated by single spaces."""
    folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_WORDS.findall(folded)) or folded.strip()


def look_hash(image: Any) -> bytes | None:
    """Perceptual hash of a PIL image, 32 bytes, followed by the mean of each channel, 3 bytes; None without contrast.

    A bit is set where a coefficient among the 16 × 16 lowest frequencies of the DCT of the 64 × 64 gray image exceeds
    their median (pHash: Zauner 2010, section 3.2.1, with four times the bits).
    """
    from PIL import Image as Pixels
    from scipy.fft import dctn

    small = image.convert("RGB").resize((_SIDE, _SIDE), Pixels.Resampling.BOX if min(image.size) > _SIDE else None)
    gray = np.asarray(small.convert("L"), dtype=np.float32)
    if gray.std() < _FLAT:
        return None
    coefficients = dctn(gray, norm="ortho")[:_GRID, :_GRID]
    color = np.asarray(small).reshape(-1, 3).mean(0).round().astype(np.uint8)
    return np.packbits(coefficients > np.median(coefficients)).tobytes() + color.tobytes()


@dataclass(frozen=True)
class Traces:
    """The hashes of many examples as arrays.

    Attributes:
        exact: (examples, 8) uint8.
        near: (examples, width) uint8, zeros for examples without a near-duplicate hash.
        has_near: (examples,) bool, whether the example has one.
    """

    exact: Array
    near: Array
    has_near: Array

    @classmethod
    def of(cls, traces: list[Trace]) -> Traces:
        width = max((len(t.near) for t in traces if t.near), default=HASH_BYTES)
        blank = bytes(width)
        exact = np.frombuffer(b"".join(t.exact for t in traces), np.uint8).reshape(-1, HASH_BYTES)
        near = np.frombuffer(b"".join(t.near or blank for t in traces), np.uint8).reshape(-1, width)
        return cls(exact, near, np.array([t.near is not None for t in traces], dtype=bool))

    def same(self) -> Array:
        """(examples,) an id that exact duplicates share."""
        return _numbered(self.exact)

    def alike(self) -> Array:
        """(examples,) an id that exact and near-duplicates share: connected components of the near-duplicate graph."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        count, same = len(self.exact), self.same()
        links = [_chains(same)]
        if self.near.shape[1] == HASH_BYTES:
            near = _numbered(self.near)
            links.append(_chains(np.where(self.has_near, near, near.max(initial=0) + 1 + np.arange(count))))
        else:
            _, first = np.unique(same, return_index=True)
            first = first[self.has_near[first]]
            links += [first[pairs] for pairs in _similar_pairs(self.near[first])]
        pairs = np.concatenate(links) if links else np.empty((0, 2), int)
        graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
        return connected_components(graph, directed=False)[1]


def _numbered(rows: Array) -> Array:
    """(n, width) bytes → (n,) an id per distinct row."""
    whole = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.shape[1]))).ravel()
    return np.unique(whole, return_inverse=True)[1]


def _chains(numbers: Array) -> Array:
    """(pairs, 2): each example and the next one with the same id."""
    order = np.argsort(numbers, kind="stable")
    together = numbers[order][1:] == numbers[order][:-1]
    return np.stack([order[:-1][together], order[1:][together]], axis=1)


def _similar_pairs(hashes: Array) -> Iterator[Array]:
    """Pairs of rows, (n, 2), within `HASH_RADIUS` bits and of similar color, found by comparing band by band."""
    bits, colors = hashes[:, : HASH_BITS // 8], hashes[:, HASH_BITS // 8 :].astype(np.int16)
    bands = np.ascontiguousarray(bits).view(np.uint16)
    assert bands.shape[1] == _BANDS
    words = np.ascontiguousarray(bits).view(np.uint64)
    for band in range(_BANDS):
        order = np.argsort(bands[:, band], kind="stable")
        values = bands[order, band]
        edges = np.flatnonzero(np.diff(values)) + 1
        for group in np.split(order, edges):
            if 1 < len(group) <= _MAX_BUCKET:
                for i, row in enumerate(group[:-1]):
                    rest = group[i + 1 :]
                    distance = np.bitwise_count(words[rest] ^ words[row]).sum(-1)
                    color_distance = np.abs(colors[rest] - colors[row]).max(-1)
                    similar = rest[(distance <= HASH_RADIUS) & (color_distance <= _COLOR_RADIUS)]
                    if len(similar):
                        yield np.stack([np.full(len(similar), row), similar], axis=1)
