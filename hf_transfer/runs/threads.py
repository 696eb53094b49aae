"""`cpu_threads: auto`: how many threads of torch train quickest on this CPU, by timed steps.

torch takes as many as there are cores, whatever share of them a container may use and whether two of them are one
core's. The number changes the order of sums and so the last bits: it stands in `run.yaml` and in checkpoints, and a
resumed run keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import psutil
import torch
from accelerate.utils import broadcast_object_list

from hf_transfer.analysis.few_labels import Choice
from hf_transfer.runs.machine import cores
from hf_transfer.runs.prepare import Prepared
from hf_transfer.runs.timing import FAILURES, seconds_by_threads
from hf_transfer.training.trainer import TransferTrainer

KEY = "cpu_threads"
WORTH = 0.95  # of the time of torch's own number, above which that is kept
ROUNDS = 3


def choose_threads(prepared: Prepared, trainer: TransferTrainer, splits: dict[str, Any]) -> Prepared:
    """The run with the number of threads that `auto` comes to, which torch is set to; else the run as it is."""
    args = trainer.args
    if args.cpu_threads is None:
        return prepared
    if args.cpu_threads != "auto":
        torch.set_num_threads(int(args.cpu_threads))  # of a resumed run
        return prepared
    own = torch.get_num_threads()
    if args.device.type != "cpu":
        choice = Choice(own, f"torch's own number: {args.device.type} trains")
    elif trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        choice = Choice(own, "torch's own number: a sharded model takes no step before training")
    else:
        choice = _quickest(prepared, trainer, splits, own)
    answer = [choice]
    if args.world_size > 1:
        broadcast_object_list(answer)
    return _set(prepared, trainer, answer[0])


def _quickest(prepared: Prepared, trainer: TransferTrainer, splits: dict[str, Any], own: int) -> Choice:
    candidates = numbers(own, max(1, cores() // trainer.args.world_size))
    if len(candidates) == 1:
        return Choice(own, "there is one core")
    try:
        return chosen(seconds_by_threads(prepared, trainer, splits, candidates, ROUNDS), own)
    except FAILURES:
        return Choice(own, "torch's own number: no step could be timed")


def numbers(own: int, most: int) -> list[int]:
    """Numbers of threads to try: powers of two up to the cores, the physical cores, all of them, and torch's own."""
    physical = psutil.cpu_count(logical=False) or most
    powers = [2**i for i in range(most.bit_length())]
    return sorted({n for n in (*powers, physical, most) if n <= most} | {own})


def chosen(seconds: Mapping[int, float], own: int) -> Choice:
    """The quickest; torch's own number if it is as good within 5%."""
    best = min(seconds, key=lambda threads: seconds[threads])
    best = own if seconds[best] > WORTH * seconds[own] else best
    tried = ", ".join(f"{threads}: {value:.3g} s" for threads, value in seconds.items())
    return Choice(best, f"seconds of a training step by threads, {tried}")


def _set(prepared: Prepared, trainer: TransferTrainer, choice: Choice) -> Prepared:
    torch.set_num_threads(choice.value)
    trainer.args.cpu_threads = choice.value
    keys = {**prepared.chosen.keys, KEY: choice}
    trainer.chosen = {name: one.value for name, one in keys.items()}
    config = replace(prepared.config, values={**prepared.config.values, KEY: choice.value})
    return replace(prepared, chosen=replace(prepared.chosen, keys=keys), config=config)
