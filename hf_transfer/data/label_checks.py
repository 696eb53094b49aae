"""What cannot be learnt from labels, told before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_transfer.data.label_cells import name_of
from hf_transfer.errors import UserError, named, option, shortened

_OWN_CLASS, _FEW_EXAMPLES = 0.8, 20  # from this share of classes to examples on, and this many examples, they are none


def check_classes(column: str, values: Sequence[Any], names: Sequence[str], checked: bool) -> None:
    """Check that there is something to learn.

    Args:
        column: name of the label column, for messages.
        values: labels of the training split.
        names: the classes.
        checked: whether the user, or the data's own feature, says that these are classes.

    Raises:
        UserError: fewer than two classes occur, one is -100, or nearly every example has a class of its own.
    """
    different = {tuple(v) if isinstance(v, list) else v for v in values}
    if len(names) < 2 or len(different) < 2:
        only = named(names) if len(names) < 2 else _shown(values[0], names)
        raise UserError(
            f"Column {column!r} has only one class ({only}) in the training split; classification needs at least two."
        )
    if "-100" in names:
        raise UserError(
            f"column {column!r} contains the label -100, which stands for `no label` in PyTorch and is never trained.",
            "Remove these examples, or give the class another name.",
        )
    few = len(different) < _OWN_CLASS * len(values) or len(values) < _FEW_EXAMPLES
    if not checked and not few and not any(isinstance(v, list) for v in values):
        raise _own_classes(column, values, len(different))


def _own_classes(column: str, values: Sequence[Any], different: int) -> UserError:
    """The error for a column in which nearly every example has a class of its own."""
    numbers = f"{option('problem_type', 'regression')} predicts them as numbers, "
    numeric = numbers if all(isinstance(v, int | float) for v in values) else ""
    shown = ", ".join(repr(shortened(name_of(v), 40)) for v in values[:3])
    return UserError(
        f"column {column!r} has {different:,} different values in {len(values):,} rows, such as {shown}: nearly every "
        "row would be a class of its own.",
        f"Name the column with the classes with {option('label_column_name')}; {numeric}"
        f"{option('problem_type', 'single_label_classification')} takes them as classes all the same.",
        key="label_column_name",
    )


def check_shares(column: str, values: Sequence[Any]) -> None:
    """Raises:
    UserError: the lists, or the objects with named values, hold fractions, such as the probability of each class.
    """
    numbers = (v.values() if isinstance(v, dict) else v for v in values)
    if any(isinstance(x, float) and not x.is_integer() for row in numbers for x in row):
        raise soft_labels(column, values[0])


def soft_labels(column: str, value: Any) -> UserError:
    """The error for a column that holds a probability per class."""
    return UserError(
        f"column {column!r} holds fractions for several classes, such as {value}: soft labels, neither one class nor "
        "several.",
        "Training on soft labels is not supported; write the most probable class into the column.",
        key="label_column_name",
    )


def _shown(value: Any, names: Sequence[str]) -> str:
    values = value if isinstance(value, list) else [value]
    return (
        ", ".join(shortened(names[v]) if isinstance(v, int) and 0 <= v < len(names) else shortened(v) for v in values)
        or "none"
    )
