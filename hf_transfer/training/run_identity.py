"""What a checkpoint must record for an exact resume, and whether a run is the one that made it.

In addition to what Trainer saves: the names behind the optimizer's parameter numbers, the loss accumulated since the
last log on each rank, the seconds spent, and the facts that decide the run's course.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_transfer.config.arguments.trainer import INHERITED
from hf_transfer.config.fields import Resume, settings_of
from hf_transfer.data.bucketing import ORDER
from hf_transfer.errors import UserError, option
from hf_transfer.plan.plan import Plan
from hf_transfer.training import run_subject
from hf_transfer.training.checkpoints import STATE
from hf_transfer.training.run_subject import plain

_ANOTHER = "resume_from_checkpoint: this is not the same run."
_REMEDY = "Resume with the keys, the data and the model of the original run, or start a new run from its weights."


def resumed_as(args: TrainingArguments) -> dict[str, Resume]:
    """What a resumed run makes of each field of its arguments; a field that nothing is known of (a newer version's of
    transformers) is fixed."""
    ours = settings_of(type(args))
    known = {**INHERITED, **ours}
    return {f.name: (known[f.name].resume if f.name in known else None) or "fixed" for f in fields(args) if f.init}


def facts(
    args: TrainingArguments,
    plan: Plan | None,
    groups: Sequence[Mapping[str, Any]],
    named: Mapping[str, Any],
    subject: Mapping[str, Any],
    data_keys: Mapping[str, Any],
    decided: Mapping[str, Any] | None = None,
    chosen: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What must be the same for a run to be resumed.

    Args:
        args: of the run.
        plan: resolved; None without one.
        groups: of the optimizer, with `rates` if there is a plan.
        named: the model's parameters by name.
        subject: facts of `run_subject`: on the training set, `backbone` and `adapter`.
        data_keys: the keys that made examples of it.
        decided: what the run decided for keys of `args` that are `auto`.
        chosen: what it chose for keys that were not given.
    """
    values = {**vars(args), **(decided or {})}
    kinds = {name: kind for name, kind in resumed_as(args).items() if kind != "free"}
    planned = [group for group in groups if "rates" in group]
    stages = [] if plan is None else [[s.name, s.epochs, None if plan.waits else s.start] for s in plan.stages]
    return {
        "keys": {name: plain(values.get(name)) for name in kinds},
        "kinds": kinds,
        "stages": stages,
        "rates": [[list(g["layers"]), list(g["rates"]), g["weight_decay"]] for g in planned],
        "members": [optimizer_names([group], named) for group in planned or groups],
        "world_size": args.world_size,
        "of_one_length": args.train_batch_size * args.world_size if values.get("length_bucketing") else None,
        "length_order": ORDER if values.get("length_bucketing") else None,
        "global_batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        **subject,
        "data_keys": {name: plain(value) for name, value in data_keys.items()},
        "chosen": {name: plain(value) for name, value in (chosen or {}).items()},
    }


def refuse_another(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check what is known before the optimizer is made, and before the checkpoint's weights are loaded.

    Args:
        then: `facts` at the checkpoint.
        now: `facts` of this run; without those of a plan.

    Raises:
        UserError: a fixed key, the data, the backbone or the adapter is another one; with the differences.
    """
    keys = [*_changed_keys(then, now, "fixed"), *_changed_data_keys(then, now)]
    differences = [*keys, *run_subject.changed(then, now, [said.split(":")[0] for said in keys])]
    if differences:
        raise UserError(f"{_ANOTHER} {_list(differences)}", _REMEDY)


def compare(then: Mapping[str, Any], now: Mapping[str, Any], allow_changed_plan: bool) -> list[str]:
    """Notes on differences that are allowed. What an earlier version did not record is not compared.

    Args:
        then: `facts` at the checkpoint.
        now: `facts` of this run.
        allow_changed_plan: as the key.

    Raises:
        UserError: the run cannot be resumed like this; with the differences.
    """
    refuse_another(then, now)
    fixed = list(_changed_batches(then, now))
    steps = f"{then['global_batch']} examples"
    if fixed:
        remedy = _REMEDY
        if then["global_batch"] != now["global_batch"] and then["world_size"] != now["world_size"]:
            remedy = (
                f"{then['world_size']} processes then, {now['world_size']} now: set gradient_accumulation_steps or "
                f"per_device_train_batch_size so that a step has {steps} again."
            )
        raise UserError(f"{_ANOTHER} {_list(fixed)}", remedy)
    planned = [*_changed_keys(then, now, "plan"), *_changed_plan(then, now)]
    if planned and not allow_changed_plan:
        raise UserError(
            f"resume_from_checkpoint: the checkpoint was made under another plan. {_list(planned)}",
            f"Resume with the original keys; {option('allow_changed_plan', True)} continues under the new ones.",
        )
    notes = []
    if planned:
        notes.append(
            f"Resuming under a changed plan. {_list(planned)} Stages and learning rates are the new plan's from this "
            "step on; the optimizer keeps its state for parameters that still train. The result is neither plan's own."
        )
    if then["world_size"] != now["world_size"]:
        notes.append(
            f"{then['world_size']} processes then, {now['world_size']} now: the same examples per step, but summed in "
            "another order and with other random numbers, so the result is equal only up to rounding."
        )
    return notes


def _changed_keys(then: Mapping[str, Any], now: Mapping[str, Any], kind: Resume) -> list[str]:
    old, new = then["keys"], now["keys"]
    names = [name for name, its in now["kinds"].items() if its == kind and name in old]
    return [f"{name}: {old[name]!r} then, {new[name]!r} now" for name in names if old[name] != new[name]]


def _changed_data_keys(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    old, new = then.get("data_keys", {}), now["data_keys"]
    return [f"{k}: {old[k]!r} then, {new[k]!r} now" for k in new if k in old and old[k] != new[k]]


def _changed_batches(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    changed = []
    if then["global_batch"] != now["global_batch"]:
        changed.append(f"examples per optimizer step: {then['global_batch']} then, {now['global_batch']} now")
    elif then.get("of_one_length") != now["of_one_length"] and "length_bucketing" in then["keys"]:
        changed.append(
            f"length_bucketing sorts examples into batches of {then.get('of_one_length')} (over all processes) then, "
            f"of {now['of_one_length']} now"
        )
    elif then.get("of_one_length") != now["of_one_length"]:  # no earlier version had it
        changed.append(f"length_bucketing: False then, {now['keys'].get('length_bucketing')!r} now")
    elif now["of_one_length"] and then.get("length_order", 1) != now["length_order"]:
        changed.append("length_bucketing draws another order than the version that wrote the checkpoint")
    return changed


def _changed_plan(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    if then["stages"] != now["stages"]:
        return [f"stages: {_stages(then['stages'])} then, {_stages(now['stages'])} now"]
    if then["rates"] != now["rates"]:
        return ["learning rates or weight decay of layer groups"]
    if not then.get("members") or then["members"] == now["members"]:  # an earlier version
        return []
    old, new = ({name for names in facts["members"] for name in names} for facts in (then, now))
    one = next(iter(sorted(old ^ new)), None)
    if one is None:
        return ["which parameters share an optimizer group"]
    return [f"parameters that train: {len(old)} then, {len(new)} now ({one} {'then' if one in old else 'now'} only)"]


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
