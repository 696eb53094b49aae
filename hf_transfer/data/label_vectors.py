"""Labels given as 0/1 vectors with one entry per label, such as `[1, 0, 0]`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import datasets
from datasets import Dataset, Value

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.label_cells import is_missing
from hf_transfer.data.label_checks import check_shares
from hf_transfer.data.raw import RawSplits, replaced
from hf_transfer.errors import UserError, listed

_MAX_SHOWN = 5
_NUMBERS = ("int", "uint", "float", "double", "bool")
_TEXTS = ("string", "large_string")
_BITS = {0: 0, 1: 1, "0": 0, "1": 1}


def named_vectors(
    raw: RawSplits, column: str, args: DataArguments, known: Sequence[str], checkpoint: Callable[[], Sequence[str]]
) -> tuple[RawSplits, tuple[str, ...]]:
    """(the splits with lists of names in place of vectors, the name of each entry); no names if there are no vectors.

    The names are `label_vector_names`, else those of the model, else 0, 1, 2, … A vector that does not fit becomes an
    unknown label, itself, where such examples are left out or the labels are known.

    Args:
        raw: raw splits.
        column: the label column.
        args: data keys.
        known: the labels of a trained model; empty before training.
        checkpoint: the class names of the checkpoint that is going to be trained; empty if it has none.

    Raises:
        UserError: a vector has another length than the others, or another value than 0 and 1, or there are not as many
            `label_vector_names`.
    """
    size = _entries(raw.main, column, is_known=bool(known))
    if size is None and not args.label_vector_names:
        return raw, ()
    if size is None and not known:
        raise UserError(
            f"column {column!r} does not hold 0/1 vectors of one length, whose entries could be named.",
            "Remove label_vector_names: labels in other forms bring their names.",
            key="label_vector_names",
        )
    own = tuple(args.label_vector_names or known or checkpoint())
    names = own if args.label_vector_names or known or len(own) == size else tuple(map(str, range(size or 0)))
    if size not in (None, len(names)):
        raise UserError(
            f"column {column!r} holds vectors of {size} entries, and there are {len(names)} "
            f"{'label_vector_names' if args.label_vector_names else 'labels of the model'}.",
            "Give one name per entry.",
            key="label_vector_names" if args.label_vector_names else "label_column_name",
        )
    is_lenient = bool(known) or args.on_bad_example == "skip"
    return _converted(raw, column, names, is_lenient), names


def _holds(split: Dataset, column: str, kinds: tuple[str, ...]) -> bool:
    inner = getattr(split.features.get(column), "feature", None)
    return isinstance(inner, Value) and inner.dtype.startswith(kinds)


def _entries(split: Dataset, column: str, is_known: bool) -> int | None:
    """The number of entries of the vectors; None if the column holds no lists of numbers, or the numbers of labels.

    A list that repeats a number does not hold numbers of labels.

    Raises:
        UserError: the lists hold fractions.
    """
    if not _holds(split, column, _NUMBERS):
        return None
    lists = [v for v in split[column][:] if v is not None and None not in v]
    if not is_known:
        check_shares(column, lists)
    different = {tuple(v) for v in lists}
    binary = [v for v in different if len(v) > 1 and all(x in _BITS for x in v)]
    if not binary:
        return None
    if len(binary) == len(different) and len({len(v) for v in binary}) == 1:
        return len(binary[0])
    repeating = [v for v in binary if len(set(v)) < len(v)]
    return Counter(map(len, repeating)).most_common(1)[0][0] if len(repeating) >= len(different) / 2 else None


def _converted(raw: RawSplits, column: str, names: tuple[str, ...], is_lenient: bool) -> RawSplits:
    converted = {}
    for split_name, split in raw.items():
        if not _holds(split, column, (*_NUMBERS, *_TEXTS)):
            converted[split_name] = split
            continue
        are_names = _holds(split, column, _TEXTS)  # a file whose labels are written in another way than in training
        values = []
        for row, value in enumerate(split[column][:]):
            missing = is_missing(value) or None in value
            fits = missing or (len(value) == len(names) and all(x in _BITS for x in value))
            if not (fits or is_lenient):
                raise UserError(
                    f"{raw.place(split_name, row)}: the label {value} is not a vector of {len(names)} entries that are "
                    "0 or 1, like the others.",
                    "Correct it, or set on_bad_example: skip to leave such examples out.",
                    key="label_column_name",
                )
            if fits and not missing:
                value = [name for name, x in zip(names, value, strict=True) if _BITS[x]]
            is_kept = fits or (are_names and not (value and all(x.isdigit() for x in value)))
            values.append(None if missing else value if is_kept else [f"[{', '.join(map(str, value))}]"])
        converted[split_name] = replaced(split, column, values, datasets.List(Value("string")))
    raw = raw.but(converted)
    raw.notes.append(
        f"Column {column!r}: vectors of {len(names)} entries, which stand for {listed(names, _MAX_SHOWN)} "
        "(label_vector_names gives them other names)."
    )
    return raw
