"""What a label that was written as text means: a whole number, a decimal number, a list of labels, or a name.

A column is read in one way, decided from all of its cells; `Notation` is the decision. A cell is converted only where
nothing of what was written is lost: `01`, `1E2`, or `1.10` beside `1.1` are names.
"""

from __future__ import annotations

import ast
import datetime
import json
import math
import re
from collections import Counter
from collections.abc import Collection
from decimal import Decimal
from enum import Enum
from typing import Any

from hf_transfer.errors import UserError

_WHOLE = re.compile(r"0|-?[1-9]\d*")
_DECIMAL = re.compile(r"-?(0|[1-9]\d*)\.\d+")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?(inf|infinity|nan)", re.IGNORECASE)
_NOT_FINITE = re.compile(r"[-+]?(inf|infinity|nan)", re.IGNORECASE)
_COMMA = re.compile(r"-?\d+,\d+")
_THOUSANDS = re.compile(r"-?[1-9]\d{0,2}(,\d{3})+")
_UNITS = re.compile(r"(?P<before>[$€£¥]\s?)?(?P<number>-?\d+([.,]\d+)?)(?P<after>\s?[%€£¥$])?")
_DELIMITERS = ("|", ";", ",")
_VECTOR = re.compile(r"[01](?P<between>\s*[,;|\s]\s*)[01]((?P=between)[01])+")
_PART = r"(?:[^\s:=,;|]+\s*[:=]\s*)?(?:0?\.\d+|[01](?:\.0*)?|\d(?:\.\d+)?[eE]-\d+)"
_SHARES = re.compile(rf"{_PART}(?:\s*[,;|\s]\s*{_PART})+")
_NO_QUOTES = str.maketrans("", "", "\"'")
_FRACTION = re.compile(r"\.\d*[1-9]|[eE]-\d")
_MAX_INT = 2**63 - 1


class Notation(Enum):
    """How the labels of a column are written."""

    WHOLE = "whole numbers"
    DECIMAL = "decimal numbers"
    COMMA = "numbers with a decimal comma"
    UNIT = "numbers with a unit"
    LOOSE = "numbers that are not all written alike"
    NAMES = "names"


def is_missing(value: Any) -> bool:
    """Whether a cell holds no label: None, NaN, or nothing but spaces."""
    return value is None or value != value or (isinstance(value, str | bytes) and not value.strip())


def notation(texts: Collection[str]) -> Notation:
    """How the labels of a column, its distinct cells without the missing ones, are written.

    `nan` and `inf` among numbers are numbers, which are refused later; by themselves they are names.

    Raises:
        UserError: they are numbers with two readings (`1,234` may have a decimal comma or a thousands separator), or
            are written in several ways.
    """
    finite = [t for t in texts if not _NOT_FINITE.fullmatch(t)]
    if finite and all(_WHOLE.fullmatch(t) for t in finite):
        fits = all(abs(int(t)) <= _MAX_INT for t in finite)
        return Notation.NAMES if not fits else Notation.WHOLE if len(finite) == len(texts) else Notation.DECIMAL
    if finite and all(map(_as_python_prints, finite)):
        one_form = is_whole(finite) or not all(float(t).is_integer() for t in finite)
        return Notation.DECIMAL if one_form else Notation.LOOSE
    if finite and all(_DECIMAL.fullmatch(t) for t in finite):
        return Notation.DECIMAL if len({len(t.partition(".")[2]) for t in finite}) == 1 else Notation.LOOSE
    if all(_NUMBER.fullmatch(t) for t in texts):
        return Notation.LOOSE
    plain = [t for t in texts if not _WHOLE.fullmatch(t)]
    if all(_COMMA.fullmatch(t) for t in plain):
        if all(_THOUSANDS.fullmatch(t) for t in plain):
            raise UserError(
                f"the label {plain[0]!r} has two readings: {plain[0].replace(',', '.')} with a decimal comma, or "
                f"{plain[0].replace(',', '')} with a thousands separator.",
                "Write it without the comma, or set problem_type: single_label_classification if it is a name.",
                key="label_column_name",
            )
        return Notation.COMMA
    matched = [_UNITS.fullmatch(t) for t in texts]
    units = {(m["before"], m["after"]) if m else (None, None) for m in matched}
    if len(units) == 1 and units != {(None, None)}:
        return Notation.UNIT
    if all(number(t) is not None for t in texts):
        raise UserError(
            f"the labels are numbers in different notations, such as {', '.join(map(repr, sorted(texts)[:3]))}.",
            "Write all of them alike and without spaces, or set problem_type: single_label_classification if they are "
            "names.",
            key="label_column_name",
        )
    return Notation.NAMES


def is_whole(texts: Collection[str]) -> bool:
    """Whether all labels are whole numbers in one form: `1`, or `1.0` as tables with missing labels hold integers."""
    return all(_WHOLE.fullmatch(t) for t in texts) or all(
        _DECIMAL.fullmatch(t) and not t.partition(".")[2].strip("0") for t in texts
    )


def _as_python_prints(text: str) -> bool:
    if _WHOLE.fullmatch(text):
        return True
    return bool(_NUMBER.fullmatch(text)) and repr(float(text)) == text


def name_of(value: Any) -> str:
    """A label as the name of a class."""
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        return str(int(value))
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return str(value)


def number(value: Any) -> float | None:
    """A label as a number; None if it is none."""
    if isinstance(value, bool | int | float | Decimal):
        return float(value)
    if not isinstance(value, str):
        return None
    text = value.strip()
    if _NUMBER.fullmatch(text):
        return float(text)
    matched = _UNITS.fullmatch(text)
    return float(matched["number"].replace(",", ".")) if matched else None


def several(value: Any) -> list[Any] | None:
    """The labels of a list that was written into a cell, as Python, JSON or NumPy print it; None if it is no list.

    Three or more zeros and ones with something between them are a list too.
    """
    text = value.strip() if isinstance(value, str) else ""
    if _VECTOR.fullmatch(text):
        return [int(c) for c in text if c in "01"]
    if not (text.startswith(("[", "(", "{")) and text.endswith(("]", ")", "}"))):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            parsed = parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(parsed, list | tuple | set | frozenset):
            return sorted(parsed) if isinstance(parsed, set | frozenset) else list(parsed)
        return None
    words = text[1:-1].split()  # NumPy prints no commas
    if text[0] == "[" and words and all(_NUMBER.fullmatch(word) for word in words):
        return [float(w) if "." in w else int(w) for w in words]
    return None


def are_shares(texts: Collection[str]) -> bool:
    """Whether each cell gives a number between 0 and 1 for several labels, in any notation: `0.2 0.8`, `[0.2, 0.8]`,
    `{'pos': 0.2, 'neg': 0.8}`, `pos:0.2;neg:0.8`; and some of them are fractions."""
    plain = [text.strip().strip("[](){}").translate(_NO_QUOTES).strip() for text in texts]
    return any(map(_FRACTION.search, plain)) and all(map(_SHARES.fullmatch, plain))


def delimiter_of(texts: Collection[str]) -> str | None:
    """The character that seems to join several labels in the cells; None if there is none.

    It is one whose parts recur: most of the parts of joined cells also occur in another cell, alone or joined with
    other parts, so that the cells have fewer different parts than they are different themselves.
    """
    for delimiter in _DELIMITERS:
        joined = [t for t in texts if delimiter in t]
        if not joined:
            continue
        parts = Counter(p for t in texts for p in {part.strip() for part in t.split(delimiter)} if p)
        inside = {p.strip() for t in joined for p in t.split(delimiter)} - {""}
        recurring = sum(parts[p] > 1 for p in inside)
        if len(parts) < len(texts) + (len(joined) == len(texts)) and recurring > len(inside) / 2:
            return delimiter
    return None
