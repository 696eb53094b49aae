"""Several processes without the launcher's own command line: `--num_processes` and `--launch`.

accelerate starts the same verb again in each process, with one of the configurations in `accelerate_configs/`. What is
wrong with the keys is told before; of what goes wrong later, the first process to fail tells, the others are silent.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import hf_transfer
from hf_transfer.config.fields import setting
from hf_transfer.errors import UserError, nearest, option

TELLS = "HF_TRANSFER_FIRST_TO_FAIL"  # environment variable: a folder in which the first process to fail leaves a mark
_MARK = "told"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # that torch's launcher handles
_PATIENCE = 600  # seconds that processes have to save a checkpoint after a signal; torch's own 30 cut a large one off
_ON_CPU, _ON_GPUS = "cpu_2proc", "ddp"


@dataclass
class LaunchArguments:
    """How a verb is started in several processes."""

    num_processes: int | None = setting(None, "processes (default: 1; with launch, one per GPU)", above=0)
    launch: str | None = setting(None, "how to start them: ddp, fsdp2, … or a file of accelerate")


# ---- in a process that was started ---------------------------------------------------------------------------------


def is_first_to_fail() -> bool:
    """Whether this process is to tell what went wrong: always, unless another one that we started has done so."""
    folder = os.environ.get(TELLS)
    if folder is None:
        return True
    try:
        (Path(folder) / _MARK).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the launcher has ended
        return True
    return True


def is_started() -> bool:
    """Whether a launcher, ours or another, has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


# ---- the configuration ---------------------------------------------------------------------------------------------


def configurations() -> dict[str, Path]:
    """The named configurations: those of an installed package, or of the checkout that the package is in."""
    package = Path(hf_transfer.__file__).parent
    folder = next(f for f in (package / "accelerate_configs", package.parent / "accelerate_configs") if f.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


@dataclass(frozen=True)
class Start:
    """What is started.

    Attributes:
        file: configuration of accelerate.
        processes: number of processes on all machines.
        machines: number of machines.
        on_cpu: whether the configuration is for the CPU; a process that is started does not see that.
    """

    file: Path
    processes: int
    machines: int = 1
    on_cpu: bool = False


def start_of(processes: int | None, launch: str | None, on_cpu: bool, gpus: int) -> Start | None:
    """What the two keys ask for; None for this process alone.

    Args:
        processes: `num_processes`.
        launch: name of a configuration, or a file.
        on_cpu: whether `use_cpu` is set.
        gpus: number of GPUs of this machine.

    Raises:
        UserError: there is no such configuration, or there are not as many GPUs.
    """
    if launch is None and processes in (None, 1):
        return None
    gpus = 0 if on_cpu else gpus
    file = _file(launch or (_ON_GPUS if gpus else _ON_CPU))
    written = _read(file)
    kind, machines = str(written.get("distributed_type", "NO")), int(written.get("num_machines") or 1)
    count = processes or int(written.get("num_processes") or 1)
    if machines > 1 and launch in configurations():
        raise UserError(
            f"{launch} is a template: it does not know the other machines.",
            f"Copy {file}, set what its comment names, and give that file.",
            key="launch",
        )
    if kind == "NO":
        if processes not in (None, 1):
            raise UserError(f"{launch} starts one process, not {processes}.", "Use ddp, or leave it out.", key="launch")
        return None
    if written.get("use_cpu"):
        return Start(file, count, machines, on_cpu=True)
    if not gpus:
        why = "use_cpu was given" if on_cpu else "this machine has no GPU"
        fix = f"On the CPU: {option('num_processes', processes or 2)} without launch."
        raise UserError(f"{launch or file.stem} starts a process per GPU, and {why}.", fix, key="launch")
    if machines > 1:
        return Start(file, count, machines)
    if processes is None and file in configurations().values():
        count = gpus  # what is written there is an example
    if count > gpus:
        problem = f"{count} processes need {count} GPUs, and this machine has {gpus}."
        raise UserError(problem, f"Use at most {gpus}.", key="num_processes")
    return Start(file, count, machines)


def _file(launch: str) -> Path:
    named = configurations()
    if launch in named:
        return named[launch]
    path = Path(launch).expanduser()
    if path.is_file():
        return path
    raise UserError(
        f"there is no configuration {launch!r}, and no file of that name.",
        f"Use {', '.join(named)}, or a file that `accelerate config` has written.{nearest(launch, named)}",
        key="launch",
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        written = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{str(file)!r} cannot be read as YAML.", key="launch") from error
    if not isinstance(written, dict) or "distributed_type" not in written:
        raise UserError(f"{str(file)!r} is no configuration of accelerate: it has no distributed_type.", key="launch")
    return written


# ---- starting ------------------------------------------------------------------------------------------------------


def start_if_asked(
    verb: str, argv: Sequence[str], values: Mapping[str, Any], file: Mapping[str, Any], given: dict[str, Any]
) -> int | None:
    """Start a verb in several processes, if its keys ask for them; returns the exit code, None if they do not.

    Args:
        verb: that takes the keys of a run.
        argv: its arguments.
        values: of its own keys, among them those of `LaunchArguments`.
        file: keys of the file.
        given: keys of the command line, without problems.

    Raises:
        UserError: the keys are wrong, or a launcher has started this process.
    """
    if values["num_processes"] is None and values["launch"] is None:
        return None
    if is_started():
        key = "num_processes" if values["launch"] is None else "launch"
        raise UserError("a launcher has started this process already.", "Leave it to the launcher.", key=key)
    import torch

    from hf_transfer.keys import NEEDS, read_values

    run = read_values(file, given, (), NEEDS).values
    asked = start_of(values["num_processes"], values["launch"], bool(run["use_cpu"]), torch.cuda.device_count())
    if asked is None:
        return None
    folder = [] if "output_dir" in {**file, **given} else ["--output_dir", str(run["output_dir"])]  # the same for all
    device = ["--use_cpu", "true"] if asked.on_cpu and not run["use_cpu"] else []
    return start(asked, verb, [*without_launch_keys(argv), *folder, *device], debug=values["debug"])


def start(asked: Start, verb: str, words: Sequence[str], debug: bool = False) -> int:
    """Run a verb in several processes; returns its exit code.

    A signal is passed on to the processes, which save a checkpoint; then this one ends with 128 + its number.

    Args:
        asked: what is started.
        verb: of the command line.
        words: its arguments, without those of this module.
        debug: whether the launcher speaks too.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    port = ["--main_process_port", "0"] if asked.machines == 1 else []  # any free one
    count = ["--num_processes", str(asked.processes)]
    launcher = ["--config_file", str(asked.file), *port, *count, "-m", "hf_transfer", verb, *words]
    with tempfile.TemporaryDirectory() as folder, _quiet(folder, debug):
        try:
            launch_command(launch_command_parser().parse_args(launcher))
        except SignalException as stopped:
            return 128 + int(stopped.sigval)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            return _ended(rank, failure.exitcode, (Path(folder) / _MARK).exists())
        except subprocess.CalledProcessError as error:
            return _ended(0, error.returncode, (Path(folder) / _MARK).exists())
    return 0


@contextlib.contextmanager
def _quiet(folder: str, debug: bool) -> Iterator[None]:
    """Context in which the launcher says nothing: its processes say what there is to say. It takes signals over."""
    os.environ[TELLS] = folder
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_PATIENCE))
    before, handlers = logging.root.manager.disable, {number: signal.getsignal(number) for number in _SIGNALS}
    if not debug:
        logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        del os.environ[TELLS]


def _ended(rank: int, code: int, told: bool) -> int:
    """The exit code of a process that failed, and why it did, unless it has told so itself."""
    name = signal.Signals(-code).name if code < 0 else ""
    if not told and code not in (130, 143):
        how = f"was ended by {name}" if name else f"ended with exit code {code}"
        hint = " Out of memory is the usual reason." if name == "SIGKILL" else ""
        sys.stderr.write(f"hf-transfer: process {rank} {how}; the others were stopped.{hint}\n")
    return 128 - code if code < 0 else code


def without_launch_keys(words: Sequence[str]) -> list[str]:
    """The words of a command without `--num_processes` and `--launch` and their values."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--":
            return [*kept, word, *rest]
        name, has_value, _ = word.partition("=")
        if name in ("--num_processes", "--launch"):
            if not has_value:
                next(rest, None)
            continue
        kept.append(word)
    return kept
