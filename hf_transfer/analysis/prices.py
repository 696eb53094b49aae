"""GPUs and what they cost: the table of this package, or one of the user's own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from hf_transfer.errors import UserError, UserErrors, closest, one_line, unknown_keys

PRICES = Path(__file__).parents[1] / "prices.yaml"
KEY, GPUS = "prices_file", "gpus"


@dataclass(frozen=True)
class Gpu:
    """A GPU that can be rented.

    Attributes:
        name: as the table has it.
        memory_gb: in GB.
        tflops: peak of dense half-precision matrix products, 10^12 operations per second.
        price: dollars per hour, on demand.
        spot: dollars per hour of a machine that may be taken away.
        bf16: whether it computes in bfloat16.
    """

    name: str
    memory_gb: float
    tflops: float
    price: float
    spot: float
    bf16: bool = True


@dataclass(frozen=True)
class Prices:
    """A table of GPUs.

    Attributes:
        date: from when it is.
        gpus: at least one.
    """

    date: str
    gpus: tuple[Gpu, ...]


def read_prices(path: str | None = None, names: Sequence[str] | None = None) -> Prices:
    """The GPUs of a table.

    Args:
        path: of a file like `prices.yaml`; None: that of this package.
        names: of the GPUs that are wanted; None: all.

    Raises:
        UserError: the file cannot be read or lacks something, or it has no GPU of a name.
    """
    file = PRICES if path is None else Path(path).expanduser()
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be read ({error.strerror}).", key=KEY) from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{str(file)!r} is not YAML ({one_line(error)}).", key=KEY) from error
    if not isinstance(values, dict) or not isinstance(values.get("gpus"), dict) or not values["gpus"]:
        raise UserError(
            f"{str(file)!r} needs `date` and `gpus`, a mapping of names to {', '.join(_NEEDED)}.",
            f"Copy {str(PRICES)!r} and change it.",
            key=KEY,
        )
    problems = ["`date` is missing: say from when the prices are."] if not values.get("date") else []
    problems += [problem for name, row in values["gpus"].items() for problem in _problems(str(name), row)]
    if problems:
        raise UserErrors(f"{KEY}: {str(file)!r}: {problem}" for problem in problems)
    gpus = {str(name): Gpu(str(name), **row) for name, row in values["gpus"].items()}
    return Prices(str(values["date"]), _chosen(gpus, names))


_NEEDED = tuple(f.name for f in fields(Gpu) if f.default is MISSING and f.name != "name")
_KNOWN = tuple(f.name for f in fields(Gpu) if f.name != "name")


def _problems(name: str, row: Any) -> Iterable[str]:
    """What is wrong about a GPU."""
    if not isinstance(row, dict):
        yield f"{name} is not a mapping of {', '.join(_NEEDED)}."
        return
    yield from (f"{name}: {problem}" for problem in unknown_keys(row, _KNOWN, "a GPU"))
    for field in _NEEDED:
        value = row.get(field)
        if field not in row:
            yield f"{name} has no {field}."
        elif isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            yield f"{name}: {field} must be a positive number, got {value!r}."
    if not isinstance(row.get("bf16", True), bool):
        yield f"{name}: bf16 must be true or false, got {row['bf16']!r}."


def _chosen(gpus: dict[str, Gpu], names: Sequence[str] | None) -> tuple[Gpu, ...]:
    """Those of these names, upper or lower case.

    Raises:
        UserError: there is no such GPU.
    """
    if not names:
        return tuple(gpus.values())
    plain = {name.lower(): gpu for name, gpu in gpus.items()}
    for name in names:
        if name.lower() not in plain:
            near = _near(name.lower(), plain)
            hint = f" Did you mean {' or '.join(repr(plain[one].name) for one in near)}?" if near else ""
            raise UserError(
                f"{name!r} is not in the price table.{hint}",
                f"It has {', '.join(gpus)}; prices_file names another table.",
                key=GPUS,
            )
    return tuple(plain[name] for name in dict.fromkeys(name.lower() for name in names))


def _near(name: str, names: Iterable[str]) -> list[str]:
    """Those that begin with a name (A100) or are in it (NVIDIA H100), else the most similar."""
    begun = [one for one in names if name and (one.startswith(name) or one in name)]
    return begun or [one for one in [closest(name, names)] if one]
