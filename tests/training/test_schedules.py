"""Our own schedules against torch's and the papers' formulas."""

from __future__ import annotations

import math

import pytest
import torch

from hf_transfer import TransferArguments, TransferTrainer, UserError
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
