"""Progress of a run: lines for people, `history.jsonl` for programs."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback, TrainerCallback

from hf_transfer.files import say
from hf_transfer.training.trainer import TransferTrainer

RATE = "learning_rate/"


class Bars(ProgressCallback):
    """transformers' progress bars without its log lines, which `Lines` prints."""

    def on_log(self, *_: Any, **__: Any) -> None:
        pass


class Lines(TrainerCallback):
    """One plain line per log, in a terminal or not."""

    def __init__(self, trainer: TransferTrainer):
        self.trainer = trainer

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
        plan = self.trainer.plan
        if "loss" in logs:
            stage = ""
            if plan is not None:
                index = logs["stage"]
                stage = f"  stage {index + 1}/{len(plan.stages)} ({plan.stages[index].name})"
            norm = f"  grad norm {logs['grad_norm']:.3g}" if "grad_norm" in logs else ""
            cache = f"  cache {logs['cache_gain']:.1f}x" if "cache_gain" in logs else ""
            return (
                f"step {state.global_step}/{state.max_steps}  epoch {logs.get('epoch', 0):.2f}{stage}  "
                f"loss {logs['loss']:.4f}{norm}  learning rate {logs['learning_rate']:.2e}{cache}"
            )
        if "probe_l2" in logs:
            return str(self.trainer.solution)
        if "eval_loss" in logs:
            hidden = ("runtime", "per_second", "epoch", "stage")
            values = [
                f"{k.removeprefix('eval_')} {v:.4f}"
                for k, v in logs.items()
                if isinstance(v, float) and not k.endswith(hidden)
            ]
            return f"  validation at epoch {logs.get('epoch', 0):.2f}: {', '.join(values)}"
        return ""


class History(TrainerCallback):
    """`history.jsonl`: one line per log, without gaps or duplicates when a run is resumed."""

    def __init__(self, trainer: TransferTrainer, path: Path):
        self.trainer, self.path = trainer, path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._last = (state.global_step, time.perf_counter())
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
        counts = self.trainer.is_in_train and ({"loss", "eval_loss", "probe_l2"} & set(logs))
        if not state.is_world_process_zero or not counts:
            return
        rates = {k.removeprefix(RATE): v for k, v in logs.items() if k.startswith(RATE)}
        entry = {"step": state.global_step, **{k: v for k, v in logs.items() if not k.startswith(RATE)}}
        if "loss" in logs:
            entry["learning_rate"] = rates or logs.get("learning_rate")
            entry |= self._throughput(args, state)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _throughput(self, args: TrainingArguments, state: TrainerState) -> dict[str, float]:
        """Examples per second since the last logged loss, evaluations included, and memory in bytes.

        Memory is the peak allocated on the GPU, or the resident memory of the process on a CPU.
        """
        step, now = self._last
        self._last = (state.global_step, time.perf_counter())
        examples = (
            (state.global_step - step) * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        )
        on_device = torch.cuda.is_available()
        memory = torch.cuda.max_memory_allocated() if on_device else psutil.Process().memory_info().rss
        return {"samples_per_second": examples / max(self._last[1] - now, 1e-9), "memory_bytes": float(memory)}
