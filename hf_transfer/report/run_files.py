"""What a run's folder holds, for its report: of a finished run, an interrupted one, or one of an older version."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from hf_transfer.config.values import load_yaml
from hf_transfer.errors import UserError
from hf_transfer.run_folder import ERRORS, EXPLANATIONS, HISTORY, LABEL_ISSUES, MISTAKES, RESULTS, RUN_FILE

MOST_ROWS = 24  # of `errors.csv` and `label_issues.csv`


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run's files; empty where there is no such file.

    Attributes:
        folder: of the run.
        results: of `results.json`; empty of a run that did not finish.
        keys: of `run.yaml`.
        history: the lines of `history.jsonl`.
        errors: the first rows of `errors.csv`.
        mistakes: of `mistakes.json`, an entry for each of these rows.
        label_issues: the first rows of `label_issues.csv`.
        explanations: of `explanations.json`.
    """

    folder: Path
    results: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()
    errors: tuple[Mapping[str, str], ...] = ()
    mistakes: tuple[Mapping[str, Any], ...] = ()
    label_issues: tuple[Mapping[str, str], ...] = ()
    explanations: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path) -> RunFiles:
        """The files of a folder.

        Raises:
            UserError: it is not the folder of a run, or one of its files is damaged.
        """
        folder = Path(folder).expanduser()
        if not any((folder / name).is_file() for name in (RESULTS, HISTORY)):
            lacks = f"has neither {RESULTS} nor {HISTORY}" if folder.is_dir() else "does not exist"
            raise UserError(
                f"{str(folder)!r} {lacks}, so that there is nothing to report.",
                "Give the output_dir of a run.",
                key="RUN",
            )
        try:
            keys = load_yaml(_text(folder / RUN_FILE)) or {}
            results = json.loads(_text(folder / RESULTS) or "{}")
            history = _lines(_text(folder / HISTORY))
            mistakes = json.loads(_text(folder / MISTAKES) or "[]")
            explanations = json.loads(_text(folder / EXPLANATIONS) or "{}")
        except ValueError as error:
            raise UserError(f"the files in {str(folder)!r} cannot be read: {error}.", key="RUN") from error
        return cls(
            folder=folder,
            results=results,
            keys=keys,
            history=tuple(history),
            errors=tuple(_rows(folder / ERRORS)),
            mistakes=tuple(mistakes),
            label_issues=tuple(_rows(folder / LABEL_ISSUES)),
            explanations=explanations,
        )

    @property
    def place(self) -> str:
        """How commands name the folder: as the run was told, unless it has another name by now."""
        said, name = str(self.keys.get("output_dir") or ""), self.folder.resolve().name
        return said if said and Path(said).name == name else name

    @property
    def labels(self) -> list[str]:
        return [str(name) for name in self.results.get("labels") or ()]

    @cached_property
    def problem_type(self) -> str:
        return str(self.results.get("problem_type") or self.keys.get("problem_type") or "")

    @property
    def split(self) -> str:
        """The split that the metrics are of."""
        return str(self.results.get("metrics_split") or "validation")

    @property
    def num_examples(self) -> int | None:
        """Examples of this split, if the run recorded them."""
        splits = (self.results.get("data_facts") or {}).get("splits") or {}
        return (splits.get(self.split) or {}).get("examples")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _lines(text: str) -> list[Mapping[str, Any]]:
    """The lines of a log, without a last one that a kill cut off."""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line.strip()]


def _rows(path: Path) -> list[Mapping[str, str]]:
    """The first rows of a table."""
    if not path.is_file():
        return []
    limit = csv.field_size_limit(sys.maxsize)  # a text may be longer than the module's default
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            return list(islice(csv.DictReader(file), MOST_ROWS))
    finally:
        csv.field_size_limit(limit)
