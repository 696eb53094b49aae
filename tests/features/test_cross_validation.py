"""Folds for the convex head."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from hf_transfer.features import convex_head, fold_heads
from hf_transfer.features.convex_head import MULTI, REGRESSION, SINGLE
from hf_transfer.features.cross_validation import divisions, held_out_logits


def test_folds_are_stratified_and_members_of_a_small_class_are_apart():
    labels = torch.tensor([0] * 23 + [1] * 41 + [2] * 2 + [3] * 4)
    (folds,) = divisions(SINGLE, labels, 1, seed=3)
    sizes = np.bincount(folds, minlength=5)
    assert sizes.max() - sizes.min() <= 1
    for value in range(4):
        own = np.bincount(folds[labels == value], minlength=5)
        assert own.max() - own.min() <= 1
    again, other = divisions(SINGLE, labels, 2, seed=3)
    assert (again == folds).all() and (other != folds).any()


def test_several_labels_are_stratified_by_the_rarest():
    labels = torch.zeros(40, 3)
    labels[:, 0] = 1
    labels[[1, 30], 2] = 1  # the rare one, beside the common one
    (folds,) = divisions(MULTI, labels, 1, seed=0)
    assert folds[1] != folds[30] and sorted(np.bincount(folds)) == [8] * 5


def test_a_regression_has_folds_of_equal_size_and_never_more_than_examples():
    assert sorted(np.bincount(divisions(REGRESSION, torch.rand(40, 1), 1, seed=0)[0])) == [8] * 5
    assert sorted(divisions(REGRESSION, torch.rand(3, 1), 1, seed=0)[0]) == [0, 1, 2]


@pytest.mark.parametrize("kind", [SINGLE, MULTI, REGRESSION])
def test_a_problem_that_is_solved_twice_has_the_same_solution_bit_for_bit(kind):
    """The runs of `tests/runs` take that for granted, see `conftest.py` there."""
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    y = {SINGLE: (x[:, 0] > 0).long(), MULTI: (x[:, :2] > 0).double(), REGRESSION: x[:, :2].double()}[kind]
    draws = divisions(kind, y, 2, 0)
    one, other = ([*held_out_logits(kind, x.clone(), y.clone(), 2, draws)] for _ in range(2))
    assert len(one) == 13 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 3.0])])
def test_two_classes_are_solved_in_half_the_variables_with_the_same_result(weights, has_bias, monkeypatch):
    """Every point of a path, where L-BFGS stops early, and the exact solution: as over both columns."""
    x = torch.randn(120, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 40)
    y = (x[:, 0] + x[:, 1] > 0.3).long()

    def solved() -> torch.Tensor:
        problem = convex_head.Problem(SINGLE, x, y, 2, weights, has_bias)
        return torch.stack([head.logits(x) for head in (*problem.path(convex_head.STRENGTHS), problem.exact(1e-2))])

    halved, whole, calls = solved(), convex_head.Problem._minimize, []
    monkeypatch.setattr(convex_head.Problem, "_minimize_binary", lambda *given: calls.append(1) or whole(*given))
    torch.testing.assert_close(halved, solved(), rtol=1e-9, atol=1e-9)
    assert len(calls) == len(convex_head.STRENGTHS) + 1 and not halved.isnan().any() and halved.abs().max() > 1


@pytest.mark.parametrize("kind", [SINGLE, REGRESSION])
def test_small_problems_are_solved_in_one_thread_and_the_caller_keeps_its_own(kind, monkeypatch):
    """Also by the BLAS of numpy and scipy, which torch does not set."""
    limits, threads = [], torch.get_num_threads()
    home, name = (convex_head.Problem, "_solve") if kind == REGRESSION else (fold_heads._Heads, "_minimize")
    solve = getattr(home, name)

    def counted(*args):
        pools = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
        limits.append({torch.get_num_threads(), *pools})
        return solve(*args)

    monkeypatch.setattr(home, name, counted)
    torch.set_num_threads(2)
    try:
        x, y = torch.randn(30, 4), torch.arange(30) % 2
        y = y[:, None].double() if kind == REGRESSION else y
        outputs = 1 if kind == REGRESSION else 2
        for logits in held_out_logits(kind, x, y, outputs, divisions(kind, y, 1, 0), (1.0, 0.1)):
            assert logits.shape == (1, 30, outputs) and torch.get_num_threads() == 2
        assert len(limits) == (10 if kind == REGRESSION else 2) and set().union(*limits) == {1}
    finally:
        torch.set_num_threads(threads)
