"""A run that ends at a budget, on a clock that only steps, evaluations and checkpoints move."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import EarlyStoppingCallback

from hf_transfer import TransferTrainer, UserError
from hf_transfer.training import stage_times, time_budget
from hf_transfer.training.pace import exactly
from hf_transfer.training.stage_times import StageTimes
from hf_transfer.training.time_budget import TARGET
from tests.helpers import arguments, changed, copy_state, images, texts, tiny_bert, tiny_vit

STEP = {0: 1.0, 1: 2.0, 2: 4.0, 3: 4.0}  # seconds in each stage


class Clocked(TransferTrainer):
    """Takes no time but these seconds."""

    now, slower, evaluation, checkpoint = 0.0, 1.0, 0.0, 0.0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.clock = lambda: self.now

    def training_step(self, *args, **kwargs):
        self.now += STEP[self.unfreezing.stage] * self.slower / self.args.gradient_accumulation_steps
        return super().training_step(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        self.now += self.evaluation
        return super().evaluate(*args, **kwargs)

    def _publish(self, *args):
        self.now += self.checkpoint
        return super()._publish(*args)


@pytest.fixture(autouse=True)
def _known_times(monkeypatch):
    def take(trainer, plan):
        trainer.boundary.decide()
        steps = [STEP[i] for i in range(len(plan.stages))]
        return StageTimes(steps, steps, 1.0, 0.0, 0.0)

    monkeypatch.setattr(stage_times, "take", take)


def made(folder, seconds, model=None, data=None, **keys):
    keys = {"strategy": "two-phase", "num_train_epochs": 10, "logging_strategy": "no", **keys}
    attributes = {n: keys.pop(n) for n in ("slower", "evaluation", "checkpoint") if n in keys}
    callbacks = keys.pop("callbacks", None)
    trainer = Clocked(
        model or tiny_bert(layers=1), arguments(folder, max_hours=seconds / 3600, **keys),
        train_dataset=data or texts(16), eval_dataset=texts(8), callbacks=callbacks,
    )  # fmt: skip
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


def trained(folder, seconds, resumed=None, **keys):
    trainer = made(folder, seconds, **keys)
    trainer.train(resume_from_checkpoint=resumed)
    return trainer


def within(trainer, seconds):
    """Ends within 5% of the budget, give or take a step."""
    step = 4.0 * trainer.slower
    assert 0.95 * seconds - step <= trainer.seconds <= 1.05 * seconds, trainer.seconds


# ---- the length ----------------------------------------------------------------------------------------------------


def test_a_run_that_fits_is_the_plans(tmp_path):
    keys = {"strategy": "two-phase", "num_train_epochs": 10, "logging_strategy": "no"}
    plain = TransferTrainer(tiny_bert(layers=1), arguments(tmp_path / "a", **keys), train_dataset=texts(16))
    plain.train()
    trainer = trained(tmp_path / "b", 1000)
    assert trainer.state.global_step == 40 and trainer.time_budget.timeline.replans == ()
    assert changed(copy_state(plain.model), copy_state(trainer.model)) == set()


def test_stages_and_schedule_shrink_together(tmp_path):
    """4 steps of 1 s and 36 of 2 s, in 38 s: half of each."""
    trainer = trained(tmp_path, 38 / TARGET)
    (replan,) = trainer.time_budget.timeline.replans
    assert (replan.step, replan.length) == (0, 20)
    assert [s.start for s in trainer.plan.stages] == [0, 2]
    assert trainer.state.global_step == trainer.state.max_steps == 20
    assert trainer.seconds == 2 * 1 + 18 * 2


@pytest.mark.parametrize("slower", [0.4, 1.5])
@pytest.mark.parametrize("strategy", ["two-phase", "gradual"])
def test_steps_that_take_longer_or_shorter_than_they_were_timed(strategy, slower, tmp_path):
    trainer = trained(tmp_path, 50, strategy=strategy, num_train_epochs=20, slower=slower)
    assert trainer.state.global_step < 80
    within(trainer, 50)


def test_a_machine_that_becomes_slower(tmp_path):
    class Slows(time_budget.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 10:
                trainer.slower = 2.0

    trainer = made(tmp_path, 80, num_train_epochs=20, callbacks=[Slows()])
    trainer.train()
    within(trainer, 80)


@pytest.mark.parametrize(
    "keys",
    [
        {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True},
        {"eval_strategy": "steps", "eval_steps": 7, "save_strategy": "steps", "save_steps": 14},
        {"eval_strategy": "steps", "eval_steps": 0.2, "save_strategy": "best", "metric_for_best_model": "loss"},
        {"eval_strategy": "epoch", "eval_delay": 5},
        {"gradient_accumulation_steps": 2},
        {"length_bucketing": True},
        {"max_steps": 70},
    ],
)
def test_evaluations_and_checkpoints_count(keys, tmp_path):
    within(trained(tmp_path, 80, num_train_epochs=20, evaluation=3.0, checkpoint=2.0, **keys), 80)


def test_stages_that_end_at_plateaus(tmp_path):
    trainer = trained(
        tmp_path, 60, strategy="gradual", unfreeze_trigger="plateau", eval_strategy="epoch", num_train_epochs=20
    )
    within(trainer, 60)


def test_no_rate_jumps_and_the_last_is_low(tmp_path):
    keys = {"strategy": "full", "num_train_epochs": 20, "slower": 2.0, "logging_strategy": "steps"}
    trainer = trained(tmp_path, 60, **keys)
    assert len(trainer.time_budget.timeline.replans) > 1
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert len(rates) == trainer.state.global_step
    assert all(a > b for a, b in itertools.pairwise(rates)) and rates[0] == 1e-2
    assert rates[-1] < 0.1 * rates[0]


def test_fractions_of_all_steps_are_of_those_that_are_left(tmp_path):
    trainer = trained(tmp_path, 38 / TARGET, eval_strategy="steps", eval_steps=0.25)
    assert [log["step"] for log in trainer.state.log_history if "eval_loss" in log] == [5, 10, 15, 20]


def test_early_stopping_still_ends_the_run(tmp_path):
    trainer = trained(
        tmp_path, 1000, num_train_epochs=10, eval_strategy="epoch", save_strategy="epoch", learning_rate=1e-9,
        load_best_model_at_end=True, callbacks=[EarlyStoppingCallback(2, early_stopping_threshold=1.0)],
    )  # fmt: skip
    assert trainer.state.global_step < trainer.time_budget.timeline.length


# ---- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, {"strategy": "gradual", "eval_strategy": "epoch", "evaluation": 1.0}])
@pytest.mark.parametrize("at", [5, 7])
def test_resumed_it_has_the_same_replannings_and_the_same_bits(at, keys, tmp_path):
    keys = {
        "model": tiny_bert(layers=1, dropout=0.2), "num_train_epochs": 20, "slower": 1.7, "save_strategy": "steps",
        "save_steps": 1, "logging_strategy": "steps", **keys,
    }  # fmt: skip
    whole = trained(tmp_path, 60, **keys)
    again = made(tmp_path, 60, **{**keys, "model": tiny_bert(layers=1, dropout=0.2)})
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert whole.state.global_step < 80 and again.resumed_at == at
    assert again.time_budget.timeline == whole.time_budget.timeline
    assert changed(copy_state(whole.model), copy_state(again.model)) == set()
    assert [log.get("learning_rate") for log in again.state.log_history] == [
        log.get("learning_rate") for log in whole.state.log_history
    ]
    assert again.seconds == pytest.approx(whole.seconds)


def test_time_before_an_interruption_counts(tmp_path):
    keys = {"num_train_epochs": 20, "save_strategy": "steps", "save_steps": 8}
    trained(tmp_path, 50, **keys)
    again = made(tmp_path, 50, slower=2.0, **keys)
    again.now = 1e6  # another clock
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    within(again, 50)


def test_another_budget_is_another_plan(tmp_path):
    keys = {"num_train_epochs": 20, "save_strategy": "steps", "save_steps": 8}
    trained(tmp_path, 50, **keys)
    checkpoint = str(tmp_path / "checkpoint-16")
    with pytest.raises(UserError, match="max_hours"):
        trained(tmp_path, 80, checkpoint, **keys)
    within(trained(tmp_path, 80, checkpoint, allow_changed_plan=True, **keys), 80)


# ---- what cannot be kept -------------------------------------------------------------------------------------------


def test_a_budget_too_small_for_one_epoch_of_the_head(tmp_path):
    trainer = made(tmp_path, 3.9)  # 4 steps of 1 s
    before = copy_state(trainer.model)
    with pytest.raises(
        UserError, match=r"max_hours 0.00108333 is 3.9 s of training, and one epoch of the head .* 4.0 s"
    ):
        trainer.train()
    assert changed(before, copy_state(trainer.model)) == set()
    assert trained(tmp_path, 4.1).state.global_step == 2


def test_a_schedule_that_follows_a_metric_is_refused(tmp_path):
    trainer = made(tmp_path, 100, strategy="full", lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch")
    with pytest.raises(UserError, match="lr_scheduler_type: reduce_lr_on_plateau follows a metric"):
        trainer.check_optimization()


def test_a_scheduler_of_the_callers_own_is_refused(tmp_path):
    model = tiny_bert(layers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    args = arguments(tmp_path, max_hours=1)
    with pytest.raises(UserError, match="optimizers="):
        Clocked(model, args, train_dataset=texts(16), optimizers=(optimizer, scheduler))
    trainer = Clocked(model, args, train_dataset=texts(16))
    trainer.lr_scheduler = scheduler
    with pytest.raises(UserError, match="scheduler of its own"):
        trainer.train()


def test_dollars_need_a_price(tmp_path):
    with pytest.raises(UserError, match=r"max_usd: .*usd_per_hour"):
        TransferTrainer(tiny_bert(layers=1), arguments(tmp_path, max_usd=1.0), train_dataset=texts(16))
    args = arguments(tmp_path, max_usd=1.0, usd_per_hour=0.5)
    assert TransferTrainer(tiny_bert(layers=1), args, train_dataset=texts(16)).time_budget.seconds == 7200
    args = arguments(tmp_path, max_usd=1.0, usd_per_hour=0.5, max_hours=0.5)
    assert TransferTrainer(tiny_bert(layers=1), args, train_dataset=texts(16)).time_budget.seconds == 1800


@pytest.mark.parametrize("value", [0, -1, float("nan")])
@pytest.mark.parametrize("key", ["max_hours", "max_usd", "usd_per_hour"])
def test_a_budget_is_positive(key, value, tmp_path):
    with pytest.raises(UserError, match=f"{key}: expected"):
        arguments(tmp_path, **{key: value})


# ---- real times ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "data"), [(tiny_bert, texts), (tiny_vit, images)])
def test_timing_a_batch_leaves_no_trace(model, data, tmp_path, monkeypatch):
    monkeypatch.undo()  # the real times
    trainer = TransferTrainer(
        model(layers=2, dropout=0.3), arguments(tmp_path, strategy="gradual", max_hours=1, num_train_epochs=4),
        train_dataset=data(16), eval_dataset=data(8),
    )  # fmt: skip
    trainer.resolve_plan()
    before, chance = copy_state(trainer.model), torch.get_rng_state()
    times = stage_times.take(trainer, trainer.plan)
    assert changed(before, copy_state(trainer.model)) == set() and torch.equal(chance, torch.get_rng_state())
    assert len(times.steps) == len(trainer.plan.stages) == 4 and min(times.steps) > 0
    assert times.head > 0 and times.evaluation > 0
    assert all(p.requires_grad and p.grad is None for p in trainer.model.parameters())


def test_a_cache_that_the_budget_leaves_no_epochs_for_is_off(tmp_path, capsys):
    trainer = made(tmp_path, 10, boundary_cache="memory", head_epochs=5)
    trainer.train()
    assert "boundary_cache is off in stage 'head': the budget leaves" in capsys.readouterr().err
    assert trainer.boundary.entries[0].stores == {}


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(3.94, "3.9 s"), (9.96, "10 s"), (59.6, "1 min"), (175, "2 min 55 s"), (3600, "1 h"), (4810, "1 h 20 min")],
)
def test_a_duration_to_the_second(seconds, said):
    assert exactly(seconds) == said
