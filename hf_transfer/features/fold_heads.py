"""Convex heads that learn from parts of the same examples, solved for at once: a cross-validation, or a learning curve.

All parts share one matrix of features (`Problem.rotated`): a step of every head is one product with it, and one back,
where heads that are solved for one by one decompose the covariance of each part, and take most of their time in Python.
The features are scaled by all examples, held-out ones included, as the final head's are: a scale tells nothing of a
label. For the rest a head is the one that `Problem.path` finds, up to the tolerance of a path.

The method is nonlinear conjugate gradients (Polak and Ribière 1969; Nocedal and Wright 2006, section 5.2), which starts
over where a direction does not descend, in variables that are scaled by the known curvature. Logits are linear in the
weights, so that a search along a line needs no product. A regression has a closed form, and is not solved for here.

The same call gives the same bits. Which heads are solved for together decides when a step is the last one, and changes
logits within the tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from hf_transfer.features.convex_head import CURVATURE, PATH, SINGLE, Problem, one_thread

_MOST_VALUES = 4_000_000  # logits of the heads that are solved for together: 32 MB, and some arrays of that size
_MOST_STEPS = 2000
_MOST_TRIED = 30  # points on a line
_FLAT = 0.1  # slope at the end of a line, relative to that at its beginning
_LEVEL = 1e-12  # slope of a line, below which a head is at its minimum already

Array = np.ndarray[Any, Any]


def logits_of_parts(problem: Problem, parts: Array, strengths: Sequence[float]) -> Iterator[list[torch.Tensor]]:
    """For each L2 strength and part (examples, outputs) logits of all examples, in float64.

    Args:
        problem: all examples; not a regression.
        parts: (parts, examples) whether the head of a part learns from an example.
        strengths: from strong to weak.
    """
    most = max(1, _MOST_VALUES // (problem.outputs * len(problem.labels)))
    groups = [_Heads(problem, parts[i : i + most]) for i in range(0, len(parts), most)]
    for strength in strengths:
        yield [logits for group in groups for logits in group.solved(strength)]


class _Heads:
    """Heads that are solved for together.

    Args:
        problem: all examples.
        parts: (parts, examples) whether the head of a part learns from an example.
    """

    def __init__(self, problem: Problem, parts: Array):
        self.count, self.outputs, self.has_bias = len(parts), problem.outputs, problem.has_bias
        self.is_pair = problem.kind == SINGLE and problem.outputs == 2
        is_softmax = problem.kind == SINGLE and not self.is_pair
        self.loss: _Softmax | _Logistic = (_Softmax if is_softmax else _Logistic)(problem, parts)
        self.x, self.variances = problem.rotated.numpy(), problem.variances.numpy()
        if self.has_bias:  # the weight of a feature that is one, without penalty
            self.x = np.pad(self.x, ((0, 0), (0, 1)), constant_values=1.0)
            self.variances = np.append(self.variances, 1.0)
        self.weights = np.zeros((*self.loss.shape, len(self.variances)))

    def solved(self, strength: float) -> Iterator[torch.Tensor]:
        """(examples, outputs) logits of each part, from where the last strength ended."""
        strength = strength / 2 if self.is_pair else strength  # of the difference of two columns that are opposite
        penalty = np.full(len(self.variances), strength)
        if self.has_bias:
            penalty[-1] = 0.0
        with one_thread(self.weights.size * len(self.x)):
            logits = self._minimize(penalty, (self.loss.curvature * self.variances + penalty) ** -0.5)
        if self.is_pair:
            logits = np.concatenate([-logits / 2, logits / 2], 1)
        for own in torch.from_numpy(logits.reshape(self.count, self.outputs, -1)):
            yield own.T

    def _minimize(self, penalty: Array, factors: Array) -> Array:
        """(heads, columns, examples) logits at the minimum.

        Args:
            penalty: (axes,) strength of each axis.
            factors: (axes,) that the curvature is at most one with.
        """
        logits = self._times(self.weights)
        at = self.loss.at(logits)
        gradient = direction = np.zeros_like(self.weights)
        size = np.zeros(len(self.weights))
        for _ in range(_MOST_STEPS):
            before, before_size = gradient, size
            slope = self.loss.slope(at)
            products = slope.reshape(-1, slope.shape[-1]) @ self.x
            gradient = (products.reshape(self.weights.shape) + penalty * self.weights) * factors
            if np.abs(gradient).max() <= PATH["gtol"]:
                break
            size = _dot(gradient, gradient)
            again = np.maximum(0.0, _ratio(size - _dot(gradient, before), before_size))
            direction = again[:, None, None] * direction - gradient
            descends = _dot(direction, gradient) < 0
            direction = np.where(descends[:, None, None], direction, -gradient)
            step = direction * factors
            change = self._times(step)
            scaled = penalty * step
            length, logits, at = _along(self.loss, logits, change, _dot(scaled, self.weights), _dot(scaled, step), at)
            self.weights = self.weights + length[:, None, None] * step
        return logits

    def _times(self, weights: Array) -> Array:
        return (weights.reshape(-1, weights.shape[-1]) @ self.x.T).reshape(*weights.shape[:2], -1)


def _along(
    loss: _Softmax | _Logistic, logits: Array, change: Array, linear: Array, quadratic: Array, at: Array
) -> tuple[Array, Array, Array]:
    """((heads,) lengths of the step, logits and predictions there): Newton's method on a line, between known bounds.

    Args:
        loss: of the heads.
        logits: where the line begins.
        change: of the logits, for a step of length one.
        linear: (heads,) slope of the penalty at the beginning.
        quadratic: (heads,) its second derivative.
        at: predictions where the line begins.
    """
    first = _dot(loss.slope(at), change) + linear
    following = _ratio(-first, loss.bend(at, change) + quadratic)
    low, high = np.zeros_like(first), np.full_like(first, np.inf)
    for _ in range(_MOST_TRIED):
        length = following
        new = logits + length[:, None, None] * change
        at = loss.at(new)
        slope = _dot(loss.slope(at), change) + linear + length * quadratic
        if (np.abs(slope) <= np.maximum(_FLAT * np.abs(first), _LEVEL)).all():
            break
        low, high = np.where(slope < 0, length, low), np.where(slope < 0, high, length)
        newton = length - _ratio(slope, loss.bend(at, change) + quadratic)
        halfway = np.where(np.isinf(high), 4 * length, (low + high) / 2)
        following = np.where((newton > low) & (newton < high), newton, halfway)
    return length, new, at


class _Softmax:
    """One class per example: as many heads as parts, of a column for each class.

    `shape` is (heads, columns); predictions are probabilities (heads, columns, examples).
    """

    curvature = CURVATURE

    def __init__(self, problem: Problem, parts: Array):
        self.share = _shares(problem, parts)[:, None]
        self.right = np.eye(problem.outputs)[problem.labels.numpy()].T
        self.shape = len(parts), problem.outputs

    def at(self, logits: Array) -> Array:
        """Predictions."""
        return torch.from_numpy(logits).softmax(1).numpy()

    def slope(self, at: Array) -> Array:
        """Derivatives of the mean losses by the logits."""
        return self.share * (at - self.right)

    def bend(self, at: Array, change: Array) -> Array:
        """(heads,) second derivatives of the mean losses along a change of the logits."""
        weighted = at * change
        spread = (weighted * change).sum(1) - weighted.sum(1) ** 2
        return (self.share[:, 0] * spread).sum(1)


class _Logistic:
    """Two classes, or several labels: a head of one column for each part, or for each part and label.

    `shape` is (heads, 1); predictions are probabilities (heads, 1, examples).
    """

    curvature = 0.25

    def __init__(self, problem: Problem, parts: Array):
        truth = problem.labels.double().numpy().reshape(len(problem.labels), -1).T  # (labels, examples)
        if problem.kind == SINGLE:
            share = _shares(problem, parts)[:, None]
            weights = np.ones((1, 1))
        else:
            share = (parts / parts.sum(1, keepdims=True))[:, None]
            weights = problem.weights.numpy()[:, None]
        self.positive = (share * weights * truth).reshape(-1, 1, parts.shape[1])
        self.either = self.positive + (share * (1 - truth)).reshape(self.positive.shape)
        self.shape = len(self.positive), 1

    def at(self, logits: Array) -> Array:
        """Predictions."""
        return torch.from_numpy(logits).sigmoid().numpy()

    def slope(self, at: Array) -> Array:
        """Derivatives of the mean losses by the logits."""
        return self.either * at - self.positive

    def bend(self, at: Array, change: Array) -> Array:
        """(heads,) second derivatives of the mean losses along a change of the logits."""
        return _dot(self.either * at * (1 - at) * change, change)


def _shares(problem: Problem, parts: Array) -> Array:
    """(parts, examples) share of each example in the mean loss, by the weight of its class."""
    each = parts * problem.weights.numpy()[problem.labels.numpy()]
    return each / each.sum(1, keepdims=True)


def _dot(one: Array, other: Array) -> Array:
    """(heads,) products of (heads, columns, …)."""
    return np.einsum("hcn,hcn->h", one, other)


def _ratio(one: Array, other: Array) -> Array:
    """Quotients; 0 where the divisor is not positive, as at a minimum."""
    return np.divide(one, other, out=np.zeros_like(one), where=other > 0)
