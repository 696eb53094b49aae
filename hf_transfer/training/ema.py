"""An exponential moving average of the weights (`ema_decay`), evaluated and saved in place of the last ones.

After optimizer step t, counted from 1, the average moves toward the weights:

    average = d · average + (1 - d) · weights,    d = min(ema_decay, (1 + t) / (10 + t))

Averaging the iterates of stochastic gradient descent is Polyak and Juditsky's (1992), the exponential form for neural
networks Tarvainen and Valpola's (2017, arXiv:1703.01780, section 2). The rising d is TensorFlow's
`ExponentialMovingAverage(num_updates=…)`: without it, the random weights of a new head would stay in the average for
about 1 / (1 - ema_decay) steps. As in timm's `ModelEmaV3`, the running statistics of BatchNorm are averaged too: those
of the last weights do not belong to the average.

A checkpoint's model is the average, which is what was evaluated: the best checkpoint, `from_pretrained` and averages of
checkpoints read it. The weights that training goes on from stand next to it, in `FILE`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode

from hf_transfer.errors import UserError, listed
from hf_transfer.layers.frozen import running_statistics
from hf_transfer.training import adalora, ddp
from hf_transfer.training.restoring import Restoring
from hf_transfer.training.running import RunningTrainer

FILE = "training_weights.safetensors"


def decay_at(step: int, decay: float) -> float:
    """The fraction of the average that optimizer step `step` keeps, counted from 1."""
    return min(decay, (1 + step) / (10 + step))


class WeightAverage(TrainerCallback):
    """The average of a trainer's weights; does nothing without `ema_decay`.

    Attributes:
        decay: `ema_decay`; None without an average.
        tensors: the average by parameter or buffer name, while training; within `applied`, the weights instead.
    """

    def __init__(self, trainer: RunningTrainer):
        self.trainer = trainer
        self.decay: float | None = vars(trainer.args).get("ema_decay")
        self.tensors: dict[str, torch.Tensor] = {}
        self._depth = 0
        self._is_resumed = False

    def check(self) -> None:
        """Raises:
        UserError: the trainer shards its weights, changes their number, or keeps them in half precision.
        """
        if self.decay is None:
            return
        trainer = self.trainer
        for enabled, name in ((trainer.is_deepspeed_enabled, "DeepSpeed"), (trainer.is_fsdp_enabled, "FSDP")):
            if enabled:
                raise UserError(
                    f"it keeps a second copy of the weights, which {name} shards.",
                    "Use plain data parallelism, or remove ema_decay.",
                    key="ema_decay",
                )
        if adalora.is_adalora(trainer.model):
            raise UserError(
                "adalora removes ranks while it trains, and an average over other ranks is no adapter.",
                "Use adapter: lora, or remove ema_decay.",
                key="ema_decay",
            )
        half = [n for n, p in trainer.model.named_parameters() if p.requires_grad and p.dtype.itemsize < 4]
        if half:
            raise UserError(
                f"{half[0]} is {str(trainer.model.get_parameter(half[0]).dtype).removeprefix('torch.')}, which rounds "
                "away the small steps of an average.",
                "Load the model in float32; mixed_precision computes in half precision all the same.",
                key="ema_decay",
            )

    def to_dict(self) -> dict[str, Any] | None:
        """For `results.json`; None without an average."""
        return None if self.decay is None else {"decay": self.decay, "steps": self.trainer.state.global_step}

    # ---- the average ----

    def update(self, step: int) -> None:
        """Move the average toward the weights, after optimizer step `step`, counted from 1."""
        assert self.decay is not None
        own = _tensors(self.trainer.model)
        with torch.no_grad():
            for name, average in self.tensors.items():
                # What has not moved stays as it is, bit for bit.
                average.lerp_(own[name], 1 - decay_at(step, self.decay))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the model has the average as its weights; called by all processes."""
        self._depth += 1
        try:
            if self._depth == 1:
                self._put()
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._swap()

    def _put(self) -> None:
        """Put the average into the model; of BatchNorm's statistics, which each rank averages, that of rank 0."""
        self._swap()
        if self.tensors and self.trainer.args.parallel_mode == ParallelMode.DISTRIBUTED:
            ddp.share_buffers(self.trainer.model)

    def _swap(self) -> None:
        own = _tensors(self.trainer.model)
        with torch.no_grad():
            for name, kept in self.tensors.items():
                weights = own[name].clone()
                own[name].copy_(kept)
                kept.copy_(weights)

    def follow(self, names: Collection[str]) -> None:
        """Begin the average anew from the weights of these names, which were replaced."""
        own = _tensors(self.trainer.model)
        with torch.no_grad():
            for name in self.tensors.keys() & set(names):
                self.tensors[name].copy_(own[name])

    def _names(self) -> list[str]:
        """What trains in some stage, and the statistics of BatchNorm."""
        trainer, model = self.trainer, self.trainer.model
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        if trainer.plan is not None and trainer.unfreezing is not None:
            trained = set().union(*(trainer.unfreezing.trains(stage) for stage in trainer.plan.stages))
        layers = running_statistics(model).items()
        statistics = {f"{n}.{b}" for n, m in layers for b, t in m.named_buffers(recurse=False) if t.is_floating_point()}
        return [name for name in _tensors(model) if name in trained | statistics]

    # ---- files ----

    def write(self, folder: Path) -> None:
        """Write the weights that training goes on from, within `applied`."""
        if self.tensors:
            save_file({n: t.detach().cpu().contiguous().clone() for n, t in self.tensors.items()}, folder / FILE)

    def restore(self, folder: str | Path) -> None:
        """Take up the average that a checkpoint's model is, which was just loaded, and the weights next to it.

        Raises:
            UserError: the weights are not those of this model.
        """
        path = Path(folder) / FILE
        if self.decay is None or not path.is_file():
            return
        own, weights = _tensors(self.trainer.model), load_file(path)
        other = [n for n, t in weights.items() if n not in own or own[n].shape != t.shape]
        if other:
            raise UserError(
                f"resume_from_checkpoint: {FILE} in {str(folder)!r} is not of this model ({listed(sorted(other), 3)} "
                "differ).",
                "Resume with the model and the keys of the run that wrote it.",
            )
        self.tensors = {name: own[name].detach().clone() for name in weights}
        self._is_resumed = True
        with torch.no_grad():
            for name, tensor in weights.items():
                own[name].copy_(tensor)

    # ---- the callback ----

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.decay is not None and not self._is_resumed:
            own = _tensors(self.trainer.model)
            self.tensors = {name: own[name].detach().clone() for name in self._names()}
        self._is_resumed = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.tensors:
            self.update(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.finish()

    def finish(self) -> None:
        """The average becomes the model for good."""
        self._put()
        self.tensors = {}


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


class Averaged(Restoring):
    """A Trainer whose average of the weights is evaluated and saved; see `TransferMixin`.

    What is overridden, and why that hook:

    - `evaluate`, `predict`: with their callbacks, so that what is kept of the best evaluation is what was evaluated.
    - `_save_checkpoint`, `_publish`: the checkpoint's model is the average, the weights stand next to it.
    - `_load_from_checkpoint`, `_load_best_model`: both again, or the average alone, as the model of the run.

    Attributes:
        ema: the average.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.ema = WeightAverage(self)
        self.ema.check()
        self.add_callback(self.ema)  # before what evaluates or saves

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self.ema.applied():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with self.ema.applied():
            return super().predict(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.ema.applied():
            super()._save_checkpoint(model, trial)

    def _publish(self, output_dir: Path, name: str, *rest: Any) -> None:
        self.ema.write(self._unsealed(output_dir, name))
        super()._publish(output_dir, name, *rest)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.ema.restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.ema.finish()
        super()._load_best_model()
