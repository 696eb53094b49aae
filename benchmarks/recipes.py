"""What the recipes reach, beside a run that is told nothing and plain `transformers.Trainer` at the same budget.

    python benchmarks/recipes.py [--size subset|full] [--data NAME ...] [--recipes NAME ...] [--again]

Every recipe of a task runs on each of its data sets as its YAML says, and plain Trainer runs on the same examples with
the same model, number of epochs, batch size, warm-up and seed, all parameters at one rate: the default of 5e-5 or the
recipes' own for the backbone, whichever validates better on the first seed. `auto` is given the model, the data and the
size at which texts and images are read, and chooses the rest. Subsets run with seeds 0, 1, 2, the full
size with seed 42 once. The order is seed by seed, so that a slow spell of the machine meets every method.

Results are kept in benchmarks/results/recipes.json; what is there already is not run again without --again. The table
is benchmarks/results/recipes.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from hf_transfer import fine_tune
from hf_transfer.config.values import read_config_file
from hf_transfer.data.label_columns import find_labels
from hf_transfer.data.labels import infer_labels
from hf_transfer.data.load import load_splits
from hf_transfer.data.splits import make_data
from hf_transfer.evaluation import metrics
from hf_transfer.settings import Config
from hf_transfer.tasks import choose_task

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
AUTO = "auto"  # a run that is told nothing
READS = ("model_name_or_path", "max_seq_length", "image_size")  # what it is told all the same
RECIPES = {
    "text_classification": (AUTO, "linear_probe", "partial", "two_phase", "gradual", "full"),
    "image_classification": (AUTO, "linear_probe", "gradual", "full"),
}
DATA = {
    "bundled:rotten-tomatoes": "text_classification",
    "bundled:imdb": "text_classification",
    "bundled:digits": "image_classification",
    "bundled:fashion-mnist": "image_classification",
}
# Examples to train on, validate on and test on. The longest data sets are cut so that three seeds of every method end
# within an hour on two cores.
SUBSETS = {
    "bundled:rotten-tomatoes": (512, 128, 512),
    "bundled:imdb": (256, 128, 256),
    "bundled:digits": (600, 100, 360),
    "bundled:fashion-mnist": (1000, 200, 1000),
}
SEEDS = {"subset": (0, 1, 2), "full": (42,)}
PLAIN = "plain Trainer"
PLAIN_RATES = {"text_classification": (5e-5, 2e-4), "image_classification": (5e-5, 1e-3)}


def keys_of(data: str, recipe: str, size: str, seed: int, folder: str) -> dict[str, Any]:
    """The recipe's keys (of `auto` hardly any), with the data, size and seed of this row; only the model is saved."""
    keys = read_config_file(str(ROOT / "recipes" / DATA[data] / f"{'full' if recipe == AUTO else recipe}.yaml"))
    if recipe == AUTO:
        keys = {name: keys[name] for name in READS if name in keys}
    keys |= {"dataset_name": data, "seed": seed, "output_dir": folder, "save_strategy": "no", "log_level": "error"}
    if size == "subset":
        names = ("max_train_samples", "max_eval_samples", "max_predict_samples")
        keys |= dict(zip(names, SUBSETS[data], strict=True))
    return keys


def ours(data: str, recipe: str, size: str, seed: int, folder: str) -> dict[str, Any]:
    result = fine_tune(**keys_of(data, recipe, size, seed, folder))
    results = result.results
    return {
        "accuracy": results["metrics"]["accuracy"],
        "validation": results["validation_metrics"]["accuracy"],
        "interval": results["intervals"]["accuracy"],
        "train_seconds": results["train_seconds"],
        "trainable_share": results["trainable_parameters"] / results["total_parameters"],
    }


def plain(data: str, rate: float, size: str, seed: int, folder: str) -> dict[str, Any]:
    """The same data and model under `transformers.Trainer`, as its example scripts use it."""
    config = Config.from_sources({}, keys_of(data, "full", size, seed, folder))
    set_seed(seed)
    splits = load_splits(config.data)
    task, inputs = choose_task(splits["train"].features, config.data)
    found = find_labels(splits, inputs, config.data)
    splits, column = found.splits, found.name
    labels = infer_labels(splits["train"], column, None)
    loaded, processor = task.load(config.model, config.data, labels)
    examples = make_data(splits, inputs, column, loaded.labels, config.data, seed).splits
    prepared = {name: task.prepare(split, inputs, processor, config.data) for name, split in examples.items()}
    args = TrainingArguments(
        folder,
        learning_rate=rate,
        seed=seed,
        num_train_epochs=config.training.num_train_epochs,
        per_device_train_batch_size=config.training.per_device_train_batch_size,
        per_device_eval_batch_size=config.training.per_device_eval_batch_size,
        warmup_steps=config.training.warmup_steps,
        weight_decay=config.training.weight_decay,
        eval_strategy="epoch",
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
    )
    trainer = Trainer(
        model=loaded.model,
        args=args,
        train_dataset=prepared["train"],
        eval_dataset=prepared["validation"],
        processing_class=processor,
        data_collator=task.collator(processor),
        compute_metrics=lambda p: metrics.compute("single_label_classification", p.predictions, p.label_ids),
    )
    trainer.remove_callback(PrinterCallback)
    seconds = trainer.train().metrics["train_runtime"]
    prediction = trainer.predict(prepared["test"])
    return {
        "accuracy": prediction.metrics["test_accuracy"],
        "validation": trainer.evaluate()["eval_accuracy"],
        "interval": metrics.intervals("single_label_classification", prediction.predictions, prediction.label_ids)[
            "accuracy"
        ],
        "train_seconds": seconds,
        "trainable_share": 1.0,
        "learning_rate": rate,
    }


class Book:
    """The results so far, written after every run."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[str, Any] = json.loads(path.read_text())["rows"] if path.is_file() else {}

    def add(self, row: str, found: dict[str, Any]) -> None:
        self.rows[row] = found
        where = {
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            **{p: version(p) for p in ("torch", "transformers", "timm")},
        }
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps({"where": where, "rows": dict(sorted(self.rows.items()))}, indent=1) + "\n")
        beside.replace(self.path)


def run(book: Book, data: str, recipes: list[str], size: str, again: bool) -> None:
    for seed in SEEDS[size]:
        for method in [*recipes, PLAIN]:
            name = f"{data} | {size} | {method} | seed {seed}"
            if name in book.rows and not again:
                continue
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                if method != PLAIN:
                    found = ours(data, method, size, seed, folder)
                elif seed == SEEDS[size][0]:
                    tried = [plain(data, rate, size, seed, folder) for rate in PLAIN_RATES[DATA[data]]]
                    found = max(tried, key=lambda t: t["validation"])
                    found["tried"] = {f"{t['learning_rate']:g}": [t["validation"], t["accuracy"]] for t in tried}
                else:
                    first = book.rows[f"{data} | {size} | {PLAIN} | seed {SEEDS[size][0]}"]
                    found = plain(data, first["learning_rate"], size, seed, folder)
            book.add(name, found)
            print(f"{name}: {found['accuracy']:.4f}, {time.perf_counter() - began:.0f} s", flush=True)
            gc.collect()


def table(book: Book) -> str:
    """One row per data set, size and method; in each block the best mean in bold, whoever reached it."""
    lines = [
        "# What the recipes reach",
        "",
        f"`python benchmarks/recipes.py` on 2 CPU cores, fp32, torch {version('torch')}, "
        f"transformers {version('transformers')}.",
        "Accuracy on the test split: mean ± standard deviation of seeds 0, 1, 2 (subsets), or one run with seed 42 and",
        "its 95% interval over the test examples (all). Seconds of training, with the evaluations after each epoch.",
        "Trained share: the parameters that train at some time. The recipes' rates are ours; those for images were",
        "chosen on the validation split of digits. The machine did other work at times: take seconds loosely.",
        "",
        "| data | examples | method | test accuracy | seconds | trained share |",
        "|---|---|---|---|---|---|",
    ]
    blocks: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for name, row in book.rows.items():
        data, size, method, _ = name.split(" | ")
        blocks.setdefault((data, size), {}).setdefault(method, []).append(row)
    for data in DATA:
        for size in SEEDS:
            block = blocks.get((data, size), {})
            means = {m: statistics.mean(r["accuracy"] for r in rows) for m, rows in block.items()}
            for method in (*RECIPES[DATA[data]], PLAIN):
                if method not in block:
                    continue
                rows = block[method]
                spread = (
                    f" ± {statistics.stdev(r['accuracy'] for r in rows):.3f}"
                    if len(rows) > 1
                    else f" ({rows[0]['interval'][0]:.3f}–{rows[0]['interval'][1]:.3f})"
                )
                mark = "**" if means[method] == max(means.values()) else ""
                examples = f"{SUBSETS[data][0]:,}" if size == "subset" else "all"
                rate = f", rate {rows[0]['learning_rate']:g}" if method == PLAIN else ""
                lines.append(
                    f"| {data.removeprefix('bundled:')} | {examples} | {method.replace('_', ' ')}{rate} "
                    f"| {mark}{means[method]:.3f}{mark}{spread} "
                    f"| {statistics.mean(r['train_seconds'] for r in rows):.0f} "
                    f"| {100 * rows[0]['trainable_share']:.3g}% |"
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SEEDS, default="subset")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--recipes", nargs="+")
    parser.add_argument("--again", action="store_true", help="run what has results already")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    book = Book(RESULTS / "recipes.json")
    for data in options.data:
        recipes = [r for r in RECIPES[DATA[data]] if options.recipes is None or r in options.recipes]
        run(book, data, recipes, options.size, options.again)
    (RESULTS / "recipes.md").write_text(table(book))
    print(table(book))


if __name__ == "__main__":
    main()
