"""Kills training with SIGKILL at chosen points, resumes it, and compares it with an uninterrupted run, bit for bit.

    python -m tests.crash FOLDER [--random N] [--seed S]

Each run is a fork of a process that has imported everything, or two that talk by gloo, so that a kill and a resumption
cost a second. Prints one JSON object, what `strike` returns.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hf_transfer import TransferTrainer
from hf_transfer.training import checkpoints, contrastive, run_identity
from tests import warm
from tests.helpers import (
    arguments,
    copy_state,
    images,
    knowing_bert,
    pad,
    ragged_texts,
    separable_texts,
    texts,
    tiny_bert,
    tiny_timm_resnet,
)

TEXT = {"model": lambda: tiny_bert(layers=2, dropout=0.2), "data": lambda: texts(22)}
CASES: dict[str, dict[str, Any]] = {
    "gradual, accumulation": {
        **TEXT,
        "strategy": "gradual",
        "num_train_epochs": 4,
        "gradient_accumulation_steps": 2,
        "unfreeze_warmup_steps": 1,
        "layer_lr_decay": 0.7,
    },
    "plateau": {
        **TEXT,
        "strategy": "gradual",
        "num_train_epochs": 6,
        "unfreeze_trigger": "plateau",
        "metric_for_best_model": "quality",
        "save_steps": 4,
    },
    "LoRA": {
        **TEXT,
        "strategy": "gradual",
        "num_train_epochs": 3,
        "groups_per_unfreeze": 2,
        "adapter": "lora",
        "lora_plus_ratio": 4,
        "lora_dropout": 0.1,
    },
    "contrastive stage": {
        **TEXT,
        "strategy": "two-phase",
        "head_init": "probe",
        "contrastive_epochs": 3,
        "num_train_epochs": 2,
        "gradient_accumulation_steps": 2,
    },
    "average": {**TEXT, "strategy": "gradual", "num_train_epochs": 4, "ema_decay": 0.7, "load_best_model_at_end": True,
                "metric_for_best_model": "quality", "save_strategy": "epoch"},
    "domain adaptation": {
        **TEXT,
        "target": lambda: texts(11, seed=5),
        "strategy": "gradual",
        "num_train_epochs": 3,
        "domain_adaptation": "dann",
        "gradient_accumulation_steps": 2,
    },
    "self-training": {
        "model": lambda: knowing_bert(dropout=0.2),
        "data": lambda: separable_texts(22),
        "target": lambda: separable_texts(11, seed=5),
        "strategy": "gradual",
        "num_train_epochs": 3,
        "domain_adaptation": "pseudo-label",
    },
    "BatchNorm": {
        "model": tiny_timm_resnet,
        "data": lambda: images(16),
        "strategy": "two-phase",
        "num_train_epochs": 2,
    },
    "no plan": {**TEXT, "num_train_epochs": 2, "load_best_model_at_end": True, "save_steps": 2, "eval_steps": 2,
                "eval_strategy": "steps"},
    "batches of one length": {
        **TEXT,
        "data": lambda: ragged_texts(30),
        "data_collator": pad,
        "num_train_epochs": 2,
        "eval_strategy": "no",
        "gradient_accumulation_steps": 2,
        "length_bucketing": True,
    },
}  # fmt: skip
QUALITY = [0.3, 0.5, 0.5, 0.6, 0.4, 0.2, 0.1]
LOG = "log.txt"  # what the ranks of a run say


class At:
    """Sends a signal to this process at the n-th passage of a point, counted from 0, if it is of that rank."""

    def __init__(self, point: str, number: int, rank: int = 0, sends: int = signal.SIGKILL):
        self.point, self.number, self.rank, self.sends = point, number, rank, sends
        self.left = number

    def __call__(self, point: str) -> None:
        if point == self.point and self.rank == int(os.environ.get("RANK", "0")):
            self.left -= 1
            if self.left == -1:
                os.kill(os.getpid(), self.sends)

    def __repr__(self) -> str:
        return f"{signal.Signals(self.sends).name} at {self.point} {self.number} of rank {self.rank}"


class Points(TrainerCallback):
    def __init__(self, kill: Callable[[str], None]):
        self.kill = kill

    def on_step_begin(self, args, state, control, **kwargs):
        self.kill("step")

    def on_substep_end(self, args, state, control, **kwargs):
        self.kill("substep")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.kill("optimizer")

    def on_epoch_end(self, args, state, control, **kwargs):
        self.kill("epoch")

    def on_log(self, args, state, control, **kwargs):
        self.kill("log")

    def on_save(self, args, state, control, **kwargs):
        self.kill("saved")


def train(case: str, folder: Path, kill: Callable[[str], None], resumed: bool) -> None:
    """One run; the end is written to `end-RANK.pt`."""
    keys = dict(CASES[case])
    model, data, collator = keys.pop("model")(), keys.pop("data")(), keys.pop("data_collator", None)
    target = keys.pop("target", lambda: None)()
    keys = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "epoch", "logging_steps": 2, **keys}

    def metrics(prediction: Any) -> dict[str, float]:
        kill("evaluation")
        done = sum("eval_loss" in log for log in trainer.state.log_history)
        return {"quality": QUALITY[done % len(QUALITY)]}

    for name in ("seal", "publish", "rotate"):
        ordinary = getattr(checkpoints, name)
        setattr(checkpoints, name, lambda *a, ordinary=ordinary, name=name: (kill(name), ordinary(*a)))
    backward = contrastive.backward
    contrastive.backward = lambda *a: (kill("contrast"), backward(*a))[1]
    args = arguments(folder, **keys, save_total_limit=2, on_nonfinite="stop")
    trainer = TransferTrainer(
        model, args, train_dataset=data, eval_dataset=data, data_collator=collator, compute_metrics=metrics,
        target_dataset=target, callbacks=[Points(kill)],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint="auto" if resumed else None)
    names = run_identity.optimizer_names(trainer.optimizer.param_groups, trainer.named_parameters)
    optimizer = trainer.optimizer.state_dict()["state"]
    timing = ("runtime", "seconds", "per_second", "total_flos")
    end = {
        "model": copy_state(trainer.model) | {n: p.detach().clone() for n, p in trainer.named_parameters.items()},
        "optimizer": {names[i]: state for i, state in optimizer.items()},
        "rates": [g["lr"] for g in trainer.optimizer.param_groups],
        "starts": [s.start for s in trainer.plan.stages] if trainer.plan is not None else [],
        "best": (trainer.state.best_metric, trainer.state.best_global_step),
        "history": [{k: v for k, v in log.items() if not k.endswith(timing)} for log in trainer.state.log_history],
        "rng": torch.random.get_rng_state(),
        "checkpoints": sorted(p.name for p in checkpoints.checkpoints(folder)),
    }
    torch.save(end, folder / f"end-{args.process_index}.pt")


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two ends differ, by so much as a bit."""
    if isinstance(one, dict):
        keys = set(one) ^ set(other)
        found = [f"{path}/{key} is in one only" for key in keys]
        return found + [d for k in set(one) & set(other) for d in differences(one[k], other[k], f"{path}/{k}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{path}: {len(one)} and {len(other)} entries"]
        return [d for i, (a, b) in enumerate(zip(one, other, strict=True)) for d in differences(a, b, f"{path}/{i}")]
    if torch.is_tensor(one):
        return [] if torch.equal(one, other) else [f"{path}: tensors differ"]
    return [] if one == other else [f"{path}: {one} {other}"]


def ends(folder: Path, processes: int) -> list[Any]:
    found = [torch.load(folder / f"end-{rank}.pt", weights_only=False) for rank in range(processes)]
    assert not any(differences(found[0]["model"], other["model"]) for other in found), "the ranks differ"
    return found


def reference(case: str, folder: Path, processes: int) -> Any:
    folder.mkdir(parents=True)
    statuses = warm.ranks(processes, partial(train, case, folder, lambda point: None, False), folder / LOG)
    assert not any(statuses), (folder / LOG).read_text()[-3000:]
    return ends(folder, processes)


def interrupted_and_resumed(case: str, folder: Path, strikes: list[At], expected: Any) -> tuple[list[At], list[str]]:
    """(what struck, differences) of a run that is interrupted, and resumed, as often as there are `strikes`."""
    folder.mkdir(parents=True)
    struck, processes = [], len(expected)
    for i, strike in enumerate([*strikes, None]):
        run = partial(train, case, folder, strike or (lambda point: None), i > 0)
        statuses = warm.ranks(processes, run, folder / LOG)
        if strike is not None and (-signal.SIGKILL in statuses or set(statuses) == {128 + strike.sends}):
            struck.append(strike)
        elif any(statuses):
            why = (folder / LOG).read_text()[-1500:]
            return struck, [f"{case} on {processes}, {strikes}: a run ended with {statuses}: {why}"]
        else:
            break
    found = differences(expected, ends(folder, processes))
    shutil.rmtree(folder)
    return struck, [f"{case} on {processes}, {strikes}: {d}" for d in found[:3]]


TERM, INT = signal.SIGTERM, signal.SIGINT
Strikes = dict[tuple[str, int], list[list[At]]]
# Each point of a run is struck once, each kind of run at least once.
CHOSEN: Strikes = {
    ("gradual, accumulation", 1): [
        [At("substep", 7)], [At("optimizer", 10)], [At("publish", 2)],
        [At("step", 5), At("seal", 0), At("evaluation", 0)], [At("substep", 5, sends=TERM)],
    ],
    ("plateau", 1): [[At("log", 11)]],
    ("LoRA", 1): [[At("seal", 2)]],
    ("contrastive stage", 1): [[At("contrast", 2), At("step", 4)]],
    ("average", 1): [[At("evaluation", 2)]],
    ("BatchNorm", 1): [[At("seal", 2), At("rotate", 0)]],
    ("no plan", 1): [[At("epoch", 1)]],
    ("gradual, accumulation", 2): [[At("step", 5, rank=1)], [At("step", 3, rank=1, sends=TERM)]],
    ("batches of one length", 2): [[At("step", 3)]],
    ("plateau", 2): [[At("saved", 2)], [At("step", 7, rank=1, sends=INT)]],
}  # fmt: skip
# The slow tests strike here too.
MORE: Strikes = {
    ("gradual, accumulation", 1): [
        [At("step", 1)], [At("step", 4)], [At("evaluation", 1)], [At("seal", 1)], [At("epoch", 2)], [At("saved", 3)],
        [At("rotate", 2)],
    ],
    ("average", 1): [[At("step", 9)]],
    ("plateau", 1): [[At("evaluation", 2)], [At("step", 13)], [At("step", 19)], [At("saved", 3)]],
    ("LoRA", 1): [[At("step", 8)]],
    ("BatchNorm", 1): [[At("step", 5)], [At("evaluation", 1)]],
    ("no plan", 1): [[At("step", 5)], [At("evaluation", 2)]],
    ("gradual, accumulation", 2): [
        [At("step", 5)], [At("seal", 1)], [At("evaluation", 2, rank=1)], [At("step", 4, sends=INT)],
    ],
    ("average", 2): [[At("step", 7, rank=1)]],
    ("domain adaptation", 1): [[At("substep", 7)]],
    ("domain adaptation", 2): [[At("epoch", 1, rank=1)]],
    ("self-training", 2): [[At("evaluation", 1)]],
    ("contrastive stage", 2): [[At("contrast", 1, rank=1), At("step", 3)]],
    ("no plan", 2): [[At("step", 4, rank=1)]],
    ("plateau", 2): [[At("step", 8, rank=1)], [At("publish", 2)], [At("step", 7, rank=1, sends=TERM)]],
}  # fmt: skip
POINTS = (
    "contrast", "step", "substep", "optimizer", "epoch", "log", "saved", "evaluation", "seal", "publish", "rotate",
)  # fmt: skip


def random_strikes(seed: int) -> Iterator[tuple[str, int, list[At]]]:
    """A case, a number of processes, and one or two kills, without end."""
    draw = random.Random(seed)
    while True:
        case, processes = draw.choice(list(CASES)), draw.choice((1, 1, 1, 2))
        places = [(draw.choice(POINTS), draw.randrange(8)) for _ in range(draw.choice((1, 1, 2)))]
        yield case, processes, [At(point, number, draw.randrange(processes)) for point, number in places]


def listed(strikes: Strikes) -> Iterator[tuple[str, int, list[At]]]:
    """Those of a table, one after the other."""
    for (case, processes), lists in strikes.items():
        for several in lists:
            yield case, processes, several


def strike(folder: Path, planned: Iterator[tuple[str, int, list[At]]], enough: int | None = None) -> dict[str, Any]:
    """What came of the planned runs, or of as many as have `enough` kills; before the first of its kind, each is run
    twice without any.

    Returns:
        {"kills": …, "signals": …, "runs": …, "repeated": …, "seconds": …, "differences": [...]}
    """
    began, expected, struck = time.perf_counter(), dict[tuple[str, int], Any](), list[At]()
    runs, found = 0, list[str]()
    while enough is None or len(struck) < enough:
        if (one := next(planned, None)) is None:
            break
        case, processes, strikes = one
        if (case, processes) not in expected:
            whole = reference(case, folder / f"reference {case} {processes}", processes)
            again = reference(case, folder / f"again {case} {processes}", processes)
            found += [f"{case} on {processes}, the same twice: {d}" for d in differences(whole, again)[:3]]
            expected[case, processes] = whole
        new, different = interrupted_and_resumed(case, folder / f"run {runs}", strikes, expected[case, processes])
        struck, runs, found = [*struck, *new], runs + 1, [*found, *different]
    kills = sum(one.sends == signal.SIGKILL for one in struck)
    counts = {"kills": kills, "signals": len(struck) - kills, "runs": runs, "repeated": len(expected)}
    return {**counts, "seconds": time.perf_counter() - began, "differences": found}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--random", type=int, default=0, help="so many random kills instead of the chosen ones")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warm.settle()
    planned = random_strikes(options.seed) if options.random else listed(CHOSEN)
    print(json.dumps(strike(options.folder, planned, options.random or None)))


if __name__ == "__main__":
    main()
