"""In which order the files run; and the fixtures of `tests/fixtures.py`, for processes that run tests.

The process that hands the files out to two others (`-n 2`) runs none, and would import torch beside them for seconds.
"""

from __future__ import annotations

from pathlib import Path

import pytest

# Files that take longest, in a thread of two: they begin first, so that both end together.
LONG = (
    "distributed/test_two_processes.py",
    "runs/test_run.py",
    "hub/test_push.py",
    "training/test_resuming.py",
    "inference/test_predictor.py",
    "training/test_boundary_cache.py",
    "layers/test_architectures.py",
    "report/test_depth_map.py",
    "cli/test_program.py",
    "adapters/test_adapter_runs.py",
    "training/test_trainer.py",
    "inference/test_head_bank.py",
    "test_docs.py",
    "data/test_resumed_data.py",
    "data/test_streaming.py",
    "cli/test_errors.py",
    "test_packages.py",
    "features/test_digests.py",
    "data/test_inputs_of_runs.py",
    "data/test_broken_later.py",
)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.fixtures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first: `--dist loadfile` hands them out in this order (with `--no-loadscope-reorder`)."""
    root = Path(__file__).parent
    place = {root / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))
