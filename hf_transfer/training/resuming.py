"""A Trainer whose resumed run equals the uninterrupted one.

What is overridden, and why that hook:

- `train`: "auto" takes the newest complete checkpoint; signals are handled (`guards`).
- `_load_optimizer_and_scheduler`: is it the same run (`run_identity`)? The optimizer's state is loaded by parameter
  name, not by position.
- `log`: the mean loss of the whole run, of which Trainer knows only the part since it was resumed.
- `_run_epoch`: nothing is trained if a run is resumed at its last step.
- `training_step`, `_get_grad_norm`, `get_train_dataloader`: the guards see loss, gradient norm and examples.
- `get_train_dataloader`: on several processes our samplers learn the epoch that is resumed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from hf_transfer.errors import UserError
from hf_transfer.training import checkpoints, run_identity
from hf_transfer.training.ema import Averaged
from hf_transfer.training.guards import record
from hf_transfer.training.saving import BEST_OF_STAGE


class Resumable(Averaged):
    """Exact resumption; see `TransferMixin`.

    Attributes:
        steps_per_epoch: optimizer steps per epoch, once the loader is known.
        resumed_at: optimizer steps that the resumed run had done before this `train()`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.steps_per_epoch = self.resumed_at = 0
        self._resumed_state: dict[str, Any] | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`.

        Args:
            resume_from_checkpoint: a folder; "auto" for the newest complete checkpoint, if there is one; True for the
                newest, which must exist. Incomplete checkpoints are renamed.
            *args: as Trainer's.
            **kwargs: as Trainer's.

        Raises:
            UserError: the checkpoint is incomplete, or belongs to another run.
            WorkFailed: a loss or gradient is NaN or infinite, and `on_nonfinite` says to stop.
            Interrupted: a signal was received, and a checkpoint was saved.
        """
        eval_on_start = self.args.eval_on_start
        try:
            checkpoint = self._find_checkpoint(resume_from_checkpoint)
            self._resumes = None if checkpoint is None else Path(checkpoint)
            if checkpoint is not None:
                self.choices.recall(checkpoint)
                self._refuse_another_run(checkpoint)
            self.args.eval_on_start &= checkpoint is None  # the run was evaluated when it started
            with self.guards.listening():
                output = super().train(checkpoint, *args, **kwargs)
            return output._replace(training_loss=self._mean_loss)
        finally:
            self.args.eval_on_start = eval_on_start

    def _find_checkpoint(self, wanted: str | bool | None) -> str | None:
        output_dir = Path(str(self.args.output_dir))
        with self.args.main_process_first(desc="checkpoints"):
            if self.args.should_save:
                checkpoints.clear_leftovers(output_dir)
            if not wanted:
                return None
            if wanted is not True and wanted != "auto":
                return str(checkpoints.checked(str(wanted)))
            checkpoints.refuse_weights_only(output_dir)
            newest, unusable = checkpoints.newest_valid(output_dir)
            for folder, why in unusable if self.args.should_save else ():
                sys.stderr.write(f"hf-transfer: {checkpoints.pass_over(folder, why)}\n")
        if newest is None and wanted is True:
            raise ValueError(f"No valid checkpoint found in output directory ({output_dir})")
        return None if newest is None else str(newest)

    def _refuse_another_run(self, checkpoint: str) -> None:
        """Raises:
        UserError: what is known before anything is loaded differs from the run that wrote the checkpoint.
        """
        state = run_identity.read(checkpoint)
        if state is not None:
            run_identity.refuse_another(state["facts"], self._identity(with_plan=False))

    @property
    def _mean_loss(self) -> float:
        return self._total_loss_scalar / max(self.state.global_step, 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:
            logs["train_loss"] = self._mean_loss
        super().log(logs, start_time)

    # ---- optimizer and counters ----

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        """Check that it is the same run, and load the optimizer by name; learning rates follow from the step."""
        state = run_identity.read(folder) if folder is not None else None
        if folder is None or state is None:
            self._load_trainers_own(folder)
            return
        notes = run_identity.compare(state["facts"], self._identity(), getattr(self.args, "allow_changed_plan", False))
        for note in notes if self.is_world_process_zero() else ():
            sys.stderr.write(f"hf-transfer: {note}\n")
        self._resumed_state = state | {"folder": folder}
        self.boundary.recall(state.get("boundary"))
        self.time_budget.recall(state.get("time_budget"))
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(folder)
            return
        self._load_optimizer_by_name(folder, state["optimizer"])
        if not self._rates_follow_from_the_step:
            saved = torch.load(Path(folder) / SCHEDULER_NAME, weights_only=True)
            self.lr_scheduler.load_state_dict(saved)
        best = Path(folder) / BEST_OF_STAGE
        if self.unfreezing is not None and best.is_file():
            self.unfreezing.best = load_file(best)

    def _load_optimizer_by_name(self, folder: str, names: list[str]) -> None:
        saved = torch.load(Path(folder) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        groups = self.optimizer.param_groups
        state_dict = self.optimizer.state_dict()
        state_dict["state"] = run_identity.by_name(
            saved, names, run_identity.optimizer_names(groups, self.named_parameters)
        )
        if not self._rates_follow_from_the_step:
            pairs = zip(saved["param_groups"], state_dict["param_groups"], strict=True)
            state_dict["param_groups"] = [{**then, "params": now["params"]} for then, now in pairs]
        self.optimizer.load_state_dict(state_dict)

    @property
    def _rates_follow_from_the_step(self) -> bool:
        """Whether learning rates are recomputed instead of loaded: the plan may have changed."""
        return self.unfreezing is not None and isinstance(self.lr_scheduler, LambdaLR)

    def _load_trainers_own(self, folder: str | None) -> None:
        """Load a checkpoint of plain Trainer or of an earlier version: by position, if its groups are the plan's.

        Raises:
            UserError: its groups are other ones.
        """
        if self.plan is None or folder is None:
            super()._load_optimizer_and_scheduler(folder)
            return
        groups = None
        path = Path(folder) / OPTIMIZER_NAME
        if path.is_file():
            groups = torch.load(path, map_location="cpu", weights_only=True)["param_groups"]
        expected = _layout(self.optimizer.param_groups)
        if groups is None or not all("layers" in g for g in groups) or _layout(groups) != expected:
            raise UserError(
                f"resume_from_checkpoint: {folder!r} was made under another plan (other groups, learning rates or "
                "weight decay).",
                "Resume with the keys that it was started with, or start a new run from its weights.",
            )
        super()._load_optimizer_and_scheduler(folder)

    def continue_counting(self) -> None:
        """Called when training begins, after Trainer has reset its counters."""
        self._began, self._seconds_before, self._is_counting = self.clock(), 0.0, True
        self.resumed_at = self.state.global_step
        state, self._resumed_state = self._resumed_state, None
        if state is None:
            return
        output_dir = Path(super()._get_output_dir(None))
        newest = next((p.name for p in checkpoints.checkpoints(output_dir)), None)
        if self.args.should_save and newest == Path(state["folder"]).name:  # the run was killed before it did this
            checkpoints.rotate(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
        sums, rank = state["loss_since_log"], self.args.process_index
        own_sum = sums[rank] if len(sums) == self.args.world_size else sum(sums) / len(sums)
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:  # no epoch will load it
            self._load_rng_state(state["folder"])
        self._tr_loss += own_sum
        self._globalstep_last_logged = state["last_logged"]
        self._total_loss_scalar = state["total_loss"]
        self._seconds_before = state["seconds"]
        if self.unfreezing is not None:
            self.unfreezing.seconds_before = {int(k): v for k, v in state["stage_seconds"].items()}

    def stop_counting(self) -> None:
        """Called when training ends."""
        self._seconds_before, self._is_counting = self.seconds, False

    def roll_back(self) -> None:
        """Restore weights and optimizer of the newest checkpoint; the run continues with the data after this step."""
        newest, _ = checkpoints.newest_valid(Path(self._get_output_dir(None)))
        (path,) = broadcast_object_list([str(newest) if newest else None]) if self.args.world_size > 1 else (newest,)
        if path is None:
            return
        self._load_from_checkpoint(str(path))
        state = run_identity.read(path)
        if state is not None:
            self._load_optimizer_by_name(str(path), state["optimizer"])
        if self.unfreezing is not None and self.unfreezing.stage is not None:
            self.boundary.record_again(self.unfreezing.stage)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer would take one more step if it is resumed at its last one, or where early stopping had ended it."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # of a stream, Trainer counts on endless epochs
            return None
        return super()._run_epoch(*args, **kwargs)

    # ---- what the guards see ----

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        values = super().set_initial_training_values(*args, **kwargs)
        self.steps_per_epoch = values[1]
        return values

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.guards.note_loss(loss)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        self.guards.note_norm(norm)
        return norm

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        _expose_sampler(loader)
        self.guards.recorder = record(loader) if self.guards.policy else None
        return loader


def _expose_sampler(loader: Any) -> None:
    """Let accelerate find the sampler when several processes resume within an epoch, to set its epoch.

    accelerate then looks for it behind the skipped batches, and looks past each process's share of the batches only if
    that share names the sampler, which accelerate ensures for its own sampler alone. Any other sampler would start with
    the order of the first epoch.
    """
    shard = getattr(loader, "batch_sampler", None)
    sampler = getattr(getattr(shard, "batch_sampler", None), "sampler", None)
    if hasattr(sampler, "set_epoch") and not hasattr(shard, "sampler"):
        shard.sampler = sampler  # type: ignore[union-attr]


def _layout(groups: list[Any]) -> list[Any]:
    """What a plan decides about an optimizer's groups."""
    return [(list(g["layers"]), list(g["rates"]), g["weight_decay"], len(g["params"])) for g in groups]
