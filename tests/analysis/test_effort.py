"""What `effort` sets, and where it does not apply."""

from __future__ import annotations

import pytest

from hf_transfer.analysis.effort import EFFORTS, Times, choose
from hf_transfer.analysis.few_labels import Choice
from hf_transfer.config.arguments.data import EFFORTS as NAMES
from hf_transfer.keys import keys

AUTO = {"strategy": Choice("two-phase", "few"), "num_train_epochs": Choice(34.0, "steps")}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
BEST |= {"save_strategy": "epoch"}
LONGER = {"num_train_epochs": 6.0}


def chosen(effort, chosen=(), unsolvable="", **given):
    """({key: value} that is chosen, reason for what is not)"""
    values = {name: key.default for name, key in keys().items()} | given
    made = choose(effort, values, set(given), dict(chosen), unsolvable)
    why = made.pop("effort").why if "effort" in made else None
    return {name: choice.value for name, choice in made.items()}, why


def test_the_table_names_the_choices_and_keys_that_exist():
    assert tuple(EFFORTS) == NAMES == keys()["effort"].choices and keys()["effort"].default == "normal"
    for table in EFFORTS.values():
        assert set(table) <= set(keys())
        numbers = {name for name, value in table.items() if isinstance(value, Times)}
        assert all(isinstance(keys()[name].default, float) for name in numbers)


def test_normal_is_what_was_chosen():
    assert chosen("normal", AUTO) == ({"strategy": "two-phase", "num_train_epochs": 34.0}, None)


@pytest.mark.parametrize(
    ("given", "unsolvable", "solves", "why"),
    [
        ({}, "", True, ""),
        ({"strategy": "linear-probe"}, "", True, ""),
        ({}, "it is an MLP", False, "the head cannot be solved for: it is an MLP"),
        ({"strategy": "full"}, "", False, "strategy: full was given"),
        ({"strategy": None}, "", False, "strategy: None was given"),
        ({"probe_solver": "sgd"}, "", False, "probe_solver: sgd was given"),
        ({"stages": [{"train": "all", "epochs": 1}]}, "", False, "stages were given"),
    ],
)
def test_quick(given, unsolvable, solves, why):
    made, said = chosen("quick", AUTO, unsolvable, **given)
    assert said == (why and f"effort: quick does not wholly apply: {why}")
    if solves:  # nothing of the course of training everything is left
        assert made == {"strategy": "linear-probe", "probe_solver": "lbfgs", "label_issues": False}
    else:
        assert made == {"strategy": "two-phase", "num_train_epochs": 34.0, "label_issues": False}


@pytest.mark.parametrize(
    ("given", "expected", "why"),
    [
        ({}, LONGER | BEST, ""),
        ({"num_train_epochs": 5.0}, {"num_train_epochs": 10.0} | BEST, ""),  # the one given wins later
        ({"max_steps": 9}, BEST, "max_steps: 9 was given"),
        ({"stages": [{"train": "all", "epochs": 1}]}, BEST, "stages say how long they are"),
        ({"eval_strategy": "steps"}, LONGER, "eval_strategy: steps was given"),
        ({"save_strategy": "no"}, LONGER, "save_strategy: no was given"),
        ({"save_strategy": "best"}, LONGER | BEST, ""),
        ({"metric_for_best_model": None}, LONGER, "metric_for_best_model: null was given"),
        ({"load_best_model_at_end": False}, LONGER | {"load_best_model_at_end": True}, ""),
        ({"probe_solver": "lbfgs"}, {}, "the head is solved for, which takes no steps"),
    ],
)
def test_best(given, expected, why):
    assert chosen("best", **given) == (expected, why and f"effort: best does not wholly apply: {why}")


def test_best_goes_on_from_what_was_chosen():
    made, _ = chosen("best", AUTO)
    assert made["num_train_epochs"] == 68.0 and made["strategy"] == "two-phase"
    made, _ = chosen("best", metric_for_best_model="accuracy", max_steps=3)
    assert made == {"load_best_model_at_end": True, "save_strategy": "epoch"}
    for kind, metric, greater in (("single_label_classification", "accuracy", True), ("regression", "rmse", False)):
        made, _ = chosen("best", problem_type=kind)
        assert (made["metric_for_best_model"], made["greater_is_better"]) == (metric, greater)
    solved = {"strategy": Choice("linear-probe", ""), "probe_solver": Choice("lbfgs", "")}
    assert chosen("best", solved)[0] == {"strategy": "linear-probe", "probe_solver": "lbfgs"}
