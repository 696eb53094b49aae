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
    "adapters/test_adapter_runs.py",
    "layers/test_architectures.py",
    "inference/test_predictor.py",
    "inference/test_head_bank.py",
    "test_docs.py",
    "inference/test_one_answer.py",
    "training/test_adapting.py",
    "report/test_written.py",
    "studies/test_search.py",
    "studies/test_comparison.py",
    "training/test_self_training.py",
    "training/test_boundary_cache.py",
    "cli/test_errors.py",
    "adapters/test_attach.py",
    "data/test_streaming.py",
    "cli/test_program.py",
    "data/test_resumed_data.py",
    "report/test_depth_map.py",
    "inference/test_held_out.py",
    "features/test_replay.py",
    "training/test_trainer.py",
    "features/test_digests.py",
    "data/test_facts.py",
    "data/test_bad_examples.py",
    "test_packages.py",
    "data/test_augment.py",
    "runs/test_preflight.py",
    "models/test_image_size.py",
    "training/test_stages.py",
    "data/test_inputs_of_runs.py",
    "data/test_preview.py",
    "training/test_linear_probe.py",
)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.fixtures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first: `--dist loadfile` hands them out in this order (with `--no-loadscope-reorder`)."""
    root = Path(__file__).parent
    place = {root / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))
