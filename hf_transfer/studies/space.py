"""What a search varies: a range of numbers or a list of choices for each key. Imports no torch and no optuna."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_transfer.config.arguments.adapter import with_adapter
from hf_transfer.config.arguments.plan import learning_rate_of
from hf_transfer.config.command_line import unknown
from hf_transfer.config.fields import Key, wrong_values
from hf_transfer.config.values import coerce
from hf_transfer.errors import UserError, UserErrors, nearest, option
from hf_transfer.keys import keys

TRIALS = 20
AUTO = "auto"
LOG, INT, CHOICES = "log", "int", "choices"
_FLAGS = (LOG, INT)
_FORMS = "[low, high], [low, high, log], [low, high, int] or a list of choices"
_DIGITS = 4  # of a drawn number: more say nothing, and make long names
# Keys that are the comparison's own, with what to do instead.
NOT_VARIED = {
    "seed": "give seeds, for example 0,1,2",
    "output_dir": "each cell has a folder of its own",
    "resume_from_checkpoint": "a comparison always goes on where it was interrupted",
    "overwrite_output_dir": "it is of the whole comparison",
    "push_to_hub": "push the best cell when the comparison has ended",
    "hub_model_id": "push the best cell when the comparison has ended",
}


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Attributes:
        low: smallest number.
        high: largest number.
        is_log: whether the logarithm is drawn evenly.
        is_int: whether numbers are whole.
    """

    low: float
    high: float
    is_log: bool = False
    is_int: bool = False

    @property
    def ends(self) -> tuple[Any, ...]:
        return self.low, self.high

    @property
    def count(self) -> float:
        """Number of values."""
        return self.high - self.low + 1 if self.is_int else math.inf

    def tidy(self, value: Any) -> Any:
        """A drawn value with few digits, within the range."""
        if self.is_int:
            return int(value)
        return min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)

    def __str__(self) -> str:
        kinds = [*(["whole numbers"] if self.is_int else []), *(["logarithmic"] if self.is_log else [])]
        return f"from {self.low:g} to {self.high:g}" + (f" ({', '.join(kinds)})" if kinds else "")


@dataclass(frozen=True)
class Choices:
    """Values without an order."""

    values: tuple[Any, ...]

    @property
    def ends(self) -> tuple[Any, ...]:
        return self.values

    @property
    def count(self) -> float:
        return len(self.values)

    def tidy(self, value: Any) -> Any:
        return value

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.values))}"


Space = dict[str, Range | Choices]


def read_space(search: Any, given: Mapping[str, Any]) -> Space:
    """What each key may be.

    Args:
        search: a mapping of keys to ranges or choices, or `auto`.
        given: keys that all trials have.

    Raises:
        UserErrors: every unknown key, wrong range and wrong value.
    """
    if search == AUTO:
        return automatic(given)
    if not isinstance(search, Mapping) or not search:
        raise UserError(
            f"expected a mapping of keys to ranges or choices, such as '{{learning_rate: [1e-5, 1e-3, log]}}', or "
            f"{AUTO}; got {search!r}.",
            key="search",
        )
    problems, read = list[str](), Space()
    for name, values in search.items():
        try:
            read[str(name)] = _dimension(str(name), values, given)
        except ValueError as error:
            problems.append(f"search: {error}")
    if problems:
        raise UserErrors(problems)
    return read


def _dimension(name: str, values: Any, given: Collection[str]) -> Range | Choices:
    """Raises:
    ValueError: with a sentence that says what was expected.
    """
    if name in NOT_VARIED:
        raise ValueError(f"{name} cannot vary: {NOT_VARIED[name]}.")
    if name not in keys():
        raise ValueError(unknown(name, keys()))
    if name in given:
        raise ValueError(f"{name} is given for all trials as well; keep one.")
    key = keys()[name]
    is_named = isinstance(values, Mapping)
    if is_named and set(values) == {CHOICES}:
        values = values[CHOICES]
    if not isinstance(values, list | tuple):
        raise ValueError(f"{name}: expected {_FORMS}, got {values!r}.")
    if not is_named and _is_range(values, key):
        return _range(name, values, key)
    if len(values) < 2:
        raise ValueError(f"{name} has {len(values) or 'no'} value, so it does not vary; give it as a key.")
    read = tuple(_value(name, value, key) for value in values)
    if len({repr(value) for value in read}) < len(read):
        raise ValueError(f"{name} names a value twice.")
    return Choices(read)


def _is_range(values: Sequence[Any], key: Key) -> bool:
    """Two numbers, alone or followed by words, for a key that takes numbers."""
    if not {int, float} & set(key.types) or len(values) < 2:
        return False
    return all(_is_number(v) for v in values[:2]) and not any(_is_number(v) for v in values[2:])


def _range(name: str, values: Sequence[Any], key: Key) -> Range:
    flags = [str(word) for word in values[2:]]
    for word in flags:
        if word not in _FLAGS:
            raise ValueError(
                f"{name}: expected {_FORMS}; {word!r} is not one of {', '.join(_FLAGS)}.{nearest(word, _FLAGS)} "
                f"Choices that look like a range are written {{choices: {list(values)}}}."
            )
    low, high = (_value(name, value, key) for value in values[:2])
    is_log, is_int = LOG in flags, INT in flags or float not in key.types
    if is_int and (low != int(low) or high != int(high)):
        raise ValueError(f"{name}: a range of whole numbers ends in whole numbers, got {values[0]} and {values[1]}.")
    if not low < high:
        raise ValueError(f"{name}: the low end must be below the high end, got {low:g} and {high:g}.")
    if is_log and low <= 0:
        raise ValueError(f"{name}: a logarithmic range begins above 0, got {low:g}.")
    convert = int if is_int else float
    return Range(convert(low), convert(high), is_log, is_int)


def _value(name: str, value: Any, key: Key) -> Any:
    try:
        read = coerce(value, key)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    for said in wrong_values({name: read}, {name: key.about}):
        raise ValueError(said)
    return read


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return False
        return True
    return isinstance(value, int | float) and not isinstance(value, bool)


def count_of(space: Space) -> float:
    """Number of combinations; infinite where numbers are not whole."""
    return math.prod(one.count for one in space.values())


def automatic(given: Mapping[str, Any]) -> Space:
    """The few keys that matter for the strategy, without those that are given.

    The learning rate is drawn around the strategy's default. It comes first in every study of what matters in
    fine-tuning; next to it stands the one key that says how far the strategy reaches.

    Args:
        given: keys that all trials have.

    Raises:
        UserError: there is no strategy, or nothing is left to search.
    """
    strategy, adapter = given.get("strategy"), str(given.get("adapter") or "none")
    if strategy in (None, AUTO) or given.get("stages"):
        raise UserError(
            "auto takes the keys that matter for a strategy, and none is given.",
            f"Give one, for example {option('strategy', 'full')}, or name the keys: "
            "'{learning_rate: [1e-5, 1e-3, log]}'.",
            key="search",
        )
    found: Space = {}
    is_solved = given.get("probe_solver") == "lbfgs"
    if not is_solved:
        middle = learning_rate_of(None, strategy, adapter)
        above = 100 if strategy in ("linear-probe", "scratch") else 10  # random weights take more than pretrained ones
        found["learning_rate"] = Range(middle / 10, middle * above, is_log=True)
    if with_adapter(strategy, adapter) == "lora":
        found["lora_r"] = Choices((4, 8, 16, 32))
    elif adapter == "none":
        found |= _REACH.get(str(strategy), {})
    found = {name: one for name, one in found.items() if name not in given}
    if not found:
        raise UserError(
            f"auto finds nothing to search for {option('strategy', strategy)}"
            + (": the head is solved for." if is_solved else ": what matters is given."),
            "Name the keys: '{weight_decay: [1e-4, 1e-1, log]}'.",
            key="search",
        )
    return found


# By strategy: how far it reaches into the model.
_REACH: dict[str, Space] = {
    "partial": {"unfrozen_groups": Choices((1, 2, 3, 4))},
    "two-phase": {"head_learning_rate": Range(1e-4, 1e-2, is_log=True)},
    "gradual": {"layer_lr_decay": Range(0.6, 1.0)},
    "full": {"layer_lr_decay": Range(0.6, 1.0)},
    "scratch": {"weight_decay": Range(0.0, 0.3)},
}
