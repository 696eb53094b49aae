"""Memory of the process: what is measured of it, and what the budget makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from hf_transfer.analysis.budget import Activations, StageMemory
from hf_transfer.analysis.budget_report import Budget
from hf_transfer.analysis.gpus import Work
from hf_transfer.analysis.pace import Pace, StagePace
from hf_transfer.analysis.prices import read_prices
from hf_transfer.runs import process_memory
from hf_transfer.runs.process_memory import resident, taken_by

MB = 1_000_000
linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux counts it")


# In a process of its own: what other tests left in this one is freed, and its gaps are filled, in between.
MEASURED = """
import json, torch
from hf_transfer.runs.process_memory import resident, taken_by
MB = 1_000_000
large = [taken_by(lambda: [torch.ones(size * MB // 4).sum() for _ in range(2)]).most for size in (40, 40, 10)]
before = resident()
small = [taken_by(lambda: [torch.ones(5000) for _ in range(2000)]).most for _ in range(2)]
left = resident() - before

held = []
stays = taken_by(lambda: held.extend([torch.ones(5000) for _ in range(2000)][::2])).kept
print(json.dumps({"large": large, "small": small, "left": left, "stays": stays}))
"""


@pytest.fixture(scope="module")
def measured():
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@linux
def test_the_peak_of_an_action_is_what_it_takes_in_between(measured):
    """Also after others of its kind, whose memory the allocator keeps."""
    for size, taken in zip((40, 40, 10), measured["large"], strict=True):
        assert abs(taken - size * MB) < 3 * MB  # the kernel adds up in portions


@linux
def test_many_small_blocks_that_were_freed_are_counted_again(measured):
    """They come from a heap that is not returned by itself."""
    assert min(measured["small"]) > 35 * MB
    assert measured["left"] < 5 * MB


@linux
def test_what_an_action_keeps_includes_free_blocks_of_the_heap(measured):
    """Half of the 40 MB is free, and lies between blocks in use."""
    assert measured["stays"] > 30 * MB


def test_where_the_system_does_not_say_nothing_is_done(tmp_path, monkeypatch):
    for name in ("RESET", "STATUS"):
        monkeypatch.setattr(process_memory, name, tmp_path / "no folder" / "file")
        assert taken_by(lambda: pytest.fail("for nothing")) is None
    assert resident() is None


def stage(name, **bytes_of):
    own = {"parameters": 100, "adapter": 0, "buffers": 10, "gradients": 90, "optimizer": 200}
    return StageMemory(name, **{**own, **bytes_of}, activations=Activations(0, 7), batch=10)


def budget(memory, steps, accumulation=1, resident=1000, kept=0, free=None):
    stages = (StagePace(m.stage, 1, 1.0, 1, step, kept) for m, step in zip(memory, steps, strict=True))
    here = Pace("cpu", 1, tuple(stages), resident, free)
    return Budget(tuple(memory), accumulation, "cpu", Work(None, False, False), read_prices(), (), here=here)


def test_the_most_that_a_process_takes():
    head, everything = stage("head", gradients=1, optimizer=2), stage("all groups")
    assert budget([head], [50]).of_process == 1000 + 2 + 2 * 110, "the second model at the end, and its file"
    assert budget([head], [50], kept=40).of_process == 1000 + 2 + 40 + 2 * 110, "what the steps left"
    assert budget([head, everything], [50, 250]).of_process == 1000 + 200 + 250
    more = stage("all groups", gradients=190)
    assert budget([more], [250], accumulation=2).of_process == 1000 + 200 + 190 + 70, "gradients stay"
    assert budget([more], [270], accumulation=2).of_process == 1000 + 200 + 270
    assert budget([stage("head", boundary_cache=30)], [250]).of_process == 1000 + 200 + 250 + 30


def test_what_is_not_known_is_not_said():
    for one in (
        budget([stage("head")], [None]),
        budget([stage("head", optimizer=None)], [50]),
        replace(budget([stage("head")], [5]), here=None),
    ):
        assert one.of_process is None and not any("process" in line for line in one.lines())
    assert budget([stage("head")], [5], resident=None).of_process is None


@pytest.mark.parametrize(
    ("free", "largest", "line"),
    [
        (400, 22, ""),
        (340, 10, ""),
        (330, 8, "enough for batches of 8: per_device_train_batch_size: 8, gradient_accumulation_steps: 2."),
        (315, 5, "enough for batches of 5: per_device_train_batch_size: 5, gradient_accumulation_steps: 2."),
        (295, 1, "enough for batches of 1: per_device_train_batch_size: 1, gradient_accumulation_steps: 10."),
        (290, 0, "too little for a step. What saves memory: "),
        (None, None, ""),
    ],
)
def test_the_largest_batch_that_fits(free, largest, line):
    """Optimizer and gradients take 290, and each of ten examples 5."""
    one = budget([stage("all groups")], [140], free=free)
    assert one.largest_here == largest
    said = [found for found in one.lines() if "are free" in found]
    assert len(said) == bool(line) and all(line in found for found in said)
