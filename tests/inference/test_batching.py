"""Requests that share batches."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from hf_transfer.inference.batching import Batcher


class Model:
    """Answers a number with its square, and notes the batches."""

    def __init__(self) -> None:
        self.batches: list[tuple[Any, list[int]]] = []

    def __call__(self, key: Any, inputs: Sequence[int]) -> list[int]:
        self.batches.append((key, list(inputs)))
        if 13 in inputs:
            raise ValueError("13")
        return [x * x for x in inputs]


def ask(*requests: tuple[Any, list[int]], size: int = 4, wait: float = 0.2, model: Callable | None = None) -> list[Any]:
    """The answers of requests that arrive at once, or what they raise."""

    async def run() -> list[Any]:
        batcher = Batcher(model or Model(), lambda key: size, wait)
        working = asyncio.create_task(batcher.work())
        try:
            asked = (batcher.ask(key, inputs) for key, inputs in requests)
            return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 30)
        finally:
            working.cancel()

    return asyncio.run(run())


def test_what_arrives_together_shares_a_batch():
    """Up to its size, in the order of arrival, by key; a request is never split."""
    model = Model()
    requests = [("a", [1]), ("b", [2, 3]), ("a", [4, 5]), ("a", [6, 7]), ("b", [8])]
    assert ask(*requests, model=model) == [[1], [4, 9], [16, 25], [36, 49], [64]]
    assert model.batches == [("a", [1, 4, 5]), ("b", [2, 3, 8]), ("a", [6, 7])]


def test_a_request_beyond_the_size_is_a_batch_of_its_own():
    model = Model()
    assert ask(("a", [1]), ("a", [2, 3, 4]), ("a", [5]), size=2, model=model) == [[1], [4, 9, 16], [25]]
    assert model.batches == [("a", [1]), ("a", [2, 3, 4]), ("a", [5])]


def test_without_waiting_each_batch_is_what_has_arrived():
    model = Model()
    assert ask(*(("a", [i]) for i in range(5)), wait=0, model=model) == [[i * i] for i in range(5)]
    assert [len(inputs) for _, inputs in model.batches] == [4, 1]


def test_only_the_faulty_request_fails():
    first, second, third = ask(("a", [1]), ("a", [13]), ("a", [3]), size=8)
    assert first == [1] and third == [9] and isinstance(second, ValueError)


def test_what_arrives_while_the_model_is_busy_is_the_next_batch():
    """Without a wait."""
    model, busy, free = Model(), threading.Event(), threading.Event()

    def slow(key: Any, inputs: Sequence[int]) -> list[int]:
        busy.set()
        assert free.wait(30)
        return model(key, inputs)

    async def run() -> None:
        batcher = Batcher(slow, lambda key: 100, 0)
        working = asyncio.create_task(batcher.work())
        first = asyncio.create_task(batcher.ask("a", [0]))
        await asyncio.to_thread(busy.wait, 30)
        others = [asyncio.create_task(batcher.ask("a", [i])) for i in range(1, 5)]
        await asyncio.sleep(0)
        free.set()
        await asyncio.wait_for(asyncio.gather(first, *others), 30)
        working.cancel()

    asyncio.run(run())
    assert model.batches == [("a", [0]), ("a", [1, 2, 3, 4])]


def test_a_client_that_has_gone_costs_nothing():
    model = Model()

    async def run() -> list[int]:
        batcher = Batcher(model, lambda key: 2, 0.2)
        gone = asyncio.create_task(batcher.ask("a", [1]))
        await asyncio.sleep(0)
        gone.cancel()
        working = asyncio.create_task(batcher.work())
        with pytest.raises(asyncio.CancelledError):
            await gone
        answers = await asyncio.wait_for(batcher.ask("a", [2]), 30)
        working.cancel()
        return answers

    assert asyncio.run(run()) == [4] and model.batches == [("a", [2])]
