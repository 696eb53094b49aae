"""What is chosen for the machine."""

from __future__ import annotations

import pytest
import torch

from hf_transfer.runs import machine
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
    monkeypatch.setattr(machine, "_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    args = Arguments(given, device)
    choose_loader(args, task)
    ours = given < 0 < chosen
    assert args.dataloader_num_workers == chosen and args.dataloader_persistent_workers is ours
    assert args.dataloader_prefetch_factor == (4 if ours else None)


def test_the_keys_leave_it_to_the_machine():
    values = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}
    assert Config.from_sources({}, values).training.dataloader_num_workers == -1
    with pytest.raises(ValueError, match="dataloader_num_workers: expected a number at least -1, got -2"):
        Config.from_sources({}, {**values, "dataloader_num_workers": -2})
