"""What the folders of an image folder are: splits, classes, or wrappers around them.

A layout that allows two readings is an error that names both; no split is ever merged into another.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_transfer.data.image_tree import IMAGE, Folder, plural
from hf_transfer.data.split_names import FILLERS, SPLITS, split_roles
from hf_transfer.errors import UserError

_FOLD = re.compile(r"(batch|chunk|fold|group|part|shard|split|subset)s?[-_ ]*\d+", re.IGNORECASE)
_MAX_SHOWN = 5


@dataclass
class Split:
    """The images of a split.

    Attributes:
        name: `train`, `validation` or `test`.
        tally: number of files in its folders, by kind.
        paths: absolute paths of its images.
        classes: class folder of each image; None where there is none.
        problem: why the folders do not say the classes.
    """

    name: str
    tally: Counter[str]
    paths: list[str]
    classes: list[str | None]
    problem: UserError | None = None

    @property
    def class_names(self) -> list[str]:
        return sorted({name for name in self.classes if name is not None})


@dataclass
class Layout:
    """The splits of an image folder, training first, and notes about how it was read."""

    splits: list[Split]
    notes: list[str]


def find_layout(root: Folder, has_table: Callable[[Folder], bool]) -> Layout:
    """The splits and classes that folders name.

    Args:
        root: the folder that the user named.
        has_table: whether a metadata table covers a folder.

    Raises:
        UserError: the names allow two readings, or two folders name the same split.
    """
    node, notes = root, list[str]()
    while True:
        inside = node.with_images
        roles = _roles(inside)
        if roles and not _are_classes(node, inside, roles, has_table, notes):
            return _named_splits([(roles[f.name], f) for f in inside if f.name in roles], notes)
        if roles or not _is_wrapper(node):
            break
        (node,) = inside
    if below := _splits_below_classes(node):
        notes.append(f"{_listed(node, node.with_images)}: classes, with the splits in folders below them.")
        return Layout(below, notes)
    return Layout([_find_classes("train", node, (), notes)], notes)


# ---- splits --------------------------------------------------------------------------------------------------------


def _roles(folders: Sequence[Folder]) -> dict[str, str]:
    return split_roles(folder.name for folder in folders)


def _are_classes(
    node: Folder,
    inside: Sequence[Folder],
    roles: dict[str, str],
    has_table: Callable[[Folder], bool],
    notes: list[str],
) -> bool:
    """Whether folders named after splits are classes after all, because of the folders next to them.

    Raises:
        UserError: it is not clear.
    """
    named = [f for f in inside if f.name in roles]
    others = [f for f in inside if f.name not in roles]
    train = next((f for f in named if roles[f.name] == "train"), None)
    if not others:
        return False
    if train is not None and (not train.is_flat or has_table(train)):
        classes = {f.name for f in _unwrapped("train", train).with_images}
        below = [{f.name for f in _unwrapped("", other).with_images} for other in others]
        if not any(names and classes.isdisjoint(names) for names in below):
            unused = ", ".join(f"{_relative(node, f)} ({plural(f.tally[IMAGE], 'image')})" for f in others)
            notes.append(f"Not used, because the name says no split: {unused}.")
            return False
    elif named == [train] and all(f.is_flat for f in inside) and len(others) > 1:
        notes.append(f"{named[0].name} is read as a class, like the folders next to it.")
        return True
    raise UserError(
        f"in folder {node.path!r}, {_listed(node, named)} can be read as a split or as a class, because of "
        f"{_listed(node, others)} next to it.",
        "If it is a split, move the folders of the training classes into a folder named train, and everything else "
        f"out of the way. If it is a class, rename it, for example to 'class {named[0].name}'.",
        key="dataset_name",
    )


def _named_splits(named: Sequence[tuple[str, Folder]], notes: list[str]) -> Layout:
    by_split: dict[str, Folder] = {}
    for split, folder in named:
        if split in by_split:
            raise UserError(
                f"folders {by_split[split].name!r} and {folder.name!r} both mean the {split} split.",
                "Rename one of them, or move it elsewhere.",
                key="dataset_name",
            )
        by_split[split] = folder
    splits, trained = list[Split](), frozenset[str]()
    for name in (name for name in SPLITS if name in by_split):
        found = _find_classes(name, by_split[name], trained, notes)
        trained = trained or frozenset(found.class_names)
        splits.append(found)
    return Layout(splits, notes)


def _splits_below_classes(node: Folder) -> list[Split]:
    """The splits of `cat/train`, `cat/val`, `dog/train`, `dog/val`; none unless every class has the same ones."""
    rows = []
    for folder in node.with_images:
        inner = folder.with_images
        clear = inner and not folder.images and all(f.is_flat and _roles([f]) for f in inner)
        roles = _roles(inner) if clear else {}
        if len(set(roles.values())) != len(inner) or not clear:
            return []
        rows.append((folder.name, {roles[f.name]: f for f in inner}))
    if len(rows) < 2 or node.images or any(set(by_split) != set(rows[0][1]) for _, by_split in rows):
        return []
    splits = []
    for split in (name for name in SPLITS if name in rows[0][1]):
        folders = [(label, by_split[split]) for label, by_split in rows]
        paths = [path for _, folder in folders for path in _paths(folder)]
        classes: list[str | None] = [label for label, folder in folders for _ in folder.images]
        splits.append(Split(split, sum((f.tally for _, f in folders), Counter[str]()), paths, classes))
    return splits


# ---- classes -------------------------------------------------------------------------------------------------------


def _is_wrapper(node: Folder) -> bool:
    """Whether all images are in one folder that has further folders with images, and no images itself."""
    inside = node.with_images
    return len(inside) == 1 and not node.images and not inside[0].images and not inside[0].is_flat


def _unwrapped(split: str, node: Folder, trained: Collection[str] = ()) -> Folder:
    """The folder of a split without wrappers such as `images`, or its own name again."""
    inside = node.with_images
    if len(inside) == 1 and not node.images and inside[0].name not in trained:
        (inner,) = inside
        repeats = inner.name == node.name or inner.name.lower() in FILLERS or _roles([inner]) == {inner.name: split}
        if repeats or _is_wrapper(node):
            return _unwrapped(split, inner, trained)
    return node


def _find_classes(split: str, place: Folder, trained: Collection[str], notes: list[str]) -> Split:
    """The images of a split by the class folders in `place`; the uppermost folder is the class, as in torchvision.

    Args:
        split: name of the split.
        place: its folder.
        trained: classes of the training split.
        notes: gets notes about how it was read.
    """
    node = _unwrapped(split, place, trained)
    inside = node.with_images
    paths, classes = _paths(node), list[str | None]([None] * len(node.images))
    for folder in inside:
        for inner in folder.below():
            paths += _paths(inner)
        classes += [folder.name] * (len(paths) - len(classes))
    problem = _problem(node)
    if empty := [f.name for f in node.folders if inside and not f.holds_images]:
        notes.append(f"{split}: no class, because there is no image in it: {', '.join(empty)}.")
    if not problem and (nested := [f for f in inside if not f.is_flat]):
        notes.append(
            f"{split}: the classes are the folders {_listed(node, inside)}; images in folders below them (as in "
            f"{_relative(node, nested[0].with_images[0])}) belong to the uppermost folder."
        )
    return Split(split, place.tally, paths, classes, problem)


def _paths(folder: Folder) -> list[str]:
    return [f"{folder.path}{os.sep}{name}" for name in folder.images]


def _problem(node: Folder) -> UserError | None:
    """Why the folders below `node` are not classes; None if they are."""
    inside = node.with_images
    where = f"folder {node.path!r}"
    if not inside:
        return _error(
            f"{where} contains {plural(len(node.images), 'image')}, but no class folders.",
            "Put the images of each class into a folder of its own, or list them with their labels in a metadata.csv "
            "(columns file_name and label).",
        )
    if node.images:
        return _error(
            f"{where} contains {plural(len(node.images), 'image')} (such as {node.images[0]!r}) next to the class "
            f"folders {_listed(node, inside)}.",
            "Move them into a class folder, or out of the way.",
        )
    if unreadable := [f for f in inside if not f.tally[IMAGE]]:
        return _error(
            f"class folder {unreadable[0].path!r} contains no image that can be read, only "
            f"{', '.join(f'{n:,} {kind}' for kind, n in unreadable[0].tally.items())}.",
            "Convert the images, or remove the folder.",
        )
    roles = _roles(inside)
    splits = [f for f in inside if f.name in roles and (len(roles) > 1 or not f.is_flat)]
    splits += [f for top in inside for f in top.below() if f is not top and f.holds_images and _roles([f])]
    if splits:
        return _error(
            f"{where} contains {_relative(node, splits[0])!r}, which is named like a split and stands where a "
            "class is expected.",
            "Put the splits first (train/cat, val/cat), set dataset_name to the folder that contains the splits, or "
            "rename the folder if it is a class.",
        )
    return _uneven(node, inside)


def _uneven(node: Folder, inside: Sequence[Folder]) -> UserError | None:
    """Images at different depths, or class folders that are parts of the data."""
    depths: dict[int, str] = {}
    for top in inside:
        for folder in top.below():
            if folder.images:
                path = f"{_relative(node, folder)}{os.sep}{folder.images[0]}"
                depths.setdefault(path.count(os.sep), path)
    if len(depths) > 1:
        first, second = [depths[depth] for depth in sorted(depths)][:2]
        return _error(
            f"the images in folder {node.path!r} are at different depths: {first!r}, but {second!r}.",
            "Arrange them as one folder per class, all at the same depth.",
        )
    shared = set.intersection(*({f.name for f in top.with_images} for top in inside)) if len(inside) > 1 else set()
    if shared and all(_FOLD.fullmatch(top.name) for top in inside):
        return _error(
            f"the folders {_listed(node, inside)} look like parts of the data with the same classes "
            f"({', '.join(sorted(shared)[:_MAX_SHOWN])}), not like classes.",
            "Merge them into one folder per class, or name them after splits.",
        )
    return None


def _error(message: str, fix: str) -> UserError:
    return UserError(message, fix, key="dataset_name")


def _relative(node: Folder, folder: Folder) -> str:
    return str(Path(folder.path).relative_to(node.path))


def _listed(node: Folder, folders: Sequence[Folder]) -> str:
    names = ", ".join(_relative(node, f) for f in folders[:_MAX_SHOWN])
    return f"{names}, … ({len(folders):,})" if len(folders) > _MAX_SHOWN else names
