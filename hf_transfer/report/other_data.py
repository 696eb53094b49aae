"""Sections on data of other kinds: the domain that a model was adapted to, and the checkpoint's own task."""

from __future__ import annotations

from hf_transfer.report import plots
from hf_transfer.report.blocks import Block, Figures, Picture, Table, Text, Tile, Tiles
from hf_transfer.report.examples import small_picture
from hf_transfer.report.figures import svg
from hf_transfer.report.run_files import RunFiles
from hf_transfer.report.words import count, number
from hf_transfer.run_folder import DOMAINS_PNG

_DISTANCES = {"proxy_a_distance": "proxy A-distance, 0 to 2", "error": "error of telling them apart", "mmd": "MMD"}


def domains(run: RunFiles) -> list[Block] | None:
    """How far the target of domain adaptation is from the source, before and after training."""
    found = (run.results.get("domain_adaptation") or {}).get("distance")
    if not found:
        return None
    if "before" not in found:
        return [Text(f"Not measured: {found.get('skipped', 'no reason is recorded')}.", "muted")]
    after = found.get("after") or {}
    rows = [(title, number(found["before"][name]), number(after.get(name))) for name, title in _DISTANCES.items()]
    blocks: list[Block] = [Table(("", "before training", "after"), rows)]
    about = f"Features of {count(found['examples'])} examples of each domain: {found['layer']}."
    path = run.folder / DOMAINS_PNG
    if path.is_file():
        blocks.append(Picture(small_picture(path), "examples of both domains, before and after training"))
    return [*blocks, Text(about, "muted")]


def forgetting(run: RunFiles) -> list[Block] | None:
    """What became of the checkpoint's own task."""
    found = run.results.get("forgetting")
    if not found:
        return None
    metric = found["metric"]
    tiles = [Tile("before training", number(found["before"]), metric), Tile("after", number(found["after"]), metric)]
    about = f"With the checkpoint's own head, on {count(found['num_examples'])} examples of {found['split']} of "
    blocks: list[Block] = [Tiles(tiles), Text(f"{about}{found['dataset']}.", "muted")]
    if len(found["curve"]) > 1:
        steps, values = zip(*((one["step"], one[metric]) for one in found["curve"]), strict=True)
        drawing = svg("old", lambda: plots.lines(steps, {metric: values}, "step", f"{metric} of the old task"))
        blocks.append(Figures([drawing]))
    return blocks
