"""The fields of `TrainingArguments` are read without importing transformers, and are the same."""

from __future__ import annotations

import pytest
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from hf_transfer.config import inherited
from hf_transfer.config.arguments.schedule import OWN_SCHEDULES
from hf_transfer.config.fields import Key, enum_values, keys_of
from hf_transfer.keys import keys
from hf_transfer.training.arguments import TransferArguments
from hf_transfer.training.schedules import SCHEDULES

UNKEYED = {"parallelism_config"}  # an object of accelerate, settable in Python only


def known(key: Key) -> tuple:
    """What is known of a key; an enumeration by its values, since another class has the same."""
    types = {t.__name__ if isinstance(t, type) else str(t) for t in key.types}
    return key.name, types, key.default, key.help, key.choices, key.about


def test_what_is_read_from_the_source_is_what_the_class_says():
    read, imported = keys_of(inherited.training_arguments(), ""), keys_of(TrainingArguments, "")
    assert inherited.training_arguments() is not TrainingArguments, "it was imported"
    assert list(read) == list(imported) and len(read) > 100
    for name in set(read) - UNKEYED:
        assert known(read[name]) == known(imported[name]), name
        assert enum_values(read[name].hint) == enum_values(imported[name].hint), name
    assert inherited.training_arguments().__doc__ == TrainingArguments.__doc__


def test_schedules_are_those_of_transformers_and_ours():
    assert inherited.scheduler_types() == tuple(s.value for s in SchedulerType)
    assert set(OWN_SCHEDULES) == set(SCHEDULES)


def test_every_key_of_training_is_a_field_with_this_type():
    """`TransferArguments` joins the same classes as the list of keys."""
    ours = keys_of(TransferArguments, "")
    for name in ours.keys() & keys().keys():
        assert known(keys()[name])[1] == known(ours[name])[1], name


@pytest.fixture
def unreadable(tmp_path, monkeypatch):
    """transformers with another layout of its source."""

    class Spec:
        origin = str(tmp_path / "__init__.py")

    caches = (inherited._names, inherited.training_arguments, inherited.scheduler_types)
    monkeypatch.setattr(inherited, "find_spec", lambda name: Spec)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("source", [None, "class TrainingArguments:\n    if is_new():\n        a: int = field()\n"])
def test_a_source_that_cannot_be_read_is_imported(unreadable, source):
    if source is not None:
        (unreadable / "utils").mkdir()
        (unreadable / "utils" / "logging.py").write_text("log_levels = {}\n")
        for name in inherited._ENUMERATIONS:
            (unreadable / name).write_text(source)
    assert inherited.training_arguments() is TrainingArguments
    assert "cosine" in inherited.scheduler_types()
