"""An exported model at work: it takes the place of the model in a `Predictor`, without torch's weights in memory.

An export's folder holds the model's file, `config.json` with the labels, the tokenizer or image processor, the run's
keys and record of examples (`run_keys`), and `export.json` (`About`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.config.arguments.export import PACKAGES, check_installed
from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.data.labels import Labels
from hf_transfer.errors import UserError, nearest, one_line
from hf_transfer.inference.formats import FORMATS, Run
from hf_transfer.models.load import Loaded
from hf_transfer.objectives.losses import Loss
from hf_transfer.run_folder import EXPORT
from hf_transfer.tasks import TASKS


@dataclass(frozen=True)
class About:
    """What `export.json` says of an exported model.

    Attributes:
        format: a key of `FORMATS`.
        precision: `fp32`, `fp16` or `int8`.
        task: name of the task.
        inputs: names of the tensors that it takes.
        longest: most tokens of a text that it reads; None of images, and where it reads any number.
        image_shape: (channels, height, width) of the images that it reads; None of texts.
        checked: how its answers were compared with PyTorch's: examples, largest difference of the logits, on what.
        accuracy: of other precisions, the measure and its values before and after; None of `fp32`.
        versions: of the packages that wrote it.
    """

    format: str
    precision: str
    task: str
    inputs: tuple[str, ...]
    longest: int | None = None
    image_shape: tuple[int, ...] | None = None
    checked: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> About:
        """Raises:
        UserError: the file cannot be read, or is of a format that is not known here.
        """
        path = folder / EXPORT
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            shape = said["image_shape"]
            about = cls(**{**said, "inputs": tuple(said["inputs"]), "image_shape": tuple(shape) if shape else None})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"RUN: {str(path)!r} is not what an export writes ({one_line(error, 100)}).") from error
        if about.format not in FORMATS or about.task not in TASKS:
            raise UserError(
                f"RUN: {str(path)!r} names the format {about.format!r} and the task {about.task!r}.",
                f"Known here are {', '.join(FORMATS)}, and {', '.join(TASKS)}.{nearest(about.format, FORMATS)}",
            )
        return about

    def check_batch(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Check that a batch is one that the model reads: no runtime says clearly that it is not.

        Raises:
            UserError: a tensor is missing, a text is too long, or images have another size.
        """
        if missing := [name for name in self.inputs if name not in inputs]:
            raise UserError(
                f"the exported model reads {', '.join(self.inputs)}, and the batch has no {' and no '.join(missing)}.",
                "Encode the inputs with the tokenizer or image processor in the export's folder.",
            )
        shape = tuple(inputs[self.inputs[0]].shape)
        if self.longest is not None and shape[1] > self.longest:
            raise UserError(
                f"a batch of {shape[1]:,} tokens per text is longer than the {self.longest:,} that the model reads.",
                f"Truncate it: tokenizer(texts, truncation=True, max_length={self.longest}).",
            )
        if self.image_shape is not None and shape[1:] != self.image_shape:
            given, own = (" × ".join(map(str, s)) for s in (shape[1:], self.image_shape))
            raise UserError(
                f"the exported model reads images of {own} (channels, height, width), and these are {given}.",
                "Prepare them with the image processor in the export's folder.",
            )


class ExportedModel(nn.Module):
    """A model that runs in another runtime and is called like one of transformers. It has no parameters.

    Args:
        config: of the model that was exported.
        about: what it is.
        run: the function from tensors by name to logits.
    """

    accepts_loss_kwargs = False  # of Trainer: nothing but a batch

    def __init__(self, config: PreTrainedConfig, about: About, run: Run):
        super().__init__()
        self.config, self.about, self._run = config, about, run
        self._loss = Loss(Labels.of(config).problem_type)

    @property
    def device(self) -> torch.device:
        """Where it reads its inputs."""
        return torch.device("cpu")

    def forward(self, labels: torch.Tensor | None = None, **inputs: torch.Tensor) -> SequenceClassifierOutput:
        """Logits (examples, outputs), and with labels the mean loss.

        Raises:
            UserError: the batch is none that the model reads.
        """
        self.about.check_batch(inputs)
        logits = self._run({name: inputs[name].cpu().contiguous() for name in self.about.inputs})
        logits = logits.to(inputs[self.about.inputs[0]].device)
        if labels is None:
            return SequenceClassifierOutput(logits=logits)
        loss = self._loss.total(logits, labels) / self._loss.weight(labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def export_of(run: str) -> Path | None:
    """The folder of an exported model, named by itself or by the model's file; None if it is something else.

    Raises:
        UserError: a file is given, and what an export writes next to it is missing.
    """
    path = Path(run).expanduser()
    if path.is_dir():
        return path if (path / EXPORT).is_file() else None
    if path.is_file() and path.suffix in {Path(form.file).suffix for form in FORMATS.values()}:
        if not (path.parent / EXPORT).is_file():
            raise UserError(
                f"RUN: {run!r} is a file alone: {EXPORT} and the other files of its export are not next to it.",
                "Give the folder that `hf-transfer export` wrote, or move its files together.",
            )
        return path.parent
    return None


def load_export(folder: Path, args: ModelArguments, data: DataArguments) -> tuple[str, Loaded, Any]:
    """(task, model, tokenizer or image processor) of an export's folder.

    Args:
        folder: of the export.
        args: with `allow_pickle`, for formats whose files may hold pickles.
        data: keys of the run that trained it.

    Raises:
        UserError: a file or a package is missing, or the format needs `allow_pickle`.
    """
    about = About.load(folder)
    form = FORMATS[about.format]
    check_installed(about.format, PACKAGES[about.format].reads)
    path = folder / form.file
    if not path.is_file():
        raise UserError(f"RUN: {str(folder)!r} has no {form.file}.", "Export it again.")
    if form.may_pickle and not args.allow_pickle:
        raise UserError(
            f"RUN: a {path.suffix} file may hold pickles, which run code when they are read.",
            "Add allow_pickle if you trust its source, or export as onnx.",
        )
    own = replace(data, image_size=None, max_seq_length=None)  # what was saved holds its size and length
    config, processor = TASKS[about.task].saved_processor(args, own)
    return about.task, Loaded(ExportedModel(config, about, form.open(path)), Labels.of(config), (), ()), processor


def check_weights(model: Any, what: str) -> None:
    """Raises:
    UserError: the model is an exported one, which gives nothing but logits.
    """
    if isinstance(model, ExportedModel):
        raise UserError(f"{what}: an exported model gives nothing but logits.", "Use the folder of its run.")
