"""What the benchmarks of whole processes share: this checkout's package, and a page of their times."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def environment(**variables: str) -> dict[str, str]:
    """This checkout's package, whatever the working directory, and other variables."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **variables}


def report(
    name: str, title: str, about: str, taken: Mapping[str, Sequence[float]], *, writes: bool, **more: Any
) -> None:
    """Print a table of times, and write results/NAME.md and results/NAME.json.

    Args:
        name: of the files.
        title: of the page.
        about: a sentence with `{on}` for the machine and the versions.
        taken: {row of the table: seconds of each repeat}.
        writes: whether to write the files.
        **more: for the JSON file.
    """
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "datasets"))
    lines = [
        f"# {title}",
        "",
        about.format(on=f"{machine}, {versions}"),
        "",
        "| | median s | fastest s |",
        "|---|---|---|",
        *(f"| {row} | {statistics.median(seconds):.2f} | {min(seconds):.2f} |" for row, seconds in taken.items()),
        "",
    ]
    print("\n".join(lines))
    if writes:
        RESULTS.mkdir(exist_ok=True)
        found = {"machine": machine, "versions": versions, **more, "seconds": taken}
        (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        (RESULTS / f"{name}.md").write_text("\n".join(lines))
