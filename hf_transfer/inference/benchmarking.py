"""How large, quick and accurate the forms of a trained model are on this machine.

Forms take turns, so that whatever else the machine does slows all of them. What is timed is the model alone, on encoded
real inputs: reading and encoding cost every form the same.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_transfer.config.arguments.export import FORMS, MAX_DROP, PACKAGES, TORCH, ExportArguments, check_installed
from hf_transfer.errors import UserError, WorkFailed
from hf_transfer.evaluation.metric_table import LEADING
from hf_transfer.inference.exporting import MADE_UP, Exporter
from hf_transfer.inference.predictor import Predictor
from hf_transfer.run_folder import EXPORT

_WARM_UP = 2  # passes that are not timed
_FEWEST = 5  # passes that are

Batches = list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Form:
    """A form of the model, loaded.

    Attributes:
        name: for display.
        predictor: that answers with it.
        nbytes: of its model's files.
        note: what is to be said of it.
    """

    name: str
    predictor: Predictor
    nbytes: int
    note: str = ""


@dataclass(frozen=True)
class Row:
    """What was measured of one form.

    Attributes:
        name: of the form, or the folder of an export.
        nbytes: size of the model's files.
        p50_ms: median time of one example, in milliseconds.
        p95_ms: 95th percentile.
        speedup: examples per second at batch 1, over PyTorch's.
        per_second: examples per second in batches.
        score: the metric on labeled data; None where no data is known.
        note: what is to be said of it.
    """

    name: str
    nbytes: int
    p50_ms: float
    p95_ms: float
    speedup: float
    per_second: float
    score: float | None
    note: str = ""


@dataclass(frozen=True)
class Table:
    """What was measured.

    Attributes:
        run: the model.
        rows: a row per form, PyTorch's first.
        metric: that `score` is.
        batch: examples per batch.
        threads: of the CPU.
        examples: that `score` was measured on.
        left_out: forms that could not be made, with the reason.
        notes: on these examples, for example that the run trained on them.
    """

    run: str
    rows: tuple[Row, ...]
    metric: str
    batch: int
    threads: int
    examples: int
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """For display."""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        on = f"{self.metric} on {self.examples:,} examples" if self.examples else "no labeled data"
        yield f"{self.run} on this machine's CPU, {threads}; {on}:"
        width = max(len(row.name) for row in self.rows)
        heads = ("size", "p50", "p95", "batch 1", f"batch {self.batch}", self.metric)
        yield f"  {'':<{width}}" + "".join(f"{head:>12}" for head in heads)
        for row in self.rows:
            cells = (
                f"{row.nbytes / 1e6:.1f} MB",
                f"{row.p50_ms:.2f} ms",
                f"{row.p95_ms:.2f} ms",
                f"{row.speedup:.2f}x",
                f"{row.per_second:.1f}/s",
                "" if row.score is None else f"{row.score:.4f}",
            )
            yield f"  {row.name:<{width}}" + "".join(f"{cell:>12}" for cell in cells) + f"  {row.note}".rstrip()
        yield "  p50, p95: one example; batch 1: examples per second over PyTorch's. Encoding inputs is not timed."
        yield from (f"  Note: {note}" for note in self.notes)
        yield from (f"  Left out: {reason}" for reason in self.left_out)


def benchmark(
    run: str | Path,
    exports: Sequence[str | Path] = (),
    *,
    forms: Sequence[str] | None = None,
    data: Any = None,
    max_examples: int = 512,
    seconds: float = 3.0,
    **keys: Any,
) -> Table:
    """Measure the forms of a trained model on the CPU.

    Args:
        run: a run's folder or a hub id.
        exports: folders of its exported models; without any, the forms are made in a temporary folder.
        forms: names of `FORMS` to make (default: those whose packages are installed).
        data: labeled data (default: the run's validation split).
        max_examples: of the data, for the metric.
        seconds: to time each form for, singly and in batches.
        **keys: as of `Predictor.load`.

    Raises:
        UserError: there is no such run or data, an export is of another model, or a form that was named cannot be made.
    """
    exporter = Exporter(Predictor.load(run, **keys), data)
    reference = exporter.reference
    with tempfile.TemporaryDirectory(prefix="hf-transfer-") as folder:
        given = [_exported(Path(place), str(place)) for place in exports]
        made, left_out = ([], []) if given else _made(exporter, Path(folder), forms)
        loaded = [Form(TORCH, reference, _tensor_bytes(reference.model)), *given, *made]
        _check_same(loaded)
        singly = _timed(loaded, exporter, 1, seconds)
        batched = _timed(loaded, exporter, reference.batch_size, seconds)
        metric = LEADING[reference.labels.problem_type][0]
        found = {
            form.name: {} if exporter.on == MADE_UP else form.predictor.evaluate(data, exporter.split, max_examples)
            for form in loaded
        }
    rows = tuple(
        Row(
            form.name,
            form.nbytes,
            1000 * float(np.quantile(singly[form.name], 0.5)),
            1000 * float(np.quantile(singly[form.name], 0.95)),
            float(np.mean(singly[TORCH]) / np.mean(singly[form.name])),
            float(1 / np.mean(batched[form.name])),
            found[form.name]["metrics"][metric] if found[form.name] else None,
            form.note,
        )
        for form in loaded
    )
    examples, notes = int(found[TORCH].get("num_examples", 0)), tuple(found[TORCH].get("notes", ()))
    threads = torch.get_num_threads()
    return Table(str(run), rows, metric, reference.batch_size, threads, examples, tuple(left_out), notes)


def _made(exporter: Exporter, folder: Path, names: Sequence[str] | None) -> tuple[list[Form], list[str]]:
    """(the forms that could be made, why the others could not).

    Raises:
        UserError: a form was named and cannot be made.
    """
    made: list[Form] = []
    left_out: list[str] = []
    for name in names or FORMS:
        format, changes = FORMS[name]
        try:
            check_installed(format, PACKAGES[format].writes)
            most = float("inf") if changes else None  # the table says what it costs
            done = exporter.export(ExportArguments(str(folder / name), format, max_drop=most, **changes))
        except (UserError, WorkFailed) as error:
            if names:
                raise
            left_out.append(f"{name}: {error.message} {error.fix}".strip())
            continue
        lost = ((done.about.accuracy if done.about else None) or {}).get("lost", 0.0)
        note = f"loses {lost:.4f}: `export` refuses it without --max_drop" if lost > MAX_DROP else ""
        made.append(Form(name, Predictor.load(done.folder, allow_pickle=True), done.nbytes, note))
    return made, left_out


def _exported(folder: Path, name: str) -> Form:
    """Raises:
    UserError: it is no folder of an export.
    """
    if not (folder / EXPORT).is_file():
        raise UserError(f"EXPORT: {name!r} is not a folder that `hf-transfer export` wrote.", "Give such a folder.")
    size = sum(path.stat().st_size for path in folder.iterdir() if path.name.startswith("model"))
    return Form(name, Predictor.load(folder, allow_pickle=True), size)


def _check_same(forms: Sequence[Form]) -> None:
    """Raises:
    UserError: one predicts other labels.
    """
    first = forms[0].predictor.labels
    for form in forms[1:]:
        if form.predictor.labels != first:
            own, other = (", ".join(labels.names[:3]) for labels in (first, form.predictor.labels))
            raise UserError(
                f"EXPORT: {form.name!r} is of another model: it predicts {other}, and RUN {own}.",
                "Give exports of this run.",
            )


def _timed(forms: Sequence[Form], exporter: Exporter, size: int, seconds: float) -> Mapping[str, list[float]]:
    """Seconds per example of each pass through each form, by name; forms take turns batch by batch."""
    batches = exporter.batches(size)
    passes = [(form.name, batch, form.predictor.model) for batch in batches for form in forms]
    times: dict[str, list[float]] = {form.name: [] for form in forms}
    end, count = time.perf_counter() + seconds * len(forms), 0
    with torch.no_grad():
        while count < _WARM_UP + _FEWEST or time.perf_counter() < end:
            start = count % len(batches) * len(forms)
            for name, batch, model in passes[start : start + len(forms)]:
                before = time.perf_counter()
                model(**batch)
                taken = time.perf_counter() - before
                if count >= _WARM_UP:
                    times[name].append(taken / len(next(iter(batch.values()))))
            count += 1
    return times


def _tensor_bytes(model: torch.nn.Module) -> int:
    return sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values())
