"""`--num_processes` and `--launch`: what is started, with real processes, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hf_transfer.cli import launching
from hf_transfer.cli.launching import Start, configurations, is_first_to_fail, start, start_of, without_launch_keys
from hf_transfer.errors import UserError

ROOT = Path(__file__).parents[2]
NAMED = configurations()


@pytest.mark.parametrize(
    ("processes", "launch", "on_cpu", "gpus", "expected"),
    [
        (None, None, False, 4, None),
        (1, None, False, 4, None),
        (None, "single", False, 4, None),
        (2, None, False, 0, ("cpu_2proc", 2)),
        (3, None, True, 4, ("cpu_2proc", 3)),
        (2, None, False, 4, ("ddp", 2)),
        (None, "ddp", False, 4, ("ddp", 4)),
        (3, "fsdp2", False, 4, ("fsdp2", 3)),
        (None, "cpu_2proc", False, 0, ("cpu_2proc", 2)),
    ],
)
def test_what_is_started(processes, launch, on_cpu, gpus, expected):
    asked = start_of(processes, launch, on_cpu, gpus)
    on = {"on_cpu": True} if expected and expected[0] == "cpu_2proc" else {}
    assert asked == (expected and Start(NAMED[expected[0]], expected[1], **on))


@pytest.mark.parametrize(
    ("processes", "launch", "on_cpu", "gpus", "said"),
    [
        (None, "dpp", False, 2, "no configuration 'dpp'.*Did you mean 'ddp'"),
        (None, "ddp", False, 0, "this machine has no GPU"),
        (None, "ddp", True, 2, "use_cpu was given"),
        (3, None, False, 2, "num_processes: 3 processes need 3 GPUs, and this machine has 2"),
        (2, "single", False, 2, "single starts one process, not 2"),
        (None, "multi_node", False, 8, "is a template"),
    ],
)
def test_what_cannot_be_started(processes, launch, on_cpu, gpus, said):
    with pytest.raises(UserError, match=f"(?s){said}"):
        start_of(processes, launch, on_cpu, gpus)


def test_a_file_says_how_many(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("distributed_type: MULTI_GPU\nnum_processes: 2\n")
    assert start_of(None, str(file), False, 4) == Start(file, 2)
    file.write_text("distributed_type: MULTI_GPU\nnum_processes: 16\nnum_machines: 2\n")
    assert start_of(None, str(file), False, 8) == Start(file, 16, 2)
    for text in ("model: x\n", "[", "- 1\n"):
        file.write_text(text)
        with pytest.raises(UserError, match="launch: "):
            start_of(None, str(file), False, 4)


def test_words_without_the_keys():
    words = ["m", "--launch", "ddp", "--seed", "1", "--num_processes=2", "--num_processes", "3", "--launch=x"]
    words += ["--", "--launch"]
    assert without_launch_keys(words) == ["m", "--seed", "1", "--", "--launch"]


def test_the_first_to_fail_tells(tmp_path, monkeypatch):
    monkeypatch.delenv(launching.TELLS, raising=False)
    assert is_first_to_fail() and is_first_to_fail()
    monkeypatch.setenv(launching.TELLS, str(tmp_path))
    assert [is_first_to_fail() for _ in range(3)] == [True, False, False]
    monkeypatch.setenv(launching.TELLS, str(tmp_path / "gone"))
    assert is_first_to_fail()


def test_a_started_process_starts_no_others(monkeypatch, capsys):
    from hf_transfer.cli.program import main

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    words = ["train", "bundled:minilm-l6", "bundled:rotten-tomatoes", "out", "--num_processes", "2"]
    assert main(words) == 2
    assert "num_processes: a launcher has started this process already" in capsys.readouterr().err


# ---- real processes ------------------------------------------------------------------------------------------------


def test_an_error_is_told_once_with_its_exit_code(capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert start(Start(NAMED["cpu_2proc"], 2), "trian", []) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 2) and err.startswith("hf-transfer: Unknown command 'trian'.")


def started_as(program: str, folder: Path, monkeypatch) -> int:
    """The exit code where this program stands in for the command line."""
    (folder / "hf_transfer").mkdir()
    (folder / "hf_transfer" / "__init__.py").touch()
    (folder / "hf_transfer" / "__main__.py").write_text(f"import os, signal, sys, time\n{program}\n")
    monkeypatch.chdir(folder)
    return start(Start(NAMED["cpu_2proc"], 2), "train", [])


def test_a_process_that_is_killed(tmp_path, monkeypatch, capfd):
    code = started_as(
        "time.sleep(60 if os.environ['RANK'] == '0' else 0.2); os.kill(os.getpid(), 9)", tmp_path, monkeypatch
    )
    assert code == 128 + 9
    said = capfd.readouterr().err
    assert said.startswith("hf-transfer: process 1 was ended by SIGKILL; the others were stopped.")
    assert said.count("\n") == 1


def test_a_signal_reaches_all_processes(tmp_path, monkeypatch, capfd):
    """They have the time that they need, and this process handles signals as before."""
    program = """
def save(*_):
    time.sleep(0.3)
    open(f"saved-{os.environ['RANK']}", "w").close()
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
open(f"ready-{os.environ['RANK']}", "w").close()
time.sleep(60)"""

    def end() -> None:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("ready-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=end)
    thread.start()
    code = started_as(program, tmp_path, monkeypatch)
    thread.join()
    assert code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]
    assert capfd.readouterr().err == ""


def test_the_processes_know_each_other(tmp_path, monkeypatch, capfd):
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")
    program = f"print(*(os.environ[name] for name in {names}), *sys.argv[1:])"
    assert started_as(program, tmp_path, monkeypatch) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["0 2 2 no train", "1 2 2 no train"]


@pytest.mark.slow
def test_two_processes_train_one_model(tiny_bert_folder, tmp_path):
    words = f"-m hf_transfer train {tiny_bert_folder} bundled:rotten-tomatoes {tmp_path / 'out'} --num_processes 2"
    keys = "--strategy full --max_train_samples 32 --max_eval_samples 8 --max_predict_samples 8 --max_steps 2"
    more = "--logging_steps 1 --save_strategy no --calibrate false --preflight false --use_cpu"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words.split(), *keys.split(), *more.split()]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    # two steps of 8 examples in each of 2 processes are an epoch of 32
    assert results["stages"][0]["steps"] == 2 and results["cost"]["device_hours"] > 0
    assert results["kept"]["epoch"] == 1.0
    assert done.stdout.count("Examples: train 32") == 1
