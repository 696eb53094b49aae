"""Whether pretraining helped: a row next to the same budget from random weights and from frozen features.

Negative transfer is a pretrained model that ends worse than one that was not (Wang et al. 2019, arXiv:1811.09751).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hf_transfer.config.arguments.adapter import AdapterArguments
from hf_transfer.config.arguments.forgetting import ForgettingArguments
from hf_transfer.config.arguments.plan import PlanArguments
from hf_transfer.config.arguments.probe import ProbeArguments
from hf_transfer.config.arguments.stopping import StoppingArguments
from hf_transfer.config.command_line import unknown
from hf_transfer.config.values import coerce
from hf_transfer.errors import UserErrors, nearest
from hf_transfer.evaluation.metric_table import METRIC_TABLE
from hf_transfer.files import write_json
from hf_transfer.hub import card
from hf_transfer.run_folder import RESULTS, read_results
from hf_transfer.settings import keys
from hf_transfer.studies.grid import Row
from hf_transfer.studies.space import NOT_VARIED
from hf_transfer.studies.statistics import Summary, paired

SCRATCH, PROBE = "scratch", "linear-probe"
FROM = {SCRATCH: "random weights", PROBE: "frozen features"}
HELPED, SAME, HURT, UNKNOWN = "helped", "no difference", "hurt", "not known"
KEY = "transfer"  # in `results.json`
# What a reference has in common with the row that it is about, as the run came to it.
BUDGET = ("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")
# How a model is transferred, which is what a reference does otherwise.
_OF_TRANSFER = (
    (
        {f.name for cls in (PlanArguments, AdapterArguments, ForgettingArguments, ProbeArguments) for f in fields(cls)}
        | {"from_scratch", "pooling", "pooling_layer", "effort", "contrastive_epochs"}
    )
    - {f.name for f in fields(StoppingArguments)}
    - {"layer_rules"}
)


@dataclass(frozen=True)
class Verdict:
    """A row compared with one of its references.

    Attributes:
        against: name of the reference.
        metric: that is compared, on the validation split.
        difference: row minus reference, by seed; None if no seed has both.
        reference: mean of the reference.
        learning_rate: of the reference.
        why_not: why there is no verdict; empty if there is one.
    """

    against: str
    metric: str
    difference: Summary | None = None
    reference: float | None = None
    learning_rate: float | None = None
    why_not: str = ""

    @property
    def verdict(self) -> str:
        if self.difference is None or self.difference.interval is None:
            return UNKNOWN
        low, high = self.difference.interval
        if not METRIC_TABLE[self.metric].greater_is_better:
            low, high = -high, -low
        return HELPED if low > 0 else HURT if high < 0 else SAME

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "against": self.against,
            "metric": self.metric,
            "verdict": self.verdict,
            "difference": self.difference and self.difference.to_dict(),
            "reference": self.reference,
            "learning_rate": self.learning_rate,
            "why_not": self.why_not,
        }

    def line(self, name: str) -> str:
        """For display: against what the row of this name was compared, and what came of it."""
        start = f"{name} against {FROM[self.against]} ({self.against})"
        if self.difference is None or self.difference.interval is None:
            return f"{start}: {self.verdict}: {self.why_not}."
        mean, (low, high) = self.difference.mean, self.difference.interval
        said = f"{self.metric} {mean:+.4f} (95% CI {low:+.4f} to {high:+.4f}, {self.difference.count} seeds)"
        return f"{start}: {self.verdict}: {said}."


def read_against(given: Sequence[str] | Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The references by name, each with keys of its own.

    Args:
        given: names, or a mapping of names to keys.

    Raises:
        UserErrors: there is no such reference or key, a value is wrong, or a reference is named twice.
    """
    named = (
        {name: own or {} for name, own in given.items()} if isinstance(given, Mapping) else {key: {} for key in given}
    )
    problems = ["against: a reference is named twice."] if len(named) < len(given) else []
    read: dict[str, dict[str, Any]] = {name: {} for name in named}
    for name, own in named.items():
        if name not in FROM:
            problems.append(f"against: {name!r} is not one of {', '.join(FROM)}.{nearest(str(name), FROM)}")
        elif not isinstance(own, Mapping):
            problems.append(f"against: {name}: expected a mapping of keys to values, got {own!r}.")
        else:
            found, said = _own_keys(own)
            read[name] = found
            problems += [f"against: {name}: {one}" for one in said]
    if problems:
        raise UserErrors(problems)
    return read


def _own_keys(own: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(values of a reference's own keys, problems)."""
    found, problems = dict[str, Any](), list[str]()
    for key, value in own.items():
        if key not in keys():
            problems.append(unknown(str(key), keys()))
        elif key in BUDGET or key in NOT_VARIED or key == "strategy":
            problems.append(f"{key} is that of the row, or of the reference itself; leave it out.")
        else:
            try:
                found[key] = coerce(value, keys()[key])
            except ValueError as error:
                problems.append(f"{key}: {error}")
    return found, problems


def reference_of(
    row: Row, kind: str, own: Mapping[str, Any] | None = None, budget: Mapping[str, Any] | None = None
) -> Row:
    """The reference of a row: the same model, data, loss, augmentation, schedule and length.

    Its learning rate is its own, by default its strategy's: one that suits pretrained weights may not suit random ones.

    Args:
        row: of the grid.
        kind: scratch or linear-probe.
        own: keys that the reference alone has.
        budget: keys of `BUDGET` that the row's run came to; None before it has run.
    """
    kept = {name: value for name, value in row.settings.items() if name not in (*_OF_TRANSFER, *(budget or ()))}
    settings = {**kept, **(own or {}), "strategy": kind, **(budget or {})}
    return Row(settings, of=f"{kind} ({row.name})", without=frozenset({*_OF_TRANSFER, *settings}))


def budget_in(folder: Path) -> dict[str, Any]:
    """What a finished run came to of the keys that say how long it trains."""
    values = read_results(folder)[1]
    return {name: values[name] for name in BUDGET}


def judge(
    kind: str,
    metric: str,
    values: Mapping[int, float],
    reference: Mapping[int, float],
    why_not: str = "",
    learning_rate: float | None = None,
) -> Verdict:
    """The verdict from the metrics of a row and of its reference, by seed.

    Args:
        kind: scratch or linear-probe.
        metric: that the values are of.
        values: of the row.
        reference: of the reference.
        why_not: what went wrong with either, if anything.
        learning_rate: of the reference.
    """
    difference = paired(dict(values), dict(reference))
    mean = sum(reference.values()) / len(reference) if reference else None
    if difference is None:
        return Verdict(kind, metric, None, mean, learning_rate, why_not or "no seed has both")
    if difference.interval is None:
        said = "one seed gives no interval" if difference.count == 1 else "all seeds have the same difference"
        return Verdict(kind, metric, difference, mean, learning_rate, f"{said} ({difference.mean:+.4f})")
    return Verdict(kind, metric, difference, mean, learning_rate)


def record(folder: Path, verdicts: Sequence[Verdict]) -> None:
    """Write the verdicts on a row into the results and the card of one of its runs."""
    results, _ = read_results(folder)
    found = [one.to_dict() for one in verdicts]
    if results.get(KEY) != found:
        write_json(folder / RESULTS, {**results, KEY: found})
        card.write(folder)


def learning_rate_in(folder: Path) -> float | None:
    """The learning rate of a finished run."""
    found = read_results(folder)[1]["learning_rate"]
    return None if found is None else float(found)


def is_itself(folder: Path, kind: str) -> bool:
    """Whether a finished run is what a reference would be."""
    results, values = read_results(folder)
    return results["strategy"] == kind or (kind == SCRATCH and bool(values.get("from_scratch")))
