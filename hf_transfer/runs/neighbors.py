"""The training examples nearest to each example that a run is measured on, for `errors.csv`.

They are found before training, in the frozen features that the search for wrong labels has computed: at the end the
features are gone, and the trained model's would say which class it takes an example for, which its answer says already.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_transfer.analysis.neighbors import Neighbors, nearest_of
from hf_transfer.data.augment import EXAMPLE
from hf_transfer.data.images import undecoded
from hf_transfer.data.labels import LABELS, MULTI_LABEL
from hf_transfer.errors import UserError, one_line
from hf_transfer.features import FrozenFeatures
from hf_transfer.features.layouts import MEAN
from hf_transfer.files import say
from hf_transfer.layers.architectures import HEAD
from hf_transfer.run_folder import ERRORS
from hf_transfer.runs.frozen_pass import frozen_pass
from hf_transfer.runs.label_issues import MOST
from hf_transfer.runs.prepare import Prepared
from hf_transfer.training.trainer import TransferTrainer

KEY = "nearest_training_examples"  # column of errors.csv, and entry of results.json
COUNT = 3
_BETWEEN = "; "


@dataclass(frozen=True)
class Nearest:
    """What `errors.csv` says of similar training examples, or why it does not.

    Attributes:
        split: that was compared with the training examples.
        layer: whose features were compared: the mean of its output, or the input of the head.
        found: None if nothing was compared.
        reason: why not, as part of a sentence.
    """

    split: str = ""
    layer: str = ""
    found: Neighbors | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For `results.json`."""
        return {"skipped": self.reason} if self.found is None else {"layer": self.layer, "count": COUNT}

    def cells(self, prepared: Prepared, positions: Sequence[int]) -> list[str]:
        """For each of some examples of the split, places of its neighbors with their labels and the cosines.

        Args:
            prepared: data of the run.
            positions: in the split.
        """
        if self.found is None or not len(positions):
            return []
        rows, cosines = self.found.rows[positions], self.found.cosines[positions]
        places, labels = self.named(prepared, positions)
        return [
            _BETWEEN.join(f"{places[row]} ({labels[row]}, {cosine:.2f})" for row, cosine in zip(own, near, strict=True))
            for own, near in zip(rows.tolist(), cosines.tolist(), strict=True)
        ]

    def named(self, prepared: Prepared, positions: Sequence[int]) -> tuple[dict[int, str], dict[int, str]]:
        """(places, labels) of the neighbors of some examples, by position in the training split.

        Args:
            prepared: data of the run.
            positions: in the split.
        """
        assert self.found is not None
        return _named(prepared, sorted(set(self.found.rows[positions].flatten().tolist())))


def _named(prepared: Prepared, rows: Sequence[int]) -> tuple[dict[int, str], dict[int, str]]:
    """The path of an image, or the place, of training examples; and their labels."""
    data, train = prepared.data, prepared.data.train.select(rows)
    names, first = data.labels.names, undecoded(train, data.inputs)[data.inputs[0]][:]
    places = data.places("train", rows)
    paths = [value.get("path") if isinstance(value, dict) else None for value in first]
    is_multi = data.labels.problem_type == MULTI_LABEL

    def label_of(label: Any) -> str:
        return json.dumps([n for n, has in zip(names, label, strict=True) if has]) if is_multi else names[label]

    labels = [label_of(label) for label in train[LABELS][:]]
    found = {row: path or place for row, path, place in zip(rows, paths, places, strict=True)}
    return found, dict(zip(rows, labels, strict=True))


def neighbors_of(
    prepared: Prepared, trainer: TransferTrainer, issues: Mapping[str, Any] | None, talks: bool
) -> Nearest:
    """The nearest training examples of what the run will be measured on; called by all processes, before training.

    Args:
        prepared: the run, with the frozen features of its examples if there are any.
        trainer: made for it, before its first step.
        issues: what was found out about its labels, from the same features.
        talks: whether the run says why there are none.
    """
    split = prepared.measured
    if prepared.frozen is None:
        reason = "label_issues is false, which computes the features" if issues is None else "the run was resumed"
        found = Nearest(reason=str((issues or {}).get("skipped", reason)).rstrip("."))
        is_said = issues is not None
    else:
        found, is_said = _compared(prepared, trainer, prepared.frozen, split), True
    if found.found is None and is_said and talks and trainer.is_world_process_zero():
        say(f"{ERRORS}: the nearest training examples are left out, because {found.reason}.")
    return found


def _compared(prepared: Prepared, trainer: TransferTrainer, known: FrozenFeatures, split: str) -> Nearest:
    data, count = prepared.data, len(prepared.data.train)
    layer = next((name for name in reversed(known.groups) if name != HEAD), HEAD)
    x = known.matrix(layer, None if layer == HEAD else MEAN)
    if split == "validation" and len(x) > count:  # drawn from the training data, and looked at with it
        return Nearest(split, layer, nearest_of(x[:count], x[count:], COUNT))
    if len(data.splits[split]) > MOST:
        return Nearest(reason=f"the {split} split has more than {MOST:,} examples")
    own = data.splits[split]
    dataset = prepared.task.prepare(
        own.remove_columns([column for column in (EXAMPLE,) if column in own.column_names]),
        prepared.inputs,
        prepared.processor,
        prepared.config.data,
    )
    autocast = torch.bfloat16 if trainer.args.bf16 else None
    try:
        others = frozen_pass(
            prepared,
            trainer.model,
            trainer.layer_groups,
            dataset,
            layers=[layer],
            poolings=None if layer == HEAD else [MEAN],
            autocast=autocast,
        )
    except UserError as error:
        return Nearest(reason=f"the {split} split has no features: {one_line(error)}".rstrip("."))
    return Nearest(split, layer, nearest_of(x[:count], others.matrix(layer, None if layer == HEAD else MEAN), COUNT))
