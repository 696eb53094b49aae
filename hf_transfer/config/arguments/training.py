"""Our keys of a training run, which `TransferArguments` adds to transformers' `TrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_transfer.config.arguments.adaptation import AdaptationArguments
from hf_transfer.config.arguments.averaging import AveragingArguments
from hf_transfer.config.arguments.boundary import BoundaryArguments
from hf_transfer.config.arguments.bucketing import BucketingArguments
from hf_transfer.config.arguments.calibration import CalibrationArguments
from hf_transfer.config.arguments.early_stopping import EarlyStoppingArguments
from hf_transfer.config.arguments.forgetting import ForgettingArguments
from hf_transfer.config.arguments.guards import GuardArguments
from hf_transfer.config.arguments.loss import LossArguments
from hf_transfer.config.arguments.machine import MachineArguments
from hf_transfer.config.arguments.plan import PlanArguments
from hf_transfer.config.arguments.precision import PrecisionArguments
from hf_transfer.config.arguments.probe import ProbeArguments
from hf_transfer.config.arguments.schedule import ScheduleArguments
from hf_transfer.config.arguments.watching import WatchingArguments


@dataclass
class TrainingKeys(
    PlanArguments,
    ProbeArguments,
    BoundaryArguments,
    BucketingArguments,
    LossArguments,
    AdaptationArguments,
    CalibrationArguments,
    EarlyStoppingArguments,
    AveragingArguments,
    ForgettingArguments,
    WatchingArguments,
    GuardArguments,
    ScheduleArguments,
    PrecisionArguments,
    MachineArguments,
):
    """Joined here once: what checks keys needs them without torch, the trainer with it."""
