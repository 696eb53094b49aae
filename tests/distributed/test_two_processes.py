"""Two real processes (gloo): the ranks stay bit-identical through every unfreeze, and equal one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.helpers import changed, copy_state, tiny_bert

from . import cases

ROOT = Path(__file__).parents[2]


def test_gradual_unfreezing_on_two_processes(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir(), one.mkdir()
    command = [
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
        "--config_file",
        "accelerate_configs/cpu_2proc.yaml",
        "--main_process_port",
        "0",
        "-m",
        "tests.distributed.cases",
        str(two),
    ]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    results = json.loads((two / "results.json").read_text())
    for case in cases.CASES:
        stages = 3 if case == "batchnorm" else 4
        assert results[case] == {"stages": stages, "ranks": 0.0, "processes": 2}, results
    start = copy_state(tiny_bert(layers=2).double())
    for case in ("plain", "accumulated", "no traversal", "adapter"):
        _, trainer = cases.run(case, one)
        ours, theirs = copy_state(trainer.model), torch.load(two / f"{case}.pt", weights_only=True)
        moved = {n for n, p in trainer.model.named_parameters() if "layer.0." in n and "lora_B" in n and p.any()}
        assert moved if case == "adapter" else changed(start, ours) > {"bert.embeddings.word_embeddings.weight"}
        assert max((ours[k] - theirs[k]).abs().max().item() for k in ours if ours[k].is_floating_point()) < 1e-9
