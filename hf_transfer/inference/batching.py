"""Requests that share batches: what arrives within a short time is answered in one forward pass.

A single thread calls the model. While it is busy, requests queue, and those of one task are its next batch; so batches
grow with the load, and `wait` only matters while it is idle.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass
class _Request:
    key: Hashable
    inputs: Sequence[Any]
    answers: asyncio.Future[list[Any]]
    arrived: float


class Batcher:
    """Collects the inputs of requests into batches.

    Args:
        answer: from a key and inputs to an answer for each, in order; called in one thread, never twice at once.
        size: inputs of a key in a batch at most. A request with more is a batch of its own, never split or shared.
        wait: seconds that a request waits for others before a batch that is not full is answered.
    """

    def __init__(
        self,
        answer: Callable[[Any, Sequence[Any]], list[Any]],
        size: Callable[[Any], int],
        wait: float,
    ):
        self._answer, self._size, self._wait = answer, size, wait
        self._queue: list[_Request] = []
        self._arrived = asyncio.Event()

    async def ask(self, key: Hashable, inputs: Sequence[Any]) -> list[Any]:
        """The answers of a request, in order.

        Args:
            key: requests of the same one may share a batch.
            inputs: of the request; at least one.

        Raises:
            Exception: what `answer` raises for these inputs, whatever it raises for those of others.
        """
        loop = asyncio.get_running_loop()
        request = _Request(key, inputs, loop.create_future(), loop.time())
        self._queue.append(request)
        self._arrived.set()
        return await request.answers

    async def work(self) -> None:
        """Answer requests until it is cancelled."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        try:
            while True:
                await self._answer_together(thread, await self._next())
        finally:
            thread.shutdown(wait=False, cancel_futures=True)

    async def _next(self) -> list[_Request]:
        """The oldest request with those that share its batch."""
        loop = asyncio.get_running_loop()
        while True:
            self._queue = [request for request in self._queue if not request.answers.done()]  # a client has gone
            self._arrived.clear()
            if not self._queue:
                await self._arrived.wait()
                continue
            batch, is_full = self._batch(self._queue[0].key)
            left = self._queue[0].arrived + self._wait - loop.time()
            if is_full or left <= 0:
                taken = set(map(id, batch))
                self._queue = [request for request in self._queue if id(request) not in taken]
                return batch
            with suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)

    def _batch(self, key: Hashable) -> tuple[list[_Request], bool]:
        """(the requests of a key that fit into its next batch, whether no other would)."""
        size, batch, count = self._size(key), list[_Request](), 0
        for request in self._queue:
            if request.key != key:
                continue
            count += len(request.inputs)
            if batch and count > size:
                return batch, True
            batch.append(request)
            if count >= size:
                return batch, True
        return batch, False

    async def _answer_together(self, thread: ThreadPoolExecutor, batch: list[_Request]) -> None:
        """Answer a batch; if it fails, each request by itself, so that only the faulty one fails."""
        inputs = [one for request in batch for one in request.inputs]
        try:
            loop = asyncio.get_running_loop()
            answers = iter(await loop.run_in_executor(thread, self._answer, batch[0].key, inputs))
            parts = [[next(answers) for _ in request.inputs] for request in batch]
        except Exception as error:
            if len(batch) == 1:
                if not batch[0].answers.done():
                    batch[0].answers.set_exception(error)
                return
            for request in batch:
                await self._answer_together(thread, [request])
            return
        for request, part in zip(batch, parts, strict=True):
            if not request.answers.done():
                request.answers.set_result(part)
