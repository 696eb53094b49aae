"""Sections on the run itself: what it cost, where it ran, and how to use what it left."""

from __future__ import annotations

import json
import re
import shlex

from hf_transfer.report.blocks import Block, Code, Table, Tile, Tiles
from hf_transfer.report.run_files import RunFiles
from hf_transfer.report.words import count, number, percent, seconds
from hf_transfer.run_folder import CARD, RUN_FILE

_CODE = re.compile(r"^## How to use\n.*?^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def cost(run: RunFiles) -> list[Block] | None:
    """Time, hardware and money."""
    results = run.results
    if "train_seconds" not in results:
        return None
    spent = results.get("cost") or {}
    tiles = [
        Tile("training", seconds(results["train_seconds"]), f"on {results.get('device', 'an unknown device')}"),
        Tile("device hours", number(spent.get("device_hours"), ".3g")),
        Tile("examples per second", number(results.get("train_samples_per_second"), ",.1f")),
    ]
    if "usd" in spent:
        tiles.append(Tile("cost", f"${number(spent['usd'], '.2f')}"))
    trained, total = results.get("trainable_parameters"), results.get("total_parameters")
    if trained is not None and total:
        tiles.append(Tile("parameters trained", count(trained), f"{percent(trained / total)} of {count(total)}"))
    memory = max((line["memory_bytes"] for line in run.history if "memory_bytes" in line), default=None)
    if memory is not None:
        tiles.append(Tile("peak memory", f"{memory / 1e9:.2f} GB", "as logged: of the GPU, or of the process"))
    return [Tiles(tiles)]


def environment(run: RunFiles) -> list[Block] | None:
    """What was run, with what."""
    results, keys = run.results, run.keys
    about = {
        "model": results.get("model") or keys.get("model_name_or_path"),
        "dataset": results.get("dataset") or keys.get("dataset_name") or keys.get("train_file"),
        "task": results.get("task") or keys.get("task"),
        "strategy": results.get("strategy") or keys.get("strategy"),
        "adapter": results.get("adapter"),
        "revision": (results.get("backbone") or {}).get("revision"),
        "commit": (results.get("backbone") or {}).get("commit"),
        "seed": results.get("seed", keys.get("seed")),
        "device": results.get("device"),
        **(results.get("versions") or {}),
    }
    rows = [(name, str(value)) for name, value in about.items() if value is not None]
    auto = (results.get("auto") or {}).items()
    chosen = [(name, str(one["value"]), str(one["why"])) for name, one in auto if one["value"] is not None]
    blocks: list[Block] = [Table(("", ""), rows, words=2)] if rows else []
    if chosen:
        blocks.append(Table(("chosen key", "value", "because"), chosen, words=3))
    given = [(n, str(v)) for n, v in keys.items() if v is not None]
    if given:
        blocks.append(Table(("key", "value"), given, words=2, folded=f"All keys ({RUN_FILE})"))
    return blocks or None


def loading(run: RunFiles) -> list[Block] | None:
    """Commands and Python that use the model; of a run that did not finish, what resumes it."""
    place = shlex.quote(run.place)
    recipe = shlex.quote(f"{run.place}/{RUN_FILE}")
    if not run.results:
        return [Code(f"hf-transfer train --config {recipe} --resume_from_checkpoint auto")]
    commands = [f"hf-transfer predict {place} -", f"hf-transfer evaluate {place}"]
    if (run.folder / RUN_FILE).is_file():
        commands.append(f"hf-transfer train --config {recipe} --output_dir again")
    ours = [
        "from hf_transfer import Predictor",
        "",
        f"predictor = Predictor.load({json.dumps(run.place)})",
        f"print(predictor.predict({json.dumps(_input(run))}))",
    ]
    blocks: list[Block] = [Code("\n".join(commands)), Code("\n".join(ours))]
    card = run.folder / CARD
    found = _CODE.search(card.read_text(encoding="utf-8")) if card.is_file() else None
    if found and "hf_transfer" not in found[1]:
        blocks.append(Code(found[1].rstrip()))
    return blocks


def _input(run: RunFiles) -> list[object]:
    """An input that the model would take."""
    if run.results.get("task") == "image-classification":
        return ["photo.jpg"]
    columns = run.keys.get("text_column_name")
    return [["first text", "second text"]] if isinstance(columns, list) and len(columns) == 2 else ["some text"]
