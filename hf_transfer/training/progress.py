"""Progress of a run: lines for people, `history.jsonl` for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback, TrainerCallback

from hf_transfer.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from hf_transfer.evaluation.metric_table import LEADING
from hf_transfer.files import say
from hf_transfer.training.cache_stage import format_bytes
from hf_transfer.training.console import RATE, rates_in_words
from hf_transfer.training.pace import Pace, spell
from hf_transfer.training.trainer import TransferTrainer

_WORTH_SAYING = 10  # seconds left

THROUGHPUT, MEMORY = "samples_per_second", "memory_bytes"
FORGETTING = "forgetting_"  # begins the names of what is logged of the checkpoint's own task


class Clock(TrainerCallback):
    """Knows how long training still takes; the first callback, so that the others may ask it."""

    def __init__(self, trainer: TransferTrainer):
        self.trainer, self.pace = trainer, Pace()

    def _stage(self) -> int | None:
        return None if self.trainer.unfreezing is None else self.trainer.unfreezing.stage

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.pace.restart(self._stage(), state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.pace.note(self._stage(), state.global_step)

    def stage_in_words(self) -> str:
        """The stage that trains, for a bar; empty without a plan."""
        plan, stage = self.trainer.plan, self._stage()
        return "" if plan is None or stage is None else f"{plan.stages[stage].name} {stage + 1}/{len(plan.stages)}"

    def left(self) -> str:
        """The time left in words, of the current stage where another follows; empty if it is not known or short."""
        plan, stage, end, where = self.trainer.plan, self._stage(), self.trainer.state.max_steps, ""
        if plan is not None and stage is not None and stage + 1 < len(plan.stages):
            following = plan.stages[stage + 1].start
            if following is None:  # a plateau ends the stage
                return ""
            end, where = following, " of this stage"
        seconds = self.pace.left(end)
        return "" if seconds is None or seconds < _WORTH_SAYING else f"about {spell(seconds)}{where} left"


class Meter(TrainerCallback):
    """Adds to each log of a loss how many examples per second were trained on, and the memory, in bytes.

    Examples are those since the last log of a loss, evaluations included in the time. Memory is the peak allocated on
    the GPU, or the resident memory of the process on a CPU. To be the first callback: whoever is told of a log after it
    (trackers, `history.jsonl`, the console) has both.
    """

    def __init__(self, trainer: TransferTrainer, clock: Callable[[], float] = time.perf_counter):
        self.trainer, self.clock = trainer, clock

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._last = (state.global_step, self.clock())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or "loss" not in logs or not self.trainer.is_in_train:
            return
        step, since = self._last
        self._last = (state.global_step, self.clock())
        examples = (
            (state.global_step - step) * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        )
        on_device = torch.cuda.is_available()
        memory = torch.cuda.max_memory_allocated() if on_device else psutil.Process().memory_info().rss
        logs[THROUGHPUT] = examples / max(self._last[1] - since, 1e-9)
        logs[MEMORY] = float(memory)


def _throughput(logs: Mapping[str, Any], unit: str = " examples/s") -> str:
    """In words; empty where it was not measured."""
    rate = logs.get(THROUGHPUT)
    return "" if rate is None else f"{rate:,.0f}{unit}" if rate >= 10 else f"{rate:.1f}{unit}"


def _memory(logs: Mapping[str, Any]) -> str:
    return format_bytes(logs[MEMORY]) if MEMORY in logs else ""


class Bars(ProgressCallback):
    """transformers' progress bars, with the stage, the time left, and what was logged last, without its log lines."""

    def __init__(self, clock: Clock):
        super().__init__()
        self.clock = clock

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.current_step = state.global_step
        if state.is_world_process_zero:
            layout = "{desc}{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}, {elapsed}{postfix}"
            self._logged = ""
            self.training_bar = tqdm(
                desc=f"{stage}: " if (stage := self.clock.stage_in_words()) else None,
                total=state.max_steps,
                initial=state.global_step,
                dynamic_ncols=True,
                bar_format=layout,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.training_bar is not None:
            self.training_bar.total = state.max_steps  # a budget changes it
            self.training_bar.set_description(self.clock.stage_in_words(), refresh=False)
            shown = ", ".join(filter(None, [self.clock.left(), self._logged]))  # what matters most is cut off last
            self.training_bar.set_postfix_str(shown, refresh=False)
        super().on_step_end(args, state, control)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        is_new = self.prediction_bar is None
        super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)
        if is_new and self.prediction_bar is not None:
            self.prediction_bar.leave = False  # also after training

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if logs and "loss" in logs:
            rate = f"lr {max(self._rates(logs)):.1e}"
            self._logged = ", ".join(
                filter(None, [f"loss {logs['loss']:.4f}", rate, _throughput(logs, "/s"), _memory(logs)])
            )

    @staticmethod
    def _rates(logs: Mapping[str, Any]) -> list[float]:
        """The learning rates of all groups, or the one of a run without a plan."""
        own = [rate for name, rate in logs.items() if name.startswith(RATE)]
        return own or [logs.get("learning_rate") or 0.0]


class Lines(TrainerCallback):
    """One plain line per log, in a terminal or not."""

    def __init__(self, clock: Clock):
        self.trainer, self.clock = clock.trainer, clock

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        line = self._line(state, logs or {}) if self.trainer.is_in_train else ""
        if line and state.is_world_process_zero:
            with tqdm.external_write_mode(file=sys.stdout):
                say(line)

    def _line(self, state: TrainerState, logs: dict[str, Any]) -> str:
        if "loss" in logs:
            return self._of_step(state, logs)
        if "pseudo_labels/round" in logs:
            return _of_round(logs)
        if "probe_l2" in logs:
            return str(self.trainer.solution)
        if f"{FORGETTING}loss" in logs:
            old = {name.removeprefix(FORGETTING): value for name, value in logs.items() if name.startswith(FORGETTING)}
            return (
                f"  old task at epoch {logs.get('epoch', 0):.2f}: {', '.join(f'{n} {v:.4f}' for n, v in old.items())}"
            )
        if "eval_loss" in logs:
            course = self.trainer.course
            worse = f" ({course.drop})" if course is not None and course.drop is not None else ""
            return f"  validation at epoch {logs.get('epoch', 0):.2f}: {shown_metrics(logs, self.trainer.args)}{worse}"
        return ""

    def _of_step(self, state: TrainerState, logs: dict[str, Any]) -> str:
        plan, stage = self.trainer.plan, ""
        if plan is not None:
            index = logs["stage"]
            stage = f"stage {index + 1}/{len(plan.stages)} ({plan.stages[index].name})"
        parts = [
            f"step {state.global_step}/{state.max_steps}",
            f"epoch {logs.get('epoch', 0):.2f}",
            stage,
            f"loss {logs['loss']:.4f}",
            f"grad norm {logs['grad_norm']:.3g}" if "grad_norm" in logs else "",
            f"learning rate {rates_in_words(logs)}",
            f"cache {logs['cache_gain']:.1f}x" if "cache_gain" in logs else "",
            _throughput(logs),
            _memory(logs),
            self.clock.left(),
        ]
        return "  ".join(filter(None, parts))


def _of_round(logs: Mapping[str, Any]) -> str:
    """A round of self-training."""
    examples, labeled = int(logs["pseudo_labels/examples"]), int(logs["pseudo_labels/labeled"])
    came_to = f"{labeled:,} of {examples:,} target examples labeled"
    if logs["pseudo_labels/collapsed"]:
        came_to = "the answers on the target fall into too few classes; training goes on with the source alone"
    return f"  pseudo-labels, round {int(logs['pseudo_labels/round'])}: {came_to}"


def shown_metrics(logs: Mapping[str, Any], args: Any) -> str:
    """The metrics of an evaluation that matter most, and the one that decides; all of them where none is known."""
    values = {
        name.removeprefix("eval_"): value
        for name, value in logs.items()
        if isinstance(value, float) and not name.endswith(("runtime", "per_second", "epoch", "stage"))
    }
    decides = (args.metric_for_best_model or "").removeprefix("eval_")
    kinds = (MULTI_LABEL, REGRESSION, SINGLE_LABEL)  # several labels have an accuracy too
    leading = next((LEADING[kind] for kind in kinds if LEADING[kind][0] in values), tuple(values))
    names = dict.fromkeys([*leading, decides])
    return ", ".join(f"{name} {values[name]:.4f}" for name in names if name in values)


class History(TrainerCallback):
    """`history.jsonl`: one line per log, without gaps or duplicates when a run is resumed."""

    def __init__(self, trainer: TransferTrainer, path: Path):
        self.trainer, self.path = trainer, path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        kept = []
        if state.global_step and self.path.is_file():
            kept = [line for line in self._whole_lines() if json.loads(line)["step"] <= state.global_step]
        temporary = self.path.with_name(f".{self.path.name}.new")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        temporary.replace(self.path)

    def _whole_lines(self) -> list[str]:
        """Without a last line that a kill cut off."""
        text = self.path.read_text(encoding="utf-8")
        return text[: text.rfind("\n") + 1].splitlines()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        counts = self.trainer.is_in_train and ({"loss", "eval_loss", "probe_l2", f"{FORGETTING}loss"} & set(logs))
        if not state.is_world_process_zero or not counts:
            return
        rates = {k.removeprefix(RATE): v for k, v in logs.items() if k.startswith(RATE)}
        entry = {"step": state.global_step, **{k: v for k, v in logs.items() if not k.startswith(RATE)}}
        if "loss" in logs:
            entry["learning_rate"] = rates or logs.get("learning_rate")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
