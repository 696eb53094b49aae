"""What several runs of one process share: data that was read, features of frozen models, and who watches them.

A run with and without it is the same, bit for bit.
"""

from __future__ import annotations

import copy

from transformers import TrainerCallback

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.load import load_splits
from hf_transfer.data.locate import Source
from hf_transfer.data.raw import RawSplits
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
        watchers: callbacks of every run's training, after those that write its history.
    """

    def __init__(self) -> None:
        self.store = FeatureStore()
        self.watchers: list[TrainerCallback] = []
        self._splits: dict[str, RawSplits] = {}

    def splits(self, args: DataArguments, source: Source) -> RawSplits:
        """As `load_splits`; data that was read before is not read again."""
        if args.in_memory is not None:
            return load_splits(args, source)
        key = repr([getattr(args, name) for name in _READ])
        if key not in self._splits:
            self._splits = {key: load_splits(args, source)}  # the newest alone: others may be as large
        splits = self._splits[key]
        return splits.but({name: copy.copy(split) for name, split in splits.items()})
