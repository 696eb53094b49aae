"""Our own schedules against torch's and the papers' formulas."""

from __future__ import annotations

import math
import re

import pytest
import torch

from hf_transfer import TransferArguments, TransferTrainer, UserError
from hf_transfer.errors import UserErrors
from hf_transfer.training.schedule_checks import notes
from hf_transfer.training.schedules import make_schedule
from tests.helpers import arguments, texts, tiny_bert

RATE = 1e-3


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)


@pytest.mark.parametrize("total", [10, 97])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"pct_start": 0.5, "div_factor": 10.0, "final_div_factor": 100.0},
        {"anneal_strategy": "linear"},
        {"three_phase": True, "pct_start": 0.4},
    ],
)
def test_one_cycle_is_torchs(total, kwargs):
    made = optimizer()
    oracle = torch.optim.lr_scheduler.OneCycleLR(made, RATE, total_steps=total, cycle_momentum=False, **kwargs)
    factor = make_schedule("one_cycle", kwargs, total, 0, RATE)
    for step in range(total):
        assert factor(step) * RATE == pytest.approx(oracle.get_last_lr()[0], rel=1e-9, abs=1e-18), step
        made.step()
        if step < total - 1:
            oracle.step()


@pytest.mark.parametrize("kwargs", [{"T_0": 7}, {"T_0": 5, "T_mult": 2}, {"T_0": 3, "T_mult": 3, "eta_min": 1e-4}])
def test_cosine_warm_restarts_is_torchs(kwargs):
    made = optimizer()
    oracle = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(made, **kwargs)
    factor = make_schedule("cosine_warm_restarts", kwargs, 60, 0, RATE)
    for step in range(60):
        assert factor(step) * RATE == pytest.approx(oracle.get_last_lr()[0], rel=1e-9), step
        made.step(), oracle.step()


def test_warm_restarts_begin_after_the_warm_up():
    factor = make_schedule("cosine_warm_restarts", {"T_0": 4}, 20, 5, RATE)
    assert [factor(t) for t in range(6)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert factor(7) == pytest.approx(0.5) and factor(9) == pytest.approx(1.0)


@pytest.mark.parametrize(("cut_frac", "ratio"), [(0.1, 32), (0.25, 8)])
def test_slanted_triangular_is_equation_3_of_ulmfit(cut_frac, ratio):
    total = 200
    factor = make_schedule("slanted_triangular", {"cut_frac": cut_frac, "ratio": ratio}, total, 0, RATE)
    cut = math.floor(total * cut_frac)
    for t in range(total):
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1))
        assert factor(t) == pytest.approx((1 + p * (ratio - 1)) / ratio, rel=1e-12)
    assert factor(0) == pytest.approx(1 / ratio) and factor(cut) == 1.0
    assert factor(total) == pytest.approx(1 / ratio)


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("one_cycle", {"pct_strat": 0.3}, r"no 'pct_strat'.*pct_start"),
        ("one_cycle", {"pct_start": 2}, "pct_start: 2"),
        ("cosine_warm_restarts", {}, "needs T_0"),
        ("cosine_warm_restarts", {"T_0": 0.5}, "T_0: 0.5"),
        ("slanted_triangular", {"ratio": 0}, "ratio: 0"),
    ],
)
def test_wrong_keys_are_explained(name, kwargs, said):
    with pytest.raises(UserError, match=said):
        make_schedule(name, kwargs, 100, 0, RATE)


def test_a_second_warm_up_is_refused():
    with pytest.raises(UserError, match="cut_frac"):
        make_schedule("slanted_triangular", {}, 100, 5, RATE)


def test_the_names_are_arguments_values_with_and_without_a_plan(tmp_path):
    args = arguments(tmp_path, lr_scheduler_type="slanted_triangular", num_train_epochs=2)
    assert args.to_dict()["lr_scheduler_type"] == "slanted_triangular"
    trainer = TransferTrainer(tiny_bert(), args, train_dataset=texts())
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "loss" in log]
    factor = make_schedule("slanted_triangular", {}, 10, 0, 1e-2)
    assert rates == pytest.approx([1e-2 * factor(t) for t in range(10)])
    with pytest.raises(UserError, match=r"one_cycel.*one_cycle"):
        TransferArguments(str(tmp_path), use_cpu=True, lr_scheduler_type="one_cycel")


# ---- schedules that cannot do what their keys say ------------------------------------------------------------------


def planned(folder, **keys):
    """20 steps: 2 stages of 10, the head alone at 1e-2, then everything at 1e-3."""
    head, body = ({"epochs": 2, "train": t, "learning_rate": r} for t, r in (("head", 1e-2), ("all", 1e-3)))
    keys = {"stages": [head, body], "learning_rate": 1e-3, "log_level": "warning", **keys}
    return TransferTrainer(
        tiny_bert(layers=1), arguments(folder, **keys), train_dataset=texts(20), eval_dataset=texts(4)
    )


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"warmup_steps": 20}, "warmup_steps: a warm-up of 20 steps .* a run of 20"),
        (
            {"unfreeze_warmup_steps": 10},
            r"unfreeze_warmup_steps: .* 'embeddings', which trains for 10 .* fewer than 10",
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-3}}, "min_lr: 0.001 is not"),
        ({"lr_scheduler_type": "cosine_warmup_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 2}}, "min_lr: 2 is not"),
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 1.5}}, "min_lr_rate: 1.5"),
        (
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "warmup_steps": 5,
                "lr_scheduler_kwargs": {"num_decay_steps": 16},
            },
            "5 of warm-up and 16 of decay make 21 optimizer steps, and the run has 20",
        ),
        (
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"num_decay_steps": 4, "num_stable_steps": 10},
            },
            "make 14 optimizer steps.*Leave num_stable_steps out",
        ),
    ],
)
def test_what_no_run_of_this_length_can_do_is_refused(keys, said, tmp_path):
    with pytest.raises(UserError, match=said):
        planned(tmp_path, **keys).resolve_plan()


@pytest.mark.parametrize(
    "keys",
    [
        {"warmup_steps": 19},
        {"unfreeze_warmup_steps": 9},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 5e-4}},
        {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 5, "lr_scheduler_kwargs": {"num_decay_steps": 15}},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.3},
    ],
)
def test_what_it_can_just_do_is_not(keys, tmp_path):
    trainer = planned(tmp_path, **keys)
    assert trainer.resolve_plan() == 20
    assert list(notes(trainer.args, trainer.plan, 20)) == []


def test_a_group_warms_up_over_all_stages_that_train_it(tmp_path):
    """The head trains for 20 steps from its unfreezing on, in stages of 10."""
    trainer = planned(tmp_path, unfreeze_warmup_steps=15, stages=[
        {"epochs": 2, "train": "head", "learning_rate": 1e-2}, {"epochs": 2, "train": "head", "learning_rate": 1e-3}
    ])  # fmt: skip
    assert trainer.resolve_plan() == 20


@pytest.mark.parametrize("name", ["constant", "reduce_lr_on_plateau", "greedy"])
def test_a_schedule_without_a_warm_up_takes_none(name, tmp_path):
    with pytest.raises(UserErrors, match=f"warmup_steps: 0.1 has no effect with lr_scheduler_type: {name},"):
        arguments(tmp_path, lr_scheduler_type=name, warmup_steps=0.1, eval_strategy="epoch")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"max_steps": 1, "lr_scheduler_type": "one_cycle"}, "in 1 optimizer step, one_cycle reaches only 4e-06 of"),
        ({"max_steps": 1, "warmup_steps": 0.1}, "in 1 optimizer step, linear reaches only 0 of"),
        (
            {"lr_scheduler_type": "cosine_warm_restarts", "lr_scheduler_kwargs": {"T_0": 20}},
            "T_0: 20 .* never restarts",
        ),
        (
            {"lr_scheduler_type": "greedy", "strategy": "full", "stages": None, "eval_strategy": "epoch"},
            "greedy lowers no learning rate",
        ),
    ],
)
def test_what_may_be_meant_is_noted_once(keys, said, tmp_path, capsys):
    trainer = planned(tmp_path, **keys)
    trainer.resolve_plan()
    assert re.search(said, "\n".join(notes(trainer.args, trainer.plan, trainer.num_steps)))
    trainer.train()
    assert len(re.findall(said, "".join(capsys.readouterr()))) == 1


def test_messages_name_a_schedule_as_the_user_writes_it(tmp_path):
    trainer = planned(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch")
    with pytest.raises(UserError, match="lr_scheduler_type: reduce_lr_on_plateau follows a metric"):
        trainer.check_optimization()


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_follows_evaluations_needs_some(name, tmp_path):
    with pytest.raises(UserErrors, match=f"lr_scheduler_type: {name} follows the evaluations.*set eval_strategy"):
        arguments(tmp_path, lr_scheduler_type=name, eval_strategy="no")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"layer_rules": "^embed"}, "layer_rules: expected a list, got '\\^embed'"),
        ({"stages": {"epochs": 1}}, "stages: expected a list, got"),
        ({"layer_learning_rates": "bn"}, "layer_learning_rates: expected a mapping, got 'bn'"),
        ({"freeze": 3}, "freeze: expected a list, got 3"),
        ({"strategy": ["full"]}, "strategy: expected one value, got"),
        ({"class_weights": ["a"]}, "class_weights: expected a mapping, got"),
    ],
)
def test_a_value_of_another_kind_is_one_sentence(tmp_path, keys, said):
    with pytest.raises(UserErrors, match=f"(?s)1 problem found:.*{said}"):
        arguments(tmp_path, **keys)
    assert arguments(tmp_path, strategy="full", freeze="embeddings").freeze == "embeddings"
