"""Numbers as a report writes them."""

from __future__ import annotations

from typing import Any

NOTHING = "–"


def number(value: Any, form: str = ".4f") -> str:
    """A number; a dash for None, which `results.json` has for NaN and infinity."""
    return format(value, form) if isinstance(value, int | float) else NOTHING


def count(value: Any) -> str:
    """A whole number with separators."""
    return number(value, ",.0f")


def percent(value: Any) -> str:
    return number(value, ".1%")


def interval(bounds: Any) -> str:
    """A 95% confidence interval; empty without one."""
    return f"{number(bounds[0])} to {number(bounds[1])}" if bounds else ""


def seconds(value: Any) -> str:
    """A time, in seconds, minutes or hours."""
    if not isinstance(value, int | float):
        return NOTHING
    if value < 100:
        return f"{value:.3g} s"
    return f"{value / 60:.1f} min" if value < 6000 else f"{value / 3600:.1f} h"


def size(value: Any) -> str:
    """Bytes, in powers of 1000."""
    if not isinstance(value, int | float):
        return NOTHING
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def rates(values: Any) -> str:
    """Learning rates: one, or the lowest and the highest of several."""
    known = sorted({v for v in values if v})
    if not known:
        return NOTHING
    return f"{known[0]:.2g}" if known[0] == known[-1] else f"{known[0]:.2g} to {known[-1]:.2g}"


def plural(amount: int, what: str) -> str:
    """`1 class`, `2 classes`."""
    ending = "es" if what.endswith("s") else "s"
    return f"{amount:,} {what}{'' if amount == 1 else ending}"
