"""From a run to an exported model: traced, written, opened again as `predict` opens it, and compared with PyTorch.

Nothing is kept that answers otherwise. In fp32 the logits must agree within 1e-4 on real inputs, singly and in batches,
and the labels must be equal. Half precision and 8 bits change the logits: there, the accuracy on the validation split
may fall by `max_drop` at most.
"""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from hf_transfer import __version__
from hf_transfer.adapters.files import merge_checked
from hf_transfer.config.arguments.export import MAX_DROP, MERGED, PACKAGES, ExportArguments
from hf_transfer.data.labels import REGRESSION
from hf_transfer.errors import UserError, WorkFailed
from hf_transfer.evaluation.metric_table import LEADING
from hf_transfer.evaluation.thresholds import thresholds_of
from hf_transfer.files import as_json, write_json
from hf_transfer.inference.exported import About, check_weights
from hf_transfer.inference.formats import FORMATS
from hf_transfer.inference.graphs import Logits, traced
from hf_transfer.inference.parity import check_equal, compared
from hf_transfer.inference.predictor import Predictor
from hf_transfer.inference.run_keys import save_keys
from hf_transfer.run_folder import EXPORT, RESULTS
from hf_transfer.tasks.tokenizer_fit import max_tokens

_INPUTS = 64  # real inputs that an export is compared on
MADE_UP = "made-up inputs"
_CALIBRATED = 8  # examples per batch of those that ranges are measured on
_TRACED = 3  # examples of the batch that is traced

Values = list[tuple[Any, ...]]


@dataclass(frozen=True)
class Exported:
    """An exported model on the disk.

    Attributes:
        folder: of the export.
        about: what it is, and how it was checked; None of a merged model, which is one of transformers.
        nbytes: size of the model's own files.
        notes: messages for the user.
    """

    folder: Path
    about: About | None
    nbytes: int
    notes: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """For display."""
        yield f"{self.folder}: {'merged' if self.about is None else self.about.format}, {self.nbytes / 1e6:,.1f} MB"
        yield from (f"  Note: {note}" for note in self.notes)
        if self.about is not None:
            said = self.about.checked
            yield (
                f"  logits within {said['max_difference']:.1e} of PyTorch's on {said['examples']} {said['on']}, "
                f"{said['other_labels'] or 'no'} label{'' if said['other_labels'] == 1 else 's'} differ"
            )
            if lost := self.about.accuracy:
                yield (
                    f"  {lost['metric']} {lost['before']:.4f} → {lost['after']:.4f} on {lost['examples']:,} examples "
                    f"({lost['split']})"
                )
        yield f"  Next: hf-transfer predict {self.folder} INPUT{_trusted(self.about)}"


def export(run: str | Path, output_dir: str | Path, *, data: Any = None, **keys: Any) -> Exported:
    """Write a trained model for another runtime, checked against PyTorch.

    Args:
        run: a run's folder or a hub id.
        output_dir: new folder, which `predict` and `evaluate` take like a run's.
        data: labeled data to check on, as of `Predictor.evaluate` (default: the run's validation split).
        **keys: `format`, `half`, `quantize`, `max_drop`, and those of `Predictor.load`.

    Raises:
        UserError: there is no such run, keys contradict each other, a package is missing, the folder exists, the
            format lacks an operator of the model, or its code cannot be traced.
        WorkFailed: the exported model answers otherwise than PyTorch, or loses more than `max_drop`.
    """
    own = {name: keys.pop(name) for name in list(keys) if name in ExportArguments.__dataclass_fields__}
    arguments = ExportArguments(str(output_dir), **own)
    arguments.check()
    return Exporter(Predictor.load(run, **keys), data).export(arguments)


class Exporter:
    """Exports one model, in one format after the other.

    Args:
        predictor: of the run.
        data: see `export`.

    Raises:
        UserError: the data cannot be read, or the model is an exported one.
    """

    def __init__(self, predictor: Predictor, data: Any = None):
        check_weights(predictor.model, "export")
        self.predictor, self.data = predictor, data
        self.notes: list[str] = []
        self.on, self.values = self._inputs()
        self.batch = self._encoded(self._traceable())
        self.reference = replace(predictor, model=self._plain(), precision=None)  # as the exported model computes
        self._before: dict[str, Any] | None = None

    def export(self, arguments: ExportArguments) -> Exported:
        """Write, check, and only then move to `output_dir`.

        Raises:
            UserError: as of `export`.
            WorkFailed: likewise.
        """
        if arguments.precision != "fp32" and self.on == MADE_UP:
            raise UserError(
                "it is missing: how much accuracy is lost must be measured, and RUN does not say its data.",
                "Name labeled data.",
                key="dataset_name",
            )
        folder = Path(str(arguments.output_dir))
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as beside:
            whole = Path(beside) / "export"
            whole.mkdir()
            if arguments.format == MERGED:
                about = None
                self._merge(whole)
            else:
                about = self._written(whole, arguments)
            nbytes = sum(p.stat().st_size for p in whole.iterdir() if p.name.startswith("model"))
            if folder.is_dir():
                folder.rmdir()  # empty: checked
            whole.replace(folder)
        return Exported(folder, about, nbytes, tuple(self.notes))

    # ---- the model and its inputs ----

    def _inputs(self) -> tuple[str, Values]:
        """(what they are, inputs as `Predictor.logits` takes them)."""
        if self.data is None and not (self.predictor.data.dataset_name or self.predictor.data.train_file):
            made = self.predictor.task.made_up(self.predictor.processor, _INPUTS)
            return MADE_UP, [row * max(1, len(self.predictor.columns)) for row in made]
        name, values = self.predictor.inputs_of(self.data, self.split, _INPUTS)
        return f"examples of the {name} split", values

    @property
    def split(self) -> str | None:
        """Of the run's own data, the validation split: the test split is for the model that is kept."""
        return "validation" if self.data is None else None

    def batches(self, size: int) -> list[dict[str, torch.Tensor]]:
        """The inputs as the model reads them, `size` at a time."""
        return [self._encoded(self.values[i : i + size]) for i in range(0, len(self.values), size)]

    def _traceable(self) -> Values:
        """A few inputs of different lengths, at least two."""
        some = sorted(self.values, key=lambda row: sum(len(v) for v in row if isinstance(v, str)))
        return [some[0], some[-1], *some[1 : _TRACED - 1]] if len(some) > 1 else some * 2

    def _encoded(self, values: Values) -> dict[str, torch.Tensor]:
        task, processor = self.predictor.task, self.predictor.processor
        encoded = task.encode(list(zip(*values, strict=True)), processor)
        rows = [{name: column[i] for name, column in encoded.items()} for i in range(len(values))]
        return dict(task.collator(processor)(rows))

    def _plain(self) -> Any:
        """The model on the CPU, its adapter in its weights where that is possible."""
        model = self.predictor.model
        if isinstance(model, PeftModel):
            device = model.device
            try:
                model = merge_checked(model, {k: v.to(device) for k, v in self.batch.items()})
            except UserError as error:
                self.notes.append(f"The adapter stays beside the weights, in the same graph. {error.message}")
        return (model if model.device.type == "cpu" else copy.deepcopy(model).cpu()).eval()

    # ---- one format ----

    def _merge(self, folder: Path) -> None:
        model = self.reference.model
        if isinstance(model, PeftModel):
            raise UserError(self.notes[-1], "Use onnx or pt2, which hold any computation.", key="format")
        model.save_pretrained(folder)
        self.predictor.processor.save_pretrained(folder)
        save_keys(self.predictor, folder)
        check_equal(compared(self.reference, Predictor.load(folder), self.values, self.on))

    def _written(self, folder: Path, arguments: ExportArguments) -> About:
        form, precision, names = FORMATS[arguments.format], arguments.precision, tuple(self.batch)
        model = self.reference.model
        with _without_cache(model):
            dtype = torch.float16 if precision == "fp16" else torch.float32
            module = Logits(copy.deepcopy(model).half() if precision == "fp16" else model, names, dtype).eval()
            program = traced(module, self.batch)
        about = About(form.name, precision, self.predictor.task.name, names, **self._sizes())
        metadata = self._metadata(about)
        form.write(program, names, metadata, folder / form.file)
        if precision == "int8":
            assert form.quantize is not None
            form.quantize(folder / form.file, metadata, self.batches(_CALIBRATED))
        config = copy.deepcopy(_core(model).config)
        config.architectures = [type(_core(model)).__name__]
        config.save_pretrained(folder)
        self.predictor.processor.save_pretrained(folder)
        save_keys(replace(self.predictor, precision=None), folder)
        write_json(folder / EXPORT, asdict(about))

        exported = Predictor.load(folder, allow_pickle=True)  # as a user will
        about = replace(about, checked=compared(self.reference, exported, self.values, self.on))
        if precision == "fp32":
            check_equal(about.checked)
        else:
            about = replace(about, accuracy=self._accuracy(exported, arguments))
        write_json(folder / EXPORT, asdict(replace(about, versions=_versions(form.name))))
        return about

    def _sizes(self) -> dict[str, Any]:
        """What batches the model reads, as of `About`."""
        if "pixel_values" in self.batch:
            return {"image_shape": tuple(self.batch["pixel_values"].shape[1:])}
        return {"longest": max_tokens(_core(self.reference.model), self.predictor.processor)}

    def _metadata(self, about: About) -> dict[str, str]:
        """What the file says of itself, as texts; whatever is not one is JSON."""
        predictor, config = self.predictor, _core(self.reference.model).config
        said: dict[str, Any] = {
            "hf_transfer": __version__,
            "task": about.task,
            "precision": about.precision,
            "problem_type": predictor.labels.problem_type,
            "labels": list(predictor.labels.names),
            "thresholds": thresholds_of(config) or None,
            "temperature": self._temperature(),
            "preprocessing": predictor.task.preprocessing(predictor.processor),
        }
        return {name: v if isinstance(v, str) else json.dumps(as_json(v)) for name, v in said.items()}

    def _temperature(self) -> float | None:
        """The temperature that the run fitted, by which the last layer is divided already; None without."""
        path = None if self.predictor.folder is None else self.predictor.folder / RESULTS
        if path is None or not path.is_file():
            return None
        fitted = json.loads(path.read_text(encoding="utf-8")).get("calibration")
        return float(fitted["temperature"]) if fitted else None

    # ---- checks ----

    def _accuracy(self, exported: Predictor, arguments: ExportArguments) -> dict[str, Any]:
        """The leading metric on labeled data before and after.

        Raises:
            UserError: no labeled data is known.
            WorkFailed: too much is lost.
        """
        metric = LEADING[self.predictor.labels.problem_type][0]
        if self._before is None:
            self._before = self.reference.evaluate(self.data, self.split)
            self.notes += self._before["notes"]
        after = exported.evaluate(self.data, self.split)
        values = [float(found["metrics"][metric]) for found in (self._before, after)]
        lost = values[0] - values[1]
        if self.predictor.labels.problem_type == REGRESSION:
            lost = -lost / max(self.predictor.spread_of(self.data, self.split), 1e-12)
        allowed = MAX_DROP if arguments.max_drop is None else arguments.max_drop
        if not lost <= allowed:
            unit = " standard deviations of the labels" if self.predictor.labels.problem_type == REGRESSION else ""
            raise WorkFailed(
                f"{arguments.precision} loses {lost:.4f}{unit} of {metric} ({values[0]:.4f} → {values[1]:.4f} on "
                f"{after['num_examples']:,} examples), more than max_drop {allowed:g}. Nothing was kept.",
                "Allow more with --max_drop, or export in fp32.",
            )
        about = {"metric": metric, "before": values[0], "after": values[1], "lost": lost, "allowed": allowed}
        return {**about, "split": after["metrics_split"], "examples": after["num_examples"]}


# ---- details ----


def _core(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextlib.contextmanager
def _without_cache(model: Any) -> Iterator[None]:
    """Context in which a decoder returns no cache of keys and values: the graph has logits alone."""
    config = _core(model).config
    before = getattr(config, "use_cache", None)
    if before:
        config.use_cache = False
    try:
        yield
    finally:
        if before:
            config.use_cache = before


def _versions(format: str) -> dict[str, str]:
    found = {"hf_transfer": __version__}
    for name in ("torch", "transformers", *PACKAGES[format].writes):
        with contextlib.suppress(PackageNotFoundError):  # installed under another name
            found[name] = version(name)
    return found


def _trusted(about: About | None) -> str:
    return " --allow_pickle" if about is not None and FORMATS[about.format].may_pickle else ""
