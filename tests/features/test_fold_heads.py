"""Heads of many parts of the same examples, against scikit-learn and the solver of a single head."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from hf_transfer.features import fold_heads
from hf_transfer.features.convex_head import MULTI, SINGLE, STRENGTHS, Problem
from hf_transfer.features.fold_heads import logits_of_parts

STRENGTH = 0.03
KINDS = [(SINGLE, 2), (SINGLE, 4), (MULTI, 3)]


def drawn(kind, outputs, examples=60, width=8, seed=0):
    """(features that differ in size, labels)"""
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, width, generator=chance) * torch.logspace(0, -1, width) + 3
    logits = (x - 3) @ torch.randn(width, outputs, generator=chance) * 2 + torch.randn(
        examples, outputs, generator=chance
    )
    return x, logits.argmax(1) if kind == SINGLE else (logits > 0.5).double()


def folds(examples, count=3):
    return np.stack([np.arange(examples) % count != fold for fold in range(count)])


@pytest.fixture
def precise(monkeypatch):
    monkeypatch.setitem(fold_heads.PATH, "gtol", 1e-9)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize(("kind", "outputs"), KINDS)
def test_each_part_has_the_head_of_scikit_learn(kind, outputs, is_weighted, has_bias, precise):
    """On features scaled by all examples; of labels, one after the other."""
    x, y = drawn(kind, outputs)
    weights = torch.linspace(0.5, 2, outputs) if is_weighted else torch.ones(outputs)
    problem, parts = Problem(kind, x, y, outputs, weights, has_bias), folds(len(x))
    scaled = ((x.double() - problem.mean) / problem.scale).numpy()
    (found,) = logits_of_parts(problem, parts, [STRENGTH])
    for own, part in zip(found, parts, strict=True):
        for column in range(outputs) if kind == MULTI else [None]:
            truth = y.numpy() if column is None else y[:, column].numpy()
            each = weights.numpy()[truth] if column is None else np.where(truth > 0, weights.numpy()[column], 1.0)
            total = each[part].sum() if column is None else part.sum()
            # The penalty of two columns that are opposite is half that of their difference.
            strength = STRENGTH / 2 if kind == SINGLE and outputs == 2 else STRENGTH
            head = LogisticRegression(C=1 / (strength * total), tol=1e-12, max_iter=10_000, fit_intercept=has_bias)
            head.fit(scaled[part], truth[part], sample_weight=each[part])
            expected = torch.from_numpy(head.decision_function(scaled))
            if column is not None:
                torch.testing.assert_close(own[:, column], expected, rtol=0, atol=1e-5)
            elif outputs == 2:
                torch.testing.assert_close(own[:, 1] - own[:, 0], expected, rtol=0, atol=1e-5)
            else:
                torch.testing.assert_close(own.log_softmax(1), expected.log_softmax(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [8, 90])
@pytest.mark.parametrize(("kind", "outputs"), KINDS)
def test_the_head_of_all_examples_is_that_of_the_solver_of_one_head(kind, outputs, width, precise):
    """With more features than examples, too; every point of the path, also the last ones."""
    x, y = drawn(kind, outputs, width=width)
    problem = Problem(kind, x, y, outputs)
    for strength, found in zip(STRENGTHS[:9], logits_of_parts(problem, folds(60, 1) | True, STRENGTHS), strict=False):
        torch.testing.assert_close(found[0], problem.exact(strength).logits(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "outputs"), KINDS)
def test_a_path_is_within_its_tolerance_as_that_of_one_head(kind, outputs):
    """L-BFGS stops as far from the minimum."""
    x, y = drawn(kind, outputs, width=90)
    problem = Problem(kind, x, y, outputs)
    strengths, parts = STRENGTHS[:9], folds(60, 1) | True
    far = 0.0
    for strength, found, head in zip(
        strengths, logits_of_parts(problem, parts, strengths), problem.path(strengths), strict=True
    ):
        exact = Problem(kind, x, y, outputs).exact(strength).logits(x)
        far = max(far, float((head.logits(x) - exact).abs().max()))
        assert (found[0] - exact).abs().max() < 0.05
    assert far > 0.001


def test_heads_that_are_solved_for_apart_are_the_same_up_to_the_tolerance(monkeypatch):
    x, y = drawn(SINGLE, 4)
    problem, parts = Problem(SINGLE, x, y, 4), folds(60, 5)
    together = [*logits_of_parts(problem, parts, STRENGTHS[:7])]
    again = [*logits_of_parts(problem, parts, STRENGTHS[:7])]
    monkeypatch.setattr(fold_heads, "_MOST_VALUES", 2 * 60 * 4)
    apart = [*logits_of_parts(problem, parts, STRENGTHS[:7])]
    assert [len(heads) for heads in apart] == [5] * 7
    for one, same, other in zip(together, again, apart, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
        torch.testing.assert_close(torch.stack(one), torch.stack(other), rtol=0, atol=0.02)
    assert not all(torch.equal(a, b) for a, b in zip(together[-1], apart[-1], strict=True)), "other last steps"


def test_parts_that_decide_nothing_are_solved_too():
    """One class alone, features that are constant, and a mistake that is far out, where a line is flat at first."""
    x, y = drawn(SINGLE, 2)
    one_class = np.stack([y.numpy() == 0, np.ones(60, dtype=bool)])
    for heads in logits_of_parts(Problem(SINGLE, x, y, 2), one_class, STRENGTHS[:7]):
        assert all(logits.isfinite().all() for logits in heads) and (heads[0][:, 0] > heads[0][:, 1]).all()
    constant = Problem(SINGLE, torch.ones(60, 3), torch.arange(60) % 2, 2)
    ((logits,),) = logits_of_parts(constant, np.ones((1, 60), dtype=bool), [1.0])
    assert (logits == 0).all()
    x[0, 0], y[0] = 1e4, 0
    (first,), (found,) = logits_of_parts(Problem(SINGLE, x, y, 2), np.ones((1, 60), dtype=bool), [1e-2, 1e-3])
    assert first.isfinite().all() and (found.argmax(1) == y).double().mean() > 0.9
