"""Tasks one after another on one backbone, and what is left of each after every step.

    python recipes/continual.py recipes/text_classification/three_datasets --strategy full --learning_rate 5e-5
    accelerate launch recipes/continual.py FOLDER [--key value ...] [-- --key value ...]

Runs the folder's data.py, then its recipes by name, each from the model that the one before left, into `out/continual`.
Then each task is measured after every step: its own head, on the backbone as it was by then, on what its run held out.
Keys go to all runs, those after `--` to all but the first; there, {before} stands for the data of the task before
(`-- --replay_dataset_name {before}`, `-- --ewc_lambda 1000 --ewc_dataset_name {before}`). With an adapter, as the
recipes are written, every task trains on the same backbone, which stays as it is, and a HeadBank answers for all.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml
from accelerate import PartialState

from hf_transfer import HeadBank, Predictor
from hf_transfer.adapters.attach import is_adapted
from hf_transfer.cli.program import main as hf_transfer
from hf_transfer.runs.forgetting import put_backbone

OUT = Path("out/continual")
Table = list[list[float]]  # a row per step, a column per task so far


def train(recipes: list[Path], keys: list[str], later: list[str]) -> dict[str, Path]:
    """The folders of the runs, by task."""
    runs: dict[str, Path] = {}
    before: Path | None = None
    for recipe in recipes:
        given = ["--config", str(recipe), *keys, "--output_dir", str(OUT / recipe.stem)]
        if before is not None:
            written = yaml.safe_load(before.read_text(encoding="utf-8"))
            data = str(written.get("dataset_name") or written["train_file"])
            given += [word.replace("{before}", data) for word in later]
            run = runs[before.stem]
            if not (run / "adapter_config.json").is_file():
                given += ["--model_name_or_path", str(run)]
        if code := hf_transfer(["train", *given, "--overwrite_output_dir", "true"]):
            sys.exit(code)
        runs[recipe.stem], before = OUT / recipe.stem, recipe
    return runs


def measure(runs: Mapping[str, Path]) -> tuple[Table, HeadBank | None]:
    """Accuracies after each step; and the bank, where the tasks have adapters."""
    loaded = {name: Predictor.load(run) for name, run in runs.items()}
    if all(is_adapted(one.model) for one in loaded.values()):
        bank, rows = HeadBank(), Table()
        for name, run in runs.items():
            bank.add(name, run)
            rows.append([bank.evaluate(one)["metrics"]["accuracy"] for one in bank.list()])
        return rows, bank
    states = [{n: t.clone() for n, t in one.model.state_dict().items()} for one in loaded.values()]
    rows = []
    for i, state in enumerate(states):
        rows.append([])
        for task in list(loaded.values())[: i + 1]:
            put_backbone(task.model, state)
            rows[i].append(task.evaluate()["metrics"]["accuracy"])
    return rows, None


def main(folder: Path, keys: list[str], later: list[str]) -> Table:
    state = PartialState()
    if state.is_local_main_process and (folder / "data.py").is_file():
        runpy.run_path(str(folder / "data.py"), run_name="__main__")
    state.wait_for_everyone()
    runs = train(sorted(folder.glob("*.yaml")), keys, later)
    if int(os.environ.get("RANK", "0")):
        return []
    rows, bank = measure(runs)
    print(f"\n{'accuracy after':<20}" + "".join(f"{name:>12}" for name in runs))
    for name, row in zip(runs, rows, strict=True):
        print(f"{name:<20}" + "".join(f"{value:>12.3f}" for value in row))
    lost = [rows[i][i] - rows[-1][i] for i in range(len(rows) - 1)]
    print(f"{'forgotten':<20}" + "".join(f"{value:>12.3f}" for value in lost))
    if bank is not None:
        print(f"\nEach task has an adapter on the same backbone: nothing is forgotten.\n{bank}")
    return rows


if __name__ == "__main__":
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    main(Path(words[0]), words[1:split], words[split + 1 :])
