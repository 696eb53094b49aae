"""`TransferArguments`: transformers' `TrainingArguments` and the keys of this package."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from hf_transfer.config.arguments.adaptation import check as check_adaptation
from hf_transfer.config.arguments.adaptation import weight_of
from hf_transfer.config.arguments.adapter import with_adapter
from hf_transfer.config.arguments.averaging import check as check_averaging
from hf_transfer.config.arguments.bucketing import check as check_bucketing
from hf_transfer.config.arguments.early_stopping import check as check_early_stopping
from hf_transfer.config.arguments.forgetting import check as check_forgetting
from hf_transfer.config.arguments.loss import check as check_loss
from hf_transfer.config.arguments.plan import PlanArguments, learning_rate_of
from hf_transfer.config.arguments.schedule import check as check_schedule
from hf_transfer.config.arguments.training import TrainingKeys
from hf_transfer.config.fields import settings_of, wrong_kinds, wrong_values
from hf_transfer.errors import UserErrors
from hf_transfer.evaluation.metric_table import LOSS
from hf_transfer.plan import checks, probe_checks
from hf_transfer.training import precision
from hf_transfer.training.best_metric import set_direction
from hf_transfer.training.schedules import SCHEDULES

_NOT_HERE = "`hf-transfer train` and `fine_tune`, which have the data, find one for auto."


@dataclass
class TransferArguments(TrainingKeys, TrainingArguments):
    """`TrainingArguments`, the keys of a Plan (`PlanArguments`), of the loss (`LossArguments`), of the guards.

    With no plan key set, `TransferTrainer` computes exactly what `Trainer` computes. A `learning_rate` that is not
    given is the strategy's: 1e-3 for a linear probe, 5e-4 with an adapter, else `TrainingArguments`' own 5e-5.
    `stages` sets `num_train_epochs` to the sum of its epochs. `lr_scheduler_type` also takes the names in
    `schedules.SCHEDULES`. `greater_is_better`, where it is not given, is the direction of a metric that this package
    computes (smaller is better for `mae`, `rmse` and `ece`), else Trainer's. `early_stopping_patience` adds the
    callback that ends training; as in transformers, `load_best_model_at_end` says which weights are then kept.

    Raises:
        UserErrors: all problems of the plan keys at once.
    """

    def __post_init__(self) -> None:
        given = {**vars(self), "freeze": [self.freeze] if isinstance(self.freeze, str) else self.freeze}
        if wrong := list(wrong_kinds(given, TrainingKeys)):  # the other checks go through them
            raise UserErrors(wrong)
        self.adapter = with_adapter(self.strategy, self.adapter)
        self.domain_adaptation_weight = weight_of(self.domain_adaptation_weight, self.domain_adaptation)
        rate = self.learning_rate
        self.learning_rate = learning_rate_of(self.learning_rate, self.strategy, self.adapter)
        words = {"true": True, "false": False}
        self.length_bucketing = words.get(str(self.length_bucketing).lower(), self.length_bucketing)
        self.calibrate = words.get(str(self.calibrate).lower(), self.calibrate)
        self.refit = words.get(str(self.refit).lower(), self.refit)
        schedule = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
        problems = [f"learning_rate: {rate!r} is not a number. {_NOT_HERE}"] if isinstance(rate, str) else []
        problems += [*checks.check(self), *check_loss(self), *probe_checks.check(self), *check_bucketing(vars(self))]
        problems += [*check_early_stopping(vars(self)), *check_schedule(vars(self)), *check_averaging(vars(self))]
        problems += [*check_forgetting(vars(self)), *check_adaptation(vars(self))]
        own = {name: about for name, about in settings_of(type(self)).items() if name not in settings_of(PlanArguments)}
        problems += wrong_values({**vars(self), "lr_scheduler_type": schedule}, own)
        # Where there is no accelerator this changes nothing for one process; several launched ones would, without it,
        # each train alone and say nothing.
        self.use_cpu |= not torch.accelerator.is_available()
        problems += filter(None, [self._set_precision()])
        if problems:
            raise UserErrors(problems)
        if self.stages is not None:
            self.num_train_epochs = float(sum(s["epochs"] for s in self.stages))
        if self.early_stopping_patience is not None and vars(self)["metric_for_best_model"] is None:
            self.metric_for_best_model = LOSS
        if schedule in SCHEDULES:  # TrainingArguments knows transformers' own only
            self.lr_scheduler_type = SchedulerType.CONSTANT
        self.has_own_direction = self.greater_is_better is not None  # else Trainer's rule or ours fills it in
        super().__post_init__()
        if schedule in SCHEDULES:
            self.lr_scheduler_type = schedule
        set_direction(self, self.has_own_direction)

    def _set_precision(self) -> str:
        """Set `fp16` and `bf16` as `mixed_precision` says; why it is refused, empty if it is not."""
        wanted, device = self.mixed_precision, precision.device_type(self.use_cpu)
        if wanted is None:
            return ""
        wanted = precision.best(device) if wanted == "auto" else wanted
        self.fp16, self.bf16 = wanted == precision.FP16, wanted == precision.BF16
        return precision.refusal(wanted, device)
