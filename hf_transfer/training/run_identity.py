"""What a checkpoint must say for a run to go on as if it had never stopped, and whether it is the same run.

Beside what Trainer saves, that is: the names behind the optimizer's numbers, the loss summed up since the last log on
each rank, the seconds spent, and the facts that decide the run's course.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainingArguments

from hf_transfer.errors import UserError
from hf_transfer.plan.plan import Plan
from hf_transfer.training.checkpoints import STATE

SAMPLED = 64
# Keys that decide a run's course. Some may change with a plan (`allow_changed_plan`), the others never within a run.
PLANNED = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "weight_decay",
    "max_grad_norm",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "label_smoothing_factor",
    "fp16",
    "bf16",
    "neftune_noise_alpha",
    "class_weights",
    "focal_gamma",
)
FIXED = (
    "seed",
    "data_seed",
    "optim",
    "optim_args",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "balanced_sampling",
    "length_bucketing",
)


def facts(
    args: TrainingArguments,
    plan: Plan | None,
    groups: Sequence[Mapping[str, Any]],
    data: Any,
    data_keys: Mapping[str, Any],
) -> dict[str, Any]:
    """What must be the same for a run to go on.

    Args:
        args: of the run.
        plan: resolved; None without one.
        groups: of the optimizer, with `rates`, where there is a plan.
        data: the training set.
        data_keys: what made examples of it, by key.
    """
    values = {name: _plain(vars(args).get(name)) for name in (*PLANNED, *FIXED)}  # plain arguments lack ours
    stages = [] if plan is None else [[s.name, s.epochs, None if plan.waits else s.start] for s in plan.stages]
    return {
        "keys": values,
        "stages": stages,
        "rates": [[list(g["layers"]), list(g["rates"]), g["weight_decay"]] for g in groups if "rates" in g],
        "world_size": args.world_size,
        "of_one_length": args.train_batch_size * args.world_size if vars(args).get("length_bucketing") else None,
        "global_batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "examples": len(data) if hasattr(data, "__len__") else None,
        "data": fingerprint(data),
        "data_keys": {name: _plain(value) for name, value in data_keys.items()},
    }


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(getattr(value, "value", value), default=str))


def fingerprint(data: Any) -> str | None:
    """SHA-256 of the columns and of up to `SAMPLED` rows of a data set; None for other kinds of it."""
    if not isinstance(data, Dataset) or not len(data):
        return None
    rows = sorted({i * (len(data) - 1) // max(1, SAMPLED - 1) for i in range(SAMPLED)})
    sample = data.with_format("arrow")[rows]
    return hashlib.sha256(f"{data.column_names} {sample.to_pylist()}".encode()).hexdigest()[:16]


def compare(then: Mapping[str, Any], now: Mapping[str, Any], allow_changed_plan: bool) -> list[str]:
    """Notes on what has changed and is allowed to.

    Args:
        then: facts at the checkpoint.
        now: facts of this run.
        allow_changed_plan: as the key.

    Raises:
        UserError: the run cannot go on like this; with the difference.
    """
    old, new = then["keys"], now["keys"]
    # A key that was noted by no earlier version was off.
    changed = [k for k in FIXED if old.get(k) != new[k] and (k in old or new[k])]
    fixed = [f"{k}: {old.get(k)!r} then, {new[k]!r} now" for k in changed]
    made, makes = then.get("data_keys", {}), now["data_keys"]  # earlier versions noted none
    fixed += [f"{k}: {made[k]!r} then, {makes[k]!r} now" for k in makes if k in made and made[k] != makes[k]]
    if then["examples"] != now["examples"]:
        fixed.append(f"training examples: {_count(then['examples'])} then, {_count(now['examples'])} now")
    elif then["data"] != now["data"]:
        fixed.append("the training examples are other ones (same number, other content)")
    if then["global_batch"] != now["global_batch"]:
        fixed.append(f"examples per optimizer step: {then['global_batch']} then, {now['global_batch']} now")
    elif then.get("of_one_length") != now["of_one_length"] and "length_bucketing" not in changed:
        fixed.append(
            f"length_bucketing orders examples by batches of {then.get('of_one_length')} (of all processes) then, of "
            f"{now['of_one_length']} now"
        )
    if fixed:
        remedy = "Resume with the keys and data that it was started with, or start a new run from its weights."
        if then["global_batch"] != now["global_batch"] and then["world_size"] != now["world_size"]:
            remedy = (
                f"{then['world_size']} processes then, {now['world_size']} now: set gradient_accumulation_steps or "
                f"per_device_train_batch_size so that a step has {then['global_batch']} examples again."
            )
        raise UserError(f"resume_from_checkpoint: this is not the same run. {_list(fixed)}", remedy)
    planned = [f"{k}: {old.get(k)!r} then, {new[k]!r} now" for k in PLANNED if old.get(k) != new[k]]
    if then["stages"] != now["stages"]:
        planned.append(f"stages: {_stages(then['stages'])} then, {_stages(now['stages'])} now")
    elif then["rates"] != now["rates"]:
        planned.append("learning rates or weight decay of layer groups")
    notes = []
    if planned and not allow_changed_plan:
        raise UserError(
            f"resume_from_checkpoint: it was made under another plan. {_list(planned)}",
            "Resume with the keys that it was started with; --allow_changed_plan goes on under the new ones.",
        )
    if planned:
        notes.append(
            f"Going on under a changed plan. {_list(planned)} Stages and rates are the new plan's from this step on; "
            "the optimizer keeps its averages where a parameter still trains. The result is neither plan's own."
        )
    if then["world_size"] != now["world_size"]:
        notes.append(
            f"{then['world_size']} processes then, {now['world_size']} now: the same examples per step, but summed in "
            "another order and with other random numbers, so the result is equal within rounding only."
        )
    return notes


def _count(number: int | None) -> str:
    return "a stream" if number is None else f"{number:,}"


def _list(differences: Sequence[str]) -> str:
    return "; ".join(differences) + "."


def _stages(stages: Sequence[Sequence[Any]]) -> str:
    text = ", ".join(f"{name} ({'plateau' if epochs is None else f'{epochs:g}'})" for name, epochs, _ in stages)
    return text or "none"


# ---- the optimizer, by name ----


def optimizer_names(groups: Sequence[Mapping[str, Any]], named: Mapping[str, Any]) -> list[str]:
    """Parameter names in the order in which `Optimizer.state_dict()` numbers them."""
    names = {id(parameter): name for name, parameter in named.items()}
    return [names[id(parameter)] for group in groups for parameter in group["params"]]


def by_name(saved: Mapping[str, Any], names_then: Sequence[str], names_now: Sequence[str]) -> dict[int, Any]:
    """The `state` of a saved optimizer under the numbers of this one; what has no namesake is left out."""
    state = {names_then[number]: value for number, value in saved["state"].items()}
    return {number: state[name] for number, name in enumerate(names_now) if name in state}


def read(checkpoint: str | Path) -> dict[str, Any] | None:
    """`transfer_state.json` of a checkpoint; None where plain Trainer made it."""
    path = Path(checkpoint) / STATE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
