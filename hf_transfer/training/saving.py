"""A Trainer whose checkpoints are complete or absent: written next to their place, sealed and renamed.

What is overridden, and why that hook:

- `_save_checkpoint`: Trainer writes into a temporary folder, which is then published (`checkpoints`).
- `_get_output_dir`: where Trainer writes.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_transfer.adapters.attach import is_adapted
from hf_transfer.errors import WorkFailed, one_line
from hf_transfer.objectives.objective import Objective
from hf_transfer.plan.plan import Plan
from hf_transfer.training import adalora, adapter_state, checkpoints, penalty_state, run_identity, run_subject
from hf_transfer.training.boundary_cache import BoundaryCache
from hf_transfer.training.choices import Choices
from hf_transfer.training.ddp import on_any_rank
from hf_transfer.training.guards import Guards
from hf_transfer.training.stages import Unfreezing
from hf_transfer.training.timing import Timed

BEST_OF_STAGE = "stage_best.safetensors"
_FAILURES = (OSError, RuntimeError, SafetensorError)  # of writing: torch wraps the disk's error


class Saving(Timed):
    """Crash-safe checkpoints; see `TransferMixin`.

    Attributes:
        guards: watch over the run.
        choices: what this run decided for keys that are `auto`.
        data_keys: keys that produced the training examples, beyond what the training set itself shows. A resumed run
            must have the same.
        chosen: keys that the run set itself, because they were not given. A resumed run goes on with them.
        backbone: identity of the backbone that the run starts from (`run_subject.backbone_facts`), if the caller that
            loaded it sets it; else that of what an adapter leaves frozen, for which no checkpoint has weights.
        self_training: labels the target (`self_training.SelfTraining`); None without pseudo-labels.
        before_training: what the run found out before its first step and does not look for again when it is resumed.
    """

    optimizer: Any
    lr_scheduler: Any
    plan: Plan | None = None
    unfreezing: Unfreezing | None = None
    boundary: BoundaryCache
    target_dataset: Any = None
    self_training: Any = None

    def __init__(self, *args: Any, **kwargs: Any):
        self.objective = Objective()
        super().__init__(*args, **kwargs)
        self.guards = Guards(self)
        self.choices = Choices(self)
        self.data_keys: dict[str, Any] = {}
        self.chosen: dict[str, Any] = {}
        self.backbone: dict[str, Any] | None = None
        self.before_training: dict[str, Any] = {}
        self._data_facts: tuple[Any, dict[str, Any]] = None, {}  # the training set, what is known of it
        self._target_facts: dict[str, Any] | None = None
        self._writes_to: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writes_to) if self._writes_to is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint; a failure leaves the last one as it was."""
        output_dir = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        pushes, self.args.push_to_hub = self.args.push_to_hub, False  # the temporary folder must not be pushed
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        failure: Exception | None = None
        counters, best = self._counters(), self.state.best_model_checkpoint
        adalora.keep_what_acts(self.model)
        try:
            with checkpoints.temporary_folder(output_dir) if self.args.should_save else contextlib.nullcontext():
                self._writes_to = output_dir / checkpoints.SAVING
                try:
                    super()._save_checkpoint(model, trial)
                except _FAILURES as error:
                    failure = error
                failed = self._any_rank(failure is not None)
                if self.state.best_global_step == self.state.global_step:  # Trainer took it for the temporary folder
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
            self._report_failure(output_dir, name, failure)
            return
        if pushes:
            self._push_from_checkpoint(str(output_dir / name))
        self.guards.saved(output_dir / name)

    @staticmethod
    def _unsealed(output_dir: Path, name: str) -> Path:
        """Where a checkpoint is written before it is sealed."""
        return output_dir / checkpoints.SAVING / name

    def _publish(self, output_dir: Path, name: str, counters: dict[str, Any], limit: int | None) -> None:
        folder = self._unsealed(output_dir, name)
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        (folder / checkpoints.STATE).write_text(json.dumps(counters) + "\n", encoding="utf-8")
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            adapter_state.write(self.model, getattr(self, "trainable", ()), folder)
            penalty_state.write(self.objective, folder)
            if self.self_training is not None:
                self.self_training.write(folder)
        if self.unfreezing is not None and self.unfreezing.best is not None:
            save_file(self.unfreezing.best, folder / BEST_OF_STAGE)
        checkpoints.seal(folder)
        checkpoints.publish(folder, output_dir / name)
        checkpoints.rotate(output_dir, limit, self.state.best_model_checkpoint)

    def _report_failure(self, output_dir: Path, name: str, failure: Exception | None) -> None:
        """Say that a checkpoint could not be saved; training continues, unless a signal asked to stop.

        Raises:
            WorkFailed: a signal was received, and there is no new checkpoint to resume from.
        """
        last = next((p.name for p in checkpoints.checkpoints(output_dir)), None)
        why = f" ({one_line(failure, 200)})" if failure is not None else ""
        have = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
        if self.guards.stopping:
            raise WorkFailed(f"{name} could not be saved{why}; {have}.", "Free disk space, then resume from there.")
        if self.is_world_process_zero():
            sys.stderr.write(
                f"hf-transfer: {name} could not be saved{why}; {have}, and training continues. Free disk space or "
                f"check {str(output_dir)!r} before the next checkpoint is due.\n"
            )

    def _any_rank(self, flag: bool) -> bool:
        return on_any_rank([flag], self.args.device)[0] if self.args.world_size > 1 else flag

    def _counters(self) -> dict[str, Any]:
        """The content of `transfer_state.json`."""
        sums = self.accelerator.gather(self._tr_loss.detach().reshape(1)).tolist()
        groups = self.optimizer.param_groups
        return {
            "facts": self._identity(),
            "optimizer": run_identity.optimizer_names(groups, self.named_parameters),
            "loss_since_log": sums,
            "last_logged": self._globalstep_last_logged,
            "total_loss": self._total_loss_scalar,
            "seconds": self.seconds,
            "time_budget": self.time_budget.state(),
            "boundary": self.boundary.decisions,
            "before_training": self.before_training,
            "stage_seconds": {} if self.unfreezing is None else self.unfreezing.seconds,
        }

    @property
    def named_parameters(self) -> dict[str, Any]:
        """The parameters of the model and those of penalties, by name."""
        return dict(self.model.named_parameters()) | self.objective.named_parameters()

    def _identity(self, with_plan: bool = True) -> dict[str, Any]:
        """What must be the same for a run to be resumed; without the plan before the optimizer is made."""
        return run_identity.facts(
            self.args,
            self.time_budget.planned if with_plan else None,
            self.optimizer.param_groups if with_plan else (),
            self.named_parameters,
            self._subject(),
            self.data_keys,
            decided=self.choices.values,
            chosen=self.chosen,
        )

    def _subject(self) -> dict[str, Any]:
        if self._data_facts[0] is not self.train_dataset:
            facts = run_subject.data_facts(self.train_dataset, self.args.label_names)
            self._data_facts = self.train_dataset, facts
        if self.backbone is None and is_adapted(self.model):
            self.backbone = run_subject.backbone_facts(self.model)
        if self.target_dataset is not None and self._target_facts is None:
            self._target_facts = run_subject.data_facts(self.target_dataset, ())
        return {
            **self._data_facts[1],
            "target": self._target_facts,
            "backbone": self.backbone,
            "adapter": run_subject.adapter_facts(self.model),
        }
