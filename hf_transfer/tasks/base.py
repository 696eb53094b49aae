"""The contract of a task. A new one is a class with these methods and one line in `tasks/__init__.py`."""

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
from hf_transfer.data.labels import LABELS, Labels
from hf_transfer.errors import UserError
from hf_transfer.models.load import Loaded


class Task(ABC):
    """What differs between one kind of input and another; everything else reads the Plan and the layer groups.

    Attributes:
        name: the value of the key `task`.
        auto_class: transformers' class that loads what a run saves; empty where there is none.
        input_key: the key that names the input column; empty where no key does.
        suffixes: of the files that are one input each.
        mixes: whether two inputs can be blended into one, as mixup does.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str] = ""
    input_key: ClassVar[str] = ""
    suffixes: ClassVar[frozenset[str]] = frozenset()
    mixes: ClassVar[bool] = False

    @abstractmethod
    def input_columns(self, features: Mapping[str, Any], args: DataArguments) -> tuple[str, ...]:
        """The columns that hold an example's input; empty where the data is not of this task.

        Raises:
            UserError: a column that was named is not there, or several could be meant.
        """

    @abstractmethod
    def load(self, model_args: ModelArguments, data_args: DataArguments, labels: Labels) -> tuple[Loaded, Any]:
        """(the model with its head, the processor: a tokenizer or an image processor).

        Where the checkpoint has the same labels in another order, the model's `config.id2label` keeps the checkpoint's.

        Raises:
            UserError: there is no such model.
        """

    @abstractmethod
    def prepare(self, split: Dataset, inputs: tuple[str, ...], processor: Any, args: DataArguments) -> Dataset:
        """`split` with exactly what the model reads, and `labels`."""

    def prepare_training(
        self, split: Dataset, inputs: tuple[str, ...], processor: Any, args: DataArguments, chance: Chance
    ) -> Dataset:
        """`prepare` for the training split, with the random changes that the keys ask for.

        Raises:
            UserError: a key asks for what this task cannot do.
        """
        return self.prepare(split, inputs, processor, args)

    def change(
        self, inputs: tuple[str, ...], processor: Any, args: DataArguments, chance: Chance
    ) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """The function from training rows (inputs as `read` gives them, `labels`, `EXAMPLE`) to what the model reads.

        With the random changes that the keys ask for; columns of a batch, each a list. It goes to the loader's workers,
        so it can be pickled.
        """
        return partial(self._encoded, inputs, processor)

    def _encoded(self, inputs: tuple[str, ...], processor: Any, batch: dict[str, Any]) -> dict[str, Any]:
        return {**self.encode([batch[c] for c in inputs], processor), LABELS: batch[LABELS]}

    def read(self, value: Any) -> Any:
        """One input as a user gives it, in the form that `encode` takes.

        Raises:
            ValueError: what is wrong with it.
        """
        return value

    def trace(self, values: Sequence[Any]) -> Trace:
        """What an example leaves behind, to find duplicates of it: see `data.duplicates`. One value per input column.

        Raises:
            ValueError: what is wrong with it: it cannot be used.
        """
        read = [self.read(value) for value in values]
        return Trace(content_hash(*(repr(value).encode() for value in read)), None, {})

    def cut(self, sample: Dataset, inputs: tuple[str, ...], processor: Any) -> tuple[float, int] | None:
        """(share of the examples of which the model does not read all, how much it reads); None where it reads all."""
        return None

    @abstractmethod
    def encode(self, columns: Sequence[Sequence[Any]], processor: Any) -> Mapping[str, Any]:
        """What the model reads, by name, for a batch of inputs: one sequence per input column."""

    def look(
        self, columns: Sequence[Sequence[Any]], processor: Any, views: Views, args: DataArguments
    ) -> tuple[Mapping[str, Any], list[int]]:
        """(what the model reads, one row per look; the input that each row is of): `encode`, where one look is enough.

        Raises:
            UserError: this task has no such looks.
        """
        if views.several:
            raise UserError(f"tta, stride: {self.name} looks at an input once.", "Leave them out.")
        return self.encode(columns, processor), list(range(len(columns[0])))

    @abstractmethod
    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """The function that makes a batch of prepared examples."""
