"""Examples that are the same, or nearly: by a hash of the content, of the normalised text, of how a picture looks."""

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
LOOK_BITS = 256
LOOK_RADIUS = 15  # bits; re-encoding at quality 30 and half the size changes up to 16, two digits differ in 22 at least
_COLOUR_RADIUS = 16  # of 255, of each channel's mean
_FLAT = 3.0  # standard deviation of grey levels below which a picture has no look
_GRID, _SIDE = 16, 64  # coefficients and pixels per side
_BANDS = LOOK_RADIUS + 1  # two hashes that differ in 15 bits agree in one of 16 bands at least
_MOST_ALIKE = 5000  # pictures that agree in a band; of more, that band says nothing


@dataclass(frozen=True)
class Trace:
    """What an example leaves behind, to compare and to count.

    Attributes:
        exact: a hash of the content.
        near: a hash that nearly equal examples share (texts) or nearly share (pictures); None where there is none.
        sizes: what is measured of it, by name.
    """

    exact: bytes
    near: bytes | None
    sizes: dict[str, int]


def content_hash(*parts: bytes) -> bytes:
    """8 bytes of BLAKE2b over the parts, each with its length."""
    made = hashlib.blake2b(digest_size=HASH_BYTES)
    for part in parts:
        made.update(len(part).to_bytes(8, "little"))
        made.update(part)
    return made.digest()


def normalised(text: str) -> str:
    """Compatible characters as one, without case, marks and punctuation, words one space apart."""
    folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_WORDS.findall(folded)) or folded.strip()


def look_hash(image: Any) -> bytes | None:
    """The perceptual hash of a picture: 256 bits, and the mean of each colour; None for one without contrast.

    The signs, against their median, of the 16 × 16 lowest frequencies of a cosine transform over 64 × 64 grey pixels
    (Zauner 2010, section 3.2.1, with four times the bits).
    """
    from PIL import Image as Pixels
    from scipy.fft import dctn

    small = image.convert("RGB").resize((_SIDE, _SIDE), Pixels.Resampling.BOX if min(image.size) > _SIDE else None)
    grey = np.asarray(small.convert("L"), dtype=np.float32)
    if grey.std() < _FLAT:
        return None
    waves = dctn(grey, norm="ortho")[:_GRID, :_GRID]
    colour = np.asarray(small).reshape(-1, 3).mean(0).round().astype(np.uint8)
    return np.packbits(waves > np.median(waves)).tobytes() + colour.tobytes()


@dataclass(frozen=True)
class Traces:
    """The traces of many examples, as arrays.

    Attributes:
        exact: (examples, 8) bytes.
        near: (examples, width) bytes.
        has_near: (examples,) whether there is a near hash.
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
        """(examples,) a number that equal contents share."""
        return _numbered(self.exact)

    def alike(self) -> Array:
        """(examples,) a number that examples share which are equal or nearly so, directly or through others."""
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
            links += [first[pairs] for pairs in _looks_alike(self.near[first])]
        pairs = np.concatenate(links) if links else np.empty((0, 2), int)
        graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
        return connected_components(graph, directed=False)[1]


def _numbered(rows: Array) -> Array:
    """(n, width) bytes → (n,) a number for each different row."""
    whole = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.shape[1]))).ravel()
    return np.unique(whole, return_inverse=True)[1]


def _chains(numbers: Array) -> Array:
    """(pairs, 2): each example with the next one of the same number."""
    order = np.argsort(numbers, kind="stable")
    together = numbers[order][1:] == numbers[order][:-1]
    return np.stack([order[:-1][together], order[1:][together]], axis=1)


def _looks_alike(hashes: Array) -> Iterator[Array]:
    """Pairs (n, 2) of rows within `LOOK_RADIUS` bits and of nearly the same colour, found band by band."""
    bits, colours = hashes[:, : LOOK_BITS // 8], hashes[:, LOOK_BITS // 8 :].astype(np.int16)
    bands = np.ascontiguousarray(bits).view(np.uint16)
    assert bands.shape[1] == _BANDS
    words = np.ascontiguousarray(bits).view(np.uint64)
    for band in range(_BANDS):
        order = np.argsort(bands[:, band], kind="stable")
        values = bands[order, band]
        edges = np.flatnonzero(np.diff(values)) + 1
        for group in np.split(order, edges):
            if 1 < len(group) <= _MOST_ALIKE:
                for i, row in enumerate(group[:-1]):
                    rest = group[i + 1 :]
                    apart = np.bitwise_count(words[rest] ^ words[row]).sum(-1)
                    tint = np.abs(colours[rest] - colours[row]).max(-1)
                    found = rest[(apart <= LOOK_RADIUS) & (tint <= _COLOUR_RADIUS)]
                    if len(found):
                        yield np.stack([np.full(len(found), row), found], axis=1)
