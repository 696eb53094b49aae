"""`dataloader_num_workers: auto`: workers where loading is a good part of a batch's time, and what it says of it."""

from __future__ import annotations

import time

import pytest
import torch

from hf_transfer import UserError
from hf_transfer.runs import machine, workers
from hf_transfer.runs.preview import plan_only
from tests.helpers import copy_state
from tests.runs.test_budgeting import bert, configured, drawn, made
from tests.runs.test_preflight import pictures, resnet, table

__all__ = ["bert", "resnet"]  # fixtures
KEYS = dict(strategy="full", per_device_train_batch_size=8, dataloader_num_workers="auto")
LOADING = 0.02  # seconds of a slow batch


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("data") / "d", 17)


@pytest.fixture
def run(resnet, images, tmp_path, monkeypatch):
    """A run on images on a machine of four cores, whose steps take no time unless a test says otherwise."""
    monkeypatch.setattr(machine, "cores", lambda: 4)
    monkeypatch.setattr(workers, "START", 0.0)

    def make(loading=0.0, step=0.0, **keys):
        prepared, trainer, splits = made(resnet, images, tmp_path, **{**KEYS, "num_train_epochs": 20, **keys})
        collate = trainer.data_collator

        def slow(examples):
            time.sleep(loading)
            return collate(examples)

        monkeypatch.setattr(trainer, "data_collator", slow)
        monkeypatch.setattr(workers, "_seconds", lambda action: loading)  # a busy machine takes longer
        monkeypatch.setattr(workers, "seconds_of_step", lambda *_: time.sleep(step) or step)
        return prepared, trainer, splits

    return make


def said(prepared, trainer, splits):
    choice = workers.choose_workers(prepared, trainer, splits).chosen.keys[workers.KEY]
    assert trainer.args.dataloader_num_workers == choice.value
    return choice


def test_loading_that_takes_most_of_the_time_gets_workers(run):
    """Three times as long as a step: four workers would keep up, and one core stays for training."""
    prepared, trainer, splits = run(loading=3 * LOADING, step=LOADING)
    choice = said(prepared, trainer, splits)
    assert choice.value == 3 and "; with 3 workers a batch takes 0." in choice.why
    assert trainer.args.dataloader_persistent_workers and trainer.args.dataloader_prefetch_factor == machine.PREFETCHED
    assert workers.KEY not in trainer.chosen, "a resumed run chooses for its own machine"


def test_loading_that_is_small_beside_a_step_gets_none(run):
    prepared, trainer, splits = run(loading=0.01, step=0.5)
    args = trainer.args  # as for a device, before the probe
    args.dataloader_num_workers, args.dataloader_persistent_workers, args.dataloader_prefetch_factor = 3, True, 4
    choice = said(prepared, trainer, splits)
    assert choice.value == 0 and choice.why.startswith("loading takes ") and "workers" not in choice.why
    assert not args.dataloader_persistent_workers and args.dataloader_prefetch_factor is None


def test_a_run_that_is_too_short_gets_none(run):
    choice = said(*run(loading=LOADING, step=LOADING, num_train_epochs=1))
    assert choice.value == 0 and "the run is too short for workers to pay back" in choice.why


def test_workers_that_make_nothing_quicker_are_left_out(run, monkeypatch):
    """As on a CPU whose cores all train."""
    monkeypatch.setattr(workers, "_seconds_with", lambda number, *_: 2 * LOADING)
    choice = said(*run(loading=LOADING, step=LOADING))
    assert choice.value == 0 and "with 2 workers a batch takes" in choice.why


def test_one_core_times_nothing(run, monkeypatch):
    parts = run()
    monkeypatch.setattr(machine, "cores", lambda: 1)
    monkeypatch.setattr(workers, "examples_of", lambda *_: pytest.fail("for nothing"))
    assert said(*parts) == workers.Choice(0, "there is one core for each process")


def test_what_cannot_be_timed_stays_as_it_was(run, monkeypatch):
    parts = run()
    monkeypatch.setattr(workers, "examples_of", lambda *_: [][0])
    assert said(*parts) == workers.Choice(0, "no batch could be timed")


def test_the_probe_leaves_no_trace(run, monkeypatch):
    """Real steps, real workers, images that change at random."""
    step = workers.seconds_of_step
    prepared, trainer, splits = run(loading=LOADING, augmentation="basic")
    monkeypatch.setattr(workers, "seconds_of_step", step)
    state, numbers, loaders = copy_state(trainer.model), drawn(), len(trainer.accelerator._dataloaders)
    assert "workers a batch takes" in said(prepared, trainer, splits).why
    assert drawn() == numbers and all(torch.equal(state[n], v) for n, v in copy_state(trainer.model).items())
    assert len(trainer.accelerator._dataloaders) == loaders and all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize("keys", [{"dataloader_num_workers": 0}, {"strategy": "linear-probe", "probe_solver": "lbfgs"}])
def test_a_number_that_was_given_stays_and_a_solved_head_is_not_timed(run, keys, monkeypatch):
    prepared, trainer, splits = run(**keys)
    monkeypatch.setattr(workers, "examples_of", lambda *_: pytest.fail("for nothing"))
    assert workers.choose_workers(prepared, trainer, splits) is prepared


def test_texts_have_none(bert, tmp_path):
    prepared, trainer, splits = made(bert, table(tmp_path / "a.csv"), tmp_path, **KEYS)
    assert workers.choose_workers(prepared, trainer, splits) is prepared and trainer.args.dataloader_num_workers == 0


def test_examples_of_a_batch_are_taken_from_all_of_the_data():
    assert workers._spread(17, 4, 0) == [0, 4, 8, 12] and workers._spread(17, 4, 15) == [15, 2, 6, 10]
    assert sorted(workers._spread(3, 3, 2)) == [0, 1, 2]


def test_the_longest_stage_is_timed(run):
    for head_epochs, longest in ((1, "all"), (2, "head")):
        _, trainer, _ = run(strategy="two-phase", head_epochs=head_epochs, num_train_epochs=3)
        assert workers._longest(trainer, ["head", "all"]) == longest


def test_the_plan_says_it_and_a_word_that_is_no_number_is_refused(resnet, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 1)
    found = plan_only(configured(resnet, images, tmp_path, **KEYS | dict(per_device_train_batch_size=6)))
    assert "dataloader_num_workers: 0 (there is one core for each process)" in capsys.readouterr().out
    assert found.config.values["dataloader_num_workers"] == -1 and found.chosen["dataloader_num_workers"]["value"] == 0
    with pytest.raises(UserError, match="dataloader_num_workers: 'automatic' is not a whole number or auto"):
        configured(resnet, images, tmp_path, **{**KEYS, "dataloader_num_workers": "automatic"})
