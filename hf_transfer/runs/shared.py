"""What several runs of one process share: data that was read, features of frozen models, and who watches them.

A run with and without it is the same, bit for bit.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import TrainerCallback

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.labels import SINGLE_LABEL
from hf_transfer.data.load import load_splits
from hf_transfer.data.locate import Source
from hf_transfer.data.raw import RawSplits
from hf_transfer.errors import UserError
from hf_transfer.features import FeatureStore

# Keys that decide what is read, before anyone draws from it. Of the others, `load_splits` reads none.
_READ = (
    "dataset_name",
    "dataset_config_name",
    "train_file",
    "validation_file",
    "test_file",
    "image_column_name",
    "label_column_name",
    "on_bad_example",
    "task",
)


class Shared:
    """What was read and computed so far.

    Attributes:
        store: features of frozen models, by weights, preprocessing and content.
        leaves_test: whether the test split is left for the run that is chosen.
        keeps_last: whether each run saves a checkpoint at its end.
        one_class: the key that needs one class per example, if any.
        selection: of the run that was chosen, what it was chosen from, for `results.json`.
        watchers: callbacks of every run's training, after those that write its history.
    """

    def __init__(self) -> None:
        self.store = FeatureStore()
        self.leaves_test, self.keeps_last = True, False
        self.one_class = ""
        self.selection: dict[str, Any] | None = None
        self.watchers: list[TrainerCallback] = []
        self._splits: dict[str, RawSplits] = {}

    def but(self, **changes: Any) -> Shared:
        """The same with other values of attributes."""
        other = copy.copy(self)
        for name, value in changes.items():
            assert name in vars(self), name
            setattr(other, name, value)
        return other

    def check(self, problem_type: str) -> None:
        """Raises:
        UserError: a key needs one class per example, and the data has others.
        """
        if self.one_class and problem_type != SINGLE_LABEL:
            raise UserError(
                f"it needs one class per example, and the task is {problem_type.replace('_', ' ')}.",
                "Name mmd, coral or dann.",
                key=self.one_class,
            )

    def splits(self, args: DataArguments, source: Source) -> RawSplits:
        """As `load_splits`; data that was read before is not read again."""
        if args.in_memory is not None:
            return load_splits(args, source)
        key = repr([getattr(args, name) for name in _READ])
        if key not in self._splits:
            self._splits.clear()  # the newest alone: others may be as large
            self._splits[key] = load_splits(args, source)
        splits = self._splits[key]
        return splits.but({name: copy.copy(split) for name, split in splits.items()})
