"""The interface of a task. A new task is a subclass and one line in `tasks/__init__.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from datasets import Dataset

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.config.arguments.views import Views
from hf_transfer.data.augment import Chance
from hf_transfer.data.duplicates import Trace, content_hash
from hf_transfer.data.facts import Misfit, PixelFacts
from hf_transfer.data.labels import LABELS, Labels
from hf_transfer.data.splits import Data
from hf_transfer.errors import UserError
from hf_transfer.evaluation.corruptions import Corruption
from hf_transfer.models.load import Loaded


def spread(split: Dataset, size: int) -> Dataset:
    """At most `size` examples, evenly over a split."""
    return split.select(range(0, len(split), max(1, -(-len(split) // size))))


class Task(ABC):
    """Everything that depends on the kind of input: columns, model class, preprocessing and batching.

    Attributes:
        name: value of the key `task`.
        auto_class: transformers auto class that loads the saved model; empty if there is none.
        input_key: key that names the input column; empty if there is none.
        suffixes: extensions of files that hold a single input.
        mixes: whether two inputs can be blended, as mixup does.
        corruptions: what may happen to an input, by name, to measure how robust a model is; of `plain` inputs.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str] = ""
    input_key: ClassVar[str] = ""
    suffixes: ClassVar[frozenset[str]] = frozenset()
    mixes: ClassVar[bool] = False
    corruptions: ClassVar[Mapping[str, Corruption]] = {}

    @abstractmethod
    def input_columns(self, features: Mapping[str, Any], args: DataArguments) -> tuple[str, ...]:
        """Names of the input columns; empty if the data does not belong to this task.

        Raises:
            UserError: a named column does not exist or has the wrong type, or several columns are possible.
        """

    @abstractmethod
    def load(self, model_args: ModelArguments, data_args: DataArguments, labels: Labels) -> tuple[Loaded, Any]:
        """(the model with its head, the processor, i.e. tokenizer or image processor).

        If the checkpoint has the same labels in a different order, `config.id2label` keeps the checkpoint's order.

        Raises:
            UserError: the model or its processor cannot be loaded, or does not fit the keys.
        """

    def saved_processor(self, model_args: ModelArguments, data_args: DataArguments) -> tuple[Any, Any]:
        """(configuration, processor) of a saved model whose weights are elsewhere, in an exported file.

        Raises:
            UserError: they cannot be loaded, or the task has no exported models.
        """
        raise UserError(f"RUN: exported models of {self.name} are not supported.", "Use the run's own folder.")

    @abstractmethod
    def prepare(self, split: Dataset, inputs: tuple[str, ...], processor: Any, args: DataArguments) -> Dataset:
        """`split` with exactly the model inputs and `labels`, if it has any."""

    def prepare_training(
        self, split: Dataset, inputs: tuple[str, ...], processor: Any, args: DataArguments, chance: Chance
    ) -> Dataset:
        """`prepare` for the training split, with augmentation.

        Raises:
            UserError: the task does not support the requested augmentation.
        """
        return self.prepare(split, inputs, processor, args)

    def change(
        self, inputs: tuple[str, ...], processor: Any, args: DataArguments, chance: Chance
    ) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """A function from a batch of training rows to model inputs, with augmentation.

        It takes columns of lists: the inputs as returned by `read`, `labels` and `EXAMPLE`. It is picklable, because it
        is sent to data loader workers.
        """
        return partial(self._encoded, inputs, processor)

    def _encoded(self, inputs: tuple[str, ...], processor: Any, batch: dict[str, Any]) -> dict[str, Any]:
        return {**self.encode([batch[c] for c in inputs], processor), LABELS: batch[LABELS]}

    def read(self, value: Any) -> Any:
        """One raw input, such as a path, in the form that `encode` takes.

        Raises:
            ValueError: the input is unusable; the message says why.
        """
        return value

    def wrong(self, values: Sequence[Any]) -> str:
        """Why an example cannot be used, in training, evaluation and prediction alike; empty if it can.

        Args:
            values: what `read` returned for each input column.
        """
        return ""

    def trace(self, values: Sequence[Any]) -> Trace:
        """Hashes and sizes of an example, to find its duplicates; takes one value per input column.

        Raises:
            ValueError: the example is unusable; the message says why.
        """
        read = [self.read(value) for value in values]
        if reason := self.wrong(read):
            raise ValueError(reason)
        return Trace(content_hash(*(repr(value).encode() for value in read)), None, {})

    def settle(self, data: Data, model: Any, processor: Any, args: DataArguments) -> PixelFacts | None:
        """Decide what preprocessing takes from the training split, and write it into the model's configuration.

        Returns:
            What was decided; None if nothing had to be.

        Raises:
            UserError: a key has a wrong value.
        """
        return None

    def clipped(self, split: Dataset, inputs: tuple[str, ...], processor: Any) -> dict[str, int]:
        """Number of examples of which preprocessing clips values, as an entry of an evaluation's results."""
        return {}

    def remarks(self, values: Sequence[Any], processor: Any) -> dict[str, Any]:
        """What an answer says beyond the prediction, for example that pixels were clipped; takes what `read` gave."""
        return {}

    def cut(self, sample: Dataset, inputs: tuple[str, ...], processor: Any) -> tuple[float, int] | None:
        """(fraction of the examples that are truncated, maximum length); None if nothing is ever truncated."""
        return None

    def misfits(self, split: Dataset, inputs: tuple[str, ...], model: Any, processor: Any) -> list[Misfit]:
        """What of the inputs the checkpoint was not made for, measured on a sample of the training split."""
        return []

    @abstractmethod
    def encode(self, columns: Sequence[Sequence[Any]], processor: Any) -> Mapping[str, Any]:
        """Model inputs by name for a batch: one sequence of inputs per input column."""

    def look(
        self, columns: Sequence[Sequence[Any]], processor: Any, views: Views, args: DataArguments
    ) -> tuple[Mapping[str, Any], list[int]]:
        """(model inputs with one row per view, index of the input that each row belongs to).

        Raises:
            UserError: the task does not support the requested views.
        """
        if views.several:
            raise UserError(f"tta, stride: not supported for {self.name}.", "Remove tta and stride.")
        return self.encode(columns, processor), list(range(len(columns[0])))

    def plain(self, values: Sequence[Any], processor: Any) -> tuple[Any, ...]:
        """An example, as `read` gave it, in the form that `corruptions` take."""
        return tuple(values)

    def preprocessing(self, processor: Any) -> dict[str, Any]:
        """How inputs are prepared, in words and numbers, for the metadata of an exported model."""
        return {}

    def made_up(self, processor: Any, count: int) -> list[tuple[Any, ...]]:
        """Inputs of different sizes, one value each, to compare models on where no data is known.

        Raises:
            UserError: the task has none.
        """
        raise UserError(f"dataset_name: it is missing, and {self.name} has no inputs of its own to try.")

    @abstractmethod
    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """The function that collates prepared examples into a batch."""
