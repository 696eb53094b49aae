"""Out-of-distribution scores of a trained model: what its run trained on, and data from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.draws import draw
from hf_transfer.data.labels import LABELS
from hf_transfer.errors import UserError
from hf_transfer.evaluation.out_of_distribution import FEWEST, Reference, classes_of, scores_of, separation
from hf_transfer.evaluation.scores import Array
from hf_transfer.inference.answering import Answering
from hf_transfer.inference.held_out import Selection

MOST_TRAINING = 5_000  # training examples that inputs are compared with
KEY = "ood_data"


@dataclass
class Outsiders:
    """Scores inputs by how unlike they are to what a model was trained on.

    Attributes:
        model: whose logits and features are read.
        reference: the training examples that it compares with; None if they are not known.
        compared: number of them.
        reason: why not, as a sentence.
    """

    model: Answering
    reference: Reference | None = None
    compared: int = 0
    reason: str = ""
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: Answering, training: Any) -> Outsiders:
        """Of a model and its training examples, which are read again.

        Args:
            model: that answers.
            training: a function that returns (the training examples, windows of them as `window_logits` takes them).
        """
        kind = model.labels.problem_type
        try:
            examples, parts = training()
            vectors = [model.window_logits(part, features=True)[1] for part in parts(examples)]
            features, labels = np.concatenate(vectors), np.array(examples[LABELS][:])
            if len(features) < FEWEST:
                raise UserError(f"The run trained on {len(features)} examples.")
        except UserError as error:
            reason = f"Distances to the training examples are left out. {error.message}"
            return cls(model, reason=reason, notes=[reason])
        return cls(model, Reference.of(features, classes_of(kind, labels)), len(features))

    def scores(self, parts: Iterable[list[tuple[Any, ...]]]) -> dict[str, Array]:
        """(inputs,) values of each score, of windows as `window_logits` takes them; empty without any input."""
        with_features = self.reference is not None
        answers = [self.model.window_logits(part, features=with_features) for part in parts if part]
        if not answers:
            return {}
        logits = np.concatenate([logits for logits, _ in answers])
        features = np.concatenate([vectors for _, vectors in answers]) if with_features else None
        return scores_of(self.model.labels.problem_type, logits, features, self.reference)


def sample(examples: Dataset, model: Answering) -> Dataset:
    """The training examples that inputs are compared with: at most `MOST_TRAINING`, drawn by class."""
    if len(examples) <= MOST_TRAINING:
        return examples
    return draw(examples, MOST_TRAINING, model.labels, model.seed).sample


def read_outside(
    model: Answering, args: DataArguments, most: int | None
) -> tuple[str, Dataset, tuple[str, ...], list[str]]:
    """(split, examples, input columns, notes) of data from elsewhere.

    Args:
        model: that reads it.
        args: where it is.
        most: only so many examples, drawn at random; None for all.

    Raises:
        UserError: there is no such data, or it is of another kind than the model reads.
    """
    selection = Selection(model.task, model.labels, args, model.seed, None, False)
    try:
        split, examples, inputs = selection.unlabeled()
    except UserError as error:
        own = error.key in ("", "dataset_name", "test_file", KEY)
        raise UserError(error.problem if own else error.message, error.fix, key=KEY) from error
    if most is not None and most < len(examples):
        rows = np.random.default_rng(model.seed).choice(len(examples), most, replace=False)
        examples = examples.select(np.sort(rows))
    return split, examples, inputs, [f"{KEY}: {note}" for note in selection.notes]


def separations(inside: dict[str, Array], outside: dict[str, Array], seed: int) -> dict[str, Any]:
    """`separation` of each score."""
    return {name: separation(inside[name], outside[name], seed) for name in inside}
