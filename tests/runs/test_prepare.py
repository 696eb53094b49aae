"""What a run decides for the machine."""

from __future__ import annotations

import pytest
import torch
from transformers.trainer_pt_utils import AcceleratorConfig

from hf_transfer.runs import machine
from hf_transfer.runs.decisions import with_decisions
from hf_transfer.runs.machine import choose_loader
from hf_transfer.settings import Config
from hf_transfer.tasks import TASKS

IMAGES, TEXTS = TASKS["image-classification"], TASKS["text-classification"]


class Arguments:
    def __init__(self, workers, device):
        self.dataloader_num_workers, self.device = workers, torch.device(device)
        self.dataloader_persistent_workers, self.dataloader_prefetch_factor = False, None


@pytest.mark.parametrize(
    ("task", "device", "cores", "processes", "given", "chosen"),
    [
        (IMAGES, "cuda", 16, 1, -1, 8),
        (IMAGES, "cuda", 4, 1, -1, 3),
        (IMAGES, "cuda", 16, 4, -1, 3),
        (IMAGES, "cuda", 1, 1, -1, 0),
        (IMAGES, "cpu", 16, 1, -1, 0),
        (TEXTS, "cuda", 16, 1, -1, 0),
        (IMAGES, "cuda", 16, 1, 0, 0),
        (IMAGES, "cpu", 2, 1, 5, 5),
    ],
)
def test_workers(task, device, cores, processes, given, chosen, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    decisions = choose_loader(Arguments(given, device), task)
    ours = {"dataloader_persistent_workers": True, "dataloader_prefetch_factor": 4} if given < 0 < chosen else {}
    assert decisions == {"dataloader_num_workers": chosen, **ours}


@pytest.mark.parametrize(("given", "shards", "chosen"), [(3, 2, 2), (3, 8, 3), (3, 0, 0), (0, 2, 0), (-1, 2, 2)])
def test_workers_of_a_stream_have_a_shard_each(given, shards, chosen, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 16)
    args = Arguments(given, "cuda")
    args.accelerator_config = AcceleratorConfig()
    decisions = choose_loader(args, TEXTS, shards)
    assert decisions["dataloader_num_workers"] == chosen and args.accelerator_config.dispatch_batches is None
    assert decisions["accelerator_config"].dispatch_batches is False
    if not chosen:
        assert decisions["dataloader_prefetch_factor"] is None and not decisions["dataloader_persistent_workers"]


def test_decisions_leave_the_configuration_as_it_was():
    values = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}
    config = Config.from_sources({}, values)
    decided = with_decisions(config, {"dataloader_num_workers": 2}, {"push_to_hub": False})
    assert decided.training.dataloader_num_workers == 2 and config.training.dataloader_num_workers == -1
    with pytest.raises(AssertionError, match="dataloader_workers"):
        with_decisions(config, {"dataloader_workers": 2})


def test_the_keys_leave_it_to_the_machine():
    values = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}
    assert Config.from_sources({}, values).training.dataloader_num_workers == -1
    with pytest.raises(ValueError, match="dataloader_num_workers: expected a number at least -1, got -2"):
        Config.from_sources({}, {**values, "dataloader_num_workers": -2})
