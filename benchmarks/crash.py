"""Random kills: is a run that was killed and resumed the uninterrupted one?

    python benchmarks/crash.py [--kills 200] [--seed 0] [--quick]

Draws a case (gradual unfreezing with accumulation, plateaus, LoRA, BatchNorm, no plan), one process or two, a rank and
a point (a step, within an accumulated batch, between gradient and update, in an evaluation, while a checkpoint is
written, sealed, renamed, or old ones are removed) and compares every bit of the end: see `tests/crash.py`. Writes
benchmarks/results/crash.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="three kills, nothing is written")
    options = parser.parse_args()
    kills = 3 if options.quick else options.kills
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.crash", folder, "--random", str(kills), "--seed", str(options.seed)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    differences = found.pop("differences")
    where = {"date": time.strftime("%Y-%m-%d"), "machine": platform.machine(), "seed": options.seed}
    where |= {p: version(p) for p in ("torch", "transformers", "accelerate", "peft")}
    lines = [
        "# Kills",
        "",
        f"`python benchmarks/crash.py`: {', '.join(f'{k} {v}' for k, v in where.items())}; two CPU cores, fp32.",
        "",
        f"{found['kills']} kills in {found['runs']} runs: {len(differences)} differences from the uninterrupted run "
        f"({found['seconds']:.0f} s).",
        *(f"- {difference}" for difference in differences),
    ]
    print("\n".join(lines))
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "crash.json").write_text(
            json.dumps({"where": where, "results": found, "differences": differences}, indent=2) + "\n"
        )
        (RESULTS / "crash.md").write_text("\n".join(lines) + "\n")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
