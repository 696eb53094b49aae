"""Kills training with SIGKILL at chosen points, resumes it, and compares it with an uninterrupted run, bit for bit.

    python -m tests.crash FOLDER [--random N] [--seed S]

One process imports everything; each run is a fork of it, so that a kill and a resumption cost a second. Prints one JSON
object: {"kills": …, "resumed": …, "differences": [...]}.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hf_transfer import TransferTrainer, checkpoint, resume
from tests.helpers import arguments, copy_state, images, texts, tiny_bert, tiny_timm_resnet

TEXT = {"model": lambda: tiny_bert(layers=2, dropout=0.2), "data": lambda: texts(22)}
CASES: dict[str, dict[str, Any]] = {
    "gradual, accumulation": {
        **TEXT,
        "strategy": "gradual",
        "num_train_epochs": 4,
        "gradient_accumulation_steps": 2,
        "unfreeze_warmup_steps": 2,
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
    "BatchNorm": {
        "model": tiny_timm_resnet,
        "data": lambda: images(16),
        "strategy": "two-phase",
        "num_train_epochs": 2,
    },
    "no plan": {**TEXT, "num_train_epochs": 2, "load_best_model_at_end": True, "save_steps": 2, "eval_steps": 2,
                "eval_strategy": "steps"},
}  # fmt: skip
QUALITY = [0.3, 0.5, 0.5, 0.6, 0.4, 0.2, 0.1]


class Kill:
    """Ends this process with SIGKILL at the n-th passage of a point."""

    def __init__(self, point: str, number: int):
        self.point, self.left = point, number

    def __call__(self, point: str) -> None:
        if point == self.point:
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)


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
    """One run; the end is written to `end.pt`."""
    keys = dict(CASES[case])
    model, data = keys.pop("model")(), keys.pop("data")()
    keys = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "epoch", "logging_steps": 2, **keys}

    def metrics(prediction: Any) -> dict[str, float]:
        kill("evaluation")
        done = sum("eval_loss" in log for log in trainer.state.log_history)
        return {"quality": QUALITY[done % len(QUALITY)]}

    for name in ("seal", "publish", "rotate"):
        ordinary = getattr(checkpoint, name)
        setattr(checkpoint, name, lambda *a, ordinary=ordinary, name=name: (kill(name), ordinary(*a)))
    args = arguments(folder, **keys, save_total_limit=2, on_nonfinite="stop")
    trainer = TransferTrainer(
        model, args, train_dataset=data, eval_dataset=data, compute_metrics=metrics, callbacks=[Points(kill)]
    )
    trainer.train(resume_from_checkpoint="auto" if resumed else None)
    names = resume.optimizer_names(trainer.optimizer.param_groups, dict(model.named_parameters()))
    optimizer = trainer.optimizer.state_dict()["state"]
    timing = ("runtime", "per_second", "total_flos", "train_loss")
    end = {
        "model": copy_state(model),
        "optimizer": {names[i]: state for i, state in optimizer.items()},
        "rates": [g["lr"] for g in trainer.optimizer.param_groups],
        "starts": [s.start for s in trainer.plan.stages] if trainer.plan is not None else [],
        "best": (trainer.state.best_metric, trainer.state.best_global_step),
        "history": [{k: v for k, v in log.items() if not k.endswith(timing)} for log in trainer.state.log_history],
        "rng": torch.random.get_rng_state(),
        "checkpoints": sorted(p.name for p in checkpoint.checkpoints(folder)),
    }
    torch.save(end, folder / "end.pt")


def fork(function: Callable[..., None], *arguments: Any) -> int:
    """Run a function in a forked process; its exit status, negative for a signal."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            sys.stdout = sys.stderr = (Path(arguments[1]) / "log.txt").open("a")
            function(*arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


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


def reference(case: str, folder: Path) -> Any:
    folder.mkdir(parents=True)
    status = fork(train, case, folder, lambda point: None, False)
    assert status == 0, (folder / "log.txt").read_text()[-3000:]
    return torch.load(folder / "end.pt", weights_only=False)


def killed_and_resumed(
    case: str, folder: Path, kills: list[Callable[[str], None]], expected: Any
) -> tuple[int, list[str]]:
    """(kills that struck, differences) of a run that is killed, and resumed, as often as there are `kills`."""
    folder.mkdir(parents=True)
    struck = 0
    for i, kill in enumerate([*kills, lambda point: None]):
        status = fork(train, case, folder, kill, i > 0)
        if status == -signal.SIGKILL:
            struck += 1
        elif status != 0:
            return struck, [f"{case}: a run failed: {(folder / 'log.txt').read_text()[-1500:]}"]
        else:
            break
    found = differences(expected, torch.load(folder / "end.pt", weights_only=False))
    shutil.rmtree(folder)
    return struck, [f"{case}, {[(k.point, k.number) for k in kills if isinstance(k, At)]}: {d}" for d in found[:3]]


class At(Kill):
    def __init__(self, point: str, number: int):
        super().__init__(point, number)
        self.number = number


CHOSEN = {
    "gradual, accumulation": [
        [At("step", 1)], [At("step", 4)], [At("substep", 7)], [At("optimizer", 10)], [At("evaluation", 1)],
        [At("seal", 1)], [At("publish", 2)], [At("rotate", 2)], [At("epoch", 2)], [At("saved", 3)],
        [At("step", 5), At("seal", 0), At("evaluation", 0)],
    ],
    "plateau": [[At("evaluation", 2)], [At("step", 13)], [At("step", 19)], [At("saved", 3)], [At("log", 11)]],
    "BatchNorm": [[At("step", 5)], [At("evaluation", 1)]],
    "no plan": [[At("step", 5)], [At("evaluation", 2)]],
}  # fmt: skip
POINTS = ("step", "substep", "optimizer", "epoch", "log", "saved", "evaluation", "seal", "publish", "rotate")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--random", type=int, default=0, help="so many random kills instead of the chosen ones")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    draw, began = random.Random(options.seed), time.perf_counter()
    expected = {case: reference(case, options.folder / f"reference {case}") for case in CASES}
    kills, runs, found = 0, 0, list[str]()
    planned = [(case, kills) for case, lists in CHOSEN.items() for kills in lists]
    while kills < options.random if options.random else runs < len(planned):
        if options.random:
            case = draw.choice(list(CASES))
            chosen = [At(draw.choice(POINTS), draw.randrange(8)) for _ in range(draw.choice((1, 1, 2)))]
        else:
            case, chosen = planned[runs]
        struck, different = killed_and_resumed(case, options.folder / f"run {runs}", chosen, expected[case])
        kills, runs, found = kills + struck, runs + 1, [*found, *different]
    print(json.dumps({"kills": kills, "runs": runs, "seconds": time.perf_counter() - began, "differences": found}))


if __name__ == "__main__":
    main()
