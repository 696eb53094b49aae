"""One backbone, a task per recipe of a folder: an adapter and a head each, all answering from one bank.

    python recipes/many_tasks.py recipes/text_classification/three_datasets [--key value ...]

Runs the folder's data.py, then every recipe, then measures each task again in the bank and checks that it is as good as
its run. Keys go to all of the runs.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import yaml

from hf_transfer import HeadBank
from hf_transfer.cli.program import main as hf_transfer


def train(recipe: Path, options: list[str]) -> Path:
    """The folder of the run."""
    code = hf_transfer(["train", "--config", str(recipe), *options])
    if code:
        sys.exit(code)
    return Path(yaml.safe_load(recipe.read_text())["output_dir"])


def main(folder: Path, options: list[str]) -> None:
    runpy.run_path(str(folder / "data.py"), run_name="__main__")
    runs = {recipe.stem: train(recipe, options) for recipe in sorted(folder.glob("*.yaml"))}
    bank, memory = HeadBank(), [0]
    for name, out in runs.items():
        bank.add(name, out)
        memory.append(bank.nbytes)
    print(f"\n{bank}\n{'task':<12}{'labels':>7}{'accuracy':>10}{'in the bank':>13}{'file, MB':>10}{'memory, MB':>12}")
    for i, (name, out) in enumerate(runs.items()):
        measured = json.loads((out / "results.json").read_text())["metrics"]["accuracy"]
        again = bank.evaluate(name)["metrics"]["accuracy"]
        file = (out / "adapter_model.safetensors").stat().st_size / 1e6
        more = (memory[i + 1] - memory[i]) / 1e6
        print(f"{name:<12}{len(bank.list()[name]):>7}{measured:>10.3f}{again:>13.3f}{file:>10.2f}{more:>12.2f}")
        if measured != again:
            sys.exit(f"{name}: the bank is not as good as the run.")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
