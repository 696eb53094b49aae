"""What timed steps say of a run: how long it takes here, how many threads are quickest, whether compiling pays."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import yaml

from hf_transfer import UserError, fine_tune
from hf_transfer.analysis.few_labels import Choice
from hf_transfer.analysis.pace import Pace, StagePace, compile_note, in_time
from hf_transfer.errors import Interrupted
from hf_transfer.runs import threads, timing
from hf_transfer.runs.machine import own_threads
from hf_transfer.runs.preview import plan_only
from hf_transfer.runs.run import run
from hf_transfer.settings import Config
from hf_transfer.training.trainer import TransferTrainer
from tests.helpers import copy_state
from tests.runs.test_budgeting import bert, configured, drawn, made
from tests.runs.test_preflight import table

__all__ = ["bert"]  # a fixture
TWO = dict(strategy="two-phase", num_train_epochs=2, per_device_train_batch_size=6)


def test_the_pace_leaves_no_trace(bert, tmp_path):
    prepared, trainer, splits = made(bert, table(tmp_path / "a.csv"), tmp_path, **TWO)
    state, numbers = copy_state(trainer.model), drawn()
    needed = {name: p.requires_grad for name, p in trainer.model.named_parameters()}
    pace = timing.measure(prepared, trainer, splits)
    assert drawn() == numbers and all(torch.equal(state[n], v) for n, v in copy_state(trainer.model).items())
    assert {name: p.requires_grad for name, p in trainer.model.named_parameters()} == needed
    assert all(p.grad is None for p in trainer.model.parameters()) and trainer.optimizer is None
    assert [one.stage for one in pace.stages] == [stage.name for stage in trainer.plan.stages]
    assert sum(one.steps for one in pace.stages) == trainer.num_steps
    assert all(one.seconds_per_step > 0 and one.measured for one in pace.stages)


def test_batches_are_weighed_by_their_tokens(bert, tmp_path, monkeypatch):
    """With steps that take a second per token, the mean step takes as many seconds as the mean batch has tokens."""
    prepared, trainer, splits = made(bert, table(tmp_path / "a.csv"), tmp_path, **TWO)
    monkeypatch.setattr(timing, "seconds_of_step", lambda trainer, batch: float(batch["input_ids"].numel()))
    monkeypatch.setattr(timing, "_of_optimizer", lambda trainer, step: 1000.0)
    pace = timing.measure(prepared, trainer, splits)
    counts = [batch["input_ids"].numel() for batch in trainer.get_train_dataloader()]
    expected = 1000 + sum(counts) / len(counts)
    assert [one.seconds_per_step for one in pace.stages] == pytest.approx([expected] * 2, rel=0.15)


def test_what_has_no_pace(bert, tmp_path):
    data = table(tmp_path / "a.csv")
    plateau = dict(strategy="gradual", unfreeze_trigger="plateau")
    for keys in (plateau, dict(strategy="linear-probe", probe_solver="lbfgs")):
        prepared, trainer, splits = made(bert, data, tmp_path, **keys)
        assert timing.measure(prepared, trainer, splits) is None


def test_the_plan_says_it(bert, tmp_path, monkeypatch):
    head = StagePace("head", 10, 0.5, 6, memory=3_000_000, kept=1_000_000)
    stages = head, StagePace("all groups", 20, 4.0, 6, memory=40_000_000, kept=2_000_000)
    pace = Pace("cpu", 2, stages, resident=500_000_000)
    monkeypatch.setattr("hf_transfer.runs.preview.measure", lambda *_: pace)
    data = table(tmp_path / "a.csv")
    found = plan_only(configured(bert, data, tmp_path, **TWO, learning_rate="auto", torch_compile=True), talks=False)
    here, (_, memory) = found.to_dict()["budget"]["this_machine"], found.budget.memory
    assert here["seconds"] == 85.0 and here["stages"][1]["memory_bytes"] == 40_000_000
    assert here["stages"][1]["kept_bytes"] == 2_000_000
    assert here["process_bytes"] == 540_000_000 + memory.optimizer
    assert any(line.startswith("The process will take about 54") for line in found.budget.lines())
    assert any(line.startswith("On this machine (cpu, 2 threads): about 85 s") for line in found.budget.lines())
    assert any("a range test of at most 100 steps comes before training, about 6.7 min" in note for note in found.notes)
    assert found.to_dict()["warnings"] == []  # 42.5 s could be saved, and two stages compile in 40


@pytest.mark.parametrize(("seconds", "stages", "speaks"), [(30, 1, True), (60, 1, False), (60, 4, True)])
def test_when_compiling_cannot_pay(seconds, stages, speaks):
    pace = Pace("cpu", 1, tuple(StagePace(str(i), 10, seconds / stages / 10, 1) for i in range(stages)))
    assert bool(compile_note(pace)) is speaks
    assert not speaks or f"about {in_time(seconds)} of training steps" in compile_note(pace)


@pytest.mark.parametrize(
    ("keys", "stops"),
    [
        ({"torch_compile": True}, True),
        ({"torch_compile": True, "torch_compile_backend": "inductor"}, False),
        ({}, False),
    ],
)
def test_a_run_that_would_be_compiled_for_nothing_stops(keys, stops, bert, tmp_path, monkeypatch):
    """Unless a backend is named as well."""
    pace = Pace("cpu", 1, (StagePace("all", 10, 0.1, 1),))
    monkeypatch.setattr(timing, "measure", lambda *_: pace)
    config = configured(bert, table(tmp_path / "a.csv"), tmp_path, **TWO, **keys)
    prepared, trainer = SimpleNamespace(config=config), SimpleNamespace(args=config.training)
    with pytest.raises(UserError, match="torch_compile cannot pay back") if stops else nullcontext():
        timing.check_compilation(prepared, trainer, {})


# ---- threads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "own", "best"),
    [({1: 1.0, 2: 0.6, 4: 0.9}, 4, 2), ({1: 1.0, 2: 0.97}, 1, 1), ({1: 0.9, 2: 1.0}, 2, 1), ({1: 2.0, 2: 1.0}, 2, 2)],
)
def test_the_quickest_unless_torchs_own_is_as_good(seconds, own, best):
    choice = threads.chosen(seconds, own)
    assert choice.value == best and "1: " in choice.why


def test_numbers_that_are_tried(monkeypatch):
    monkeypatch.setattr(threads.psutil, "cpu_count", lambda logical: 6)
    assert threads.numbers(12, 12) == [1, 2, 4, 6, 8, 12]
    assert threads.numbers(16, 2) == [1, 2, 16], "a container's two cores of sixteen"
    assert threads.numbers(1, 1) == [1]


def test_steps_are_timed_with_each_number_in_turn(bert, tmp_path, monkeypatch):
    prepared, trainer, splits = made(bert, table(tmp_path / "a.csv"), tmp_path, **TWO)
    seen, before, numbers = [], torch.get_num_threads(), drawn()

    def timed(trainer, batch):
        seen.append(torch.get_num_threads())
        return 1.0 / len(seen)

    monkeypatch.setattr(timing, "seconds_of_step", timed)
    found = timing.seconds_by_threads(prepared, trainer, splits, [1, 2], rounds=2)
    assert seen == [1, 2] * 3 and found == {1: 1 / 5, 2: 1 / 6}, "the first round warms up"
    assert torch.get_num_threads() == before and drawn() == numbers


def test_auto_is_set_and_stands_with_what_was_chosen(bert, tmp_path, monkeypatch):
    prepared, trainer, splits = made(bert, table(tmp_path / "a.csv"), tmp_path, **TWO, cpu_threads="auto")
    monkeypatch.setattr(threads, "_quickest", lambda *_: Choice(3, "measured"))
    with own_threads():
        found = threads.choose_threads(prepared, trainer, splits)
        assert torch.get_num_threads() == trainer.args.cpu_threads == found.config.values["cpu_threads"] == 3
    assert trainer.chosen["cpu_threads"] == 3 and found.chosen.keys["cpu_threads"].why == "measured"
    assert torch.get_num_threads() != 3, "another run of this process decides for itself"
    with own_threads():
        assert threads.choose_threads(found, trainer, splits) is found, "chosen once"


@pytest.mark.slow
def test_auto_is_recorded_repeated_and_resumed(bert, tmp_path, monkeypatch):
    """The run, one with the number that it found, and one that is resumed are the same, bit for bit."""
    before, asked = torch.get_num_threads(), []
    quickest = 2 if before == 1 else 1
    monkeypatch.setattr(threads, "_quickest", lambda *_: asked.append(1) or Choice(quickest, "measured"))
    data = table(tmp_path / "a.csv")
    keys = dict(strategy="full", num_train_epochs=2, per_device_train_batch_size=12, max_train_samples=24)
    keys |= dict(cpu_threads="auto", save_strategy="epoch", save_only_model=False)
    seen = []
    step = TransferTrainer.training_step

    def training_step(self, *args, **kwargs):
        seen.append(torch.get_num_threads())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(TransferTrainer, "training_step", training_step)
    whole = run(configured(bert, data, tmp_path / "whole", **keys))
    assert set(seen) == {quickest} and torch.get_num_threads() == before and asked == [1]
    assert whole.results["auto"]["cpu_threads"] == {"value": quickest, "why": "measured"}
    written = yaml.safe_load((whole.output_dir / "run.yaml").read_text())
    assert written["cpu_threads"] == quickest
    again = fine_tune(**{k: v for k, v in written.items() if v is not None} | {"output_dir": str(tmp_path / "again")})
    assert again.metrics == whole.metrics and asked == [1]

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == self.num_steps // 2 + 1:
            raise Interrupted(2)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(TransferTrainer, "training_step", interrupted)
    with pytest.raises(Interrupted):
        run(configured(bert, data, tmp_path / "part", **keys))
    asked.clear()
    monkeypatch.setattr(TransferTrainer, "training_step", training_step)
    more = dict(resume_from_checkpoint="auto")
    with pytest.raises(UserError, match="cpu_threads"):
        run(configured(bert, data, tmp_path / "part", **{**keys, "cpu_threads": quickest + 1}, **more))
    resumed = run(configured(bert, data, tmp_path / "part", **keys, **more))
    assert resumed.metrics == whole.metrics and asked == [] and set(seen) == {quickest}
    weights = zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True)
    assert all(torch.equal(value, other) for (_, value), other in weights)


def test_what_is_no_number():
    with pytest.raises(UserError, match="cpu_threads: 'many' is not one of auto"):
        Config.from_sources({}, {"model_name_or_path": "m", "dataset_name": "d", "cpu_threads": "many"})
