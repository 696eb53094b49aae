"""Searches: what the ranges mean, what optuna is asked, and trials of tiny models that are stopped and gone on with."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
from pathlib import Path

import pytest

from hf_transfer import UserError, compare
from hf_transfer.cli.program import main
from hf_transfer.runs import saving
from hf_transfer.runs.configured import configured
from hf_transfer.studies import running, sampling
from hf_transfer.studies.announcing import lines_of
from hf_transfer.studies.history import by_epoch, last_training_loss
from hf_transfer.studies.question import Question, search_asked
from hf_transfer.studies.sampling import Told, is_hopeless, propose
from hf_transfer.studies.space import Choices, Range, automatic, read_space
from tests.studies.conftest import QUICK

RATES = {"learning_rate": [1e-5, 1e-3, "log"]}


# ---- the space ----


@pytest.mark.parametrize(
    ("values", "read"),
    [
        ({"learning_rate": ["1e-5", 1e-3]}, Range(1e-5, 1e-3)),
        ({"learning_rate": [1e-5, 1e-3, "log"]}, Range(1e-5, 1e-3, is_log=True)),
        ({"lora_r": [4, 32]}, Range(4, 32, is_int=True)),
        ({"lora_r": [4, 32, "log"]}, Range(4, 32, is_log=True, is_int=True)),
        ({"num_train_epochs": [1, 5, "int"]}, Range(1, 5, is_int=True)),
        ({"lora_r": [4, 8, 32]}, Choices((4, 8, 32))),
        ({"lora_r": {"choices": [4, 32]}}, Choices((4, 32))),
        ({"strategy": ["gradual", "full"]}, Choices(("gradual", "full"))),
        ({"bf16": [True, False]}, Choices((True, False))),
    ],
)
def test_a_range_or_choices(values, read):
    assert list(read_space(values, {}).values()) == [read]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"learning_rate": [1e-3, 1e-5]},
            "learning_rate: the low end must be below the high end, got 0.001 and 1e-05.",
        ),
        ({"learning_rate": [0, 1e-3, "log"]}, "learning_rate: a logarithmic range begins above 0, got 0."),
        ({"learning_rate": [1e-5, 1e-3, "lgo"]}, "'lgo' is not one of log, int. Did you mean 'log'?"),
        ({"learning_rate": 1e-3}, "learning_rate: expected [low, high], [low, high, log], [low, high, int] or a list"),
        ({"learnin_rate": [1e-5, 1e-3]}, "learnin_rate is not a key. Did you mean 'learning_rate'?"),
        ({"augmentation": [1, 3]}, "augmentation: '1' is not one of none, basic, strong"),
        ({"lora_r": [1.5, 4]}, "lora_r: 1.5 is not a whole number."),
        ({"num_train_epochs": [1.5, 4, "int"]}, "ends in whole numbers, got 1.5 and 4."),
        ({"weight_decay": [-1, 1]}, "weight_decay"),
        ({"seed": [1, 2]}, "seed cannot vary: give seeds"),
        ({"bf16": [True]}, "bf16 has 1 value, so it does not vary"),
        ({"strategy": ["full", "full"]}, "strategy names a value twice."),
        ({"head_lr": [1, 2], "lora_r": [2, 1]}, "2 problems found"),
        ({"max_steps": [5, 9]}, "max_steps is given for all trials as well; keep one."),
        ({}, "search: expected a mapping of keys to ranges or choices"),
        ("all", "or auto; got 'all'."),
    ],
)
def test_a_wrong_space_is_refused(values, said):
    with pytest.raises(UserError) as raised:
        read_space(values, {"max_steps": 3})
    assert said in str(raised.value)


def test_auto_takes_what_matters_for_the_strategy():
    assert list(automatic({"strategy": "full"})) == ["learning_rate", "layer_lr_decay"]
    assert list(automatic({"strategy": "lora"})) == ["learning_rate", "lora_r"]
    assert list(automatic({"strategy": "full", "learning_rate": 1e-4})) == ["layer_lr_decay"]
    low, high = automatic({"strategy": "lora"})["learning_rate"].ends
    assert low < 5e-4 < high  # the default of adapters
    for given, said in (({}, "none is given"), ({"strategy": "linear-probe", "probe_solver": "lbfgs"}, "solved for")):
        with pytest.raises(UserError, match=said):
            automatic(given)


# ---- what is asked of optuna ----


def test_without_optuna_the_extra_is_named(monkeypatch, capsys, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "optuna" else find(name, *more)
    )
    argv = ["compare", "bundled:minilm-l6", "bundled:rotten-tomatoes", str(tmp_path), "--search", "{lora_r: [1, 4]}"]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "search: it needs optuna" in said and 'pip install "hf-transfer-toolkit[hpo]"' in said


def test_a_proposal_depends_on_the_trials_so_far_alone():
    pytest.importorskip("optuna")
    space = read_space({**RATES, "strategy": ["full", "gradual"]}, {})
    told: list[Told] = []
    for _ in range(8):
        settings = propose(space, told, True, seed=3)
        told.append(Told(settings, -abs(math.log10(settings["learning_rate"]) + 4)))
    assert [propose(space, told[:n], True, seed=3) for n in range(8)] == [dict(one.settings) for one in told]
    assert propose(space, told, True, seed=4) != propose(space, told, True, seed=3)
    assert all(1e-5 <= one.settings["learning_rate"] <= 1e-3 for one in told)


@pytest.mark.parametrize("greater_is_better", [True, False])
def test_later_trials_are_nearer_to_the_best(greater_is_better):
    pytest.importorskip("optuna")
    space, told = read_space(RATES, {}), list[Told]()
    for _ in range(24):
        settings = propose(space, told, greater_is_better, seed=0)
        distance = abs(math.log10(settings["learning_rate"]) + 4)
        told.append(Told(settings, -distance if greater_is_better else distance))
    far = [abs(one.value) for one in told]
    assert statistics.mean(far[-8:]) < 0.7 * statistics.mean(far[:8])


def test_every_combination_once_and_then_no_more():
    pytest.importorskip("optuna")
    space, told = read_space({"lora_r": [1, 3], "strategy": ["full", "gradual"]}, {}), list[Told]()
    while (settings := propose(space, told, True, seed=0)) is not None:
        told.append(Told(settings, 0.5))
    assert len(told) == 6 == len({json.dumps(one.settings) for one in told})


@pytest.mark.parametrize("greater_is_better", [True, False])
def test_hopeless_is_what_is_worse_than_the_median_of_that_epoch(greater_is_better):
    pytest.importorskip("optuna")
    sign = 1 if greater_is_better else -1
    space = read_space(RATES, {})
    values = [0.1, 0.2, 0.6, 0.7, 0.9]
    told = [
        Told({"learning_rate": (n + 1) * 1e-4}, sign * v, {1: sign * v, 2: sign * (v + 1)})
        for n, v in enumerate(values)
    ]

    def judged(among, **by_epoch):
        running = Told({"learning_rate": 5e-5}, by_epoch={int(k[1:]): sign * v for k, v in by_epoch.items()})
        return is_hopeless(space, among, running, greater_is_better)

    median = statistics.median(values)
    assert judged(told, e1=median - 0.01) and not judged(told, e1=median + 0.01)
    assert judged(told, e1=median + 0.01, e2=median + 0.99)
    assert not judged(told[:4], e1=-9.0)  # too few to judge by
    stopped = [Told({"learning_rate": 9e-4}, None, {1: -9.0 * sign}, is_stopped=True)] * 9
    assert judged([*told, *stopped], e1=median - 0.01)  # stopped ones are no measure


# ---- real trials ----


def search(model, data, folder, **changes):
    keys = {**QUICK, **data, "strategy": "full", "num_train_epochs": 2, "seeds": (7,), "metric": "loss", "trials": 4}
    keys |= {"search": {"learning_rate": [1e-6, 1e-1, "log"]}, "talks": False, "estimate": False, **changes}
    return compare(model, output_dir=folder, **keys)


@pytest.fixture(scope="module")
def found(tiny_bert_folder, reviews, tmp_path_factory):
    """(frame, folder) of a search in which two ended trials suffice to judge others."""
    pytest.importorskip("optuna")
    folder = tmp_path_factory.mktemp("search") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "JUDGES", 2)
        frame = search(tiny_bert_folder, reviews, folder)
    return frame, folder


def test_the_table_is_that_of_a_comparison(found):
    frame, folder = found
    whole = json.loads((folder / "compare.json").read_text())
    trials = json.loads((folder / "search.json").read_text())["trials"]
    assert [row["settings"] for row in whole["rows"]] == [{}, *trials] and len(trials) == 4
    assert frame.loc[0, "row"] == "as given" and frame["mean"].min() == frame.loc[frame["is_chosen"], "mean"].item()
    assert frame.attrs["test"]["row"] == frame.attrs["chosen"] and not frame.attrs["failures"]
    for picture in ("curves.png", "search.png"):
        assert (folder / picture).read_bytes()[:4] == b"\x89PNG"


def test_a_hopeless_trial_is_stopped_by_the_median(found):
    _frame, folder = found
    rows = json.loads((folder / "compare.json").read_text())["rows"][1:]
    ended: list[float] = []
    stopped = 0
    for row in rows:
        cell = folder / "cells" / row["cells"]["7"]
        after = by_epoch(cell, "loss")
        is_worse = len(ended) >= 2 and after[1] > statistics.median(ended)
        assert bool(row["stopped"]) == is_worse == (not (cell / "results.json").exists())
        assert sorted(after) == ([1] if is_worse else [1, 2])
        if is_worse:
            assert row["mean"] is None and not row["failures"] and not list(cell.glob("checkpoint-*"))
        else:
            ended.append(after[1])
        stopped += is_worse
    assert 0 < stopped < len(rows), "the case must show both"
    assert f"{stopped} of 5 rows were stopped early" in (folder / "compare.md").read_text()


def test_the_gap_is_between_losses_of_the_same_model(found):
    frame, _folder = found
    cell = Path(frame.attrs["cells"]["as given"][0])
    results = json.loads((cell / "results.json").read_text())
    logs = [json.loads(line) for line in (cell / "history.jsonl").read_text().splitlines()]
    last = [one for one in logs if "loss" in one and one["epoch"] > 1]
    assert last_training_loss(cell) == pytest.approx(statistics.mean(one["loss"] for one in last))
    gap = results["validation_metrics"]["loss"] - last_training_loss(cell)
    assert frame.loc[0, "gap"] == pytest.approx(gap)


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(found, tiny_bert_folder, reviews, tmp_path, monkeypatch):
    frame, folder = found
    monkeypatch.setattr(sampling, "JUDGES", 2)
    save, saved = saving.save_model, []

    def interrupted(*args):
        saved.append(1)
        if len(saved) == 3:  # the second trial, after its last checkpoint
            raise KeyboardInterrupt
        return save(*args)

    monkeypatch.setattr(saving, "save_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(tiny_bert_folder, reviews, tmp_path / "out")
    monkeypatch.setattr(saving, "save_model", save)
    again = search(tiny_bert_folder, reviews, tmp_path / "out")
    assert (tmp_path / "out" / "search.json").read_text() == (folder / "search.json").read_text()
    assert list(again["mean"].fillna(-1)) == list(frame["mean"].fillna(-1))


def test_more_trials_keep_the_ones_before(found, tiny_bert_folder, reviews, monkeypatch):
    frame, folder = found
    before, ran = json.loads((folder / "search.json").read_text())["trials"], []
    run = running.run
    monkeypatch.setattr(sampling, "JUDGES", 2)
    monkeypatch.setattr(running, "run", lambda *args: ran.append(1) or run(*args))
    more = search(tiny_bert_folder, reviews, folder, trials=5)
    after = json.loads((folder / "search.json").read_text())["trials"]
    assert ran == [1] and after[:4] == before and len(after) == 5 and len(more) == 6
    assert list(more["row"][:5]) == list(frame["row"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trials": 0}, "trials: expected a positive number, got 0."),
        ({"grid": {"strategy": ["full", "gradual"]}}, "search: a search and a grid exclude each other."),
        ({"search": None, "trials": 3}, "trials: it is of a search, and there is none."),
        ({"search": None, "trials": None, "prune": False}, "prune: it is of a search, and there is none."),
        ({"trials": 300}, "301 cells (300 trials, 1 seeds), more than 200."),
        ({"search": {"adapter": ["lora", "ia3"]}, "strategy": "scratch"}, "adapter: it belongs to a pretrained"),
    ],
)
def test_a_search_without_an_answer_is_refused(tiny_bert_folder, reviews, tmp_path, changes, said):
    pytest.importorskip("optuna")
    with pytest.raises(UserError) as raised:
        search(tiny_bert_folder, reviews, tmp_path / "out", **changes)
    assert said in str(raised.value) and not (tmp_path / "out").exists()


def test_there_are_no_more_trials_than_combinations(tiny_bert_folder, reviews, tmp_path):
    def make(changes, without=()):
        return configured(tiny_bert_folder, None, {"output_dir": "out", **reviews, **changes})

    question = Question({}, {}, [0], tmp_path, search={"strategy": ["full", "gradual"], "weight_decay": [0, 0.1, 0.2]})
    order = search_asked(question, make)
    assert order.trials == 6 and len(order.left) == 7
    (first, *rest) = lines_of(order, question)
    assert first.startswith("Search: 6 trials (all combinations) next to the run as given, seed 0.")
    assert rest == ["  strategy: one of full, gradual", "  weight_decay: one of 0.0, 0.1, 0.2"]


def test_a_search_has_no_numbered_cells(capsys, tmp_path):
    pytest.importorskip("optuna")
    argv = ["compare", "bundled:minilm-l6", "bundled:rotten-tomatoes", str(tmp_path), "--search", "{lora_r: [1, 4]}"]
    assert main([*argv, "--cell", "1"]) == 2
    assert "a search has no numbered cells" in capsys.readouterr().err


def test_several_processes_are_refused(tiny_bert_folder, reviews, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="compare runs in one process"):
        compare(tiny_bert_folder, output_dir=tmp_path, grid={"strategy": ["full", "gradual"]}, **QUICK, **reviews)
