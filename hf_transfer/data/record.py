"""What the examples of a run were, by content, so that they are recognized when its model is evaluated later.

The record stays in the run's folder: a hash tells whoever guesses a text that it was there.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Image

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.duplicates import content_hash
from hf_transfer.data.images import undecoded
from hf_transfer.data.labels import LABELS, MULTI_LABEL, REGRESSION, Labels
from hf_transfer.data.splits import Data
from hf_transfer.errors import UserError, one_line
from hf_transfer.files import write_bytes

Array = np.ndarray[Any, Any]
VERSION, REFITTED = 1, 2  # the latter of a run that trained on its validation split in the end
_LIMITS = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_predict_samples"}
_BATCH = 256
_STREAMED = "streamed"


@dataclass(frozen=True)
class SplitRecord:
    """The examples of a split, in order.

    Attributes:
        content: (examples,) uint64, hash of the inputs of each.
        labels: (examples,) uint64, hash of its label.
    """

    content: Array
    labels: Array

    @classmethod
    def of(cls, split: Dataset, inputs: Sequence[str], labels: Labels) -> SplitRecord:
        return cls(content_of(split, inputs), _label_hashes(split, labels))


@dataclass(frozen=True)
class Change:
    """How a split differs from what a run recorded of it.

    Attributes:
        split: its name.
        new: examples that it did not have.
        gone: examples that it no longer has.
        relabeled: examples that have another label.
    """

    split: str
    new: int
    gone: int
    relabeled: int

    def __bool__(self) -> bool:
        return bool(self.new or self.gone or self.relabeled)

    def __str__(self) -> str:
        parts = {"new": self.new, "gone": self.gone, "with another label": self.relabeled}
        return f"{self.split}: {', '.join(f'{n:,} {what}' for what, n in parts.items() if n)}"


@dataclass(frozen=True)
class Record:
    """The examples of a run.

    Attributes:
        inputs: names of the input columns that were hashed.
        limits: `max_train_samples` and its like by split.
        splits: by name; a training set that was a stream is missing.
        streamed: (examples,) uint64, hash of each example that a stream gave to training; None if there was no stream,
            or the run has not read it to the end.
        refitted: whether the validation split, after the run was measured on it, was trained on too (`refit`).
    """

    inputs: tuple[str, ...]
    limits: Mapping[str, int | None]
    splits: Mapping[str, SplitRecord]
    streamed: Array | None = None
    refitted: bool = False

    @classmethod
    def of(cls, data: Data, args: DataArguments, refitted: bool = False) -> Record:
        """The record of a run's splits, as it trains and measures on them."""
        splits = {name: split for name, split in data.splits.items() if not (args.streaming and name == "train")}
        return cls(
            data.inputs,
            {name: getattr(args, key) for name, key in _LIMITS.items()},
            {name: SplitRecord.of(split, data.inputs, data.labels) for name, split in splits.items()},
            refitted=refitted,
        )

    @property
    def trained(self) -> Array:
        """Hashes of the examples that were trained on, without those that were held out too: known leaks."""
        held_out = [s.content for name, s in self.splits.items() if name not in self._trains_on]
        return np.setdiff1d(self.train, np.concatenate([*held_out, np.empty(0, np.uint64)]))

    @property
    def _trains_on(self) -> tuple[str, ...]:
        return ("train", "validation") if self.refitted else ("train",)

    @property
    def train(self) -> Array:
        """Hashes of the examples that were trained on; empty if they are not known."""
        if "train" in self.splits:
            return np.concatenate([self.splits[name].content for name in self._trains_on])
        return np.empty(0, np.uint64) if self.streamed is None else self.streamed

    @property
    def has_train(self) -> bool:
        return "train" in self.splits or self.streamed is not None

    def is_limited_alike(self, name: str, args: DataArguments) -> bool:
        """Whether the run drew as many examples of a split as `args` asks for."""
        return self.limits.get(name) == getattr(args, _LIMITS[name])

    def change(self, name: str, now: SplitRecord) -> Change:
        """How a split differs from the recorded one."""
        then = self.splits[name]
        new, gone = _surplus(now.content, then.content), _surplus(then.content, now.content)
        return Change(name, new, gone, _surplus(_pairs(now), _pairs(then)) - new)

    def including(self, earlier: Record) -> Record:
        """This record with the training examples of an earlier part of the same run."""
        if not ("train" in self.splits and "train" in earlier.splits):
            return replace(self, streamed=earlier.streamed)  # of a run that had ended
        now, then = self.splits["train"], earlier.splits["train"]
        more = ~np.isin(then.content, now.content)
        both = SplitRecord(*(np.concatenate([getattr(now, f), getattr(then, f)[more]]) for f in ("content", "labels")))
        return replace(self, splits={**self.splits, "train": both})

    def save(self, path: Path) -> None:
        version = REFITTED if self.refitted else VERSION  # earlier versions of this package refuse the latter
        about = json.dumps({"version": version, "inputs": self.inputs, "limits": self.limits})
        arrays = {f"{name}.{f}": getattr(s, f) for name, s in self.splits.items() for f in ("content", "labels")}
        if self.streamed is not None:
            arrays[_STREAMED] = self.streamed
        buffer = BytesIO()
        np.savez(buffer, about=np.array(about), **arrays)
        write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Record | None:
        """The record in a file; None if there is no file, or another version wrote it.

        Raises:
            UserError: the file is damaged.
        """
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                about = json.loads(str(file["about"]))
                arrays = {name: file[name] for name in file.files if name != "about"}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"RUN: {str(path)!r} is damaged ({one_line(error)}).",
                "Delete it to evaluate without knowing what was trained on.",
            ) from error
        if about["version"] not in (VERSION, REFITTED):
            return None
        streamed = arrays.pop(_STREAMED, None)
        names = dict.fromkeys(name.partition(".")[0] for name in arrays)
        splits = {name: SplitRecord(arrays[f"{name}.content"], arrays[f"{name}.labels"]) for name in names}
        return cls(tuple(about["inputs"]), about["limits"], splits, streamed, about["version"] == REFITTED)


def content_of(split: Dataset, inputs: Sequence[str]) -> Array:
    """(examples,) uint64 hash of each example's inputs: the texts, or the bytes of the image files."""
    plain = undecoded(split, inputs)
    has_images = any(isinstance(f, Image) for f in plain.features.values())
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # reading files releases the GIL
        hashes = list(_hashes(plain, inputs, pool.map if has_images else map))
    return np.frombuffer(b"".join(hashes), dtype="<u8").astype(np.uint64)


def positions(content: Array, wanted: Array) -> Array:
    """Positions in `content` of the hashes in `wanted`, each as often as it occurs there."""
    left = dict(zip(*(a.tolist() for a in np.unique(wanted, return_counts=True)), strict=True))
    chosen = []
    for i, value in enumerate(content.tolist()):
        if left.get(value, 0):
            left[value] -= 1
            chosen.append(i)
    return np.array(chosen, dtype=int)


def _hashes(plain: Dataset, inputs: Sequence[str], run: Any) -> Iterator[bytes]:
    for batch in plain.iter(batch_size=_BATCH):
        yield from run(hash_of, zip(*(batch[c] for c in inputs), strict=True))


def hash_of(values: Sequence[Any]) -> bytes:
    """8-byte hash of an example, the values of its input columns: the texts, or the bytes of the image files."""
    return content_hash(*map(_bytes_of, values))


def _bytes_of(value: Any) -> bytes:
    """The content of a cell; of an image file that cannot be read, its path."""
    if isinstance(value, dict):
        stored, path = value.get("bytes"), value.get("path")
        try:
            return stored if stored is not None else Path(str(path)).read_bytes()
        except OSError:
            value = path
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")


def _label_hashes(split: Dataset, labels: Labels) -> Array:
    """(examples,) uint64 hash of each label by its name, so that the order of the classes does not matter."""
    values = split[LABELS][:]
    if labels.problem_type == REGRESSION:
        texts = [repr(float(v)) for v in values]
    elif labels.problem_type == MULTI_LABEL:
        texts = ["\0".join(sorted(n for n, v in zip(labels.names, row, strict=True) if v)) for row in values]
    else:
        texts = [labels.names[v] for v in values]
    hashes = {text: content_hash(text.encode("utf-8", "surrogatepass")) for text in dict.fromkeys(texts)}
    return np.frombuffer(b"".join(hashes[text] for text in texts), dtype="<u8").astype(np.uint64)


def _pairs(split: SplitRecord) -> Array:
    """(examples,) one number for the inputs and the label."""
    return split.content ^ (split.labels * np.uint64(0x9E3779B97F4A7C15))


def _surplus(one: Array, other: Array) -> int:
    """How many elements of `one` are left when each of `other` has taken an equal one away."""
    values, counts = np.unique(one, return_counts=True)
    others, taken = np.unique(other, return_counts=True)
    places = np.searchsorted(others, values)
    places[places == len(others)] = 0
    taken_here = np.where(others[places] == values, taken[places], 0) if len(others) else 0
    return int(np.maximum(counts - taken_here, 0).sum())
