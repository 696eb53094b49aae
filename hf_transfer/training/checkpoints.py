"""Checkpoints that are complete or absent: written to a temporary folder, sealed with a manifest, and renamed.

A checkpoint is a folder in Trainer's own layout with two more files: `manifest.json`, written last, with the size and
SHA-256 of every other file, and `transfer_state.json`, what a resumed run needs to equal an uninterrupted one. A folder
named `checkpoint-N` appears by a rename, so it is complete at any time; what a crash leaves behind has another name.
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

from hf_transfer.errors import UserError, option
from hf_transfer.training import checkpoint_contents
from hf_transfer.training.checkpoint_contents import WEIGHTS_ONLY

MANIFEST = "manifest.json"
STATE = "transfer_state.json"
SAVING, OLD, GONE, BROKEN = ".saving", ".old-", ".gone-", "broken-"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders named like a checkpoint, newest first."""
    folders = [p for p in output_dir.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)] if output_dir.is_dir() else []
    return sorted(folders, key=lambda p: int(p.name.split("-")[1]), reverse=True)


def seal(folder: Path) -> None:
    """Sync every file to the disk, then write the manifest.

    Raises:
        OSError: the disk is full or unavailable.
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
    """Why a run cannot be resumed from a checkpoint; None if it can.

    A checkpoint without a manifest is plain Trainer's: it is taken to be complete if `trainer_state.json`, which
    Trainer writes last, can be read, and no part is missing.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        if (folder / STATE).is_file():  # ours, which have one: a part of a copy
            return f"{MANIFEST} is missing"
        return _problem_of_trainers(folder) or checkpoint_contents.missing(folder)
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
    return checkpoint_contents.missing(folder)


def _problem_of_trainers(folder: Path) -> str | None:
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "trainer_state.json is missing"
    except (OSError, ValueError):
        return "trainer_state.json cannot be read"
    return None


def newest_valid(output_dir: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """(the newest checkpoint to resume from, [(folder, why it is not that)] for newer ones)."""
    incomplete: list[tuple[Path, str]] = []
    for folder in checkpoints(output_dir):
        defect = problem(folder)
        if defect is None:
            return folder, incomplete
        incomplete.append((folder, defect))
    return None, incomplete


def pass_over(folder: Path, why: str) -> str:
    """Leave out a checkpoint that a run cannot be resumed from; returns what to say. A damaged one is renamed."""
    if why == WEIGHTS_ONLY:
        return f"{folder.name} is passed over: {why}."
    return f"{folder.name} is incomplete ({why}); renamed to {set_aside(folder).name}."


def set_aside(folder: Path) -> Path:
    """Rename an incomplete checkpoint, so that nothing loads it; returns its new path."""
    place = folder.with_name(BROKEN + folder.name)
    if place.exists():
        shutil.rmtree(place)
    return folder.rename(place)


def publish(folder: Path, place: Path) -> None:
    """Move a sealed folder to its final path; a checkpoint that was there is deleted afterwards.

    Raises:
        OSError: the parent folder is missing or read-only.
    """
    if place.exists():
        old = place.with_name(OLD + place.name)
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
    folder.rename(place)
    _sync(place.parent)
    shutil.rmtree(place.with_name(OLD + place.name), ignore_errors=True)


def clear_leftovers(output_dir: Path) -> None:
    """Delete what a crash left half-written; a checkpoint that was being replaced gets its name back."""
    for old in output_dir.glob(f"{OLD}checkpoint-*"):
        place = old.with_name(old.name.removeprefix(OLD))
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(place)
    for rest in (output_dir / SAVING, *output_dir.glob(f"{GONE}checkpoint-*")):
        shutil.rmtree(rest, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, keep: str | None) -> None:
    """Delete the oldest checkpoints beyond a number.

    Args:
        output_dir: with the checkpoints.
        limit: number to keep; None or 0 keeps all.
        keep: path of the best checkpoint, which is never deleted; neither is the newest.
    """
    if not limit or limit < 0:
        return
    existing = checkpoints(output_dir)
    kept = {p for p in existing if keep and p.name == Path(keep).name}
    for path in existing:
        if len(kept) < limit or path == existing[0]:
            kept.add(path)
    for path in existing:
        if path not in kept:
            gone = path.with_name(GONE + path.name)  # a kill in between must not leave half a checkpoint
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def refuse_weights_only(output_dir: Path) -> None:
    """Raises:
    UserError: there are checkpoints, and none of them holds more than weights.
    """
    saved = checkpoints(output_dir)
    if saved and all(map(checkpoint_contents.is_weights_only, saved)):
        raise _no_optimizer(saved[0])


def _no_optimizer(folder: Path) -> UserError:
    return UserError(
        f"resume_from_checkpoint: a run cannot be resumed from {str(folder)!r}: {WEIGHTS_ONLY}.",
        f"Start a new run from these weights: {option('model_name_or_path', str(folder))} and another output_dir.",
    )


def checked(folder: str | Path) -> Path:
    """The folder of a checkpoint that the user named.

    Raises:
        UserError: it does not exist, or a run cannot be resumed from it.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(
            f"resume_from_checkpoint: there is no folder {str(folder)!r}.",
            "Give a checkpoint's folder, or auto for the newest one in output_dir.",
        )
    defect = problem(path)
    if defect == WEIGHTS_ONLY:
        raise _no_optimizer(path)
    if defect is not None:
        raise UserError(
            f"resume_from_checkpoint: {str(folder)!r} is incomplete: {defect}.",
            "Give another one, or auto for the newest complete one in output_dir.",
        )
    return path


@contextlib.contextmanager
def temporary_folder(output_dir: Path) -> Iterator[Path]:
    """A folder to write into; what is left in it at the end is deleted."""
    folder = output_dir / SAVING
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
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
