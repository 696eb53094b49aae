"""A trained model at work: predictions for inputs, metrics on labelled data."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Value
from scipy.special import expit, softmax
from transformers import Trainer, TrainingArguments

from hf_transfer.adapters.files import merge_checked
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.config.arguments.views import Views
from hf_transfer.config.values import coerce, read_config_file
from hf_transfer.data.examine import examine
from hf_transfer.data.images import undecoded
from hf_transfer.data.labels import LABELS, Labels, encode, find_labels
from hf_transfer.data.load import load_held_out, load_splits, standard_name
from hf_transfer.data.splits import draw, make_data
from hf_transfer.data.streaming import beginning
from hf_transfer.errors import UserError, nearest, one_line
from hf_transfer.evaluation import metrics
from hf_transfer.evaluation.measure import THRESHOLD, _measured, held_out_metrics, metrics_of, thresholds_of
from hf_transfer.inference.inputs import Example, check_inputs, example, read_inputs
from hf_transfer.layers.forward_pass import example as example_of
from hf_transfer.layers.groups import layer_groups
from hf_transfer.models.load import read_config
from hf_transfer.objectives.losses import Loss
from hf_transfer.run_folder import RUN_FILE
from hf_transfer.settings import keys
from hf_transfer.tasks import TASKS, task_of
from hf_transfer.tasks.base import Task
from hf_transfer.tasks.views import pooled

BATCH_SIZE = 32


@dataclass
class Predictor:
    """A model with what it needs to read inputs and to name its answers.

    Attributes:
        task: what it reads.
        model: with its head.
        processor: the tokenizer or image processor.
        labels: problem type and names, in the order of the outputs.
        data: the data keys of the run that trained it.
        batch_size: examples per forward pass.
        precision: `bf16` or `fp16` where it was trained and evaluated under autocast, else None.
        seed: of the run's splits.
        views: how it looks at an example.
    """

    task: Task
    model: Any = field(repr=False)
    processor: Any = field(repr=False)
    labels: Labels
    data: DataArguments = field(default_factory=DataArguments)
    batch_size: int = BATCH_SIZE
    precision: str | None = None
    seed: int = 0
    views: Views = field(default_factory=Views)

    @classmethod
    def load(cls, run: str | Path, **changes: Any) -> Predictor:
        """The model of a run's folder, of any folder that `save_pretrained` wrote, or of a hub id.

        Args:
            run: the folder or id.
            **changes: keys to use instead of the run's own, for example `per_device_eval_batch_size`; and `tta`,
                `stride` and `pool` (see `Views`).

        Raises:
            UserError: there is no such model, or it has no trained head.
        """
        others = ("per_device_eval_batch_size", "trust_remote_code")
        known = {*DataArguments.__dataclass_fields__, *Views.__dataclass_fields__, *others}
        for name in set(changes) - known:
            raise UserError(f"{name} is no key of a trained model.{nearest(name, known)}")
        with _named_run():
            return cls._load(str(run), changes)

    @classmethod
    def _load(cls, run: str, changes: dict[str, Any]) -> Predictor:
        if not run:
            raise UserError("RUN: it is empty.", "Give the folder of a run, or a hub id.")
        found = _keys_of_run(run) | {k: v for k, v in changes.items() if v is not None}
        data = DataArguments(**{f.name: found[f.name] for f in fields(DataArguments) if f.name in found})
        model_args = ModelArguments(run, trust_remote_code=bool(changes.get("trust_remote_code")))
        config = read_config(model_args)
        task, labels = data.task or task_of(config, run), Labels.of(config)
        data = replace(data, task=task)
        # What was saved holds its own size and length.
        loaded, processor = TASKS[task].load(model_args, replace(data, image_size=None, max_seq_length=None), labels)
        if loaded.fresh:
            raise UserError(
                f"RUN: {run!r} holds no trained head ({', '.join(loaded.fresh[:2])} would be random).",
                f"Train one with `hf-transfer train --model_name_or_path {run}`.",
            )
        precision = next((p for p in ("bf16", "fp16") if found.get(p)), None)
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        return cls(
            TASKS[task],
            loaded.model.to(device).eval(),
            processor,
            loaded.labels,
            data,
            int(found.get("per_device_eval_batch_size") or BATCH_SIZE),
            precision,
            int(next((found[k] for k in ("data_seed", "seed") if found.get(k) is not None), 0)),
            Views.of(changes),
        )

    def looking(self, **views: Any) -> Predictor:
        """The same model, looking at an example as `tta`, `stride` and `pool` say (see `Views`).

        Raises:
            UserError: it is no such key, or not a value of it.
        """
        for name in views:
            if name not in Views.__dataclass_fields__:
                raise UserError(f"{name} is no key of how a model looks.{nearest(name, Views.__dataclass_fields__)}")
        return replace(self, views=Views.of(views))

    def save_merged(self, folder: str | Path, batch: dict[str, Any] | None = None) -> Path:
        """Write a plain model, an adapter merged into its backbone, with its tokenizer or image processor.

        Args:
            folder: is made.
            batch: what the model reads, to compare merged and unmerged answers on (default: a made-up example).

        Raises:
            UserError: its kind of adapter cannot be merged.
            WorkFailed: the merged weights answer otherwise than the adapter.
        """
        model = merge_checked(self.model, batch or example_of(self.model) or {})
        Path(folder).mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        return Path(folder)

    # ---- predictions ----

    def predict(self, inputs: Any, top_k: int | None = None, features: bool = False) -> list[dict[str, Any]]:
        """An answer per input, in order.

        Args:
            inputs: texts (tuples of two for pairs), or pictures: paths, arrays or PIL images; or one of them.
            top_k: only so many scores, the highest first; None gives all, in the order of the labels.
            features: add what the head receives: one vector per example.

        Returns:
            `{"input", "label", "score", "scores": {label: probability}}`; for several labels `labels` instead of
            `label` and `score`; for a regression `value`.

        Raises:
            UserError: an input cannot be read.
        """
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k: {top_k} is not positive.")
        several = isinstance(inputs, list | Dataset) or (isinstance(inputs, tuple) and not self.is_pair)
        items = list(inputs) if several else [inputs]
        examples = [self._example(item) for item in items]
        for i, made in enumerate(examples):
            if wrong := self._wrong(made):
                raise UserError(f"inputs[{i}]: {wrong}.")
        return list(self.stream(examples, top_k, features))

    def _example(self, item: Any) -> Example:
        columns = self.columns
        if isinstance(item, dict) and columns and all(c in item for c in columns):
            item = tuple(item[c] for c in columns)
        elif isinstance(item, dict) and not columns:
            texts = {k: Value("string") for k, v in item.items() if isinstance(v, str)}
            found = self.task.input_columns(texts, self.data)
            item = tuple(item[c] for c in found) if found else item
        item = item[0] if isinstance(item, tuple) and len(item) == 1 else item
        raw = list(item) if isinstance(item, tuple) else [item]
        return example(self.task, raw if len(raw) > 1 else item, raw)

    def _wrong(self, made: Example) -> str:
        """Why an example cannot be answered; empty where it can."""
        if made.values is None:
            return made.error
        if self.columns and len(made.values) != len(self.columns):
            return f"the model reads {' and '.join(self.columns)}: give {'both' if self.is_pair else 'one'}"
        return ""

    @property
    def columns(self) -> tuple[str, ...]:
        """The input columns that the run was trained on; empty where that is not known."""
        named = getattr(self.data, self.task.input_key) if self.task.input_key else None
        return (named,) if isinstance(named, str) else tuple(named or ())

    @property
    def is_pair(self) -> bool:
        return len(self.columns) == 2

    def read(self, words: Sequence[str]) -> Iterator[Example | None]:
        """Examples of what `hf-transfer predict` was given.

        Raises:
            UserError: an input is missing or of the wrong kind.
        """
        check_inputs(words, self.task)
        return read_inputs(words, self.task, self.data)

    def stream(
        self, examples: Iterable[Example | None], top_k: int | None = None, features: bool = False
    ) -> Iterator[dict[str, Any]]:
        """An answer per example, in order, as soon as a batch is full or the source pauses (None).

        One that cannot be read is answered with its `error`.
        """
        batch: list[Example] = []
        for item in examples:
            if item is not None:
                if batch and len(item.values or ()) != len(batch[-1].values or item.values or ()):
                    yield from self._answers(batch, top_k, features)  # texts and pairs do not share a batch
                    batch = []
                batch.append(item)
            if batch and (item is None or len(batch) == self.batch_size):
                yield from self._answers(batch, top_k, features)
                batch = []
        if batch:
            yield from self._answers(batch, top_k, features)

    def _answers(self, batch: list[Example], top_k: int | None, features: bool) -> Iterator[dict[str, Any]]:
        whole = [e for e in batch if not self._wrong(e)]
        logits, vectors = self.logits([e.values for e in whole if e.values], features) if whole else ([], None)
        answers = {id(e): self.answer(z, top_k) for e, z in zip(whole, logits, strict=True)}
        if vectors is not None:
            for e, vector in zip(whole, vectors, strict=True):
                answers[id(e)]["features"] = vector.tolist()
        for e in batch:
            yield {"input": e.shown, **answers.get(id(e), {"error": self._wrong(e)})}

    def answer(self, logits: Any, top_k: int | None = None) -> dict[str, Any]:
        """The answer that one example's logits (labels,) stand for."""
        if self.labels.problem_type == "regression":
            return {"value": float(logits[0])}
        several = self.labels.problem_type == "multi_label_classification"
        wide = np.asarray(logits, dtype=np.float64)
        scores = expit(wide) if several else softmax(wide)
        order = np.argsort(-scores, kind="stable")[:top_k] if top_k else range(len(scores))
        named = {"scores": {self.labels.names[i]: float(scores[i]) for i in order}}
        if several:
            limits = thresholds_of(self.model.config) or [THRESHOLD] * len(scores)
            chosen = [n for n, p, t in zip(self.labels.names, scores, limits, strict=True) if p > t]
            return {"labels": chosen, **named}
        best = int(np.asarray(logits).argmax())
        return {"label": self.labels.names[best], "score": float(scores[best]), **named}

    @torch.no_grad()
    def logits(self, values: Sequence[tuple[Any, ...]], features: bool = False) -> tuple[Any, Any]:
        """((examples, labels) logits, (examples, width) features or None) of one batch, computed as in evaluation."""
        columns = list(zip(*values, strict=True))
        encoded, owners = self.task.look(columns, self.processor, self.views, self.data)
        rows = [{k: v[i] for k, v in encoded.items()} for i in range(len(owners))]
        parts = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        if len(rows) == len(values):  # as the caller chose the batch
            parts = [rows]
        found, vectors = zip(*(self._forward(part, features) for part in parts), strict=True)
        logits = pooled(np.concatenate(found), owners, self.views.pool)
        return logits, pooled(np.concatenate(vectors), owners, "mean") if features else None

    def _forward(self, rows: list[dict[str, Any]], features: bool) -> tuple[Any, Any]:
        device = self.model.device
        batch = {k: v.to(device) for k, v in self.task.collator(self.processor)(rows).items()}
        self.model.eval()
        seen = _Features(self.model) if features else None
        with _autocast(self.precision, device), seen or contextlib.nullcontext():
            output = self.model(**batch).logits
        vectors = seen.pooled(batch).float().cpu().numpy() if seen else None
        return output.float().cpu().numpy(), vectors

    # ---- evaluation ----

    def evaluate(
        self, data: DataArguments | None = None, split: str | None = None, max_examples: int | None = None
    ) -> dict[str, Any]:
        """Metrics on labelled data, as training computes them.

        Args:
            data: where the data is; None takes what the run held out.
            split: which of its splits (default: test, else validation, else the only one).
            max_examples: only so many of them, drawn by class.

        Returns:
            `{"metrics", "intervals", "metrics_split", "num_examples", "dataset"}`.

        Raises:
            UserError: there is no such data, or its labels are not the model's.
        """
        name, examples, inputs = self._held_out(data, split, max_examples)
        if self.views.several:
            found = self._measure_looks(examples, inputs)
        else:
            found = self.measure(self.task.prepare(examples, inputs, self.processor, data or self.data))
        return {**found, "metrics_split": name, "dataset": _name_of(data or self.data)}

    def other_data(self, **keys: Any) -> DataArguments:
        """The run's data keys for other data: columns as in the run, unless named otherwise; nothing of its files."""
        nothing = dict.fromkeys(
            ("in_memory", "dataset_name", "dataset_config_name", "train_file", "validation_file", "test_file")
        )
        return replace(self.data, **{**nothing, "max_predict_samples": None, "streaming": False, **keys})

    def _held_out(
        self, data: DataArguments | None = None, split: str | None = None, max_examples: int | None = None
    ) -> tuple[str, Dataset, tuple[str, ...]]:
        """(name, examples with encoded labels, input columns) of the split to evaluate on."""
        own = data is None
        args = self.data if data is None else data
        if own and not (args.dataset_name or args.train_file):
            raise UserError(
                "test_file or dataset_name is missing: what to evaluate on.", "The run does not say what it held out."
            )
        if own:
            splits = (beginning if args.streaming else load_splits)(args)
            features = splits["train"].features
        else:
            name, examples = load_held_out(args, split)
            features = examples.features
        inputs = self.task.input_columns(features, args)
        if not inputs:
            raise UserError(
                f"{self.task.input_key}: the data has no input column for {self.task.name}.",
                f"Name one of {', '.join(features)}.",
            )
        splits, column = find_labels(splits if own else {name: examples}, inputs, args)
        if own:
            whole = make_data(splits, inputs, column, self.labels, args, self.seed)
            if args.on_bad_example == "skip" or args.drop_leaks:  # as the run did, for what it held out
                whole, _ = examine(whole, self.task.trace, args, self.seed, ("test", "validation"))
            made = whole.splits
            name = standard_name(split) if split else "test" if "test" in made else "validation"
            if name not in made:
                raise UserError(
                    f"split: the data has no split {split!r}.", f"It has {', '.join(made)}.{nearest(name, made)}"
                )
            examples = made[name]
        else:
            examples = encode(splits[name], name, column, self.labels)
        if max_examples is not None and max_examples < len(examples):
            examples = draw(examples, max_examples, self.labels, self.seed)[1]
        return name, examples, inputs

    def _measure_looks(self, examples: Dataset, inputs: tuple[str, ...]) -> dict[str, Any]:
        """As `measure`, of logits that are pooled over the looks at each example; the loss is theirs too."""
        logits: list[Any] = []
        for batch in undecoded(examples, inputs).iter(batch_size=self.batch_size):
            rows = list(zip(*(batch[c] for c in inputs), strict=True))
            read = [example(self.task, None, row) for row in rows]
            for i, made in enumerate(read):
                if made.values is None:
                    row = sum(len(part) for part in logits) + i
                    raise UserError(f"Example {row} of the data cannot be used: {made.error}.")
            logits.append(self.logits([made.values for made in read if made.values is not None])[0])
        kind, found = self.labels.problem_type, np.concatenate(logits)
        labels = np.array(examples[LABELS][:])
        loss = Loss(kind).total(torch.tensor(found), torch.tensor(labels)) / len(labels)
        values = {"loss": float(loss), **metrics.compute(kind, found, labels)}
        return _measured(kind, values, found, labels, thresholds_of(self.model.config))

    def measure(self, prepared: Dataset) -> dict[str, Any]:
        """Metrics and intervals on prepared examples, by Trainer's own evaluation loop."""
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                folder,
                per_device_eval_batch_size=self.batch_size,
                remove_unused_columns=False,
                dataloader_pin_memory=torch.accelerator.is_available(),
                disable_tqdm=True,
                average_tokens_across_devices=False,  # else Trainer multiplies BERT's loss by the number of processes
                use_cpu=not torch.accelerator.is_available(),
                **({self.precision: True} if self.precision else {}),
            )
            trainer = Trainer(
                model=self.model,
                args=args,
                data_collator=self.task.collator(self.processor),
                compute_metrics=lambda p: metrics_of(self.labels.problem_type, p),
            )
            found = held_out_metrics(trainer, prepared, self.labels.problem_type)
        return {name: found[name] for name in ("metrics", "intervals", "num_examples")}


def merge(run: str | Path, folder: str | Path, **changes: Any) -> Path:
    """Write a run with an adapter as a plain model, which any library loads: the adapter in the backbone's weights.

    Args:
        run: a run's folder or a hub id.
        folder: where the plain model goes, with its tokenizer or image processor.
        **changes: as of `Predictor.load`.

    Raises:
        UserError: there is no such run, or its kind of adapter cannot be merged (prompts, prefixes, bottlenecks).
        WorkFailed: the merged weights answer otherwise than the adapter.
    """
    return Predictor.load(run, **changes).save_merged(folder)


# ---- details -------------------------------------------------------------------------------------------------------


class _Features:
    """Notes, during a forward pass, what the head receives: the input of its first layer with weights."""

    def __init__(self, model: torch.nn.Module):
        head = {name.rpartition(".")[0] for name in layer_groups(model)[-1].parameters}
        self.model = model
        self.layers = [module for name, module in model.named_modules() if name in head]
        self.seen: torch.Tensor | None = None

    def __enter__(self) -> _Features:
        self.handles = [layer.register_forward_pre_hook(self._note) for layer in self.layers]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _note(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.seen is None and inputs and torch.is_tensor(inputs[0]):
            self.seen = inputs[0]

    def pooled(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(examples, width). Where the head classifies every token (decoders), the last one that is no padding."""
        assert self.seen is not None, "the head was not called"
        if self.seen.ndim == 3 and "attention_mask" in batch and self.seen.shape[:2] == batch["attention_mask"].shape:
            places = torch.arange(self.seen.shape[1], device=self.seen.device)
            last = (batch["attention_mask"] * places).argmax(-1)
            return self.seen[torch.arange(len(last), device=last.device), last]
        return self.seen.flatten(1)


def _autocast(precision: str | None, device: torch.device) -> Any:
    if precision is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


@contextlib.contextmanager
def _named_run() -> Iterator[None]:
    """Here the model is named by RUN, not by a key."""
    try:
        yield
    except UserError as error:
        message, fix = (text.replace("model_name_or_path:", "RUN:") for text in (error.message, error.fix))
        raise type(error)(message, fix) from error


def _keys_of_run(run: str) -> dict[str, Any]:
    """The keys that a run's folder recorded; none for another model's folder or a hub id."""
    path = Path(run) / RUN_FILE
    if not path.is_file():
        return {}
    try:
        found = {k: coerce(v, keys()[k]) for k, v in read_config_file(str(path)).items() if k in keys()}
        if found.get("task") not in (None, *TASKS):
            raise ValueError(f"task: {found['task']!r} is not one of {', '.join(TASKS)}.")
    except ValueError as error:
        raise UserError(f"RUN: {str(path)!r} is not what a run writes ({one_line(error)}).") from error
    return found


def _name_of(data: DataArguments) -> str | None:
    return data.test_file or data.dataset_name or data.train_file
