"""The optimal linear head on fixed features, for a path of L2 strengths.

The objective is the mean loss over examples (for multi-label classification the sum over labels, which are separate
problems) plus strength / 2 times the squared weights, on standardized features; the bias is not penalized. A feature
that varies little beside the others, such as a ReLU that few examples activate, is not stretched to their size: one
example would have a value of some hundreds, and the loss of held-out ones would explode. Softmax and sigmoid heads are
solved by L-BFGS in float64 (Liu and Nocedal 1989), a regression in closed form (ridge).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch.nn import functional

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
STRENGTHS = tuple(10 ** (2 - i / 2) for i in range(13))  # 1e2 … 1e-4, half a decade apart, strongest first
Point = tuple[torch.Tensor, torch.Tensor]  # (weights in rotated axes, bias)
_CONSTANT = 1e-6  # a feature with a smaller standard deviation, relative to its mean, counts as constant
_LEAST = 0.1  # of the median standard deviation, which features are divided by at least
_NULL = 1e-12  # smaller eigenvalues, relative to the largest, are rounding errors
_MANY_PRODUCTS = 1e9  # of a matrix multiplication, from which several threads may pay
PATH = {"gtol": 1e-4, "ftol": 1e-7}  # tolerances of a path, which predictions do not notice
_LIMITS = {"maxcor": 20, "maxiter": 2000, "maxfun": 4000}  # of L-BFGS
_SQRT_2 = 2**0.5
CURVATURE = 0.5  # upper bound of the Hessian with respect to the logits (Böhning 1992, theorem 2)


@dataclass(frozen=True)
class Head:
    """A linear head on features that are not standardized.

    Attributes:
        weight: (outputs, width), float64.
        bias: (outputs,), or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """(examples, outputs), float64, of features (examples, width)."""
        return functional.linear(features.double(), self.weight, self.bias)


class Problem:
    """Fixed features and their labels.

    Args:
        kind: `problem_type` as in `transformers` configurations.
        features: (examples, width).
        labels: (examples,) classes; (examples, labels) of 0 and 1; (examples, outputs) values.
        outputs: of the head.
        weights: (outputs,) of each class's examples, or of each label's positives; None for 1 each.
        has_bias: whether the head has a bias. Without one, features are scaled and not centered.
    """

    def __init__(
        self,
        kind: str,
        features: torch.Tensor,
        labels: torch.Tensor,
        outputs: int,
        weights: torch.Tensor | None = None,
        has_bias: bool = True,
    ):
        self.kind, self.outputs, self.has_bias = kind, outputs, has_bias
        self.labels = labels if kind == SINGLE else labels.double()
        self.weights = torch.ones(outputs, dtype=torch.float64) if weights is None else weights.double()
        x = features.double()
        mean, deviation = x.mean(0), x.std(0, correction=0)
        self.mean = mean if has_bias else torch.zeros_like(mean)
        size = deviation if has_bias else x.square().mean(0).sqrt()
        varies = size > _CONSTANT * mean.abs()
        self.scale = torch.where(varies, size.clamp(min=_LEAST * float(size.median())), torch.ones_like(size))
        x = (x - self.mean) / self.scale
        # In the eigenvectors of the features' covariance, the variables of L-BFGS can be scaled by the known curvature.
        with one_thread(x.numel() * min(x.shape)):
            self.variances, self.rotated, self._axes = _in_axes(x)
        self._solved: dict[float, Point] = {}  # by strength
        self._prepare_loss()

    def path(self, strengths: Sequence[float]) -> Iterator[Head]:
        """Solutions up to a tolerance that predictions do not notice, each started from the one before.

        Args:
            strengths: of the penalty, from strong to weak.
        """
        point = self._origin
        for strength in strengths:
            with self._threads():
                point = self._solved[strength] = self._solve(strength, point, PATH)
                head = self._head(*point)
            yield head

    def exact(self, strength: float) -> Head:
        """The solution to machine precision, started from the one of a path, if there is one."""
        point = self._solved.get(strength, self._origin)
        with self._threads():
            return self._head(*self._solve(strength, point, {"gtol": 1e-8, "ftol": 1e-15}))

    def _threads(self) -> contextlib.AbstractContextManager[None]:
        return one_thread(self.rotated.numel() * self.outputs)

    @property
    def _origin(self) -> Point:
        double = torch.float64
        return torch.zeros(len(self.variances), self.outputs, dtype=double), torch.zeros(self.outputs, dtype=double)

    def _solve(self, strength: float, point: Point, tolerances: dict[str, float]) -> Point:
        if self.kind == SINGLE and self.outputs == 2:
            return self._minimize_binary(strength, point, tolerances)
        if self.kind != REGRESSION:
            return self._minimize(strength, point, tolerances)
        bias = self.labels.mean(0) if self.has_bias else point[1]
        moments = self.rotated.T @ (self.labels - bias) / len(self.labels)
        return moments / (self.variances + strength)[:, None], bias

    def _head(self, inner: torch.Tensor, bias: torch.Tensor) -> Head:
        """The head for features that are not standardized, from weights in the eigenvector basis."""
        weight = self._axes(inner).T / self.scale
        return Head(weight, bias - weight @ self.mean if self.has_bias else None)

    def _minimize(self, strength: float, begin: Point, tolerances: dict[str, float]) -> Point:
        from scipy.optimize import minimize  # slow to import

        steps = (CURVATURE * self.variances + strength).rsqrt()[:, None]
        start = torch.cat([begin[0] / steps, begin[1][None]])
        shape, factors, moments = tuple(start.shape), steps.numpy(), self.rotated.T

        def objective(x: Any) -> tuple[float, Any]:  # in arrays: on numbers so few, an operation of torch takes longer
            point = x.reshape(shape)
            inner = point[:-1] * factors
            weight = torch.from_numpy(inner)
            loss, slope = self._loss(self.rotated @ weight + torch.from_numpy(point[-1]))
            gradient = np.empty(shape)
            np.multiply((moments @ slope).numpy() + strength * inner, factors, out=gradient[:-1])
            gradient[-1] = slope.sum(0).numpy() if self.has_bias else 0.0
            return float(loss) + strength / 2 * float(weight.square().sum()), gradient.ravel()

        result = minimize(objective, start.ravel().numpy(), jac=True, method="L-BFGS-B", options=_LIMITS | tolerances)
        point = torch.from_numpy(result.x).view_as(start)
        return point[:-1] * steps, point[-1].clone()

    def _minimize_binary(self, strength: float, begin: Point, tolerances: dict[str, float]) -> Point:
        """`_minimize` of a softmax over two classes, whose second column is minus the first at every step from zero.

        That is a restriction to an orthonormal basis of half the size, (-1, 1) / sqrt(2) in each row: L-BFGS takes the
        same steps up to rounding. Only the largest element of the gradient, at which it stops, is sqrt(2) as large.
        """
        from scipy.optimize import minimize  # slow to import
        from scipy.special import expit

        steps = (CURVATURE * self.variances + strength).rsqrt().numpy()
        rotated, signs = self.rotated.numpy(), 2.0 * self.labels.numpy() - 1
        share = self._share[:, 0].numpy()
        start = np.append(begin[0][:, 1].numpy() / steps, float(begin[1][1])) * _SQRT_2

        def objective(x: Any) -> tuple[float, Any]:
            inner = x[:-1] * steps
            margins = (rotated @ inner + x[-1]) * (_SQRT_2 * signs)
            slope = share * signs * expit(-margins) * -_SQRT_2
            gradient = np.empty_like(x)
            np.multiply(slope @ rotated + strength * inner, steps, out=gradient[:-1])
            gradient[-1] = slope.sum() if self.has_bias else 0.0
            return float(share @ np.logaddexp(0.0, -margins)) + strength / 2 * float(inner @ inner), gradient

        options = _LIMITS | tolerances | {"gtol": tolerances["gtol"] * _SQRT_2}
        x = minimize(objective, start, jac=True, method="L-BFGS-B", options=options).x
        inner, bias = torch.from_numpy(x[:-1] * steps / _SQRT_2), float(x[-1]) / _SQRT_2
        return torch.stack([-inner, inner], 1), torch.tensor([-bias, bias], dtype=torch.float64)

    def loss(self, head: Head, features: torch.Tensor) -> float:
        """Mean loss of this problem's examples, without the penalty, as training would log it."""
        value = self._loss(head.logits(features))[0]
        return float(value / self.outputs if self.kind == MULTI else value)

    def _loss(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean loss, its gradient) at logits (examples, outputs)."""
        if self.kind == REGRESSION:
            error = logits - self.labels
            return error.square().mean(), 2 * error / error.numel()
        if self.kind == MULTI:
            slope = torch.sigmoid(logits) * self._either - self._positive
            loss = functional.binary_cross_entropy_with_logits(
                logits, self.labels, pos_weight=self.weights, reduction="sum"
            )
            return loss / len(logits), slope / len(logits)
        logs = logits.log_softmax(-1)
        loss = (logs.gather(1, self.labels[:, None])[:, 0] * self._each).sum() / self._total
        return -loss, (logs.exp() - self._one_hot).mul_(self._share)

    def _prepare_loss(self) -> None:
        """What the loss is made of besides the logits: the weights of the examples."""
        if self.kind == MULTI:
            self._either, self._positive = 1 + (self.weights - 1) * self.labels, self.weights * self.labels
        elif self.kind == SINGLE:
            self._each = self.weights[self.labels]
            self._total = self._each.sum()
            self._share = (self._each / self._total)[:, None]
            self._one_hot = functional.one_hot(self.labels, self.outputs).double()


@contextlib.contextmanager
def one_thread(products: int) -> Iterator[None]:
    """Context of a small problem, where the threads of torch and of scipy's BLAS wait for each other at every step.

    On two cores one thread was 2.5 to 20 times as fast, for 1e5 to 8e7 products. Where other programs want the cores
    too, a thread that waits spins, and most CPU time is lost: a comparison of seven layers took 1 s in one thread, 14 s
    in two.

    Args:
        products: of the largest matrix multiplication.
    """
    if products >= _MANY_PRODUCTS:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _blas().limit(limits=1):
            yield
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _blas() -> ThreadpoolController:
    """The threads of the BLAS libraries of numpy and scipy, which torch does not set."""
    from scipy.optimize import minimize  # noqa: F401, slow to import; has the BLAS that the solver calls

    return ThreadpoolController().select(user_api="blas")


def _in_axes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Features in the eigenvectors of their covariance, without null ones.

    Args:
        x: (examples, width).

    Returns:
        (variances (axes,), features (examples, axes), function of weights (axes, outputs) to weights (width, outputs)).
    """
    count, width = x.shape
    is_wide = count < width
    variances, vectors = torch.linalg.eigh((x @ x.T if is_wide else x.T @ x) / count)
    kept = variances > _NULL * variances[-1].clamp(min=1e-300)
    variances, vectors = variances[kept], vectors[:, kept]
    if not is_wide:
        return variances, x @ vectors, lambda inner: vectors @ inner
    # With the singular value decomposition x = left · sizes · right, right is left out: it has the most numbers.
    sizes = (variances * count).sqrt()
    return variances, vectors * sizes, lambda inner: x.T @ (vectors @ (inner / sizes[:, None]))
