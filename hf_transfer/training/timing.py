"""A Trainer that knows how long it has trained, and how long it may.

What is overridden, and why that hook:

- `_maybe_log_save_evaluate`: the time of evaluations and checkpoints is told from that of steps (`time_budget`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from hf_transfer.training.time_budget import TimeBudget


class Timed(Trainer if TYPE_CHECKING else object):  # type: ignore[misc]
    """The time of training; see `TransferMixin`.

    Attributes:
        clock: seconds, from any moment on.
        time_budget: ends the run at `max_hours` or `max_usd`.
    """

    clock: Callable[[], float] = staticmethod(time.perf_counter)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._seconds_before, self._began = 0.0, 0.0
        self._is_counting = False
        self.time_budget = TimeBudget(self)
        self.time_budget.check()
        self.add_callback(self.time_budget)  # before `stages.Unfreezing`, which asks where the stages are

    @property
    def seconds(self) -> float:
        """Wall time of training in seconds, including the time before the run was resumed."""
        return self._seconds_before + (self.clock() - self._began if self._is_counting else 0.0)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        with self.time_budget.pausing():
            super()._maybe_log_save_evaluate(*args, **kwargs)
