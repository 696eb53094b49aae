"""What a run chooses for keys that were not given, from its data and its model (`analysis.few_labels`)."""

from __future__ import annotations

import copy
import enum
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from hf_transfer.adapters.attach import is_adapted
from hf_transfer.analysis import effort, few_labels
from hf_transfer.analysis.few_labels import FEW, Choice, Chosen, Seen
from hf_transfer.analysis.pooling_choice import LEAST_EXAMPLES, PoolingChoice, choose_pooling
from hf_transfer.config.arguments import early_stopping
from hf_transfer.config.arguments.adapter import with_adapter
from hf_transfer.data.augment import EXAMPLE
from hf_transfer.data.labels import LABELS, SINGLE_LABEL
from hf_transfer.errors import UserError, nearest
from hf_transfer.features import frozen_features
from hf_transfer.features.layer_inputs import layer_inputs
from hf_transfer.layers.architectures import HEAD
from hf_transfer.layers.frozen import running_statistics
from hf_transfer.layers.groups import LayerGroup, layer_groups
from hf_transfer.layers.head_layers import ends_with_linear, in_order, owners
from hf_transfer.models import pooling_layer
from hf_transfer.models.heads import MLPSpec
from hf_transfer.objectives.losses import make_loss
from hf_transfer.plan import probe_checks
from hf_transfer.runs.checks import check_batches
from hf_transfer.runs.prepare import Prepared
from hf_transfer.settings import Config
from hf_transfer.training import run_identity
from hf_transfer.training.checkpoints import newest_valid

_SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
_RATES = ("layer_lr_decay", "layer_lr_multiplier", "layer_learning_rates")
LAST = "last"
_BATCH = 32  # examples of a forward pass without gradient, at least
_BEFORE = {"pooling": None, "pooling_layer": None}  # of a run by a version that chose nothing
# Keys of a solution from which everything is trained, and of one that stays.
_FIRST = {"strategy": "two-phase", "head_init": "probe", "probe_solver": "sgd"}
_ALONE = {"strategy": "linear-probe", "head_init": "random", "probe_solver": "lbfgs", "stages": None}
_OWN = (None, "cls")  # values of `pooling` that leave the model as it is


def choose(prepared: Prepared, checkpoint: str | None = None) -> Prepared:
    """Set the keys that were not given, and change what the model's head reads.

    Args:
        prepared: the run; its model is changed in place.
        checkpoint: the folder to resume from, or "auto", if any: the run that wrote it has chosen.

    Raises:
        UserError: `pooling` or `pooling_layer` does not fit the model.
    """
    config = prepared.config
    _check_pooling(prepared)
    folder = Path(str(config.training.output_dir))
    found_in = newest_valid(folder)[0] if checkpoint == "auto" else checkpoint
    state = run_identity.read(found_in) if found_in else None
    if state is not None:  # also of a version that chose nothing
        before = state["facts"].get("chosen", _BEFORE)
        chosen = Chosen({n: Choice(v, "as when the run began") for n, v in before.items() if n not in _given(config)})
        candidates = None
    else:
        chosen, candidates = _chosen(prepared)
    config = _with(config, {name: choice.value for name, choice in chosen.keys.items()})
    check_batches(config.training, len(prepared.data.train))
    prepared = replace(prepared, config=config, chosen=chosen)
    if config.model.pooling != "mean":
        return prepared
    change = _read_mean(prepared, is_resumed=state is not None)
    return replace(prepared, chosen=replace(chosen, pooling=candidates, change=change))


def _chosen(prepared: Prepared) -> tuple[Chosen, PoolingChoice | None]:
    """(what is set, without what was given; the layers that were compared)."""
    config = prepared.config
    values, model = config.values, config.model
    given = _given(config)
    is_auto = values["strategy"] == "auto" and values["stages"] is None
    is_wanted = model.pooling == "mean" or (model.pooling == "auto" and (is_auto or "pooling" in config.given))
    found, why_not = _compare_layers(prepared) if is_wanted else (None, "")
    chosen = few_labels.choose(_seen(prepared)) if is_auto else {}
    if config.training.load_best_model_at_end:
        chosen.pop("save_strategy", None)
    unsolvable = _unsolvable(prepared, **_ALONE) if config.data.effort == "quick" else ""
    chosen = effort.choose(config.data.effort, values, given, chosen, unsolvable)
    why = "early_stopping_patience: the best weights are kept"
    chosen |= {name: Choice(value, why) for name, value in early_stopping.implied(values, config.given).items()}
    if set(_RATES) & {name for name in given if values[name] is not None}:
        chosen.pop("head_learning_rate", None)
    if model.pooling == "auto":
        chosen |= few_labels.pooling(found, why_not)
    elif model.pooling == "mean" and found is not None:
        chosen["pooling_layer"] = Choice(found.best.group, "the lowest loss in cross-validation")
    elif model.pooling_layer == "auto":
        chosen["pooling_layer"] = Choice(None if model.pooling in _OWN else LAST, "")
    kept = {name: values[name] for name, choice in chosen.items() if name in given and values[name] != choice.value}
    return Chosen({name: choice for name, choice in chosen.items() if name not in given}, kept), found


def _given(config: Config) -> frozenset[str]:
    """The keys that were given, without those whose value asks for a choice."""
    asks = {name for name in ("strategy", "pooling", "pooling_layer") if config.values[name] == "auto"}
    return config.given - asks - {"effort"}


def _seen(prepared: Prepared) -> Seen:
    """What the choice of `strategy: auto` depends on."""
    config, model, data = prepared.config, prepared.loaded.model, prepared.data
    values, given, labels = config.values, config.given, prepared.loaded.labels
    has_classes = labels.problem_type == SINGLE_LABEL
    size = config.training.per_device_train_batch_size if "per_device_train_batch_size" in given else None
    return Seen(
        examples=None if config.data.streaming else len(data.train),
        per_class=len(data.train) / len(labels.names) if has_classes else None,
        is_adapted=_has_adapter(prepared),
        is_new_head=_has_new_head(prepared),
        unsolvable=_unsolvable(prepared),
        has_batchnorm=bool(running_statistics(model)),
        batch_size=size and size * config.training.gradient_accumulation_steps * config.training.world_size,
        rate=values["learning_rate"] if "learning_rate" in given else None,
    )


def _has_adapter(prepared: Prepared) -> bool:
    values = prepared.config.values
    return is_adapted(prepared.loaded.model) or with_adapter(values["strategy"], values["adapter"]) != "none"


def _has_new_head(prepared: Prepared) -> bool:
    head = _groups(prepared)[-1]
    assert head.name == HEAD
    return bool(set(prepared.loaded.fresh) & set(head.parameters))


def _groups(prepared: Prepared) -> tuple[LayerGroup, ...]:
    return layer_groups(prepared.loaded.model, prepared.config.training.layer_rules or ())


def _unsolvable(prepared: Prepared, **wanted: str | None) -> str:
    """Why a run cannot begin with the best linear head, as part of a sentence; empty if it can.

    Args:
        prepared: the run.
        **wanted: values of keys with which it would, other than those of `strategy: auto`.
    """
    config, model = prepared.config, prepared.loaded.model
    if config.values["from_scratch"]:
        return "the weights are random"
    if not wanted and config.values["head_init"] == "random" and "head_init" in config.given:
        return "head_init: random was given"
    if any(os.environ.get(name, "").lower() in ("1", "true") for name in _SHARDED):
        return "FSDP and DeepSpeed shard the model"
    if wanted and _has_adapter(prepared):
        return "an adapter would change the features"
    values = {**config.values, **(wanted or _FIRST)}
    problems = [*probe_checks.check(SimpleNamespace(**values)), *probe_checks.check_run(values)]
    if problems:
        return problems[0].partition(";")[0].rstrip(".")
    if MLPSpec.of(model.config) is not None:
        return "it is an MLP"
    if not ends_with_linear(model, owners(in_order(model, _groups(prepared)[-1].parameters))):
        return "the head does not end with one linear layer"
    return ""


# ---- layers ----------------------------------------------------------------------------------------------------------


def _check_pooling(prepared: Prepared) -> None:
    """Check `pooling` and `pooling_layer` against each other and the model.

    Raises:
        UserError: they do not fit.
    """
    model, given = prepared.config.model, prepared.config.given
    name = prepared.config.model.pooling_layer
    if name not in (None, "auto", LAST):
        if model.pooling in _OWN:
            raise UserError(f"{name!r} is only for pooling: mean or auto.", "Add pooling: mean.", key="pooling_layer")
        _group(prepared, str(name))
    if model.pooling is None or (model.pooling == "auto" and "pooling" not in given):
        return
    if reason := _no_pooling(prepared):
        raise UserError(
            f"{model.pooling} cannot be had with this model: {reason}.", "Leave pooling out.", key="pooling"
        )


def _no_pooling(prepared: Prepared) -> str:
    """Why another pooling is not possible, as part of a sentence; empty if it is."""
    if prepared.task.mixes:
        return "an image model keeps its own"
    if _has_adapter(prepared):
        return "an adapter is saved without the backbone, whose layers pooling changes"
    return pooling_layer.refusal(prepared.loaded.model)


def _compare_layers(prepared: Prepared) -> tuple[PoolingChoice | None, str]:
    """(what cross-validation says of the layers, why it was not asked); the same on all processes."""
    config, model, count = prepared.config, prepared.loaded.model, len(prepared.data.train)
    only = config.model.pooling_layer
    if config.model.pooling == "mean" and only not in (None, "auto"):
        return None, ""
    if reason := _no_pooling(prepared):
        return None, reason
    if config.model.pooling == "auto":
        if not _has_new_head(prepared):
            return None, "the checkpoint's head is kept"
        if reason := _unsolvable(prepared):
            return None, f"the head cannot be solved for: {reason}"
        if config.data.streaming or count > FEW:
            return None, f"more than {FEW:,} training examples"
    if count < LEAST_EXAMPLES:
        return None, f"{count} training examples are too few for cross-validation"
    groups = _groups(prepared)[:-1]
    wanted = [group.name for group in groups] if only in (None, "auto") else [_group(prepared, str(only))]
    labels, args = prepared.loaded.labels, config.training
    examples, collate = _examples(prepared)
    features = frozen_features(
        model.to(args.device),
        _groups(prepared),
        examples,
        collate=collate,
        layers=list(dict.fromkeys([*wanted, groups[-1].name])),
        poolings=("cls", "mean"),
        batch_size=max(_BATCH, args.eval_batch_size),
    )
    truth = torch.as_tensor(prepared.data.train[LABELS])
    truth = truth if labels.problem_type == SINGLE_LABEL else truth.reshape(count, -1)
    answer: list[Any] = [None]
    if args.process_index == 0:
        own = (groups[-1].name, "mean" if vars(model.config).get("classifier_pooling") == "mean" else "cls")
        cells = [(name, "mean") for name in reversed(wanted) if _keep(name) >= pooling_layer.least_layers(model)]
        weights = make_loss(args, model.config, examples).weights
        outputs = len(labels.names)
        answer = [choose_pooling(features, truth, labels.problem_type, outputs, own, cells, args.seed, weights)]
    if args.world_size > 1:
        broadcast_object_list(answer)
    return answer[0], ""


def _examples(prepared: Prepared) -> tuple[Any, Any]:
    """(the training examples as model inputs, their collator)."""
    train, task = prepared.data.train, prepared.task
    own = train.remove_columns([column for column in (EXAMPLE,) if column in train.column_names])
    prepared_rows = task.prepare(own, prepared.inputs, prepared.processor, prepared.config.data)
    return prepared_rows, task.collator(prepared.processor)


def _group(prepared: Prepared, name: str) -> str:
    """The layer group that `pooling_layer` names.

    Raises:
        UserError: there is none.
    """
    names = [group.name for group in _groups(prepared)[:-1]]
    if name == LAST:
        return names[-1]
    if name not in names:
        raise UserError(
            f"there is no layer group {name!r} below the head.",
            f"Use last, auto, or one of {', '.join(names)}.{nearest(name, names)}",
            key="pooling_layer",
        )
    return name


def _keep(name: str) -> int:
    """The number of layers up to a group of this name: none up to the embeddings."""
    number = re.search(r"(\d+)$", name)
    return int(number[1]) + 1 if number else 0


def _read_mean(prepared: Prepared, is_resumed: bool) -> pooling_layer.PoolingChange:
    """Let the head read the mean of a layer, standardized over the training examples.

    Raises:
        UserError: the model cannot do it.
    """
    model, name = prepared.loaded.model, _group(prepared, str(prepared.config.model.pooling_layer or LAST))
    change = pooling_layer.with_mean_pooling(model, _keep(name))
    if not is_resumed:  # else the checkpoint holds the weights
        model.to(prepared.config.training.device)
        states = layer_inputs(
            model,
            pooling_layer.head_reader(model),
            *_examples(prepared),
            batch_size=max(_BATCH, prepared.config.training.eval_batch_size),
        )
        pooling_layer.set_standardizing(model, states.mean(0), states.std(0, correction=0))
    return change


def _with(config: Config, values: Mapping[str, Any]) -> Config:
    """The configuration with other values of keys."""
    training, model, data = copy.copy(config.training), config.model, config.data
    for name, value in values.items():
        if hasattr(model, name):
            model = replace(model, **{name: value})
        elif hasattr(data, name):
            data = replace(data, **{name: value})
        else:
            kind = type(getattr(training, name))
            setattr(training, name, kind(value) if issubclass(kind, enum.Enum) else value)
    return replace(config, training=training, model=model, data=data, values={**config.values, **values})
