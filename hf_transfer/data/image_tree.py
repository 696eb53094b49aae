"""A folder of images as a tree: every file below it is listed or counted, and nothing is opened."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePath

from hf_transfer.data.image_paths import IMAGE_SUFFIXES, UNREADABLE_IMAGES
from hf_transfer.data.run_outputs import is_run_folder

HIDDEN, IMAGE = "hidden", "images"  # kinds of files in `Folder.tally`; the others are suffixes
METADATA = frozenset(("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet"))
# What operating systems leave behind, in lower case; a folder `__background__` is a class.
_SYSTEM = frozenset(
    ("__macosx", "__pycache__", "@eadir", "$recycle.bin", "desktop.ini", "lost+found", "system volume information")
) | {"thumbs.db"}


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's: its name starts with a dot, or the system made it."""
    return name.startswith(".") or name.lower() in _SYSTEM


@dataclass
class Folder:
    """A folder.

    Attributes:
        path: absolute path, through links as they are named.
        images: names of the images in the folder itself, sorted.
        tables: names of its metadata tables.
        others: names of its other files.
        hidden: number of files by kind that are none of the user's, or cannot be reached.
        folders: its visible folders, sorted by name.
    """

    path: str
    images: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    hidden: Counter[str] = field(default_factory=Counter)
    folders: list[Folder] = field(default_factory=list)

    @property
    def name(self) -> str:
        return Path(self.path).name

    @cached_property
    def tally(self) -> Counter[str]:
        """Number of files at any depth, by kind; metadata tables are not among them."""
        total = Counter({IMAGE: len(self.images)}) + self.hidden
        total.update(PurePath(name).suffix.lower() or "no suffix" for name in self.others)
        for folder in self.folders:
            total += folder.tally
        return total

    @property
    def with_images(self) -> list[Folder]:
        """Its folders that hold images at some depth, also such that cannot be read."""
        return [folder for folder in self.folders if folder.holds_images]

    @property
    def holds_images(self) -> bool:
        return any(kind == IMAGE or kind in UNREADABLE_IMAGES for kind in self.tally)

    @property
    def is_flat(self) -> bool:
        """Whether no folder in it holds images."""
        return not self.with_images

    def take(self, listed: Container[str]) -> None:
        """Count files as images that a metadata table lists, whatever their suffix, unless they cannot be read."""
        for folder in self.below():
            taken = [n for n in folder.others if f"{folder.path}{os.sep}{n}" in listed and not _is_unreadable(n)]
            folder.images = sorted([*folder.images, *taken])
            folder.others = [name for name in folder.others if name not in set(taken)]

    def below(self) -> Iterator[Folder]:
        """The folder and all folders in it, in the order of their files."""
        yield self
        for folder in self.folders:
            yield from folder.below()


def _is_unreadable(name: str) -> bool:
    return PurePath(name).suffix.lower() in UNREADABLE_IMAGES


def plural(number: int, noun: str) -> str:
    """`1 image`, `1,000 images`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def walk(root: Path) -> Folder:
    """The tree below a folder; links to folders are followed, but not into a folder that encloses them.

    Raises:
        OSError: a folder cannot be read.
    """
    return _walk(str(root.absolute()), (_identity(str(root)),))


def _walk(path: str, enclosing: tuple[tuple[int, int], ...]) -> Folder:
    folder = Folder(path)
    with os.scandir(path) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        suffix = PurePath(entry.name).suffix.lower()
        if entry.is_dir():
            identity = _identity(entry.path)
            if is_hidden(entry.name):
                folder.hidden[HIDDEN] += _files_below(entry.path)
            elif is_run_folder(Path(entry.path)):
                folder.hidden["output of a run"] += _files_below(entry.path)
            elif identity in enclosing:
                folder.hidden["link to an enclosing folder"] += 1
            else:
                folder.folders.append(_walk(entry.path, (*enclosing, identity)))
        elif is_hidden(entry.name):
            folder.hidden[HIDDEN] += 1
        elif suffix in IMAGE_SUFFIXES:  # a broken link too: it is reported as an image that cannot be read
            folder.images.append(entry.name)
        elif entry.name in METADATA:
            folder.tables.append(entry.name)
        else:
            folder.others.append(entry.name)
    return folder


def _files_below(path: str) -> int:
    return sum(len(files) for _, _, files in os.walk(path))


def _identity(path: str) -> tuple[int, int]:
    status = Path(path).stat()
    return status.st_dev, status.st_ino


def visible_files(root: Path) -> Iterator[Path]:
    """The files that are not hidden, sorted by path, with the rules of `walk` for folders and links."""
    yield from sorted(_visible(str(root), (_identity(str(root)),)))


def _visible(path: str, enclosing: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    with os.scandir(path) as entries:
        for entry in entries:
            if is_hidden(entry.name) or (entry.is_dir() and is_run_folder(Path(entry.path))):
                continue
            if not entry.is_dir():
                yield Path(entry.path)
            elif (identity := _identity(entry.path)) not in enclosing:
                yield from _visible(entry.path, (*enclosing, identity))
