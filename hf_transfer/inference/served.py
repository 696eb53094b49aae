"""What `serve` and `demo` answer with: the tasks of a bank or of runs, each a predictor, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_transfer.config.places import split_revision
from hf_transfer.errors import UserError, nearest
from hf_transfer.inference.bank_files import BANK
from hf_transfer.inference.head_bank import HeadBank
from hf_transfer.inference.predictor import Predictor


@dataclass(frozen=True)
class Served:
    """Tasks by name. A task's predictor serves one thread at a time.

    Attributes:
        predictors: by name; at least one.
    """

    predictors: Mapping[str, Predictor]

    @classmethod
    def load(cls, words: Sequence[str], coverage: float | None = None, **changes: Any) -> Served:
        """The tasks of a saved `HeadBank`, of one run, or of several runs with adapters on one backbone.

        A run's task has the name of its folder, or the last part of its hub id.

        Args:
            words: a bank's folder, or runs.
            coverage: of prediction sets (see `Predictor.abstaining`); None without them.
            **changes: as of `Predictor.load`.

        Raises:
            UserError: one cannot be loaded; of several, one has no adapter, another backbone, or the name of another.
        """
        predictors = cls._load(words, changes)
        if coverage is None:
            return cls(predictors)
        abstaining = {}
        for name, predictor in predictors.items():
            try:
                abstaining[name] = predictor.abstaining(coverage)
            except UserError as error:
                where = f"task {name!r}: " if len(predictors) > 1 else ""
                raise UserError(f"{where}{error.problem}", error.fix, error.key) from error
        return cls(abstaining)

    @staticmethod
    def _load(words: Sequence[str], changes: dict[str, Any]) -> dict[str, Predictor]:
        banks = [word for word in words if is_bank(word)]
        if banks and len(words) > 1:
            raise UserError(
                f"RUN: {banks[0]!r} is a bank, and other words are given with it.", "Give a bank alone, or runs."
            )
        if banks:
            return HeadBank.load(Path(banks[0]).expanduser(), **changes).predictors
        names = task_names(words)
        if len(words) == 1:
            return {names[0]: Predictor.load(words[0], **changes)}
        bank = HeadBank()
        for name, word in zip(names, words, strict=True):
            bank.add(name, word, **changes)
        return bank.predictors

    def __getitem__(self, name: str) -> Predictor:
        """Raises:
        UserError: there is no such task.
        """
        try:
            return self.predictors[name]
        except KeyError:
            raise UserError(
                f"there is no task {name!r}.",
                f"Tasks: {', '.join(self.predictors)}.{nearest(name, self.predictors)}",
                key="task",
            ) from None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.predictors)

    def about(self) -> dict[str, dict[str, Any]]:
        """What each task reads and answers with: `type`, `columns`, `problem_type`, `labels`."""
        return {
            name: {
                "type": predictor.task.name,
                "columns": list(predictor.columns),
                "problem_type": predictor.labels.problem_type,
                "labels": list(predictor.labels.names),
            }
            for name, predictor in self.predictors.items()
        }


def is_bank(word: str) -> bool:
    """Whether a folder is one that `HeadBank.save` wrote."""
    return (Path(word).expanduser() / BANK).is_file()


def task_names(runs: Sequence[str]) -> list[str]:
    """A name for the task of each run.

    Raises:
        UserError: two runs would have the same.
    """
    names = []
    for run in runs:
        path = Path(run).expanduser()
        place = path.resolve() if path.exists() else Path(split_revision(run)[0])
        names.append((place.parent if place.is_file() else place).name)
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UserError(
                f"RUN: {runs[names.index(name)]!r} and {runs[i]!r} would both be the task {name!r}.",
                "Rename a folder, or name the tasks in Python: HeadBank().add(name, run), and save the bank.",
            )
    return names
