"""Templates for clusters and accelerate's configurations: read by who will read them, and run with stand-ins."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from hf_transfer.keys import keys

ROOT = Path(__file__).parents[1]
SLURM, SKYPILOT = ROOT / "launch" / "slurm.sbatch", ROOT / "launch" / "skypilot.yaml"
STAND_INS = {
    "srun": '"$@"\n',
    "scontrol": 'echo "scontrol $*" >> "$CALLS"\n[ "$1" = show ] && echo node-1\nexit 0\n',
    "scancel": 'echo "scancel $*" >> "$CALLS"\nkill -TERM "$(cat "$CALLS.pid")"\n',
    "accelerate": 'echo "accelerate $*" >> "$CALLS"\necho $$ > "$CALLS.pid"\n'
    'trap \'sleep 0.3; exit 1\' TERM\nfor i in $(seq "$STEPS"); do sleep 0.1; done\nexit "$ENDS"\n',
}


def submit(folder: Path, steps: int, ends: int, signals: tuple[int, ...] = ()) -> tuple[int, list[str]]:
    """(exit status, what was called) of the batch script, with a training of so many tenths of a second."""
    tools, calls = folder / "tools", folder / "calls"
    tools.mkdir()
    for name, body in STAND_INS.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}")
        (tools / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(calls), "STEPS": str(steps),
        "ENDS": str(ends), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-1", "SLURM_NNODES": "1",
        "SLURM_NODEID": "0", "SLURM_GPUS_ON_NODE": "4",
    }  # fmt: skip
    job = subprocess.Popen(["bash", str(SLURM), "--config", "a b.yaml"], env=environment, cwd=folder)
    deadline = time.monotonic() + 20
    while signals and not (folder / "calls.pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    for number in signals:
        job.send_signal(number)
    return job.wait(timeout=30), calls.read_text().splitlines()


def test_slurm_queues_an_interrupted_run_again(tmp_path):
    status, calls = submit(tmp_path, steps=200, ends=0, signals=(signal.SIGUSR1,))
    assert status == 0 and calls[-2:] == ["scancel --signal=TERM 7", "scontrol requeue 7"]


@pytest.mark.parametrize("ends", [0, 2])
def test_slurm_does_not_queue_what_ended(ends, tmp_path):
    status, calls = submit(tmp_path, steps=1, ends=ends)
    assert status == ends and not any("requeue" in call for call in calls)
    (launch,) = [call for call in calls if call.startswith("accelerate")]
    assert launch.endswith("recipes/train.py --config a b.yaml --resume_from_checkpoint auto")
    assert "--num_processes 4 --main_process_ip node-1" in launch and "--machine_rank 0" in launch


@pytest.mark.parametrize("path", [SLURM, SKYPILOT], ids=lambda path: path.name)
def test_templates_name_keys_and_files_that_exist(path):
    text = path.read_text()
    run = text[text.index("recipes/train.py \\" if path is SKYPILOT else 'recipes/train.py "$@"') :]
    names = re.findall(r"--(\w+)", run)
    assert "resume_from_checkpoint" in names and set(names) <= {*keys(), "config"}
    for file in re.findall(r"(?:accelerate_configs|recipes)/[\w/]+\.(?:yaml|py)", text):
        assert (ROOT / file).is_file(), file


def test_skypilot_keeps_checkpoints_outside_the_machine():
    task = yaml.safe_load(SKYPILOT.read_text())
    assert task["resources"]["use_spot"] and any(folder in task["run"] for folder in task["file_mounts"])


@pytest.mark.parametrize("path", sorted(ROOT.glob("accelerate_configs/*.yaml")), ids=lambda path: path.name)
def test_accelerate_reads_its_configurations(path):
    assert path.read_text().startswith("# ") and "Pick it" in path.read_text()
    found = load_config_from_file(str(path))
    assert (
        found.num_processes >= 1
        and str(found.distributed_type.value) == yaml.safe_load(path.read_text())["distributed_type"]
    )


def test_fsdp_is_of_the_second_kind():
    assert load_config_from_file(str(ROOT / "accelerate_configs" / "fsdp2.yaml")).fsdp_config["fsdp_version"] == 2


ARRAY = ROOT / "launch" / "slurm_array.sbatch"


def submit_cell(folder: Path, ends: int, numbers: tuple[int, ...] = ()) -> tuple[int, list[str]]:
    """(exit status, what was called) of the array's script for cell 5, with a run of some tenths of a second."""
    tools, calls = folder / "tools", folder / "calls"
    tools.mkdir()
    body = STAND_INS["accelerate"].replace("accelerate", "hf-transfer")
    for name, text in {"hf-transfer": body, "scontrol": STAND_INS["scontrol"]}.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}")
        (tools / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(calls), "STEPS": "200" if numbers else "1",
        "ENDS": str(ends), "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "5",
    }  # fmt: skip
    job = subprocess.Popen(["bash", str(ARRAY), "model", "a b.csv", "out", "--seeds", "0,1"], env=environment)
    deadline = time.monotonic() + 20
    while numbers and not (folder / "calls.pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    for number in numbers:
        job.send_signal(number)
    return job.wait(timeout=30), calls.read_text().splitlines()


def test_a_cell_of_an_array_is_queued_again_when_interrupted_and_only_then(tmp_path):
    command = "hf-transfer compare model a b.csv out --seeds 0,1 --estimate false --cell 5"
    for name, ends in (("done", 0), ("failed", 1)):
        (tmp_path / name).mkdir()
        assert submit_cell(tmp_path / name, ends) == (ends, [command])
    status, calls = submit_cell(tmp_path, 0, (signal.SIGUSR1,))
    assert status == 0 and calls == [command, "scontrol requeue 7_5"]
