"""The folder of a `HeadBank`: `bank.json`, and below `tasks` a folder per task that loads on its own.

bank.json   {"backbone": name, "tasks": {name: {"folder": below the bank's, "views": keys of `Views`}}}
"""

from __future__ import annotations

import json
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_transfer.adapters.files import write_config
from hf_transfer.errors import UserError, one_line
from hf_transfer.files import write_json
from hf_transfer.inference.predictor import Predictor
from hf_transfer.inference.run_keys import save_keys

BANK = "bank.json"


def save_tasks(tasks: Mapping[str, tuple[Predictor, threading.Lock]], backbone: str, folder: Path) -> Path:
    """Write tasks beside `folder` and rename.

    Args:
        tasks: by name, each with the lock of its tokenizer.
        backbone: hub id or folder of the backbone that they share.
        folder: is made.

    Raises:
        UserError: there is no task, or there is such a folder already.
    """
    if not tasks:
        raise UserError("bank: it has no task to save.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"bank: {str(folder)!r} exists already.", "Choose another folder, or remove it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".bank-") as beside:
        whole = Path(beside) / "bank"
        entries: dict[str, Any] = {}
        for name, (predictor, lock) in tasks.items():
            place = f"tasks/{_folder_name(name, {e['folder'] for e in entries.values()})}"
            with lock:
                _save_task(predictor, whole / place)
            entries[name] = {"folder": place, "views": asdict(predictor.views)}
        write_json(whole / BANK, {"backbone": _from_anywhere(backbone), "tasks": entries})
        whole.replace(folder)
    return folder


def saved_tasks(folder: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """(name, folder, keys of `Views`) of each task that was saved.

    Raises:
        UserError: it is not the folder of a bank.
    """
    try:
        entries = json.loads((folder / BANK).read_text(encoding="utf-8"))["tasks"]
        tasks = [(name, folder / entry["folder"], dict(entry["views"])) for name, entry in entries.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"bank: {str(folder)!r} is not a folder that HeadBank.save wrote ({one_line(error, 100)}).",
            "Add the tasks of a run with HeadBank().add(name, run).",
        ) from error
    yield from tasks


def _save_task(predictor: Predictor, folder: Path) -> None:
    """An adapter with its labels, its tokenizer or image processor, and what `Predictor.load` reads of a run."""
    folder.mkdir(parents=True)
    predictor.model.save_pretrained(folder)
    write_config(predictor.model, folder)
    predictor.processor.save_pretrained(folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**config, "base_model_name_or_path": _from_anywhere(config["base_model_name_or_path"])})
    save_keys(predictor, folder)


def _from_anywhere(backbone: str) -> str:
    """A backbone in a folder by its absolute path; a hub id as it is."""
    return str(Path(backbone).absolute()) if Path(backbone).is_dir() else backbone


def _folder_name(name: str, taken: set[str]) -> str:
    """A name for the folder of a task that any file system takes."""
    plain = re.sub(r"[^\w-]+", "-", name).strip("-").lower() or "task"
    used = {place.rpartition("/")[2] for place in taken}
    return next(n for n in (plain, *(f"{plain}-{i}" for i in range(2, len(used) + 3))) if n not in used)
