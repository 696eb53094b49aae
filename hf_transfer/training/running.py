"""The interface of a `TransferTrainer` to its parts, so that none of them imports the trainer."""

from __future__ import annotations

from typing import Any, Protocol

from hf_transfer.layers.groups import LayerGroup
from hf_transfer.objectives.objective import Objective
from hf_transfer.plan.plan import Plan


class RunningTrainer(Protocol):
    """A `transformers.Trainer` with a plan; the attributes are those of `TransferMixin` and of Trainer."""

    args: Any
    model: Any
    model_wrapped: Any
    accelerator: Any
    state: Any
    train_dataset: Any
    eval_dataset: Any
    optimizer: Any
    lr_scheduler: Any
    is_in_train: bool
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    _tr_loss: Any

    plan: Plan | None
    shows_plan: bool
    shown_plan: Plan | None
    layer_groups: tuple[LayerGroup, ...]
    trainable: tuple[str, ...]
    keeps_head: bool
    anchors: Any
    replay: Any
    pretrained_statistics: frozenset[str]
    num_steps: int
    target_dataset: Any
    labeled_targets: int
    targets: Any
    aligned: Any
    self_training: Any
    aligned_layer: str
    alignment: Any
    time_budget: Any
    steps_per_epoch: int
    unfreezing: Any
    ema: Any
    boundary: Any
    objective: Objective
    choices: Any
    solution: Any
    solved_on: Any
    solves_again: bool
    guards: Any
    bucketing: Any
    clock: Any
    seconds: float
    _train_batch_size: int
    _main_input: str
    _global_batch: int

    def log(self, logs: dict[str, float]) -> None: ...
    def add_callback(self, callback: Any) -> None: ...
    def is_world_process_zero(self) -> bool: ...
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any: ...
    def compute_loss_context_manager(self) -> Any: ...
    def length_sampler(self) -> Any: ...
    def _no_decay(self, model: Any) -> set[str]: ...
    def _prepare_inputs(self, inputs: Any) -> Any: ...
    def stop_counting(self) -> None: ...
    def continue_counting(self) -> None: ...
    def roll_back(self, *args: Any, **kwargs: Any) -> Any: ...
