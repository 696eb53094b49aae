"""What the runs of this folder compute from equal numbers is computed once in a process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="package", autouse=True)
def _heads_are_solved_once() -> Iterator[None]:
    """A linear head of the same features, labels and start is solved for once.

    Most runs here begin with the same few features, and each solves some hundred problems of them: L-BFGS took a
    quarter of their time. That the solver answers alike twice is tested in `tests/features/test_cross_validation.py`.
    """
    from hf_transfer.features.convex_head import Problem

    solved: dict[bytes, Any] = {}
    solve = Problem._minimize

    def once(problem: Problem, strength: float, begin: Any, tolerances: dict[str, float]) -> Any:
        own = problem.__dict__.get("_digest") or problem.__dict__.setdefault("_digest", _digest(problem))
        key = hashlib.sha256(own + repr((strength, tolerances)).encode())
        for part in begin:
            key.update(part.numpy().tobytes())
        if (digest := key.digest()) not in solved:
            solved[digest] = solve(problem, strength, begin, tolerances)
        return tuple(part.clone() for part in solved[digest])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Problem, "_minimize", once)
        yield


def _digest(problem: Any) -> bytes:
    """Of everything that a solution depends on, besides its strength and start."""
    key = hashlib.sha256(repr((problem.kind, problem.outputs, problem.has_bias, problem.rotated.shape)).encode())
    for tensor in (problem.rotated, problem.variances, problem.labels, problem.weights):
        key.update(tensor.contiguous().numpy().tobytes())
    return key.digest()
