"""`hf-transfer doctor`: what is installed, what the machine has, what is wrong and how to fix it.

It imports nothing of the package but the error type, so that it runs where the rest does not.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from http.client import HTTPException
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from hf_transfer.config.extras import DISTRIBUTION, EXTRAS, missing_of
from hf_transfer.errors import UserError, UserErrors, nearest, one_line

if TYPE_CHECKING:
    from hf_transfer.config.fields import Key

NAMESAKE = "hf-transfer"  # PyPI's retired downloader, which installs a package of our import name
HUB = "https://huggingface.co"
HUB_TIMEOUT = 5.0  # seconds
LITTLE_DISK = 5e9  # bytes: a base model with its optimizer state and two checkpoints
NEEDED_FOR = {
    "vision": "image models",
    "quickstart": "bundled: models and data",
    "models": "bundled: more models",
    "onnx": "export",
    "serve": "serve",
    "demo": "demo",
    "track": "report_to tensorboard or trackio",
    "hpo": "hyperparameter search",
    "explain": "predict --explain, and why in reports",
}


class State(StrEnum):
    """What a check says."""

    OK = "ok"
    NOTE = "note"
    WRONG = "WRONG"


OK, NOTE, WRONG = State


@dataclass(frozen=True)
class Check:
    """One finding: `state` is ok, a note, or wrong; `fix` says what to do."""

    name: str
    state: State
    detail: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"[{self.state:>5}] {self.name}: {self.detail}"
        return f"{line}\n        fix: {self.fix}" if self.fix else line


def examine(extras: Sequence[str] = ()) -> Iterator[Check]:
    """All checks, one at a time.

    Args:
        extras: those that must be there; a missing other one is only noted.

    Raises:
        UserError: there is no such extra.
    """
    for name in extras:
        if name not in EXTRAS:
            raise UserError(
                f"{name!r} is no extra of {DISTRIBUTION}.", f"There are {', '.join(EXTRAS)}.{nearest(name, EXTRAS)}"
            )
    checks: tuple[Callable[[], Iterator[Check]], ...] = (
        python,
        packages,
        namesake,
        torch_pair,
        devices,
        lambda: extras_installed(extras),
        hub,
        disk,
        boundary_store,
    )
    for check in checks:
        yield from check()


def python() -> Iterator[Check]:
    """The interpreter."""
    yield Check("python", OK, f"{platform.python_version()} at {sys.executable}, {platform.platform()}")


def packages() -> Iterator[Check]:
    """What the package requires, in the versions that it requires."""
    try:
        required = metadata.requires(DISTRIBUTION) or []
        yield Check(DISTRIBUTION, OK, metadata.version(DISTRIBUTION))
    except metadata.PackageNotFoundError:
        yield Check(DISTRIBUTION, WRONG, "is not installed, only on the path", "pip install --editable .")
        return
    from packaging.requirements import Requirement

    for text in required:
        requirement = Requirement(text)
        if requirement.marker is not None and "extra" in str(requirement.marker):
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Check(requirement.name, WRONG, "is not installed", f'pip install "{requirement}"')
            continue
        if requirement.specifier.contains(installed, prereleases=True):
            yield Check(requirement.name, OK, installed)
        else:
            fix = f'pip install --upgrade "{requirement}"'
            yield Check(requirement.name, WRONG, f"{installed} does not satisfy {requirement.specifier}", fix)


def namesake() -> Iterator[Check]:
    """PyPI's `hf_transfer`: it installs files over ours, or hides us."""
    try:
        installed = metadata.version(NAMESAKE)
    except metadata.PackageNotFoundError:
        yield Check("name clash", OK, "PyPI's unrelated hf_transfer is not installed")
        return
    yield Check(
        "name clash",
        WRONG,
        f"PyPI's hf_transfer {installed}, a retired downloader, is installed under the same import name",
        f"pip uninstall --yes hf_transfer && pip install --force-reinstall --no-deps {DISTRIBUTION} "
        "(huggingface_hub no longer uses it; unset HF_HUB_ENABLE_HF_TRANSFER)",
    )


def torch_pair() -> Iterator[Check]:
    """torch and torchvision are built in pairs; a wrong pair breaks even the import of text models."""
    try:
        wanted = [r for r in metadata.requires("torchvision") or [] if re.match(r"torch\b(?!vision)", r)]
        vision, torch = metadata.version("torchvision"), metadata.version("torch")
    except metadata.PackageNotFoundError:
        yield Check("torch and torchvision", NOTE, "torchvision is not installed: image models will not run")
        return
    fix = "pip install --upgrade --force-reinstall torch torchvision (both in one command)"
    pinned = re.search(r"==\s*([\d.]+)", wanted[0]) if wanted else None
    if pinned and torch.split("+")[0] != pinned[1]:
        yield Check(
            "torch and torchvision", WRONG, f"torchvision {vision} is built for torch {pinned[1]}, not {torch}", fix
        )
        return
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError) as error:
        yield Check("torch and torchvision", WRONG, f"torchvision {vision} does not load ({one_line(error, 120)})", fix)
        return
    yield Check("torch and torchvision", OK, f"{torch} and {vision} are a pair")


def devices() -> Iterator[Check]:
    """Accelerators, with memory and whether they compute in bf16; the processor's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Check(
            "devices", WRONG, f"torch does not load ({one_line(error, 120)})", "pip install --force-reinstall torch"
        )
        return
    yield Check(
        "processor",
        OK,
        f"{platform.processor() or platform.machine()}, {cores} cores, {torch.get_num_threads()} threads",
    )
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            bf16 = "computes in bf16" if properties.major >= 8 else "has no bf16: use fp16"
            yield Check(f"cuda:{i}", OK, f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {bf16}")
    elif shutil.which("nvidia-smi"):
        yield Check(
            "cuda",
            WRONG,
            f"there is an NVIDIA driver, and torch {torch.__version__} does not see a device",
            "compare `nvidia-smi` with the CUDA version of torch; a +cpu build never sees one",
        )
    elif torch.accelerator.is_available():
        yield Check("accelerator", OK, str(torch.accelerator.current_accelerator()))
    else:
        yield Check("accelerator", NOTE, "none: training runs on the processor")


def extras_installed(needed: Sequence[str]) -> Iterator[Check]:
    """What each extra brings."""
    for extra in EXTRAS:
        if missing := missing_of(extra):
            yield Check(
                f"extra {extra}",
                WRONG if extra in needed else NOTE,
                f"{', '.join(missing)} missing (for {NEEDED_FOR[extra]})",
                f'pip install "{DISTRIBUTION}[{extra}]"',
            )
        else:
            yield Check(f"extra {extra}", OK, f"for {NEEDED_FOR[extra]}")


def hub() -> Iterator[Check]:
    """Whether the hub answers, and whether a token is set (it is not shown)."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Check("hub", NOTE, "HF_HUB_OFFLINE is set: only what was downloaded before is used")
        return
    endpoint = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    began = time.perf_counter()
    try:
        with urlopen(Request(f"{endpoint}/api/models?limit=1", method="GET"), timeout=HUB_TIMEOUT):
            pass
        answered = True
    except HTTPError:  # it answers, which is what was asked
        answered = True
    except (URLError, HTTPException, OSError, ValueError) as error:
        answered = False
        yield Check(
            "hub",
            WRONG,
            f"{endpoint} cannot be reached ({one_line(error, 120)})",
            "check the network, HTTPS_PROXY and HF_ENDPOINT; to work without a hub, set HF_HUB_OFFLINE=1",
        )
    if answered:
        yield Check("hub", OK, f"{endpoint} answers after {1000 * (time.perf_counter() - began):.0f} ms")
    token = "set" if os.environ.get("HF_TOKEN") or (_hub_home() / "token").is_file() else "not set"
    yield Check("hub token", OK if token == "set" else NOTE, f"{token} (needed for private repositories and to push)")


def disk() -> Iterator[Check]:
    """Room, and whether the caches can be written."""
    for name, folder in (
        ("disk here", Path.cwd()),
        ("disk of the cache", _hub_home()),
        ("temporary files", Path(tempfile.gettempdir())),
    ):
        existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        if not os.access(existing, os.W_OK):
            yield Check(name, WRONG, f"{folder} cannot be written to", f"change its permissions{_move(name)}")
        elif free < LITTLE_DISK:
            yield Check(name, WRONG, f"{free / 1e9:.1f} GB left at {folder}", f"make room{_move(name)}")
        else:
            yield Check(name, OK, f"{free / 1e9:.0f} GB left at {folder}")


def boundary_store() -> Iterator[Check]:
    """The recordings of the boundary cache on disk: where, how large, and how to delete them."""
    name, folder = "boundary cache", _hub_home() / "hf_transfer" / "boundary"
    try:
        files = [path for path in folder.glob("*/*") if path.is_file()]
        size, entries = sum(path.stat().st_size for path in files), len({path.parent for path in files})
    except OSError as error:
        yield Check(name, WRONG, f"{folder} cannot be read ({one_line(error)})", "change its permissions")
        return
    if not files:
        yield Check(name, OK, f"nothing on disk (in {folder}, unless boundary_cache_dir names another folder)")
        return
    delete = "Remove-Item -Recurse" if os.name == "nt" else "rm -r"
    kept = f"{entries} recording{'s' if entries > 1 else ''}, {size / 1e9:.2g} GB in {folder}"
    yield Check(name, OK, f"{kept}; to delete them while no run uses them: {delete} {shlex.quote(str(folder))}")


def _hub_home() -> Path:
    """As huggingface_hub finds it."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.path.expandvars(os.environ.get("HF_HOME", f"{cache}/huggingface"))).expanduser()


def _move(name: str) -> str:
    places = {"disk of the cache": "HF_HOME", "temporary files": "TMPDIR"}
    return f", or point {places[name]} to another disk" if name in places else ", or work on another disk"


# ---- the verb ----

HELP = (
    "What is installed, what the machine has, what is wrong and how to fix it. Exit code 1 where something is wrong. "
    "EXTRA names extras that must be there: vision, quickstart, models, onnx, serve, demo, track, hpo."
)


def keys() -> dict[str, Key]:
    from hf_transfer.cli.words import keys_with

    return keys_with()


def parser() -> argparse.ArgumentParser:
    from hf_transfer.cli.words import words_parser

    return words_parser("doctor", "[EXTRA...]", HELP, keys())


def run(argv: Sequence[str]) -> int:
    """Examine the installation."""
    from hf_transfer.config.command_line import parse_words

    words, values, problems = parse_words(parser(), argv, keys())
    if problems:
        raise UserErrors(problems)
    counts = dict.fromkeys((OK, NOTE, WRONG), 0)
    for check in examine(words):
        counts[check.state] += 1
        if check.state == WRONG or not values.get("quiet"):
            print(check, flush=True)
    if not values.get("quiet"):
        print(
            "No problems found."
            if not counts[WRONG]
            else f"{counts[WRONG]} problem{'s' if counts[WRONG] > 1 else ''} found."
        )
    return 1 if counts[WRONG] else 0
