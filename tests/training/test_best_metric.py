"""Which evaluation is the best: checkpoints, plateaus, early stopping and schedules go in the metric's direction."""

from __future__ import annotations

import pytest
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from hf_transfer import TransferArguments, TransferTrainer, UserError
from hf_transfer.training.best_metric import _evaluations
from tests.helpers import arguments, texts, tiny_bert

BEST = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
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
