"""The section on the source and the target of domain adaptation."""

from __future__ import annotations

from hf_transfer.objectives.adaptation.distance_in_words import before_in_words, both_in_words
from hf_transfer.report.blocks import Block, Picture, Text
from hf_transfer.report.examples import smaller
from hf_transfer.report.run_files import RunFiles
from hf_transfer.run_folder import DOMAINS_PNG


def domains(run: RunFiles) -> list[Block] | None:
    """How far apart the domains are, before and after."""
    found = (run.results.get("domain_adaptation") or {}).get("distance")
    if not found:
        return None
    blocks: list[Block] = []
    if (path := run.folder / DOMAINS_PNG).is_file():
        about = "Source and target in the plane in which both vary most, before and after."
        blocks = [Picture(smaller(path), about), Text(about, "muted")]
    said = [before_in_words(found), both_in_words(found)]
    return [*blocks, *(Text(line if line.endswith(".") else f"{line}.") for line in said if line)]
