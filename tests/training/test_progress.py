"""What a run prints while it trains."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from transformers import TrainerState

from hf_transfer import TransferTrainer
from hf_transfer.training.console import rates_in_words
from hf_transfer.training.pace import Pace, log_interval, spell
from hf_transfer.training.progress import Bars, Clock, Lines, Meter, shown_metrics
from tests.helpers import arguments, texts, tiny_bert


@pytest.mark.parametrize(
    ("steps", "interval"),
    [(1, 1), (2, 1), (8, 2), (16, 4), (20, 5), (100, 5), (101, 6), (240, 12), (1000, 50), (100_000, 5000)],
)
def test_a_short_run_has_a_few_lines_and_a_long_one_twenty(steps, interval):
    assert log_interval(0.05, steps) == interval


def test_time_left_is_that_of_the_current_stage():
    now = [0.0]
    pace = Pace(lambda: now[0])
    for step in range(1, 6):  # the first steps are slow and do not count
        now[0] += 100 if step < 3 else 2
        pace.note(0, step)
        assert pace.left(10) == (None if step < 3 else 2 * (10 - step))
    for step in range(6, 11):
        now[0] += 7
        pace.note(1, step)
        assert pace.left(20) == (None if step < 8 else 7 * (20 - step))
    pace.restart(1, 10)
    assert pace.left(20) is None
    said = [spell(s) for s in (0.2, 14, 47, 89, 200, 5300, 5500, 7300, 9000)]
    assert said == ["1 s", "14 s", "50 s", "90 s", "3 min", "88 min", "1 h 30 min", "2 h", "2 h 30 min"]


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ({"a": 1e-4, "b": 2e-4, "head": 1e-3}, "1.00e-04 to 2.00e-04, head 1.00e-03"),
        ({"a": 0.0, "b": 2e-4, "head": 1e-3}, "2.00e-04, head 1.00e-03"),
        ({"a": 0.0, "head": 1e-3}, "head 1.00e-03"),
        ({"a": 1e-4, "head": 1e-4}, "1.00e-04"),
        ({"a": 1e-4, "head": 0.0}, "1.00e-04"),
        ({"a": 0.0, "head": 0.0}, "0"),
        ({}, "5.00e-05"),
    ],
)
def test_a_line_has_the_rates_of_backbone_and_head(rates, words):
    logs = {"learning_rate": 5e-5, **{f"learning_rate/{name}": rate for name, rate in rates.items()}}
    assert rates_in_words(logs) == words


@pytest.mark.parametrize(
    ("names", "decides", "shown"),
    [
        (("loss", "accuracy", "f1_macro", "runtime"), None, ["accuracy", "loss"]),
        (("loss", "accuracy", "f1_macro"), "eval_f1_macro", ["accuracy", "loss", "f1_macro"]),
        (("loss", "rmse", "mae", "pearson"), "loss", ["rmse", "mae", "loss"]),
        (("loss", "mine"), None, ["loss", "mine"]),
    ],
)
def test_a_validation_line_has_the_metrics_that_matter(names, decides, shown):
    logs = {f"eval_{name}": 0.25 for name in names}
    line = shown_metrics(logs, SimpleNamespace(metric_for_best_model=decides))
    assert line == ", ".join(f"{name} 0.2500" for name in shown)


def test_several_labels_are_judged_by_f1():
    logs = {"eval_accuracy": 0.1, "eval_f1_micro": 0.5, "eval_loss": 1.0, "eval_map": 0.6}
    line = shown_metrics(logs, SimpleNamespace(metric_for_best_model=None))
    assert line == "f1_micro 0.5000, loss 1.0000"


def test_lines_and_bar_of_a_run(tmp_path, capsys):
    keys = dict(strategy="gradual", num_train_epochs=2, logging_steps=2, eval_strategy="epoch", head_learning_rate=0.05)
    trainer = TransferTrainer(tiny_bert(), arguments(tmp_path, **keys), train_dataset=texts(16), eval_dataset=texts(8))
    clock = Clock(trainer)
    clock.pace.clock = iter(range(0, 10_000, 60)).__next__  # a minute whenever it is read
    meter = Meter(trainer, iter(range(0, 10_000, 2)).__next__)
    trainer.callback_handler.callbacks.insert(0, meter)
    for callback in (clock, Bars(clock), Lines(clock)):
        trainer.add_callback(callback)
    trainer.train()
    out, bar = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert [re.match(r"step (\d+)/8", line)[1] for line in lines] == ["2", "4", "6", "8"]
    assert "learning rate head 4.38e-02" in lines[0] and "left" not in lines[0]  # of a stage's first steps
    rest = r"  4\.0 examples/s  [\d.]+ [MG]B"  # 2 steps of 4 examples in the 2 s that the clock is read
    assert re.search(rf"learning rate 1\.25e-03, head 6\.25e-03{rest}$", lines[-1])
    assert re.search(r"stage 1/\d \(head\)  loss \d\.\d{4}  grad norm", lines[0])
    evaluations = [line.partition(": ") for line in out.splitlines() if line[:2] == "  "]
    assert [e[0] for e in evaluations] == ["  validation at epoch 1.00", "  validation at epoch 2.00"]
    assert all(re.fullmatch(r"loss \d\.\d{4}", e[2]) for e in evaluations)
    assert "100%|██████████| step 8/8, 00:0" in bar and "head 1/2:   0%|" in bar
    assert re.search(r"step 4/8, [\d:]+, loss \d\.\d{4}, lr 4\.4e-02, 4\.0/s, [\d.]+ [MG]B", bar)


def test_a_plateau_has_no_known_end(tmp_path):
    trainer = SimpleNamespace(
        plan=SimpleNamespace(stages=[SimpleNamespace(start=0), SimpleNamespace(start=None)]),
        unfreezing=SimpleNamespace(stage=0),
        state=TrainerState(max_steps=100),
    )
    clock = Clock(trainer)
    clock.pace.clock = iter((0, 1000)).__next__
    for step in (1, 2, 3):
        clock.pace.note(0, step)
    assert clock.left() == ""
    clock.pace.clock = lambda: 50.0
    trainer.plan.stages[1].start = 53
    assert clock.left() == "about 42 min of this stage left"
