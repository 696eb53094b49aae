"""A key is declared once, says what resuming makes of it, and is read."""

from __future__ import annotations

import ast
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from transformers import HfArgumentParser, TrainingArguments

import hf_transfer
from hf_transfer import TransferArguments
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.config.arguments.trainer import INHERITED
from hf_transfer.config.fields import Setting, setting, settings_of, wrong_values

PACKAGE = Path(hf_transfer.__file__).parent
OURS = (ModelArguments, DataArguments, TransferArguments)


def declared() -> dict[str, Setting]:
    return {name: about for cls in OURS for name, about in settings_of(cls).items()}


def names_read(package: Path) -> set[str]:
    """Attributes and whole strings outside the declarations: `args.name` and `values["name"]`."""
    names: set[str] = set()
    for path in package.rglob("*.py"):
        if "arguments" in path.relative_to(package).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
    return names


def unread(names, package: Path = PACKAGE) -> set[str]:
    return set(names) - names_read(package)


def test_every_key_of_ours_says_what_resuming_makes_of_it():
    inherited = {f.name for f in fields(TrainingArguments)}
    ours = {f.name for cls in OURS for f in fields(cls) if f.init} - inherited
    assert ours - set(declared()) == set(), "declare them with `setting`"
    assert {name for name, about in declared().items() if about.resume is None} == set()


def test_the_table_of_inherited_fields_is_complete():
    """As of the versions that are tested; a newer one's fields count as fixed until they are in the table."""
    assert all(about.resume for about in INHERITED.values())
    missing = {f.name for f in fields(TrainingArguments)} - set(INHERITED) - set(declared())
    assert not {name for name in missing if not name.startswith("_")}, missing


def test_every_key_is_read_outside_its_declaration():
    assert unread(declared()) == set()


def test_a_key_that_nothing_reads_would_be_seen():
    @dataclass
    class Planted:
        skip_what_is_frozen_twice: bool = setting(False, "does nothing", resume="free")

    assert unread(settings_of(Planted)) == {"skip_what_is_frozen_twice"}


def test_transformers_parser_takes_our_arguments(tmp_path):
    """It passes a field's metadata to argparse, which refuses what it does not know."""
    argv = [
        "--use_cpu",
        "--output_dir",
        str(tmp_path),
        "--strategy",
        "gradual",
        "--unfreeze_trigger",
        "plateau",
        "--use_cpu",
        "true",
    ]
    (args,) = HfArgumentParser(TransferArguments).parse_args_into_dataclasses(argv)
    assert (args.strategy, args.unfreeze_trigger, args.learning_rate) == ("gradual", "plateau", 5e-5)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, TrainingArguments.__dataclass_fields__["learning_rate"].default),
        ({"strategy": "full"}, 5e-5),
        ({"strategy": "linear-probe"}, 1e-3),
        ({"strategy": "lora"}, 5e-4),
        ({"adapter": "ia3"}, 5e-4),
        ({"strategy": "linear-probe", "learning_rate": 5e-5}, 5e-5),
        ({"adapter": "lora", "learning_rate": 5e-5}, 5e-5),
    ],
)
def test_a_learning_rate_that_is_not_given_is_the_strategys(keys, expected, tmp_path):
    """Also in Python; the default can be told from the same number, given."""
    args = TransferArguments(str(tmp_path), use_cpu=True, **keys)
    assert args.learning_rate == expected
    given = {k: v for k, v in args.to_dict().items() if TransferArguments.__dataclass_fields__[k].init}
    assert TransferArguments(**given).learning_rate == expected


BOUNDS = {
    "share": Setting(minimum=0, maximum=1),
    "count": Setting(above=0),
    "rate": Setting(minimum=0, below=1),
    "kind": Setting(choices=("one", "other")),
}


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("share", (0, 0.5, 1), (-0.1, 1.1, float("nan"), float("inf"))),
        ("count", (1, 1e9), (0, -1, float("inf"))),
        ("rate", (0, 0.999), (1, -1e-9)),
        ("kind", ("one", "other", None), ("oter",)),
    ],
)
def test_bounds_and_choices(name, good, bad):
    assert not [said for value in good for said in wrong_values({name: value}, BOUNDS)]
    said = [list(wrong_values({name: value}, BOUNDS)) for value in bad]
    assert all(len(sentences) == 1 and sentences[0].startswith(f"{name}: ") for sentences in said)
