"""The accuracy that a run expects, beside the accuracy that it then has: how often the interval holds it.

    python benchmarks/expected.py [--quick] [--cells rotten-tomatoes:16,messages:64] [--seeds 0,1,2] [--test 500]
                                  [--table] [--minutes 120] [--results FOLDER]

A cell is a set of data with a number of examples per class; a seed draws the training examples, and the test examples
are always the same. A run is `fine_tune(model, data)` with no key but the paths; what it expects of itself stands in
its `results.json`, and the outcome is its accuracy on the test examples. Texts are cut at 128 tokens and images are 64
pixels wide. The data is that of `low_data.py`.

Such runs are also the `auto` of `low_data.py` and of `advice.py`: the table counts theirs too, as far as those files
hold what they expected. A run that only solves for a head (`linear-probe`) is of a kind of its own.

How much training adds to a head on frozen features is fitted to the outcomes themselves. So the table has the coverage
twice: with the constants of `analysis.expected`, and with constants that were fitted without the set of data that is
predicted; a set that is the only one of its kind has no such fit.

Every finished cell is kept in benchmarks/results/expected.json and not run again. The table is expected.md.
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
from low_data import DATA, MODELS, PIXELS, TOKENS, draw
from peers.race import RESULTS, machine, settled

from hf_transfer import fine_tune
from hf_transfer.analysis.expected import COVERAGE, HEAD_ALONE, TEXTS, WITH_BATCHNORM, Added, interval

CELLS = (  # sizes that the other two do not have
    ("digits", 8),
    ("rotten-tomatoes", 250),
    ("digits", 48),
    ("imdb", 32),
    ("messages", 200),
    ("rotten-tomatoes", 32),
)
HEAD = "head alone"
ADDED = {"text": TEXTS, "image": WITH_BATCHNORM, HEAD: HEAD_ALONE}
KEPT = ("accuracy", "low", "high", "frozen", "frozen_sd", "examples", "layer", "gain")  # of what is expected


def outcome(name: str, per_class: int, seed: int, test: int) -> dict[str, Any]:
    """What a run expected, and what came of it."""
    train, held = draw(name, per_class, seed, test)
    size = {"max_seq_length": TOKENS} if DATA[name] == "text" else {"image_size": PIXELS}
    quiet = {"log_level": "error", "report_to": "none", "seed": seed, "preflight": False, "save_strategy": "no"}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        data = DatasetDict(train=train, test=held)
        results = fine_tune(MODELS[DATA[name]], data, output_dir=f"{folder}/out", **size, **quiet).results
    expected = results["expected"]
    return {
        **{key: expected[key] for key in KEPT if key in expected},
        **({"skipped": expected["skipped"]} if "skipped" in expected else {}),
        "strategy": results["strategy"],
        "outcome": results["metrics"]["accuracy"],
        "seconds": time.perf_counter() - began,
    }


def fitted(cells: list[dict[str, Any]]) -> Added:
    """What training adds, by least squares over the cells; its spread without what the interval has anyway."""
    x = np.array([[1.0, math.log(cell["examples"] / 100)] for cell in cells])
    y = np.array([_log_odds(cell) - _logit(cell["frozen"]) for cell in cells])
    noise = np.array([_noise(cell) for cell in cells])
    (level, slope), *_ = np.linalg.lstsq(x, y, rcond=None)
    rest = y - x @ np.array([level, slope])
    spread = float((rest @ rest) / max(1, len(cells) - 2) - (noise**2).mean())
    return Added(float(level), float(slope), math.sqrt(max(spread, 0.01)), "")


def _noise(cell: dict[str, Any]) -> float:
    p, q = cell["frozen"], _shrunk(cell)
    return math.sqrt((cell["frozen_sd"] / (p * (1 - p))) ** 2 + 1 / (q * (1 - q) * cell["test"]))


def _shrunk(cell: dict[str, Any]) -> float:
    return (cell["outcome"] * cell["test"] + 0.5) / (cell["test"] + 1)


def _log_odds(cell: dict[str, Any]) -> float:
    return _logit(_shrunk(cell))


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


def holds(cell: dict[str, Any], added: Added) -> tuple[bool, float, float]:
    """(whether the interval holds the outcome, its width, the outcome less what was expected)."""
    expected, low, high = interval(cell["frozen"], cell["frozen_sd"], added, cell["examples"], cell["test"])
    return low <= cell["outcome"] <= high, high - low, cell["outcome"] - expected


def gathered(folder: Path) -> list[dict[str, Any]]:
    """The outcomes of all three benchmarks for which an accuracy could be predicted."""
    found = []
    for key, cell in _cells(folder / "expected.json").items():
        found.append({**cell, "data": key.split()[0], "test": int(key.split()[-1])})
    for key, cell in _cells(folder / "low_data.json").items():
        name, _, side, _, _, test = key.split()
        if side == "auto" and "expected" in cell:
            more = {"strategy": cell["chosen"]["strategy"], "outcome": cell["accuracy"], "test": int(test)}
            found.append({**cell["expected"], **more, "data": name})
    for key, cell in _cells(folder / "advice.json").items():
        if (expected := cell.get("expected")) is not None:
            more = {"strategy": cell["strategy"], "outcome": cell["accuracy"], "test": expected["split_examples"]}
            found.append({**{name: expected[name] for name in KEPT}, **more, "data": key.split()[0]})
    return [cell for cell in found if "skipped" not in cell]


def _cells(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())["cells"]) if path.is_file() else {}


def kind_of(cell: dict[str, Any]) -> str:
    return HEAD if cell["strategy"] == "linear-probe" else DATA[cell["data"]]


def table(cells: list[dict[str, Any]]) -> str:
    """The Markdown page."""
    lines = [
        "# The accuracy to expect",
        "",
        f"`python benchmarks/expected.py`, {time.strftime('%Y-%m-%d')}: "
        f"{', '.join(f'{k} {v}' for k, v in machine().items())}; fp32.",
        "",
        f"Intervals are meant to hold {COVERAGE:.0%} of outcomes. *Fitted elsewhere*: with constants that know nothing",
        "of this set of data. Width, error and frozen (a head on frozen features alone) in points of accuracy.",
        "",
        "| trained | data | outcomes | held | width | mean error | absolute error | frozen - outcome "
        "| held, fitted elsewhere |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    total: list[bool] = []
    elsewhere: list[bool] = []
    for kind, added in ADDED.items():
        of_kind = [cell for cell in cells if kind_of(cell) == kind]
        for name in sorted({cell["data"] for cell in of_kind}):
            own = [cell for cell in of_kind if cell["data"] == name]
            found = [holds(cell, added) for cell in own]
            total += [held for held, *_ in found]
            others, text = [cell for cell in of_kind if cell["data"] != name], "–"
            if len(others) > 3:
                apart = [holds(cell, fitted(others))[0] for cell in own]
                elsewhere += apart
                text = f"{sum(apart)} of {len(apart)}"
            lines.append(
                f"| {HEAD if kind == HEAD else 'all layers'} | {name} | {len(own)} | {sum(held for held, *_ in found)} "
                f"| {100 * statistics.mean(width for _, width, _ in found):.1f} "
                f"| {100 * statistics.mean(error for *_, error in found):+.1f} "
                f"| {100 * statistics.mean(abs(error) for *_, error in found):.1f} "
                f"| {100 * statistics.mean(cell['frozen'] - cell['outcome'] for cell in own):+.1f} | {text} |"
            )
    if total:
        rest = f"; fitted elsewhere {sum(elsewhere)} of {len(elsewhere)}" if elsewhere else ""
        lines += ["", f"All: {sum(total)} of {len(total)} outcomes held ({sum(total) / len(total):.0%}){rest}.", ""]
    for kind, used in ADDED.items():
        if len(of_kind := [cell for cell in cells if kind_of(cell) == kind]) > 3:
            best = fitted(of_kind)
            lines.append(
                f"Added to the log-odds of a frozen head, {kind}: least squares {best.level:+.2f} at 100 examples, "
                f"{best.slope:+.2f} more for each factor e, standard deviation {best.sd:.2f}; used {used.level:+.2f}, "
                f"{used.slope:+.2f}, {used.sd:.2f}."
            )
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default=CELLS, type=lambda text: [_cell(one) for one in text.split(",")])
    parser.add_argument("--seeds", default=[0, 1, 2, 3, 4], type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many")
    parser.add_argument("--table", action="store_true", help="run nothing, make the table from what there is")
    parser.add_argument("--quick", action="store_true", help="one small cell; results go nowhere")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, settled():
        if options.quick:
            options.cells, options.seeds, options.test, options.results = [("digits", 10)], [0], 100, Path(folder)
        path = options.results / "expected.json"
        book = json.loads(path.read_text()) if path.is_file() else {"cells": {}, "machine": machine()}
        for seed in [] if options.table else options.seeds:
            for name, per_class in options.cells:
                key = f"{name} {per_class} {seed} test {options.test}"
                if key in book["cells"] or time.perf_counter() - began > 60 * options.minutes:
                    continue
                book["cells"][key] = outcome(name, per_class, seed, options.test)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(book, indent=1) + "\n")
                print(key, book["cells"][key], flush=True)
        page = table(gathered(options.results))
        print(page)
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "expected.md").write_text(page)


def _cell(text: str) -> tuple[str, int]:
    name, _, per_class = text.partition(":")
    return name, int(per_class)


if __name__ == "__main__":
    main()
