"""Whether batches of similar length pay: what `length_bucketing: auto` decides.

The decision depends on the lengths and the size of a batch alone, so that it is the same in every run on the same data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from hf_transfer.config.arguments.bucketing import other_orders
from hf_transfer.data.bucketing import LengthSampler, lengths_of, padding
from hf_transfer.errors import UserError

MUCH = 0.10  # share of padding in random batches from which it pays to avoid it
_TEXT = "input_ids"
_SEED = 0  # of the orders that are compared: another seed of the run decides nothing else
_SAMPLE = 50_000  # examples that are compared: of more, the share of padding is the same


@dataclass(frozen=True)
class Choice:
    """Whether examples are put into batches by length.

    Attributes:
        on: whether they are.
        why: why not, as part of a sentence; empty if it is on, or off without a need to say so.
        random: share of padding in random batches; None where it was not measured.
        bucketed: share of padding in batches of similar length; None where it was not measured.
    """

    on: bool
    why: str = ""
    random: float | None = None
    bucketed: float | None = None

    @property
    def value(self) -> bool:
        """The value of `length_bucketing` that the run is repeated with."""
        return self.on

    def line(self) -> str:
        """For display; empty where there is nothing to say."""
        return f"length_bucketing: off: {self.why}" if self.why else ""

    def to_dict(self) -> dict[str, Any]:
        """For `results.json`."""
        return {"on": self.on, "why": self.why, "padding": self.bucketed, "padding_in_random_batches": self.random}


OFF = Choice(False)


def measure(lengths: torch.Tensor, size: int, processes: int = 1) -> tuple[float, float]:
    """Shares of padding in (random batches, batches of similar length).

    Args:
        lengths: (examples,) in tokens.
        size: batch size over all processes.
        processes: that share a batch; each pads its own part.
    """
    generator = torch.Generator().manual_seed(_SEED)
    sample = lengths[torch.randperm(len(lengths), generator=generator)[: max(_SAMPLE, 200 * size)]]
    batch, order = max(1, size // processes), LengthSampler(sample, size, _SEED).order()
    return padding(sample, torch.arange(len(sample)), batch), padding(sample, order, batch)


def choose(lengths: torch.Tensor, size: int, processes: int = 1) -> Choice:
    """On if random batches are at least a tenth padding, and batches of similar length avoid most of it.

    Args:
        lengths: (examples,) in tokens.
        size: batch size over all processes.
        processes: that share a batch.
    """
    random, bucketed = measure(lengths, size, processes)
    if random < MUCH:
        return Choice(False, f"only {random:.1%} of the tokens of random batches are padding", random, bucketed)
    if bucketed > random / 2:
        why = (
            f"{len(lengths):,} examples in batches of {size} are too few to form batches of similar length "
            f"({bucketed:.1%} padding instead of {random:.1%})"
        )
        return Choice(False, why, random, bucketed)
    return Choice(True, "", random, bucketed)


def choose_for(data: Any, keys: Mapping[str, Any], main_input: str, size: int, processes: int) -> Choice:
    """What `length_bucketing: auto` is for a training set.

    Args:
        data: training set.
        keys: the training keys, by name.
        main_input: name of the model's main input.
        size: batch size over all processes.
        processes: that share a batch.
    """
    is_text = main_input != "pixel_values"  # images have one size: there is nothing to say
    if isinstance(data, torch.utils.data.IterableDataset) or not hasattr(data, "__len__"):
        return Choice(False, "the lengths of a stream are not known in advance") if is_text else OFF
    if not is_text:
        return OFF
    if others := other_orders(keys):
        return Choice(False, f"{' and '.join(others)} decides the order of examples")
    if not _states_lengths(data, {keys["length_column_name"], _TEXT, main_input}):
        return Choice(False, "the examples would have to be read to know their lengths; true reads them")
    try:
        return choose(lengths_of(data, keys["length_column_name"], main_input), size, processes)
    except UserError as error:
        return Choice(False, error.message.removeprefix("length_bucketing: ").rstrip("."))


def stated_lengths(data: Any, column: str, main_input: str) -> torch.Tensor | None:
    """`lengths_of`, where they can be had without reading every example; None of images, and where they cannot."""
    if main_input == "pixel_values" or not _states_lengths(data, {column, _TEXT, main_input}):
        return None
    try:
        return lengths_of(data, column, main_input)
    except UserError:
        return None


def _states_lengths(data: Any, columns: set[str]) -> bool:
    """Whether lengths can be had without reading, and perhaps tokenizing, every example."""
    return isinstance(data, list | tuple) or (isinstance(data, Dataset) and bool(columns & set(data.column_names)))
