"""Which evaluation is the best: checkpoints, plateaus, early stopping and schedules go in the metric's direction."""

from __future__ import annotations

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from hf_transfer import TransferArguments, TransferTrainer, UserError
from hf_transfer.keys import keys as keys_of_runs
from hf_transfer.settings import Config
from hf_transfer.training.best_metric import _evaluations
from hf_transfer.training.early_stopping import ended_by
from tests.helpers import arguments, changed, copy_state, texts, tiny_bert

BEST = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
RUN = {"model_name_or_path": "m", "dataset_name": "d.csv", "output_dir": "o", "use_cpu": True}
PLATEAU = {"strategy": "gradual", "unfreeze_trigger": "plateau", "eval_strategy": "epoch"}


class Scripted:
    """Metrics that are read from a list, one entry per evaluation."""

    def __init__(self, name, values):
        self.name, self.values = name, list(values)

    def __call__(self, prediction):
        return {self.name: self.values.pop(0)}


def trainer_of(tmp_path, name="mae", values=(), epochs=4, sets=None, callbacks=None, **keys):
    args = arguments(tmp_path, num_train_epochs=epochs, metric_for_best_model=name, **keys)
    data = texts(8) if sets is None else {s: texts(4) for s in sets}
    made = Scripted(name.removeprefix("eval_") if name else "quality", values) if values else None
    return TransferTrainer(
        tiny_bert(), args, train_dataset=texts(8), eval_dataset=data, compute_metrics=made, callbacks=callbacks
    )


# ---- direction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "direction"),
    [
        ("mae", None, False),
        ("eval_rmse", None, False),
        ("ece", None, False),
        ("loss", None, False),
        ("accuracy", None, True),
        ("eval_pearson", None, True),
        ("mae", True, True),  # whoever says so
        ("accuracy", False, False),
        ("neg_mae", None, True),  # not ours: Trainer's rule
        ("my_loss", None, False),
        (None, None, None),
        (None, True, True),
    ],
)
@pytest.mark.parametrize("keys", [{}, {"strategy": "full"}], ids=["no plan", "plan"])
def test_direction(tmp_path, name, given, direction, keys):
    args = TransferArguments(str(tmp_path), metric_for_best_model=name, greater_is_better=given, **keys)
    assert args.greater_is_better is direction
    again = TransferArguments(**{k: v for k, v in args.to_dict().items() if k in vars(args)})
    assert again.greater_is_better is direction
    if (name or "").removeprefix("eval_") not in ("mae", "rmse", "ece"):
        theirs = TrainingArguments(str(tmp_path), metric_for_best_model=name, greater_is_better=given)
        assert theirs.greater_is_better is direction


@pytest.mark.parametrize(("name", "best"), [("mae", 2), ("accuracy", 4)])
def test_the_best_checkpoint_is_kept(tmp_path, name, best):
    trainer = trainer_of(tmp_path, name, (0.3, 0.1, 0.4, 0.9), **BEST)
    trainer.train()
    assert trainer.state.best_global_step == 2 * best


def test_plateaus_go_in_the_direction_of_the_metric(tmp_path):
    """Falling errors are improvements: only the third evaluation is none."""
    trainer = trainer_of(tmp_path, "mae", (0.9, 0.5, 0.6, 0.4), **PLATEAU)
    trainer.train()
    assert [stage.start for stage in trainer.plan.stages][:2] == [0, 6]
    assert trainer.stage_records[0].best_step == 4


@pytest.mark.parametrize(("given", "mode"), [(None, "max"), ({"mode": "min"}, "min"), ({"patience": 2}, "max")])
def test_a_schedule_that_follows_the_metric_does_too(tmp_path, given, mode):
    keys = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": given, "eval_strategy": "epoch"}
    trainer = trainer_of(tmp_path, "accuracy", (0.5,), strategy="full", **keys)
    trainer.create_optimizer_and_scheduler(4)
    assert trainer.lr_scheduler.mode == mode and trainer.lr_scheduler.patience == (given or {}).get("patience", 10)
    smaller = trainer_of(tmp_path, "mae", (0.5,), strategy="full", **keys)
    assert smaller.args.lr_scheduler_kwargs["mode"] == "min"
    plain = trainer_of(tmp_path, "accuracy", (0.5,), **keys)  # no plan: Trainer, whatever it does
    assert (plain.args.lr_scheduler_kwargs or {}) == (given or {})


# ---- several evaluation sets ---------------------------------------------------------------------------------------


def test_one_of_several_sets_decides_in_its_metrics_direction(tmp_path):
    assert trainer_of(tmp_path, "far_mae", sets=("near", "far"), **PLATEAU).args.greater_is_better is False
    assert trainer_of(tmp_path, "eval_near_f1_macro", sets=("near", "far")).args.greater_is_better is True
    assert trainer_of(tmp_path, "far_mae", sets=("near", "far"), greater_is_better=True).args.greater_is_better is True
    assert trainer_of(tmp_path, "neg_mae", sets=("near", "far")).args.greater_is_better is True
    assert trainer_of(tmp_path, "neg_mae", sets=("near", "neg")).args.greater_is_better is False


@pytest.mark.parametrize("keys", [PLATEAU, {"strategy": "full", **BEST}], ids=["plateau", "best"])
@pytest.mark.parametrize(("name", "listed"), [(None, "near_loss, far_loss"), ("eval_mae", "near_mae, far_mae")])
def test_several_sets_need_one_that_decides(tmp_path, keys, name, listed):
    with pytest.raises(UserError, match=rf"^metric_for_best_model: .*several evaluation sets.*: {listed}\.$"):
        trainer_of(tmp_path, name, sets=("near", "far"), **keys)


@pytest.mark.parametrize("sets", [("a", "a_b"), ("a_b", "a")])
def test_a_plateau_of_one_of_several_sets(tmp_path, sets):
    """One evaluation of both sets is one evaluation, in whatever order they are."""
    trainer = trainer_of(tmp_path, "a_b_loss", sets=sets, epochs=6, unfreeze_patience=2, learning_rate=1e-30, **PLATEAU)
    trainer.train()
    assert [stage.start for stage in trainer.plan.stages][:2] == [0, 6]
    with pytest.raises(UserError, match=r"no 'a_b_los'.*a_b_loss, a_loss.*Did you mean 'a_b_loss'"):
        trainer_of(tmp_path, "a_b_los", sets=sets, **PLATEAU).train()


# ---- early stopping ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "last"), [("mae", 4), ("accuracy", 2)])
def test_early_stopping_goes_in_the_direction_of_the_metric(tmp_path, name, last):
    stop = EarlyStoppingCallback(early_stopping_patience=1)
    trainer = trainer_of(tmp_path, name, (0.9, 0.5, 0.4, 0.6, 0.3), 5, callbacks=[stop], strategy="full", **BEST)
    trainer.train()
    assert trainer.state.global_step == 2 * last


@pytest.mark.parametrize(
    ("patience", "needed", "keys"),
    [
        (2, 3, {**PLATEAU, "unfreeze_patience": 2}),  # both count the same evaluations: the run would end first
        (1, 3, {"strategy": "gradual", "unfreeze_interval": 3.0, "eval_strategy": "epoch"}),
        (4, 6, {"strategy": "two-phase", "head_epochs": 3.0, "eval_strategy": "steps", "eval_steps": 1}),
        (2, 3, {"strategy": "two-phase", "head_epochs": 3.0, "eval_strategy": "steps", "eval_steps": 0.2}),
    ],
)
def test_early_stopping_that_ends_a_run_before_anything_thaws_is_refused(tmp_path, patience, needed, keys):
    """With one evaluation more than its patience before the first unfreeze, the callback can end the run."""
    stop = EarlyStoppingCallback(early_stopping_patience=patience)
    trainer = trainer_of(tmp_path, "mae", (0.5,) * 20, 5, callbacks=[stop], **keys)
    with pytest.raises(UserError, match=rf"early_stopping_patience {patience} can end .* at least {needed}\."):
        trainer.train()
    assert trainer.state.global_step == 0
    stop.early_stopping_patience = needed
    assert trainer.resolve_plan() == 10


def test_early_stopping_may_end_a_run_of_one_stage(tmp_path):
    trainer = trainer_of(
        tmp_path, "mae", (0.5,) * 9, callbacks=[EarlyStoppingCallback(1)], strategy="full", eval_strategy="epoch"
    )
    trainer.train()
    assert trainer.state.global_step == 4


def stopping(folder, values, resumed=None, **keys):
    """A run of at most 8 epochs of 2 steps that the third evaluation without improvement ends."""
    keys = {"early_stopping_patience": 3, "early_stopping_threshold": 0.05, "strategy": "full", **BEST, **keys}
    trainer = trainer_of(folder, "mae", values, 8, **keys)
    trainer.train(resume_from_checkpoint=resumed)
    return trainer


MAE = (0.9, 0.5, 0.48, 0.51, 0.47, 0.1, 0.1, 0.1)  # from the third on, nothing improves by 0.05 until too late


def test_a_key_ends_a_run_at_its_patience(tmp_path):
    trainer = stopping(tmp_path, MAE)
    assert trainer.state.global_step == 2 * 5
    assert trainer.state.best_global_step == 2 * 5, "the best weights, also where the threshold was not reached"
    assert ended_by(trainer.callback_handler.callbacks) is not None
    longer = stopping(tmp_path / "longer", MAE, early_stopping_patience=4)
    assert longer.state.global_step == 2 * 8
    assert ended_by(longer.callback_handler.callbacks) is None


@pytest.mark.parametrize("epochs", [1, 3, 4, 5])
def test_a_resumed_run_ends_where_the_whole_one_did_bit_for_bit(tmp_path, epochs):
    """Also from the checkpoint at which it had ended, which trains no step more."""
    whole = stopping(tmp_path, MAE)
    checkpoint = tmp_path / f"checkpoint-{2 * epochs}"
    resumed = stopping(tmp_path / "resumed", MAE[epochs:], str(checkpoint))
    assert resumed.state.global_step == whole.state.global_step
    assert not changed(copy_state(whole.model), copy_state(resumed.model))
    random = torch.load(tmp_path / "checkpoint-10" / "rng_state.pth", weights_only=False)["cpu"]
    assert torch.equal(random, torch.get_rng_state())


def test_a_run_goes_on_with_more_patience_or_a_patience_that_is_new(tmp_path):
    stopping(tmp_path / "a", MAE)
    longer = stopping(tmp_path / "b", MAE[5:], str(tmp_path / "a/checkpoint-10"), early_stopping_patience=4)
    assert longer.state.epoch == 8
    trainer_of(tmp_path / "c", "mae", MAE, 2, strategy="full", **BEST).train()
    keys = {"early_stopping_patience": 2, "allow_changed_plan": True}
    assert stopping(tmp_path / "d", MAE[2:], str(tmp_path / "c/checkpoint-4"), **keys).state.epoch == 4


def test_a_second_training_counts_anew(tmp_path):
    keys = {"early_stopping_patience": 1, "strategy": "full", "eval_strategy": "epoch"}
    trainer = trainer_of(tmp_path, "mae", (0.5,) * 8, 8, **keys)
    for _ in range(2):
        trainer.train()
        assert trainer.state.global_step == 4


def test_only_the_set_that_decides_is_counted_and_nothing_is_said_of_the_others(tmp_path, caplog):
    keys = {"early_stopping_patience": 1, "learning_rate": 1e-30, "strategy": "full", "eval_strategy": "epoch"}
    trainer = trainer_of(tmp_path, "far_loss", sets=("near", "far"), **keys)
    trainer.train()
    assert trainer.state.global_step == 4 and "disabled" not in caplog.text


def test_without_a_metric_the_loss_decides(tmp_path):
    args = arguments(tmp_path, early_stopping_patience=2, eval_strategy="epoch")
    assert (args.metric_for_best_model, args.greater_is_better) == ("loss", False)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"early_stopping_patience": 2, "eval_strategy": "no"}, "eval_strategy: no makes none"),
        ({"early_stopping_patience": 0, "eval_strategy": "epoch"}, "expected a positive number, got 0"),
        ({"early_stopping_threshold": 0.1}, "no effect without early_stopping_patience"),
    ],
)
def test_early_stopping_that_cannot_work_is_refused(tmp_path, keys, sentence):
    with pytest.raises(UserError, match=sentence):
        arguments(tmp_path, **keys)
    with pytest.raises(UserError, match=sentence):
        Config.from_sources({}, {**RUN, **keys})


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, (True, "epoch")),
        ({"eval_strategy": "steps", "eval_steps": 7}, (True, "steps")),
        ({"save_strategy": "best"}, (True, "best")),
        ({"load_best_model_at_end": False, "save_strategy": "no"}, (False, "no")),
        ({"save_strategy": "no"}, "save_strategy: no does not save where eval_strategy: epoch evaluates"),
    ],
)
def test_a_run_that_may_end_early_keeps_its_best_weights(keys, expected):
    given = {**RUN, "early_stopping_patience": 2, **keys}
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            Config.from_sources({}, given)
        return
    values = Config.from_sources({}, given).values
    assert (values["load_best_model_at_end"], values["save_strategy"]) == expected
    assert values["save_steps"] == (7 if "eval_steps" in keys else keys_of_runs()["save_steps"].default)


@pytest.mark.parametrize("keys", [{"eval_strategy": "epoch"}, {"eval_strategy": "steps", "eval_steps": 3}])
@pytest.mark.parametrize("delay", [0, 2.5, 5])
def test_evaluations_are_counted_as_trainer_schedules_them(tmp_path, keys, delay):
    args = TrainingArguments(
        str(tmp_path),
        num_train_epochs=5,
        per_device_train_batch_size=4,
        report_to="none",
        eval_delay=delay,
        use_cpu=True,
        **keys,
    )
    trainer = Trainer(tiny_bert(), args, train_dataset=texts(8), eval_dataset=texts(4))
    trainer.train()
    steps = [log["step"] for log in trainer.state.log_history if "eval_loss" in log]
    for until in (1, 2, 3, 6, 9):
        assert _evaluations(args, until, 2, 10) == sum(step <= until for step in steps)
