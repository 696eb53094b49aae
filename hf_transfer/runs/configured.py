"""From what `fine_tune` is given to a configuration: keys, and data as Python objects."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.in_memory import splits_of
from hf_transfer.data.locate import IN_MEMORY
from hf_transfer.data.raw import RawSplits
from hf_transfer.errors import UserError
from hf_transfer.settings import Config

_TARGET, TARGET_KEY = "target_dataset", "target_dataset_name"
_HELD_OUT = {"validation_file": "eval_dataset", "test_file": "test_dataset"}


def configured(
    model_name_or_path: str | None,
    dataset_name: Any,
    keys: Mapping[str, Any],
    needs: Collection[str] = ("model", "output", "data"),
) -> Config:
    """The configuration of what `fine_tune` is given.

    Raises:
        UserError: the keys or the data are not right.
    """
    given = {"model_name_or_path": model_name_or_path, **keys}
    objects: dict[str, Any] = {}  # data in memory by the key that names it
    for key, name, value in (
        ("dataset_name", "dataset_name", dataset_name),
        *((key, name, given.pop(name, None)) for key, name in _HELD_OUT.items()),
    ):
        if value is None:
            continue
        if given.get(key) is not None:
            raise UserError(f"{name} and {key} contradict each other: keep one.")
        is_named = isinstance(value, str | Path)
        given[key] = str(value) if is_named else IN_MEMORY
        if not is_named:
            objects[key] = value
    target = given.pop(_TARGET, None)
    if target is not None:
        if given.get(TARGET_KEY) is not None:
            raise UserError(f"{_TARGET} and {TARGET_KEY} contradict each other: keep one.")
        given[TARGET_KEY] = str(target) if isinstance(target, str | Path) else IN_MEMORY
    config = Config.from_sources({}, given, needs=needs)
    if target is not None and given[TARGET_KEY] == IN_MEMORY:
        config = replace(config, data=replace(config.data, target_in_memory=splits_of(target, config.data)))
    if not objects:
        return config
    return replace(config, data=replace(config.data, in_memory=_in_memory(objects, config.data)))


def _in_memory(objects: Mapping[str, Any], args: DataArguments) -> RawSplits:
    """The splits that were given as Python objects.

    Args:
        objects: by the key that names them.
        args: data keys.

    Raises:
        UserError: they are no data, or a split was given twice.
    """
    splits = RawSplits({})
    for key, value in objects.items():
        name = key.removesuffix("_file")
        named = splits_of(value, args) if key == "dataset_name" else splits_of(value, args, name)
        if key != "dataset_name" and list(named) != [name]:
            raise UserError(f"{_HELD_OUT[key]}: expected one split, got {', '.join(named)}.", "Give one of them.")
        if name in splits:
            raise UserError(f"{_HELD_OUT[key]}: the dataset has a {name} split already.", "Keep one of them.")
        splits.update(named)
        splits.notes += named.notes
    return splits
