"""Is the advice good? What `strategy: auto` loses to the best strategy of each case, beside always taking one.

    python benchmarks/advice.py [--quick] [--cases 'cifar10 300 lite0,imdb 600 minilm'] [--seeds 0,1,2] [--table]
                                [--strategies auto,full] [--minutes 120] [--results FOLDER]

A case is a set of data, a number of labeled examples and a backbone; a seed draws the examples, and all strategies get
the same ones, with the same test examples. `auto` is `fine_tune(model, data)` with no key but the paths and the size
at which texts (128 tokens) and images (64 pixels) are read. The others are told their strategy, and a length and rates
at which each does well (`KEYS`): at least 200 optimizer steps, where `auto` takes fewer on few examples.

The regret of a strategy in a case is what its accuracy, on the mean of the seeds, is below that of the best strategy of
the case. The constants of `auto` were chosen on Rotten Tomatoes, the messages and the digits ("tuned"); IMDB, CIFAR-10
and MNIST had no part in it ("held out"). The best of seven noisy means is too high on average, so a regret of 0 is not
to be had; that holds for every strategy alike. Intervals are of a bootstrap over cases.

Data and backbones from packages: `low_data.py` says which. Every finished run is kept in
benchmarks/results/advice.json and not run again. The table is advice.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from datasets import DatasetDict
from low_data import DATA, PIXELS, TOKENS, draw, pool
from peers.race import RESULTS, machine, settled

from hf_transfer import fine_tune

BACKBONES = {
    "minilm": "bundled:minilm-l6",
    "lite0": "bundled:efficientnet-lite0",
    "lite1": "bundled:efficientnet-lite1",
}
TUNED = ("rotten-tomatoes", "messages", "digits")
CASES = (
    ("digits", 300, "lite0"),
    ("imdb", 300, "minilm"),
    ("cifar10", 300, "lite0"),
    ("messages", 450, "minilm"),
    ("rotten-tomatoes", 300, "minilm"),
    ("mnist", 500, "lite1"),
    ("cifar10", 1000, "lite1"),
    ("digits", 900, "lite1"),
    ("rotten-tomatoes", 1000, "minilm"),
    ("imdb", 600, "minilm"),
    ("messages", 900, "minilm"),
    ("cifar10", 600, "lite0"),
)
TEST = {"digits": 600, "imdb": 1000}  # examples; 2,000 of the others
STEPS, MOST_EPOCHS, LEAST_EPOCHS, BATCH = 200, 20, 4, 16
# The strategy's own keys; rates are set by the kind of model.
KEYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "full": {"strategy": "full"},
    "two-phase": {"strategy": "two-phase", "head_init": "probe", "head_epochs": 0},
    "gradual": {"strategy": "gradual", "head_init": "probe", "groups_per_unfreeze": 3},
    "partial": {"strategy": "partial"},
    "probe": {"strategy": "linear-probe", "probe_solver": "lbfgs"},
    "lora": {"strategy": "lora", "lora_r": 16},
}
RATE = {"text": 1e-4, "image": 1e-3}
LORA_RATE, HEAD_RATE = 1e-3, 2e-3  # the latter of a head that begins random
Case = tuple[str, int, str]


def keys_of(strategy: str, case: Case) -> dict[str, Any]:
    """Every key of a run but those of model, data and output."""
    name, examples, _ = case
    kind = DATA[name]
    size = {"max_seq_length": TOKENS} if kind == "text" else {"image_size": PIXELS}
    keys = {**size, **KEYS[strategy]}
    if strategy in ("auto", "probe"):
        return keys
    steps = math.ceil(0.8 * examples / BATCH)
    keys |= {
        "num_train_epochs": min(MOST_EPOCHS, max(LEAST_EPOCHS, math.ceil(STEPS / steps))),
        "per_device_train_batch_size": BATCH,
        "warmup_steps": 0.1,
        "learning_rate": LORA_RATE if strategy == "lora" else RATE[kind],
    }
    keys["head_learning_rate"] = RATE[kind] if "head_init" in keys else HEAD_RATE
    if strategy == "gradual":
        keys["unfreeze_interval"] = keys["num_train_epochs"] / 6  # the upper third of the epochs has everything
    if strategy == "partial":
        keys["unfrozen_groups"] = 3 if kind == "text" else 8  # about half of the groups
    return keys


def outcome(case: Case, strategy: str, seed: int, test: int) -> dict[str, Any]:
    """Accuracy on the test examples, and what it took."""
    name, examples, backbone = case
    train, held = draw(name, math.ceil(examples / len(pool(name)[1])), seed, test)
    quiet = {"log_level": "error", "report_to": "none", "seed": seed, "preflight": False, "save_strategy": "no"}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        data = DatasetDict(train=train, test=held)
        results = fine_tune(
            BACKBONES[backbone], data, output_dir=f"{folder}/out", **quiet, **keys_of(strategy, case)
        ).results
    return {
        "accuracy": results["metrics"]["accuracy"],
        "seconds": time.perf_counter() - began,
        "train_seconds": results["train_seconds"],
        "strategy": results["strategy"],
        **({"expected": results["expected"]} if strategy == "auto" else {}),
    }


def means(book: dict[str, Any]) -> dict[Case, dict[str, tuple[float, int]]]:
    """{case: {strategy: (mean accuracy in percent, number of seeds)}}, over the seeds that every strategy has."""
    found: dict[Case, dict[str, dict[int, float]]] = {}
    for key, cell in book["cells"].items():
        name, examples, backbone, strategy, seed = key.split()
        of = found.setdefault((name, int(examples), backbone), {})
        of.setdefault(strategy, {})[int(seed)] = 100 * cell["accuracy"]
    result = {}
    for case, of in found.items():
        if set(of) != set(KEYS):
            continue
        common = set.intersection(*(set(seeds) for seeds in of.values()))
        if common:
            result[case] = {s: (statistics.mean(of[s][seed] for seed in common), len(common)) for s in KEYS}
    return result


def regrets(of: dict[str, tuple[float, int]]) -> dict[str, float]:
    best = max(mean for mean, _ in of.values())
    return {strategy: best - mean for strategy, (mean, _) in of.items()}


def bootstrap(values: list[float]) -> str:
    """The mean with its 95% interval over cases."""
    if len(values) < 2:
        return f"{statistics.mean(values):.1f}"
    rng = np.random.default_rng(0)
    drawn = rng.choice(values, (10_000, len(values))).mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{statistics.mean(values):.1f} ({low:.1f} to {high:.1f})"


def table(book: dict[str, Any]) -> str:
    """The Markdown page."""
    cases = means(book)
    lines = [
        "# Advice",
        "",
        f"`python benchmarks/advice.py`, {time.strftime('%Y-%m-%d')}: "
        f"{', '.join(f'{k} {v}' for k, v in machine().items())}; fp32.",
        "",
        f"Accuracy in percent on test examples the training never saw, mean of the seeds; texts of {TOKENS} tokens,",
        f"images of {PIXELS} pixels.",
        "",
        f"| case | part | seeds | {' | '.join(KEYS)} | regret of auto |",
        f"|---|---|---|{'---|' * len(KEYS)}---|",
    ]
    for case in [c for c in CASES if c in cases]:
        of = cases[case]
        part = "tuned" if case[0] in TUNED else "held out"
        cells = " | ".join(f"{of[strategy][0]:.1f}" for strategy in KEYS)
        lines.append(
            f"| {case[0]}, {case[1]:,}, {case[2]} | {part} | {of['auto'][1]} | {cells} | {regrets(of)['auto']:.1f} |"
        )
    lines += ["", "Regret, mean over cases with its 95% interval (bootstrap), and the worst case:", ""]
    lines += ["| | cases | " + " | ".join(KEYS) + " |", "|---|---|" + "---|" * len(KEYS)]
    for title, wanted in (("tuned", True), ("held out", False), ("all", None)):
        of_part = [regrets(of) for case, of in cases.items() if wanted is None or (case[0] in TUNED) == wanted]
        if of_part:
            found = [[one[strategy] for one in of_part] for strategy in KEYS]
            cells = " | ".join(f"{bootstrap(values)}, {max(values):.1f}" for values in found)
            lines.append(f"| {title} | {len(of_part)} | {cells} |")
    seconds = {s: [c["seconds"] for key, c in book["cells"].items() if key.split()[3] == s] for s in KEYS}
    told = ", ".join(f"{s} {statistics.median(values):.0f}" for s, values in seconds.items() if values)
    lines += ["", f"Median seconds of a run, with its test (the machine did other work beside it): {told}.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES, type=lambda text: [_case(one) for one in text.split(",")])
    parser.add_argument("--strategies", default=list(KEYS), type=lambda text: text.split(","))
    parser.add_argument("--seeds", default=[0, 1, 2], type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many")
    parser.add_argument("--table", action="store_true", help="run nothing, make the table from what there is")
    parser.add_argument("--quick", action="store_true", help="one small case; results go nowhere")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, settled():
        if options.quick:
            options.cases, options.seeds, options.results = [("digits", 100, "lite0")], [0], Path(folder)
        path = options.results / "advice.json"
        book = json.loads(path.read_text()) if path.is_file() else {"cells": {}, "machine": machine()}
        for seed in [] if options.table else options.seeds:
            for case in options.cases:
                for strategy in options.strategies:
                    key = " ".join(map(str, (*case, strategy, seed)))
                    if key in book["cells"] or time.perf_counter() - began > 60 * options.minutes:
                        continue
                    test = 200 if options.quick else TEST.get(case[0], 2000)
                    book["cells"][key] = outcome(case, strategy, seed, test)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(json.dumps(book, indent=1) + "\n")
                    print(key, {k: v for k, v in book["cells"][key].items() if k != "expected"}, flush=True)
        page = table(book)
        print(page)
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "advice.md").write_text(page)


def _case(text: str) -> Case:
    name, examples, backbone = text.split()
    return name, int(examples), backbone


if __name__ == "__main__":
    main()
