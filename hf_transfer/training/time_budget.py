"""Ends a run, annealed, at a budget of time (`max_hours`, `max_usd`).

Before the first step every stage is timed on a few examples, which gives their proportions; from then on the steps of
the run itself are timed. Whenever these say that the run would end too late, or could be longer, the main process makes
a re-planning (`plan.timeline`). Re-plannings and measurements are part of every checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_transfer.config.arguments.stopping import budget_seconds, in_keys, wants_budget
from hf_transfer.errors import UserError
from hf_transfer.plan.plan import Plan
from hf_transfer.plan.timeline import Costs, Every, Replan, Timeline
from hf_transfer.training import stage_times
from hf_transfer.training.arguments import TransferArguments
from hf_transfer.training.pace import WARMUP, exactly, log_interval
from hf_transfer.training.running import RunningTrainer
from hf_transfer.training.schedules import name_of

TARGET = 0.985  # fraction of the budget that is aimed at: a step that takes longer than the others must not exceed it
SLACK = 0.01  # fraction of the budget by which the end may move without a re-planning
CHECKS = 20  # the end is checked whenever so large a part (1/CHECKS) of the remaining steps was taken
MEASURED = 3  # steps of a stage after which they are believed
NEWEST = 0.07  # weight of the last step in the average: of those before the last 10, half of the weight is left


@dataclass
class Measured:
    """What was measured up to now; in checkpoints.

    Attributes:
        times: of the stages, before training; None before they are taken.
        scale: how many times longer steps really take.
        stage: that the last steps were in.
        steps: of that stage that were timed.
        mean: seconds of one, without pauses; the last ones count most.
        evaluation: seconds of one; None before the first.
        checkpoint: seconds of one; None before the first.
        next_check: optimizer step after which the end is checked again.
    """

    times: stage_times.StageTimes | None = None
    scale: float = 1.0
    stage: int = -1
    steps: int = 0
    mean: float = 0.0
    evaluation: float | None = None
    checkpoint: float | None = None
    next_check: int = 0

    def note(self, seconds: float) -> None:
        """Take the time of one more step of the stage."""
        self.steps += 1
        self.mean += (seconds - self.mean) * max(1 / self.steps, NEWEST)


class TimeBudget(TrainerCallback):
    """The length of a trainer's run. Without a budget it is the plan's.

    Attributes:
        planned: the plan in planned steps; `trainer.plan` is where its stages are now.
        timeline: the re-plannings so far.
        measured: what was measured so far.
        log_fraction: fraction of all steps between log lines, if the run chose their number itself.
        prepared_since: time of the clock at which preparation began.
        first_step_at: time of the clock at which the first step of this `train()` began.
    """

    def __init__(self, trainer: RunningTrainer):
        self.trainer = trainer
        self.planned: Plan | None = None
        self.timeline = Timeline(0)
        self.measured = Measured()
        self.log_fraction: float | None = None
        self.prepared_since = trainer.clock()
        self.first_step_at: float | None = None
        self._is_followed = False
        self._last: float | None = None  # end of the last step
        self._paused = 0.0  # since then
        self._pause_began: float | None = None
        self._evaluated_at: float | None = None
        self._saved = False

    @property
    def seconds(self) -> float | None:
        """Of training that the budget allows; None without one, and where a head is solved for without steps."""
        args = self.trainer.args
        if not isinstance(args, TransferArguments) or not wants_budget(args) or args.probe_solver == "lbfgs":
            return None
        return budget_seconds(args, args.world_size * max(1, args.n_gpu))

    def check(self) -> None:
        """Raises:
        UserError: what is asked for cannot be kept.
        """
        args, trainer = self.trainer.args, self.trainer
        if not isinstance(args, TransferArguments) or not wants_budget(args):
            return
        if args.max_usd is not None and args.usd_per_hour is None:
            raise UserError(
                f"{args.max_usd:g} dollars are no time as long as the price of this device is not known.",
                "Set usd_per_hour, the price of one device in dollars per hour.",
                key="max_usd",
            )
        if trainer.is_deepspeed_enabled:
            raise UserError(
                f"{in_keys(args)}: under DeepSpeed the length of a run cannot change.", "Use max_steps, DDP or FSDP 2."
            )

    # ---- the plan and the schedule ----

    def follow(self, plan: Plan | None, num_steps: int) -> None:
        """The run is planned anew: `plan` is resolved to `num_steps` optimizer steps."""
        self.planned, self.timeline, self.measured = plan, Timeline(num_steps), Measured()
        self._last, self._paused, self.first_step_at = None, 0.0, None

    def stretched(self, schedule: Callable[[Any], float] | None) -> Callable[[int], float] | None:
        """A schedule of planned steps as one of the steps of the run.

        Raises:
            UserError: the schedule follows a metric, so that it cannot end with the run.
        """
        if self.seconds is None:
            return schedule
        if schedule is None:
            name = name_of(self.trainer.args)
            raise UserError(
                f"lr_scheduler_type: {name} follows a metric, so it cannot anneal to the end of a budget "
                f"({in_keys(self.trainer.args)}).",
                "Use linear, cosine or another schedule of the step.",
            )
        self._is_followed = True
        return lambda step: schedule(self.timeline.position(step))

    def _apply(self, timeline: Timeline) -> None:
        trainer, self.timeline = self.trainer, timeline
        assert self.planned is not None, "a budget makes a plan"
        if not self.planned.waits:
            trainer.plan = timeline.moved(self.planned)
        trainer.state.max_steps = timeline.length
        trainer.state.compute_steps(trainer.args, timeline.length)
        if self.log_fraction is not None:
            trainer.state.logging_steps = log_interval(self.log_fraction, timeline.length)

    def expected(self) -> float | None:
        """Seconds of training that the plan takes here, from a timed batch of each stage; at most the budget.

        None where that is not known: of a stream, under FSDP, without a plan, and where a head is solved for.
        """
        args, plan = self.trainer.args, self.planned
        if plan is None or args.probe_solver == "lbfgs":
            return None
        times = stage_times.take(self.trainer, plan)
        if times.head is None:
            return None
        self.measured.times = times
        self.trainer.state.compute_steps(args, self.timeline.length)
        seconds = self._costs().rest(self.timeline, plan, 0)
        self.measured = Measured()
        return seconds if self.seconds is None else min(seconds, self.seconds)

    # ---- checkpoints ----

    def state(self) -> dict[str, Any] | None:
        """For a checkpoint."""
        if self.seconds is None:
            return None
        return {"replans": [asdict(r) for r in self.timeline.replans], "measured": asdict(self.measured)}

    def recall(self, state: dict[str, Any] | None) -> None:
        """Go on as the run that wrote a checkpoint; called once the plan is resolved, before training begins."""
        if state is None or self.seconds is None:
            return
        times = state["measured"].pop("times")
        self.measured = Measured(**state["measured"], times=times and stage_times.StageTimes(**times))
        self._apply(Timeline(self.timeline.planned, tuple(Replan(**r) for r in state["replans"])))

    # ---- what the rest takes ----

    def _costs(self) -> Costs:
        measured, args, state = self.measured, self.trainer.args, self.trainer.state
        times, epoch = measured.times, self.trainer.steps_per_epoch
        assert times is not None, "taken when training begins"
        steps = [seconds * measured.scale for seconds in times.steps]
        if measured.steps >= MEASURED:
            steps[measured.stage] = measured.mean
        evaluates, saves = _value(args.eval_strategy), _value(args.save_strategy)
        intervals = {"epoch": epoch, "steps": state.eval_steps}
        evaluations = Every(intervals.get(evaluates), args.eval_delay * (epoch if evaluates == "epoch" else 1))
        checkpoints = Every({"epoch": epoch, "steps": state.save_steps or None}.get(saves))
        evaluation = times.evaluation * measured.scale if measured.evaluation is None else measured.evaluation
        checkpoint = times.checkpoint if measured.checkpoint is None else measured.checkpoint
        saving = evaluations if saves == "best" else checkpoints
        return Costs(steps, [(evaluations, evaluation), (saving, checkpoint)])

    def _replan(self, step: int) -> None:
        """Check the end after `step` optimizer steps; called by all processes at the same steps."""
        (length,) = broadcast_object_list([self._better_length(step)])
        if length is not None:
            self._apply(self.timeline.then(Replan(step, length)))
        self.measured.next_check = step + max(1, (self.timeline.length - step) // CHECKS)

    def _better_length(self, step: int) -> int | None:
        """Optimizer steps of the run that ends at the budget; None if that is close to what it has."""
        trainer, seconds = self.trainer, self.seconds
        assert seconds is not None and self.planned is not None
        if trainer.args.device.type != "cpu":
            torch.accelerator.synchronize()  # else the time is that of what was asked for, not of what was done
        plan = trainer.plan if self.planned.waits else self.planned
        assert plan is not None
        costs, now = self._costs(), self.timeline
        length = costs.longest(now, plan, step, TARGET * seconds - trainer.seconds)
        moves = costs.rest(now.then(Replan(step, length)), plan, step) - costs.rest(now, plan, step)
        return None if abs(moves) < SLACK * seconds else length

    # ---- the callback ----

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Raises:
        UserError: the budget is too small, or the schedule is not ours.
        """
        seconds = self.seconds
        if seconds is None or self.planned is None:
            return
        if not self._is_followed:
            raise UserError(
                f"{in_keys(self.trainer.args)}: the trainer was given a scheduler of its own, which cannot follow a "
                "budget.",
                "Leave it out, and set lr_scheduler_type.",
            )
        if self.measured.times is None:
            (times,) = broadcast_object_list([stage_times.take(self.trainer, self.planned)])
            self.measured.times = times
            _check_head(self.trainer, times.head, seconds, self.timeline.planned)
            self._check_cache(seconds)

    def _check_cache(self, seconds: float) -> None:
        """Recording takes an epoch, which does not pay in a run that becomes too short for it."""
        assert self.measured.times is not None and self.planned is not None
        rest = self._costs().rest(self.timeline, self.planned, 0)
        if stage_times.turn_off_cache(self.trainer, min(1.0, seconds / max(rest, 1e-9))):
            self.measured.times = self.measured.times.without_cache()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.first_step_at is None:
            self.first_step_at = self.trainer.clock()
            if self.seconds is not None and state.global_step == 0:
                self._replan(0)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._last is None:  # the batches that a resumed run skips are no part of a step
            self._last, self._paused = self.trainer.clock(), 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.seconds is None:
            return
        step, measured, plan = state.global_step, self.measured, self.trainer.plan
        assert plan is not None and measured.times is not None and self._last is not None
        now, stage = self.trainer.clock(), plan.at(step - 1)
        if stage != measured.stage:
            measured.stage, measured.steps = stage, 0
        if step - (plan.stages[stage].start or 0) > WARMUP:
            measured.note(now - self._last - self._paused)
            measured.scale = measured.mean / max(measured.times.steps[stage], 1e-9)
        self._last, self._paused = now, 0.0
        if step < self.timeline.length and (measured.steps == MEASURED or step >= measured.next_check):
            self._replan(step)

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """Within the context the trainer logs, evaluates and saves, if it is time to."""
        self._pause_began, self._evaluated_at, self._saved = self.trainer.clock(), None, False
        yield
        now = self.trainer.clock()
        if self._saved:
            self.measured.checkpoint = now - (self._evaluated_at or self._pause_began)
        self._paused += now - self._pause_began
        self._pause_began = None

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._pause_began is not None:
            self._evaluated_at = self.trainer.clock()
            self.measured.evaluation = self._evaluated_at - self._pause_began

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._saved = True

    # ---- results ----

    def to_dict(self) -> dict[str, Any] | None:
        """For `results.json`; None without a budget."""
        args = self.trainer.args
        if not isinstance(args, TransferArguments) or not wants_budget(args):
            return None
        return {
            "max_hours": args.max_hours,
            "max_usd": args.max_usd,
            "usd_per_hour": args.usd_per_hour,
            "seconds": self.seconds,
            "preparation_seconds": (self.first_step_at or self.prepared_since) - self.prepared_since,
            "steps": self.trainer.state.global_step,
            "planned_steps": self.timeline.planned,
            "replans": [asdict(replan) for replan in self.timeline.replans],
        }


def note(args: Any, devices: int) -> str:
    """The budget, for display before training; empty without one."""
    if not wants_budget(args):
        return ""
    if args.probe_solver == "lbfgs":
        return f"Budget: {in_keys(args)} has no effect: the head is solved for, without training steps."
    seconds = budget_seconds(args, devices)
    assert seconds is not None
    price = f" at ${args.usd_per_hour:g} per hour and device" if args.max_usd is not None else ""
    return (
        f"Budget: {in_keys(args)}{price}: training ends after {exactly(seconds)} at the latest. Stages and schedule "
        "follow the measured time per step; the epochs above are the upper limit."
    )


def _value(strategy: Any) -> str:
    return str(getattr(strategy, "value", strategy))


def _check_head(trainer: RunningTrainer, head: float | None, seconds: float, planned: int) -> None:
    """Raises:
    UserError: the budget is too small for one epoch of the head.
    """
    if head is None:
        return
    needed = head * min(trainer.steps_per_epoch, planned)
    if needed > seconds:
        raise UserError(
            f"{in_keys(trainer.args)} is {exactly(seconds)} of training, and one epoch of the head alone takes about "
            f"{exactly(needed)} on this machine.",
            "Allow more, or train on fewer examples with max_train_samples.",
        )
