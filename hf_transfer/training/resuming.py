"""A Trainer whose interrupted run goes on as if it had never stopped.

What is overridden, and why that hook:

- `_save_checkpoint`, `_get_output_dir`: checkpoints are written beside, sealed and renamed (`checkpoint`).
- `_load_from_checkpoint`, `_load_best_model`: weights that were saved under other names than the model's.
- `_load_optimizer_and_scheduler`: is it the same run (`resume`); the optimizer's state by name, not by number.
- `train`: "auto" finds the newest checkpoint that is whole; signals are listened to (`guards`).
- `log`: the mean loss is the whole run's, of which Trainer knows the part after the resumption only.
- `_run_epoch`: nothing is trained where a run is resumed at its last step.
- `training_step`, `_get_grad_norm`, `get_train_dataloader`: the guards see loss, gradient and examples.
- `get_train_dataloader`: samplers of ours learn the epoch that is resumed on several processes.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from hf_transfer.errors import UserError, WorkFailed, one_line
from hf_transfer.plan.plan import Plan
from hf_transfer.training import checkpoints, run_identity
from hf_transfer.training.boundary_cache import BoundaryCache
from hf_transfer.training.ddp import on_any_rank
from hf_transfer.training.guards import Guards, record
from hf_transfer.training.stages import Unfreezing

BEST_OF_STAGE = "stage_best.safetensors"
_FAILURES = (OSError, RuntimeError, SafetensorError)  # what writing raises: torch wraps the disk's error


class Resumable(Trainer if TYPE_CHECKING else object):  # type: ignore[misc]
    """Crash-safe checkpoints and exact resumption; see `TransferMixin`.

    Attributes:
        guards: watches over the run.
        steps_per_epoch: optimizer steps, once the loader is known.
        resumed_at: optimizer steps that were done before this `train()`, in the run that it goes on with.
        data_keys: keys that made the training examples, beyond what the training set itself shows: a run that is
            resumed must have the same.
    """

    optimizer: Any
    lr_scheduler: Any
    plan: Plan | None = None
    unfreezing: Unfreezing | None = None
    boundary: BoundaryCache

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.guards = Guards(self)
        self.steps_per_epoch = self.resumed_at = 0
        self.data_keys: dict[str, Any] = {}
        self._writes_to: Path | None = None
        self._continued: dict[str, Any] | None = None
        self._seconds_before = self._began = 0.0

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's. `resume_from_checkpoint` may be "auto": the newest checkpoint that is whole, where there is
        one; True wants one. Broken ones are set aside.

        Raises:
            UserError: the checkpoint is not whole, or of another run.
            WorkFailed: a loss or gradient that is no number, under a policy that stops.
            Interrupted: a signal came, and a checkpoint was saved.
        """
        starts_evaluated = self.args.eval_on_start
        try:
            found = self._find_checkpoint(resume_from_checkpoint)
            self.args.eval_on_start &= found is None  # the run was evaluated when it started
            with self.guards.listening():
                output = super().train(found, *args, **kwargs)
            return output._replace(training_loss=self._mean_loss)
        finally:
            self.args.eval_on_start = starts_evaluated

    def _find_checkpoint(self, wanted: str | bool | None) -> str | None:
        output_dir = Path(str(self.args.output_dir))
        with self.args.main_process_first(desc="checkpoints"):
            if self.args.should_save:
                checkpoints.clear_leftovers(output_dir)
            if not wanted:
                return None
            if wanted is not True and wanted != "auto":
                return str(checkpoints.checked(str(wanted)))
            found, broken = checkpoints.newest_valid(output_dir)
            for folder, why in broken if self.args.should_save else ():
                place = checkpoints.set_aside(folder)
                sys.stderr.write(f"hf-transfer: {folder.name} is not whole ({why}); set aside as {place.name}.\n")
        if found is None and wanted is True:
            raise ValueError(f"No valid checkpoint found in output directory ({output_dir})")
        return None if found is None else str(found)

    @property
    def seconds(self) -> float:
        """Wall time of training, with what was before the run was resumed."""
        return self._seconds_before + (time.perf_counter() - self._began if self._began else 0.0)

    @property
    def _mean_loss(self) -> float:
        return self._total_loss_scalar / max(self.state.global_step, 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:
            logs["train_loss"] = self._mean_loss
        super().log(logs, start_time)

    # ---- saving ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writes_to) if self._writes_to is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's checkpoint, written beside, sealed and renamed. A failure leaves the last one as it was."""
        output_dir = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        pushes, self.args.push_to_hub = self.args.push_to_hub, False  # what is beside has not its name yet
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        failure: Exception | None = None
        counters, best = self._counters(), self.state.best_model_checkpoint
        try:
            with checkpoints.beside(output_dir) if self.args.should_save else contextlib.nullcontext():
                self._writes_to = output_dir / checkpoints.SAVING
                try:
                    super()._save_checkpoint(model, trial)
                except _FAILURES as error:
                    failure = error
                failed = self._any_rank(failure is not None)
                if self.state.best_global_step == self.state.global_step:  # Trainer looked where it wrote
                    self.state.best_model_checkpoint = str(output_dir / name)
                if self.args.should_save and not failed:
                    try:
                        self._publish(output_dir, name, counters, limit)
                    except _FAILURES as error:
                        failure = error
                failed = self._any_rank(failure is not None)
        finally:
            self._writes_to = None
            self.args.push_to_hub, self.args.save_total_limit = pushes, limit
        if failed:
            self.state.best_model_checkpoint = best
            self._not_saved(output_dir, name, failure)
            return
        if pushes:
            self._push_from_checkpoint(str(output_dir / name))
        self.guards.saved(output_dir / name)

    def _publish(self, output_dir: Path, name: str, counters: dict[str, Any], limit: int | None) -> None:
        folder = output_dir / checkpoints.SAVING / name
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        (folder / checkpoints.STATE).write_text(json.dumps(counters) + "\n", encoding="utf-8")
        if self.unfreezing is not None and self.unfreezing.best is not None:
            save_file(self.unfreezing.best, folder / BEST_OF_STAGE)
        checkpoints.seal(folder)
        checkpoints.publish(folder, output_dir / name)
        checkpoints.rotate(output_dir, limit, self.state.best_model_checkpoint)

    def _not_saved(self, output_dir: Path, name: str, failure: Exception | None) -> None:
        """A run is worth more than a checkpoint: say so, and go on; stop only where a signal wants it.

        Raises:
            WorkFailed: a signal has come, and there is nothing new to go on from.
        """
        last = next((p.name for p in checkpoints.checkpoints(output_dir)), None)
        why = f" ({one_line(failure, 200)})" if failure is not None else ""
        have = f"the last one is {last}" if last else "there is none yet"
        if self.guards.stopping:
            raise WorkFailed(f"{name} could not be saved{why}; {have}.", "Make room, then resume from there.")
        if self.is_world_process_zero():
            sys.stderr.write(
                f"hf-transfer: {name} could not be saved{why}; {have}, and training goes on. Make room or see to "
                f"{str(output_dir)!r} before the next one is due.\n"
            )

    def _any_rank(self, flag: bool) -> bool:
        return on_any_rank([flag], self.args.device)[0] if self.args.world_size > 1 else flag

    def _counters(self) -> dict[str, Any]:
        """What `transfer_state.json` holds."""
        sums = self.accelerator.gather(self._tr_loss.detach().reshape(1)).tolist()
        groups = self.optimizer.param_groups
        return {
            "facts": self._facts(),
            "optimizer": run_identity.optimizer_names(groups, dict(self.model.named_parameters())),
            "loss_since_log": sums,
            "last_logged": self._globalstep_last_logged,
            "total_loss": self._total_loss_scalar,
            "seconds": self.seconds,
            "boundary": self.boundary.decisions,
            "stage_seconds": {} if self.unfreezing is None else self.unfreezing.seconds,
        }

    def _facts(self) -> dict[str, Any]:
        named = dict(self.model.named_parameters())
        groups = self.optimizer.param_groups
        return run_identity.facts(self.args, self.plan, groups, named, self.train_dataset, self.data_keys)

    # ---- resuming ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_renamed(resume_from_checkpoint, self.model if model is None else model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_renamed(str(self.state.best_model_checkpoint), self.model):
            super()._load_best_model()

    def _load_renamed(self, folder: str, model: nn.Module) -> bool:
        """Load a checkpoint whose weights have not the model's names; whether it was one.

        `save_pretrained` writes some models (ViT) under the names of their hub checkpoints. Trainer does not find
        those, and would go on from the weights that the model has, with a warning.
        """
        path = Path(folder) / SAFE_WEIGHTS_NAME
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if sharded or not isinstance(model, PreTrainedModel) or not path.is_file():
            return False
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) <= set(model.state_dict()):
                return False
        with torch.random.fork_rng(devices=[]):
            model.load_state_dict(type(model).from_pretrained(folder, config=model.config).state_dict())
        return True

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        """See that it is the same run; the optimizer's state by name. Rates follow from the step."""
        state = run_identity.read(folder) if folder is not None else None
        if folder is None or state is None:
            self._load_trainers_own(folder)
            return
        notes = run_identity.compare(state["facts"], self._facts(), getattr(self.args, "allow_changed_plan", False))
        for note in notes if self.is_world_process_zero() else ():
            sys.stderr.write(f"hf-transfer: {note}\n")
        self._continued = state | {"folder": folder}
        self.boundary.recall(state.get("boundary"))
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
        ours = self.optimizer.state_dict()
        ours["state"] = run_identity.by_name(
            saved, names, run_identity.optimizer_names(groups, dict(self.model.named_parameters()))
        )
        if not self._rates_follow_from_the_step:
            pairs = zip(saved["param_groups"], ours["param_groups"], strict=True)
            ours["param_groups"] = [{**then, "params": now["params"]} for then, now in pairs]
        self.optimizer.load_state_dict(ours)

    @property
    def _rates_follow_from_the_step(self) -> bool:
        """Then they are computed anew, and not loaded: the plan may have changed."""
        return self.unfreezing is not None and isinstance(self.lr_scheduler, LambdaLR)

    def _load_trainers_own(self, folder: str | None) -> None:
        """A checkpoint of plain Trainer, or of an earlier version: by position, where the groups are the plan's."""
        if self.plan is None or folder is None:
            super()._load_optimizer_and_scheduler(folder)
            return
        ours, groups = _shape_of(self.optimizer), None
        path = Path(folder) / OPTIMIZER_NAME
        if path.is_file():
            groups = torch.load(path, map_location="cpu", weights_only=True)["param_groups"]
        if groups is None or not all("layers" in g for g in groups) or _shape_of_groups(groups) != ours:
            raise UserError(
                f"resume_from_checkpoint: {folder!r} was made under another plan (other groups, rates or decay).",
                "Resume with the keys that it was started with, or start a new run from its weights.",
            )
        super()._load_optimizer_and_scheduler(folder)

    def continue_counting(self) -> None:
        """Called when training begins, after Trainer has set its counters to nothing."""
        self._began, self._seconds_before = time.perf_counter(), 0.0
        self.resumed_at = self.state.global_step
        state, self._continued = self._continued, None
        if state is None:
            return
        output_dir = Path(super()._get_output_dir(None))
        newest = next((p.name for p in checkpoints.checkpoints(output_dir)), None)
        if self.args.should_save and newest == Path(state["folder"]).name:  # killed before it did this
            checkpoints.rotate(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
        sums, rank = state["loss_since_log"], self.args.process_index
        mine = sums[rank] if len(sums) == self.args.world_size else sum(sums) / len(sums)
        if self.state.global_step >= self.state.max_steps:  # no epoch will do it
            self._load_rng_state(state["folder"])
        self._tr_loss += mine
        self._globalstep_last_logged = state["last_logged"]
        self._total_loss_scalar = state["total_loss"]
        self._seconds_before = state["seconds"]
        if self.unfreezing is not None:
            self.unfreezing.seconds_before = {int(k): v for k, v in state["stage_seconds"].items()}

    def stop_counting(self) -> None:
        """Called when training ends."""
        self._seconds_before, self._began = self.seconds, 0.0

    def roll_back(self) -> None:
        """Weights and optimizer of the newest checkpoint; the run goes on with the data after this step."""
        found, _ = checkpoints.newest_valid(Path(self._get_output_dir(None)))
        (path,) = broadcast_object_list([str(found) if found else None]) if self.args.world_size > 1 else (found,)
        if path is None:
            return
        self._load_from_checkpoint(str(path))
        state = run_identity.read(path)
        if state is not None:
            self._load_optimizer_by_name(str(path), state["optimizer"])

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer takes one step more where it is resumed at its last one."""
        if self.state.global_step >= self.state.max_steps:
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
        _tell_epochs(loader)
        self.guards.recorder = record(loader) if self.guards.policy else None
        return loader


def _tell_epochs(loader: Any) -> None:
    """Let a sampler know the epoch also where several processes resume within one.

    accelerate then looks for it behind the part that is skipped, and past each process's share of the batches only
    where that share names the sampler: which accelerate sees to for its own sampler alone. Another one would begin
    with the order of the first epoch.
    """
    share = getattr(loader, "batch_sampler", None)
    sampler = getattr(getattr(share, "batch_sampler", None), "sampler", None)
    if hasattr(sampler, "set_epoch") and not hasattr(share, "sampler"):
        share.sampler = sampler  # type: ignore[union-attr]


def _shape_of(optimizer: Any) -> list[Any]:
    return _shape_of_groups(optimizer.param_groups)


def _shape_of_groups(groups: list[Any]) -> list[Any]:
    """What of an optimizer's groups a plan decides."""
    return [(list(g["layers"]), list(g["rates"]), g["weight_decay"], len(g["params"])) for g in groups]
