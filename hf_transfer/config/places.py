"""What the names of models and data refer to, as far as the disk tells: no hub is asked and nothing is imported.

A mistyped path is told at once this way; loading asks the same functions.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from hf_transfer.errors import UserError, closest, nearest

FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
BUNDLED_MODELS = ("bundled:minilm-l6", "bundled:efficientnet-lite0")
BUNDLED_DATA = ("bundled:rotten-tomatoes", "bundled:imdb", "bundled:digits", "bundled:fashion-mnist")
FOR_TEXTS, FOR_IMAGES = BUNDLED_MODELS
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_MODEL_FILES = ("config.json", "adapter_config.json", "run.yaml", "bank.json")  # of a model, a run, a HeadBank
_MOST_ENTRIES = 1000  # of a folder, that are looked at
_CLOSE = 0.8  # similarity from which on a bundled name is meant, not one on a hub
_SHORTEST = 4  # characters of a name that is completed


def format_of(path: Path) -> str | None:
    """`csv`, `json` or `parquet` by the suffix, also of a file compressed with gzip; None for other files."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        inner = FORMATS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return inner if inner != "parquet" else None
    return FORMATS.get(path.suffix.lower())


def is_path(name: str) -> bool:
    """Whether a name can only be that of a file or folder, not that of a repository on a hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def check_places(values: Mapping[str, Any]) -> None:
    """Check the names of the model and the data of a run.

    Raises:
        UserError: a file, folder or bundled name does not exist.
    """
    if values["model_name_or_path"]:
        check_model(str(values["model_name_or_path"]))
    if values["dataset_name"]:
        check_data(str(values["dataset_name"]))
    for key in ("train_file", "validation_file", "test_file"):
        if values[key] and not _is_pattern(str(values[key])) and "://" not in str(values[key]):
            check_file(Path(str(values[key])).expanduser(), key)


def check_model(name: str) -> None:
    """Raises:
    UserError: no folder and no bundled model has this name, or it is that of data.
    """
    key, path = "model_name_or_path", Path(name).expanduser()
    if said := data_in_place_of_model(name):
        raise UserError(said, key=key)
    if name.startswith("bundled:"):
        check_bundled(name, BUNDLED_MODELS)
    elif path.exists() and not path.is_dir():
        raise UserError(
            f"{name!r} is a file, not a folder.",
            "Use a hub id, the folder of a saved model, timm/<name> or bundled:<name>.",
            key=key,
        )
    elif is_path(name) and not path.is_dir():
        near = similar(path)
        raise UserError(
            f"{name!r} does not exist.",
            near or "Use a hub id, the folder of a saved model, timm/<name> or bundled:<name>.",
            key=key,
        )
    elif not path.is_dir() and "/" not in name and (bundled := _completed(name, BUNDLED_MODELS)):
        raise UserError(f"there is no folder and no model {name!r}.", f"Did you mean {bundled!r}?", key=key)


def check_data(name: str) -> None:
    """Raises:
    UserError: the name can only be a path or a bundled name, and there is none.
    """
    path = Path(name).expanduser()
    if name.startswith("bundled:"):
        check_bundled(name, BUNDLED_DATA)
    elif path.exists() or _is_pattern(name) or "://" in name:
        return
    elif format_of(path) or is_path(name):
        raise UserError(f"file or folder {name!r} does not exist.", similar(path), key="dataset_name")


def data_hint(name: str) -> str:
    """A hint for a dataset that is nowhere; a name without owner may be one on a hub, as imdb is."""
    bundled = _completed(name, BUNDLED_DATA) if "/" not in name else ""
    return f"Did you mean {bundled!r}?" if bundled else ""


def check_file(path: Path, key: str) -> None:
    """Raises:
    UserError: there is no such file or folder.
    """
    if not path.exists():
        raise UserError(f"file {str(path)!r} does not exist.", similar(path), key=key)


def check_bundled(name: str, names: Iterable[str]) -> None:
    """Raises:
    UserError: `name` is none of the bundled `names`.
    """
    names = tuple(names)
    if name not in names:
        near = _completed(name.removeprefix("bundled:"), names)
        hint = f" Did you mean {near!r}?" if near else nearest(name, names)
        raise UserError(f"Unknown bundled name {name!r}.", f"Available names: {', '.join(names)}.{hint}")


def data_in_place_of_model(name: str) -> str:
    """What to say where data stands in the place of the model; empty if it does not."""
    path = Path(name).expanduser()
    if not name:
        return ""
    if name in BUNDLED_DATA:
        model = FOR_IMAGES if name in BUNDLED_DATA[2:] else FOR_TEXTS
    elif path.is_file() and format_of(path):
        model = FOR_IMAGES if _names_images(path) else FOR_TEXTS
    elif path.is_dir() and not any((path / file).exists() for file in _MODEL_FILES):
        kinds = _kinds_in(path)
        if not kinds:
            return ""
        model = FOR_IMAGES if "image" in kinds else FOR_TEXTS
    else:
        return ""
    shown = f"'{name}'" if " " in name else name
    return f"{name!r} is data, and MODEL comes first; for example: hf-transfer train {model} {shown}"


def similar(path: Path) -> str:
    """A suggestion with the most similar name in the same folder."""
    names = [p.name for p in islice(path.parent.iterdir(), 100 * _MOST_ENTRIES)] if path.parent.is_dir() else []
    return nearest(path.name, names).strip()


def _is_pattern(name: str) -> bool:
    return any(c in name for c in "*?[") and not Path(name).expanduser().exists()


def _completed(name: str, names: Iterable[str]) -> str:
    """The bundled name that begins with `name` (minilm) or is close to it (minilm-l5)."""
    plain = {n.removeprefix("bundled:"): n for n in names}
    wanted = name.lower().replace("_", "-")
    begun = [p for p in plain if len(wanted) >= _SHORTEST and (p.startswith(wanted) or p.replace("-", "") == wanted)]
    near = begun[0] if begun else closest(wanted, plain, _CLOSE)
    return plain.get(near, "")


def _kinds_in(folder: Path) -> set[str]:
    """image, table: what the first files of a folder and of its subfolders are."""
    kinds, seen = set[str](), 0
    for _, folders, files in os.walk(folder):
        folders.sort()
        seen += len(files) + 1
        kinds |= {"image" for f in files if f.lower().endswith(_IMAGES)}
        kinds |= {"table" for f in files if format_of(Path(f))}
        if kinds or seen > _MOST_ENTRIES:
            break
    return kinds


def _names_images(table: Path) -> bool:
    """Whether file names of images occur at the beginning of a table."""
    with table.open("rb") as file:
        beginning = file.read(1 << 14).lower()
    return any(suffix.encode() in beginning for suffix in _IMAGES)
