"""What a resumed run may change: every key, on plain data."""

from __future__ import annotations

import copy
import json
from dataclasses import fields

import pytest
from transformers import TrainingArguments

from hf_transfer import TransferArguments, UserError
from hf_transfer.training import run_identity
from hf_transfer.training.run_identity import resumed_as
from hf_transfer.training.run_subject import data_facts
from tests.helpers import texts

KINDS = {f.name for f in fields(TransferArguments) if f.init}


@pytest.fixture(scope="module")
def now(tmp_path_factory):
    """Facts of a run with two optimizer groups, as they are written and read."""
    args = TransferArguments(str(tmp_path_factory.mktemp("out")), strategy="full", use_cpu=True)
    named = {name: object() for name in ("query", "value", "head")}
    groups = [
        {"layers": ["a"], "rates": [0.1], "weight_decay": 0.0, "params": [named["query"], named["value"]]},
        {"layers": ["head"], "rates": [0.2], "weight_decay": 0.0, "params": [named["head"]]},
    ]
    facts = run_identity.facts(
        args, None, groups, named, data_facts(texts(8)), {"augmentation": "none", "image_size": 32}
    )
    return {"kinds": resumed_as(args), "facts": json.loads(json.dumps(facts))}


@pytest.mark.parametrize("name", sorted(KINDS))
def test_every_key(name, now):
    """Fixed: refused, with both values. Plan: refused, and allowed with a note. Free: not even recorded."""
    kind, facts = now["kinds"][name], now["facts"]
    if kind == "free":
        assert name not in facts["keys"]
        return
    changed = copy.deepcopy(facts)
    changed["keys"][name] = "another value"
    said = f"{name}: {facts['keys'][name]!r} then, 'another value' now"
    with pytest.raises(UserError) as refusal:
        run_identity.compare(facts, changed, False)
    assert said in str(refusal.value)
    if kind == "fixed":
        with pytest.raises(UserError, match="not the same run"):
            run_identity.compare(facts, changed, True)
    else:
        (note,) = run_identity.compare(facts, changed, True)
        assert said in note


def test_the_kinds_that_users_rely_on(now):
    kinds = now["kinds"]
    for name in (
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "adapter",
        "seed",
        "optim",
        "balanced_sampling",
        "length_bucketing",
    ):
        assert kinds[name] == "fixed", name
    for name in ("freeze", "stages", "learning_rate", "lr_scheduler_type", "weight_decay", "unfreeze_patience"):
        assert kinds[name] == "plan", name
    for name in ("logging_steps", "save_steps", "dataloader_num_workers", "output_dir", "on_nonfinite"):
        assert kinds[name] == "free", name


def test_a_field_of_a_newer_version_is_fixed():
    class Newer(TrainingArguments):
        pass

    Newer.__dataclass_fields__ = {**TrainingArguments.__dataclass_fields__, "momentum_of_next_year": copy.copy(
        TrainingArguments.__dataclass_fields__["adam_beta1"]
    )}  # fmt: skip
    Newer.__dataclass_fields__["momentum_of_next_year"].name = "momentum_of_next_year"
    kinds = resumed_as(Newer("out", use_cpu=True))
    assert (kinds["momentum_of_next_year"], kinds["adam_beta1"]) == ("fixed", "plan")


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([["query"], ["head"]], "parameters that train: 3 then, 2 now (value then only)"),
        ([["query", "value", "key"], ["head"]], "parameters that train: 3 then, 4 now (key now only)"),
        ([["query"], ["head", "value"]], "which parameters share an optimizer group"),
    ],
)
def test_the_optimizers_members_are_compared(members, said, now):
    """Rates alone do not show them: `freeze: [query]` leaves every rate as it was."""
    changed = {**now["facts"], "members": members}
    with pytest.raises(UserError) as refusal:
        run_identity.compare(now["facts"], changed, False)
    assert said in str(refusal.value)


def test_a_checkpoint_of_an_earlier_version_is_compared_by_what_it_recorded(now):
    then = copy.deepcopy(now["facts"])
    del then["members"], then["kinds"], then["of_one_length"]
    for name in ("lora_alpha", "freeze", "length_bucketing", "strategy"):
        del then["keys"][name]
    changed = copy.deepcopy(now["facts"])
    changed["keys"]["lora_alpha"] = 64
    assert run_identity.compare(then, changed, False) == []
    changed["keys"]["seed"] = 7
    with pytest.raises(UserError, match="seed: 42 then, 7 now"):
        run_identity.compare(then, changed, False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"examples": 9}, "training examples: 8 then, 9 now"),
        ({"inputs": "x"}, "same number, other content"),
        ({"labels": "x"}, "the labels of the training examples differ"),
        ({"global_batch": 16}, "examples per optimizer step: 8 then, 16 now"),
        ({"data_keys": {"augmentation": "strong", "image_size": 32}}, "augmentation: 'none' then, 'strong' now"),
    ],
)
def test_other_data_is_another_run(change, said, now):
    with pytest.raises(UserError, match="not the same run") as refusal:
        run_identity.compare(now["facts"], {**now["facts"], **change}, True)
    assert said in str(refusal.value)


def test_the_optimizers_state_goes_by_name():
    """Another order, one parameter more and one less: positions say nothing."""
    saved = {"state": {0: "of a", 1: "of b", 2: "of c"}}
    assert run_identity.by_name(saved, ["a", "b", "c"], ["c", "new", "a"]) == {0: "of c", 2: "of a"}
