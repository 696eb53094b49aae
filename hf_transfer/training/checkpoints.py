"""Checkpoints that are whole or not there: written beside, sealed with a manifest, and renamed.

A checkpoint is a folder in Trainer's own layout, which plain tools read, with two files more: `manifest.json`, written
last, with the size and SHA-256 of every other file, and `transfer_state.json`, what a run needs to go on as if it had
never stopped. A folder named `checkpoint-N` appears by a rename, so that it is complete at every instant; what a crash
leaves behind has another name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from hf_transfer.errors import UserError

MANIFEST = "manifest.json"
STATE = "transfer_state.json"
SAVING, OLD, GONE, BROKEN = ".saving", ".old-", ".gone-", "broken-"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders with a checkpoint's name, the newest first."""
    found = [p for p in output_dir.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)] if output_dir.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True)


def seal(folder: Path) -> None:
    """Bring every file to the disk, and then the manifest.

    Raises:
        OSError: the disk is full, or has gone.
    """
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _sync(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _digest(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
    _sync(manifest)
    _sync(folder)


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None where it is whole.

    One without a manifest is plain Trainer's: it is taken for whole where `trainer_state.json`, which Trainer writes
    last, can be read.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return _problem_of_trainers(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size:,} bytes instead of {expected['size']:,}"
        if _digest(path) != expected["sha256"]:
            return f"{name} does not have the content that was written"
    return None


def _problem_of_trainers(folder: Path) -> str | None:
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "trainer_state.json is missing"
    except (OSError, ValueError):
        return "trainer_state.json cannot be read"
    return None


def newest_valid(output_dir: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """(the newest whole checkpoint, [(folder, what is wrong)] for those newer than it)."""
    broken: list[tuple[Path, str]] = []
    for folder in checkpoints(output_dir):
        found = problem(folder)
        if found is None:
            return folder, broken
        broken.append((folder, found))
    return None, broken


def set_aside(folder: Path) -> Path:
    """Rename a broken checkpoint, so that nothing takes it for one; returns its new place."""
    place = folder.with_name(BROKEN + folder.name)
    if place.exists():
        shutil.rmtree(place)
    return folder.rename(place)


def publish(folder: Path, place: Path) -> None:
    """Give a sealed folder its name; what had the name goes once the new one is there.

    Raises:
        OSError: the folder above has gone, or is read-only.
    """
    if place.exists():
        old = place.with_name(OLD + place.name)
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
    folder.rename(place)
    _sync(place.parent)
    shutil.rmtree(place.with_name(OLD + place.name), ignore_errors=True)


def clear_leftovers(output_dir: Path) -> None:
    """Remove what a crash left half-written; a checkpoint that was being replaced gets its name back."""
    for old in output_dir.glob(f"{OLD}checkpoint-*"):
        place = old.with_name(old.name.removeprefix(OLD))
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(place)
    for rest in (output_dir / SAVING, *output_dir.glob(f"{GONE}checkpoint-*")):
        shutil.rmtree(rest, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, keep: str | None) -> None:
    """Remove the oldest checkpoints over `limit`, never `keep` (the best) nor the newest."""
    if not limit or limit < 0:
        return
    found = checkpoints(output_dir)
    kept = {p for p in found if keep and p.name == Path(keep).name}
    for path in found:
        if len(kept) < limit or path == found[0]:
            kept.add(path)
    for path in found:
        if path not in kept:
            gone = path.with_name(GONE + path.name)  # so that a kill in between leaves no half of one
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def checked(folder: str | Path) -> Path:
    """The folder of a checkpoint that the user named.

    Raises:
        UserError: it does not exist, or is not whole.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(
            f"resume_from_checkpoint: there is no folder {str(folder)!r}.",
            "Give a checkpoint's folder, or auto for the newest one in output_dir.",
        )
    found = problem(path)
    if found is not None:
        raise UserError(
            f"resume_from_checkpoint: {str(folder)!r} is not whole: {found}.",
            "Give another one, or auto for the newest whole one in output_dir.",
        )
    return path


@contextlib.contextmanager
def beside(output_dir: Path) -> Iterator[Path]:
    """An empty folder to write into; what is left in it afterwards goes."""
    folder = output_dir / SAVING
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have the operating system write a file, or a folder's list of names, to the disk."""
    flags = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) if path.is_dir() else os.O_RDONLY
    try:
        descriptor = os.open(path, flags)
    except PermissionError:  # Windows cannot open a folder
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
