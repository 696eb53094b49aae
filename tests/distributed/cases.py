"""Run in several processes, by `accelerate launch` or as it launches: staged unfreezing, compared between ranks and
with one process.

Writes a JSON file for the quick or the slow cases, {case: what was seen}, and rank 0's weights. What was broken without
us, each seen by taking the fix out:
- a reducer that is not built anew at each unfreeze leaves what thaws to each rank alone (ranks differ by 0.1), or waits
  for gradients that never come;
- a parameter that the loss does not reach (a mask token) makes a reducer without traversal raise an error;
- BatchNorm in train mode: the ranks' statistics differ where they are frozen, evaluated and saved;
- a plateau seen by each rank on its own: a metric that differs in its last bit thaws on one rank only, and they hang.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_transfer import TransferTrainer
from hf_transfer.data.replay import Replay
from hf_transfer.layers.identity import identity_of
from hf_transfer.objectives.fisher import Fisher, estimate
from hf_transfer.training.ddp import data_parallel, on_any_rank
from hf_transfer.training.linear_probe import solve_again
from tests import warm
from tests.helpers import (
    CHECKPOINTING,
    arguments,
    copy_state,
    images,
    knowing_bert,
    pad,
    ragged_texts,
    separable_texts,
    soft_texts,
    texts,
    tiny_bert,
    tiny_timm_resnet,
    tiny_vit,
    with_statistics,
)

PLANS: dict[str, dict[str, Any]] = {
    "two-phase": {"strategy": "two-phase", "num_train_epochs": 2},
    "gradual": {"strategy": "gradual", "num_train_epochs": 4},
    "stages": {
        "stages": [{"epochs": 1, "train": "head"}, {"epochs": 1, "train": 1}, {"epochs": 1, "train": "all"}],
        "stage_lr_decay": 0.5,
    },
}
TEXT = {"model": lambda: tiny_bert(layers=2).double(), "data": lambda: texts(32)}
IMAGES = {"model": lambda: tiny_vit(layers=2).double(), "data": lambda: images(32)}
# Any two values of these meet in one of the quick cases; the other products are slow.
KINDS = {"text": TEXT, "image": IMAGES}
QUICK = {
    ("text", "two-phase", 1, False),
    ("image", "two-phase", 2, True),
    ("text", "gradual", 1, True),
    ("image", "gradual", 2, False),
    ("text", "stages", 2, False),
    ("image", "stages", 1, True),
}
PRODUCT = {
    f"{kind} {plan} accumulation {steps}{' checkpointing' if checkpointing else ''}": (kind, plan, steps, checkpointing)
    for kind, plan, steps, checkpointing in itertools.product(KINDS, PLANS, (1, 2), (False, True))
}
SLOW = {name for name, choice in PRODUCT.items() if choice not in QUICK}
# Equal to one process within rounding: no dropout, no live BatchNorm, SGD, float64.
EXACT: dict[str, dict[str, Any]] = {
    name: {**KINDS[kind], **PLANS[plan], "gradient_accumulation_steps": steps, CHECKPOINTING: checkpointing}
    for name, (kind, plan, steps, checkpointing) in PRODUCT.items()
}
# Half of the layers do not train at all, the others keep the checkpoint's statistics.
BATCHNORM = [name for name, module in tiny_timm_resnet().named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
EXACT["frozen BatchNorm"] = {
    "model": lambda: with_statistics(tiny_timm_resnet()).double(),
    "data": lambda: images(16),
    "strategy": "gradual",
    "groups_per_unfreeze": 2,
    "num_train_epochs": 4,
    "freeze": BATCHNORM[::2],
    "batchnorm": "frozen",
}


class Noting:
    """`pad`, with the texts of each batch that it was given."""

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []

    def __call__(self, examples: list[Any]) -> dict[str, torch.Tensor]:
        self.batches.append([example["input_ids"] for example in examples])
        return pad(examples)

    def of_all_ranks(self) -> list[Any]:
        """`batches` of each rank."""
        if not dist.is_initialized():
            return [self.batches]
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, self.batches)
        return found


class WithIdle(type(tiny_bert())):  # type: ignore[misc]
    """A BERT with a parameter that no loss reaches."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.bert.embeddings.mask = torch.nn.Parameter(torch.ones(3))


def with_idle() -> Any:
    torch.manual_seed(0)
    return WithIdle(tiny_bert(layers=2).config).double()


def knows_soft() -> Any:
    model = tiny_bert(layers=2).double()
    model.config.problem_type = "single_label_classification"
    return model


# 20 examples in batches of 8: the last group of micro-batches is short.
EXACT["class weights"] = {
    **TEXT,
    **PLANS["gradual"],
    "gradient_accumulation_steps": 2,
    "class_weights": {"LABEL_0": 0.25, "LABEL_1": 4.0},
}
EXACT["soft labels, short"] = {
    **TEXT,
    **PLANS["gradual"],
    "model": knows_soft,
    "data": lambda: soft_texts(20),
    "gradient_accumulation_steps": 2,
    "class_weights": {"LABEL_1": 3.0},
    "label_smoothing_factor": 0.1,
}
EXACT["balanced"] = {
    **TEXT,
    **PLANS["gradual"],
    "balanced_sampling": True,
    "class_weights": "auto",
    "focal_gamma": 1.0,
}
EXACT["batches of one length"] = {
    **TEXT,
    **PLANS["gradual"],
    "data": lambda: ragged_texts(48),
    "collator": Noting,
    "gradient_accumulation_steps": 2,
    "length_bucketing": True,
    "train_sampling_strategy": "random",
}
# The frozen part is computed once; one process computes it at every step. Each rank records a share.
for kept in ("memory", "disk"):
    EXACT[f"replayed from {kept}"] = {
        **TEXT,
        **PLANS["gradual"],
        "data": lambda: ragged_texts(32),
        "collator": lambda: pad,
        "gradient_accumulation_steps": 2 if kept == "memory" else 1,
        "boundary_cache": kept,
        "per_device_eval_batch_size": 3,
    }
# A mean over the examples, unlike MMD and CORAL, which each rank computes of its own. The last batch is short.
EXACT["dann"] = {
    **TEXT,
    **PLANS["gradual"],
    "gradient_accumulation_steps": 2,
    "target": lambda: texts(11, seed=5),
    "domain_adaptation": "dann",
    "discriminator_learning_rate": 0.1,
}
# Each rank labels its share of the target, and all train on the same labels. The last batch is short.
EXACT["pseudo-label"] = {
    "model": lambda: knowing_bert().double(),
    "data": lambda: separable_texts(32),
    **PLANS["gradual"],
    "gradient_accumulation_steps": 2,
    "target": lambda: separable_texts(11, seed=5),
    "per_device_eval_batch_size": 3,
    "domain_adaptation": "pseudo-label",
}
EXACT["adapter"] = {**TEXT, **PLANS["gradual"], "adapter": "lora", "lora_plus_ratio": 4}
EXACT["average"] = {**TEXT, **PLANS["gradual"], "ema_decay": 0.8, "eval_strategy": "epoch"}


def fisher_of(model: Any) -> Fisher:
    """As each process of a run computes it."""
    examples = [{name: torch.tensor([values]) for name, values in row.items()} for row in texts(6, seed=7)]
    values = estimate(model, examples, "true", "single_label_classification", 0)
    return Fisher(values, identity_of(model)["tensors"], {"kind": "true", "examples": 6})


# Terms that depend on no example, one that does, and earlier examples in every batch.
EXACT["against forgetting"] = {
    **TEXT,
    **PLANS["gradual"],
    "data": lambda: texts(20),
    "replay": lambda: Replay(texts(6, seed=7), 0.3),
    "gradient_accumulation_steps": 2,
    "l2_sp_alpha": 0.5,
    "fisher": fisher_of,
    "ewc_lambda": 1e4,  # the gradients of a random model are small
    "distillation_alpha": 0.5,
}
EXACT["a parameter that nothing reaches"] = {**TEXT, "model": with_idle, **PLANS["gradual"]}


def noisy(prediction: Any) -> dict[str, float]:
    """A metric that differs between ranks: on rank 0 it stands still, on the others it grows."""
    noisy.calls += 1  # type: ignore[attr-defined]
    rank = int(os.environ.get("RANK", "0"))
    return {"made_up": 1.0 + rank * noisy.calls}  # type: ignore[attr-defined]


noisy.calls = 0  # type: ignore[attr-defined]


def own_clock() -> Any:
    """A clock that goes faster on higher ranks, by a second or more whenever it is asked."""
    ticks = itertools.count(step=1.0 + int(os.environ.get("RANK", "0")))
    return lambda: next(ticks)


LOOSE: dict[str, dict[str, Any]] = {
    "time budget": {**TEXT, "strategy": "gradual", "num_train_epochs": 10, "max_hours": 60 / 3600, "clock": own_clock},
    "adam and dropout": {
        "model": lambda: tiny_bert(layers=2, dropout=0.3),
        "data": lambda: texts(32),
        "optim": "adamw_torch",
        **PLANS["gradual"],
    },
    "live BatchNorm": {
        "model": tiny_timm_resnet,
        "data": lambda: images(32),
        "strategy": "gradual",
        "num_train_epochs": 3,
        "eval_strategy": "epoch",
        "groups_per_unfreeze": 3,
    },
    "averaged BatchNorm": {
        "model": tiny_timm_resnet,
        "data": lambda: images(32),
        "strategy": "two-phase",
        "num_train_epochs": 2,
        "eval_strategy": "epoch",
        "ema_decay": 0.8,
    },
    "plateau": {
        **TEXT,
        "strategy": "gradual",
        "num_train_epochs": 5,
        "unfreeze_trigger": "plateau",
        "eval_strategy": "epoch",
        "metric_for_best_model": "made_up",
        "compute_metrics": noisy,
    },
    "mmd": {
        **TEXT,
        **PLANS["gradual"],
        "target": lambda: texts(11, seed=5),
        "domain_adaptation": "mmd",
        "domain_adaptation_schedule": "constant",
    },
    "traversal on request": {**TEXT, **PLANS["two-phase"], "ddp_find_unused_parameters": True},
    "compiled": {**TEXT, **PLANS["two-phase"], "torch_compile": True, "torch_compile_backend": "eager"},
}


class Watch(TrainerCallback):
    """Differences between ranks at each stage's end and evaluation, and what the reducer handles at each step."""

    def __init__(self, trainer: TransferTrainer):
        self.trainer, self.stage, self.compared = trainer, 0, 0
        self.worst, self.walks, self.surplus = 0.0, False, 0

    def compare(self) -> None:
        self.compared += 1
        for value in copy_state(self.trainer.model).values() if dist.is_initialized() else ():
            other = value.clone()
            dist.broadcast(other, src=0)
            self.worst = max(self.worst, (other - value).abs().max().item())

    def on_step_begin(self, args, state, control, **kwargs):
        if self.trainer.unfreezing.stage != self.stage:
            self.stage = self.trainer.unfreezing.stage
            self.compare()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        ddp = data_parallel(self.trainer.model_wrapped)
        if ddp is not None:
            self.walks |= ddp.find_unused_parameters
            reduced = ddp._get_ddp_logging_data()["total_parameter_size_bytes"]
            with_gradient = [p for p in self.trainer.model.parameters() if p.grad is not None]
            self.surplus = max(self.surplus, reduced - sum(p.numel() * p.element_size() for p in with_gradient))

    def on_evaluate(self, args, state, control, **kwargs):
        self.compare()

    on_train_end = on_evaluate


# Not trained in steps at all: ranks compute features of their shares, and one solves for all.
SOLVED: dict[str, Any] = {"strategy": "linear-probe", "probe_solver": "lbfgs", "per_device_eval_batch_size": 3}


def solved(folder: Path) -> tuple[list[float], TransferTrainer]:
    """The head of each rank, then the one that is solved for again on more examples, and the trainer."""
    data = {"train_dataset": texts(21), "eval_dataset": texts(10, seed=1)}
    trainer = TransferTrainer(tiny_bert(layers=2), arguments(folder, **SOLVED), **data)
    trainer.solves_again = True
    trainer.train()
    first = _head(trainer)
    solve_again(trainer, data["eval_dataset"])
    return first + _head(trainer), trainer


def _head(trainer: TransferTrainer) -> list[float]:
    return torch.cat([p.detach().ravel() for p in trainer.model.classifier.parameters()]).tolist()


def double(examples: list[Any]) -> dict[str, Any]:
    batch = default_data_collator(examples)
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def run(case: str, folder: Path) -> tuple[dict[str, Any], TransferTrainer]:
    """The same global batch of 8 whatever the number of processes."""
    keys = dict((EXACT | LOOSE)[case])
    model, data, metrics = keys.pop("model")(), keys.pop("data")(), keys.pop("compute_metrics", None)
    clock, replay, fisher = keys.pop("clock", None), keys.pop("replay", None), keys.pop("fisher", None)
    if fisher is not None:
        keys["ewc_fisher_file"] = str(folder / f"fisher-{os.environ.get('RANK', '0')}.safetensors")
        fisher(model).save(Path(keys["ewc_fisher_file"]))
    target = keys.pop("target", lambda: None)()
    collator = keys.pop("collator", lambda: double if model.dtype == torch.float64 else default_data_collator)()
    if "WORLD_SIZE" not in os.environ:
        keys.pop("boundary_cache", None)
    micro_batches = int(os.environ.get("WORLD_SIZE", "1")) * keys.get("gradient_accumulation_steps", 1)
    args = arguments(
        folder,
        **{
            "optim": "sgd",
            "learning_rate": 0.05,
            "head_learning_rate": 0.5,
            "layer_lr_decay": 0.5,
            "per_device_train_batch_size": 8 // micro_batches,
            "train_sampling_strategy": "sequential",
            "max_grad_norm": 1.0,
            "boundary_cache_dir": str(folder / "kept"),
            **keys,
        },
    )
    trainer = TransferTrainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=data,
        target_dataset=target,
        data_collator=collator,
        compute_metrics=metrics,
    )
    trainer.replay = replay and replay()
    if clock is not None:
        trainer.clock = clock()
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    worst = torch.tensor([watch.worst])
    if dist.is_initialized():
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    assert watch.compared >= len(trainer.stage_records)
    return {
        "processes": args.world_size,
        "steps": trainer.state.global_step,
        "stages": len(trainer.stage_records),
        "ranks": worst.item(),
        "walks": watch.walks,
        "surplus": watch.surplus,
        "replayed": [entry.steps for entry in trainer.boundary.entries],
        "batches": collator.of_all_ranks() if isinstance(collator, Noting) else None,
    }, trainer


class Naive(TrainerCallback):
    """What people write: freeze before training, unfreeze in a callback."""

    def __init__(self, model: Any):
        self.model = model
        model.bert.requires_grad_(False)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            self.model.bert.requires_grad_(True)


def naive(folder: Path, knows_all: bool) -> dict[str, float]:
    """Plain Trainer with that callback: how far the backbone moves, and by how much the ranks differ.

    Args:
        folder: for Trainer.
        knows_all: whether the optimizer was given the frozen parameters too, which Trainer itself does not do.
    """
    model = tiny_bert(layers=2)
    start = copy_state(model.bert)
    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=0.05,
        max_steps=10,
        per_device_train_batch_size=4,
        report_to="none",
        ddp_find_unused_parameters=True,
    )
    callback = Naive(model)
    optimizer = (torch.optim.AdamW(model.parameters(), lr=0.05), None) if knows_all else (None, None)
    Trainer(model, args, train_dataset=texts(40), optimizers=optimizer, callbacks=[callback]).train()
    moved = max((v - start[k]).abs().max().item() for k, v in copy_state(model.bert).items())
    differ = 0.0
    for value in copy_state(model).values():
        other = value.clone()
        dist.broadcast(other, src=0)
        differ = max(differ, (other - value).abs().max().item())
    worst = torch.tensor([differ])
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return {"moved": moved, "ranks": worst.item()}


def short_batch(folder: Path) -> list[Any]:
    """Each rank's batches of 42 texts of different length, 4 for each process."""
    collator = Noting()
    args = arguments(folder, length_bucketing=True)
    trainer = TransferTrainer(tiny_bert(layers=1), args, train_dataset=ragged_texts(42), data_collator=collator)
    for _ in trainer.get_train_dataloader():
        pass
    return collator.of_all_ranks()


def main(folder: Path, part: str) -> None:
    results: dict[str, Any] = {}
    for case in (name for name in [*EXACT, *LOOSE] if (name in SLOW) == (part == "slow")):
        results[case], trainer = run(case, folder)
        if trainer.is_world_process_zero():
            torch.save(copy_state(trainer.model), folder / f"{case}.pt")
    if part == "quick":
        results["short batch"] = short_batch(folder)
        results["naive"], results["naive, all in the optimizer"] = naive(folder, False), naive(folder, True)
        results["solved"] = gather_object([solved(folder)[0]])
        here = [dist.get_rank() == 0, dist.get_rank() == 1, True, False]
        results["on any rank"] = gather_object([on_any_rank(here, trainer.args.device)])
    if trainer.is_world_process_zero():
        (folder / f"{part}.json").write_text(json.dumps(results))
    dist.destroy_process_group()  # gloo's threads abort a process that ends without this, now and then
    sys.stderr.flush()
    os._exit(0)  # and rarely one that ends with it, on a busy machine: the results are written


if __name__ == "__main__":
    warm.hasten()
    warm.settle()
    main(Path(sys.argv[1]), sys.argv[2])
