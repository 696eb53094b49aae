"""The table of a comparison: rows with means, intervals, cost and paired differences; as text, Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_transfer.evaluation.metric_table import LOSS, METRIC_TABLE
from hf_transfer.hub.card_markdown import escape
from hf_transfer.hub.card_markdown import table as markdown_table
from hf_transfer.studies.grid import Row, shown
from hf_transfer.studies.history import by_epoch, last_training_loss
from hf_transfer.studies.running import Outcome
from hf_transfer.studies.statistics import Summary, holm, paired, summary
from hf_transfer.studies.transfer import UNKNOWN, Verdict
from hf_transfer.training.pace import exactly

_HEAD = (
    "",
    "row",
    "{metric}",
    "95% CI",
    "minus first",
    "95% CI",
    "p",
    "p (Holm)",
    "gap",
    "training",
    "trained",
    "cost",
)
_SMALL = 1e-3  # a share of which two decimals of a percentage say little
# Columns of `Line.flat` whose values may not be known.
NUMBERS = (
    "mean",
    "low",
    "high",
    "difference",
    "difference_low",
    "difference_high",
    "p",
    "p_holm",
    "train_seconds",
    "trainable_share",
    "training_loss",
    "gap",
    "device_hours",
    "usd",
)


@dataclass
class Line:
    """A row with what its runs came to.

    Attributes:
        row: the combination of values.
        metric: that decides, on the validation split.
        outcomes: of its seeds.
        usd_per_hour: of a device, where the runs do not know it; None if nobody does.
        difference: to the first row, paired by seed; None of the first row, and without common seeds.
        p_holm: p-value of the difference, adjusted for all rows.
        verdicts: whether pretraining helped.
        is_chosen: whether it is the best on validation.
    """

    row: Row
    metric: str
    outcomes: Sequence[Outcome]
    usd_per_hour: float | None = None
    difference: Summary | None = None
    p_holm: float | None = None
    verdicts: list[Verdict] = field(default_factory=list)
    is_chosen: bool = False

    @property
    def values(self) -> dict[int, float]:
        """The metric by seed."""
        found = {one.cell.seed: one.value(self.metric) for one in self.outcomes}
        return {seed: value for seed, value in found.items() if value is not None}

    @property
    def summary(self) -> Summary | None:
        return summary(list(self.values.values()))

    @property
    def stopped(self) -> str:
        """Why a search has stopped it; empty if none has."""
        return next((one.stopped for one in self.outcomes if one.stopped), "")

    @property
    def failures(self) -> dict[int, str]:
        """Why a seed has no value, by seed; a stopped run has not failed."""
        missing = [one for one in self.outcomes if one.cell.seed not in self.values and not one.stopped]
        return {one.cell.seed: one.why_not or _no_value(one, self.metric) for one in missing}

    def mean(self, *path: str) -> float | None:
        """The mean of a number in `results.json` over the seeds; None if no run has it."""
        found = [_at(one.results, path) for one in self.outcomes if one.results is not None]
        known = [float(value) for value in found if value is not None]
        return sum(known) / len(known) if known else None

    @property
    def share(self) -> float | None:
        """Trained parameters of all."""
        trained, total = self.mean("trainable_parameters"), self.mean("total_parameters")
        return None if trained is None or not total else trained / total

    @property
    def training_loss(self) -> float | None:
        """Mean training loss of the last epoch."""
        found = [last_training_loss(one.cell.folder) for one in self.outcomes if one.results is not None]
        known = [value for value in found if value is not None]
        return sum(known) / len(known) if known and len(known) == len(found) else None

    @property
    def gap(self) -> float | None:
        """How far the loss on validation lies above that of training: over-fitting, where it is large."""
        trained, held_out = self.training_loss, self.mean("validation_metrics", LOSS)
        return None if trained is None or held_out is None else held_out - trained

    @property
    def curve(self) -> dict[int, float]:
        """The metric after each epoch: the mean of the seeds that have evaluated then, all of them."""
        of_seeds = [by_epoch(one.cell.folder, self.metric) for one in self.outcomes]
        common = set.intersection(*map(set, of_seeds)) if of_seeds else set()
        return {epoch: sum(one[epoch] for one in of_seeds) / len(of_seeds) for epoch in sorted(common)}

    @property
    def usd(self) -> float | None:
        """Dollars of a run."""
        paid, hours = self.mean("cost", "usd"), self.mean("cost", "device_hours")
        if paid is None and hours is not None and self.usd_per_hour is not None:
            return hours * self.usd_per_hour
        return paid

    def to_dict(self) -> dict[str, Any]:
        """For JSON, and a line of the frame."""
        found = self.summary
        return {
            "row": self.row.name,
            "settings": dict(self.row.settings),
            "metric": self.metric,
            "mean": found and found.mean,
            "interval": found and found.interval,
            "values": {str(seed): value for seed, value in self.values.items()},
            "train_seconds": self.mean("train_seconds"),
            "trainable_share": self.share,
            "training_loss": self.training_loss,
            "gap": self.gap,
            "by_epoch": {str(epoch): value for epoch, value in self.curve.items()},
            "device_hours": self.mean("cost", "device_hours"),
            "usd": self.usd,
            "difference": self.difference and self.difference.to_dict(),
            "p_holm": self.p_holm,
            "is_chosen": self.is_chosen,
            "stopped": self.stopped,
            "transfer": [one.to_dict() for one in self.verdicts],
            "failures": {str(seed): why for seed, why in self.failures.items()},
            "cells": {str(one.cell.seed): one.cell.key for one in self.outcomes},
        }

    def flat(self) -> dict[str, Any]:
        """One value per column: a line of the frame and of the CSV."""
        whole = self.to_dict()
        low, high = whole["interval"] or (None, None)
        difference = whole["difference"] or {}
        below, above = difference.get("interval") or (None, None)
        return {
            "row": whole["row"],
            **{
                key: value if isinstance(value, int | float | str) else shown(value)
                for key, value in self.row.settings.items()
            },
            "metric": self.metric,
            "seeds": len(self.values),
            "mean": whole["mean"],
            "low": low,
            "high": high,
            "difference": difference.get("mean"),
            "difference_low": below,
            "difference_high": above,
            "p": difference.get("p"),
            "p_holm": self.p_holm,
            "train_seconds": whole["train_seconds"],
            "trainable_share": whole["trainable_share"],
            "training_loss": whole["training_loss"],
            "gap": whole["gap"],
            "device_hours": whole["device_hours"],
            "usd": whole["usd"],
            "is_chosen": self.is_chosen,
            **{f"against_{one.against}": one.verdict for one in self.verdicts},
            **({"stopped": self.stopped} if self.stopped else {}),
            "failed": "; ".join(f"seed {seed}: {why}" for seed, why in self.failures.items()),
        }


def compared(lines: Sequence[Line]) -> None:
    """Fill in differences to the first row, their adjusted p-values, and which row is chosen.

    The best mean on validation is chosen, among the rows of which every seed has ended, if there are any.
    """
    first = lines[0].values
    for line in lines[1:]:
        line.difference = paired(line.values, first)
    tested = [line for line in lines if line.difference is not None and line.difference.p is not None]
    for line, p in zip(tested, holm([line.difference.p for line in tested]), strict=True):  # type: ignore[union-attr, misc]
        line.p_holm = p
    with_values = [line for line in lines if line.values and not line.stopped]
    whole = [line for line in with_values if not line.failures] or with_values
    if whole:
        sign = 1 if METRIC_TABLE[lines[0].metric].greater_is_better else -1
        best = max(whole, key=lambda line: sign * line.summary.mean)  # type: ignore[union-attr]
        best.is_chosen = True


# ---- as text ----


def as_text(lines: Sequence[Line]) -> list[str]:
    """For a terminal."""
    head, rows = _cells(lines)
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return ["  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]


def as_markdown(lines: Sequence[Line]) -> list[str]:
    head, rows = _cells(lines)
    return markdown_table(head, [tuple(escape(cell) for cell in row) for row in rows])


def as_csv(lines: Sequence[Line]) -> str:
    """One line per row; an empty cell is not known."""
    flat = [line.flat() for line in lines]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return file.getvalue()


def _cells(lines: Sequence[Line]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(head, a row of texts for each line); columns in which nothing stands are left out."""
    head = [name.format(metric=lines[0].metric) for name in _HEAD]
    rows = [_row(line) for line in lines]
    kept = [i for i in range(len(head)) if i < 3 or any(row[i] for row in rows)]
    return tuple(head[i] for i in kept), [tuple(row[i] for i in kept) for row in rows]


def _row(line: Line) -> tuple[str, ...]:
    found, difference, share, seconds = line.summary, line.difference, line.share, line.mean("train_seconds")
    return (
        "*" if line.is_chosen else "",
        line.row.name,
        ("stopped" if line.stopped else "failed") if found is None else f"{found.mean:.4f}",
        _interval(found),
        "" if difference is None else f"{difference.mean:+.4f}",
        _interval(difference, "+"),
        "" if difference is None or difference.p is None else f"{difference.p:.3g}",
        "" if line.p_holm is None else f"{line.p_holm:.3g}",
        "" if line.gap is None else f"{line.gap:+.3f}",
        "" if seconds is None else exactly(seconds),
        "" if share is None else f"{share:.2%}" if share >= _SMALL else f"{100 * share:.2g}%",
        "" if line.usd is None else f"${line.usd:.3g}",
    )


def _interval(found: Summary | None, sign: str = "") -> str:
    if found is None or found.interval is None:
        return ""
    low, high = found.interval
    return f"{low:{sign}.4f} to {high:{sign}.4f}"


def notes(lines: Sequence[Line], seeds: Sequence[int], draws: bool) -> list[str]:
    """What to know to read the table.

    Args:
        lines: of it.
        seeds: of the comparison.
        draws: whether every seed draws its own validation split or examples.
    """
    said = ["Means of the validation split; * is the best. Costs are those of a run, of training alone."]
    if any(line.gap is not None for line in lines):
        said.append(
            "gap: the loss on validation minus the training loss of the last epoch, dropout and augmentation included: "
            "over-fitting where it is large."
        )
    if len(seeds) == 1:
        said.append(
            "One seed: no intervals and no tests, since nothing says how much the metric varies. Give several seeds."
        )
        return said
    said.append(
        f"95% intervals are Student's t over the {len(seeds)} seeds; differences are paired by seed. They say how "
        "results vary from seed to seed, not how another sample of held-out examples would."
    )
    if any(line.summary is not None and line.summary.interval is None for line in lines):
        said.append("No interval stands where fewer than two seeds have a result, or all have the same.")
    if sum(line.p_holm is not None for line in lines) > 1:
        said.append(
            f"{len(lines) - 1} rows are compared with the first: read p (Holm), which is adjusted for their number. "
            "The best of several rows is somewhat optimistic on validation."
        )
    said.append(
        "What is drawn from the data (a validation split that is not given, max_train_samples) differs by seed; with "
        "data_seed it would not."
        if draws
        else "All seeds draw the same from the data (data_seed is given)."
    )
    return said


def notes_of_search(lines: Sequence[Line]) -> list[str]:
    """What to know to read the table of a search."""
    stopped = sum(bool(line.stopped) for line in lines)
    said = ["The best of many trials is optimistic on validation; the test split, where there is one, is not."]
    if stopped:
        said.insert(
            0,
            f"{stopped} of {len(lines)} rows were stopped early, since their first seed was worse than the median of "
            "the trials before.",
        )
    return said


def _no_value(outcome: Outcome, metric: str) -> str:
    return UNKNOWN if outcome.results is None else f"{metric} is not a number: training diverged, or it is undefined"


def _at(results: Mapping[str, Any] | None, path: Sequence[str]) -> Any:
    found: Any = results
    for name in path:
        found = (found or {}).get(name)
    return found
