"""`hf-transfer report`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from hf_transfer.cli.imports import quick_imports
from hf_transfer.cli.words import help_of, keys_with, read_words, words_parser
from hf_transfer.config.fields import Key
from hf_transfer.config.places import check_run
from hf_transfer.errors import UserError

HELP = (
    "Write the report of a run again, from the files in its folder: report.html, and the pictures of its curves and "
    "confusion matrix. Nothing is computed by the model. RUN is the folder of a run, finished or not, or of a "
    "comparison."
)


def keys() -> dict[str, Key]:
    return keys_with()


def parser() -> argparse.ArgumentParser:
    return words_parser("report", "RUN ...", HELP, keys())


def _check(words: list[str], _: dict[str, Any]) -> None:
    """Raises:
    UserError: no run is named, or one does not exist.
    """
    if not words:
        raise UserError("A RUN is needed: the folder of a run, or several.", help_of("report"))
    for word in words:
        check_run(word)


def run(argv: Sequence[str]) -> int:
    """Write reports."""
    words, values = read_words(parser(), argv, keys(), _check)

    with quick_imports():
        from hf_transfer.report import comparison, page
        from hf_transfer.report.run_files import RunFiles

    for word in words:
        (comparison.ComparisonFiles if comparison.is_comparison(word) else RunFiles).read(word)  # before any is written
    for word in words:
        path = comparison.write(word) if comparison.is_comparison(word) else page.write(word)
        if not values["quiet"]:
            print(path)
    return 0
