"""What the head of a run's model reads: checks of `pooling`, the comparison of layers, and the change of the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from hf_transfer.analysis.few_labels import FEW
from hf_transfer.analysis.pooling_choice import LEAST_EXAMPLES, PoolingChoice, choose_pooling
from hf_transfer.data.labels import LABELS, SINGLE_LABEL
from hf_transfer.errors import UserError, nearest, one_line, option
from hf_transfer.features import FeatureStore, FrozenFeatures
from hf_transfer.features.inputs import Reader
from hf_transfer.features.layer_inputs import layer_inputs
from hf_transfer.features.layouts import CLS, MEAN
from hf_transfer.features.pooled_layer import PooledChange, head_refusal
from hf_transfer.models import pooling_layer
from hf_transfer.models.pooling_architectures import head_states
from hf_transfer.objectives.losses import make_loss
from hf_transfer.runs import choosing_pooled
from hf_transfer.runs.choosing_pooled import AVERAGE, LAST
from hf_transfer.runs.frozen_pass import LEAST_BATCH
from hf_transfer.runs.prepare import Prepared
from hf_transfer.runs.solvable import groups_of, has_adapter, has_new_head, keeps_head, unsolvable

OWN = (None, "cls")  # values of `pooling` with which no layer is left out
BY_HAND = ("mean", "max")


def check(prepared: Prepared) -> None:
    """Check `pooling` and `pooling_layer` against each other and the model.

    Raises:
        UserError: they do not fit.
    """
    pooling, name = prepared.config.model.pooling, prepared.config.model.pooling_layer
    if name not in (None, "auto", LAST) and pooling in OWN:
        raise UserError(f"{name!r} is only for pooling: mean, max or auto.", "Add pooling: mean.", key="pooling_layer")
    if name == AVERAGE and pooling == "auto":
        raise UserError("'average' is only for pooling: mean or max.", "Add pooling: mean.", key="pooling_layer")
    if pooling in OWN:
        return
    reason = _no_pooling(prepared)
    if pooling in BY_HAND and not reason and keeps_head(prepared):
        reason = "the checkpoint's head is kept, which was trained on what it reads now"
    if pooling in BY_HAND and reason:
        raise UserError(f"{pooling} cannot be had with this model: {reason}.", "Leave pooling out.", key="pooling")
    if not reason and name not in (None, "auto"):
        if is_standard(prepared):
            _group(prepared, str(name))
        else:
            choosing_pooled.name_of(groups_of(prepared), name)


def is_standard(prepared: Prepared) -> bool:
    """Whether the architecture itself can read what is wanted: the mean over the tokens, of some text encoders."""
    keys = prepared.config.model
    if prepared.task.mixes or keys.pooling == "max" or keys.pooling_layer == AVERAGE:
        return False
    return not pooling_layer.refusal(prepared.loaded.model)


def can_average(prepared: Prepared, tries: bool) -> bool:
    """Whether an architecture that can read the mean of a layer can be changed to read that of several.

    Args:
        prepared: the run.
        tries: whether to make sure, which takes a few forward passes.
    """
    if not is_standard(prepared) or _no_pooling(prepared) or choosing_pooled.refusal(prepared):
        return False
    if head_refusal(prepared.loaded.model, groups_of(prepared)):
        return False
    return not tries or choosing_pooled.can_average(prepared, "mean")


def _no_pooling(prepared: Prepared) -> str:
    """Why another pooling is not possible, as part of a sentence; empty if nothing shows yet."""
    if has_adapter(prepared):
        return "an adapter is saved without the backbone, whose layers pooling changes"
    return "" if is_standard(prepared) else choosing_pooled.refusal(prepared)


def read_first(prepared: Prepared) -> None:
    """Let a head that would read the mean read the first token, for `pooling: cls`.

    Raises:
        UserError: the head cannot.
    """
    model: Any = prepared.loaded.model
    if not pooling_layer.reads_mean(model):
        return
    reason = ""
    if has_adapter(prepared):
        reason = "an adapter is saved without the configuration, which says so"
    elif keeps_head(prepared):
        reason = "the checkpoint's head was trained on it"
    elif not pooling_layer.has_switch(model):
        reason = "a layer of an earlier run computes it"
    if reason:
        raise UserError(
            f"cls cannot be had: the head reads the mean over the tokens, and {reason}.",
            "Leave pooling out, or begin with another checkpoint.",
            key="pooling",
        )
    model.config.classifier_pooling = "cls"


def compare(prepared: Prepared, fine_tunes: bool) -> tuple[PoolingChoice | None, str]:
    """(what cross-validation says of the layers, why it was not asked); the same on all processes.

    Args:
        prepared: the run.
        fine_tunes: whether more than the head trains. A layer in the middle separates classes best as long as it is
            frozen; where everything trains, the layers above it are worth more than that (`docs/few-labels.md`), and
            only the last one is compared with what the head reads.

    Raises:
        UserError: `pooling: mean` or `max` needs the comparison, and there are no features.
    """
    config, model, count = prepared.config, prepared.loaded.model, len(prepared.data.train)
    only = config.model.pooling_layer
    if "pooling_layer" not in config.given and fine_tunes and is_standard(prepared):
        only = LAST
    if config.model.pooling in BY_HAND and only not in (None, "auto"):
        return None, ""
    if reason := _no_comparison(prepared):
        return None, reason
    try:
        features, own, cells, why = _cells(prepared, None if only == "auto" else only)
    except UserError as error:
        if config.model.pooling in BY_HAND:
            raise
        return None, f"the layers have no features to compare: {one_line(error)}".rstrip(".")
    if not cells or features is None:
        reason = why or "no layer can be read"
        if config.model.pooling in BY_HAND:
            raise UserError(
                f"{config.model.pooling} cannot be had with this model: {reason}.", "Leave pooling out.", key="pooling"
            )
        return None, reason
    labels, args = prepared.loaded.labels, config.training
    truth = torch.as_tensor(prepared.data.train[LABELS])
    truth = truth if labels.problem_type == SINGLE_LABEL else truth.reshape(count, -1)
    answer: list[Any] = [None]
    if args.process_index == 0:
        weights = make_loss(args, model.config, choosing_pooled.examples(prepared)[0]).weights
        outputs = len(labels.names)
        problem = (features, truth, labels.problem_type, outputs, own, cells, args.seed, weights)
        if is_standard(prepared):
            answer = [choose_pooling(*problem)]
        else:
            found = choose_pooling(*problem, accept=choosing_pooled.acceptable(prepared))
            answer = [replace(found, margin=choosing_pooled.MARGIN)]
    if args.world_size > 1:
        broadcast_object_list(answer)
    if config.model.pooling in BY_HAND and (answer[0].best.group, answer[0].best.pooling) == choosing_pooled.OWN:
        raise UserError(
            f"{config.model.pooling} cannot be had with this model: none of its layers can be read so.",
            "Leave pooling out.",
            key="pooling",
        )
    return answer[0], ""


_Cells = tuple[FrozenFeatures | None, tuple[str, str], list[tuple[str, str]], str]


def _cells(prepared: Prepared, only: str | None) -> _Cells:
    """(features of the training examples, what the head reads, what it could read, why nothing).

    Raises:
        UserError: there are no features of what the head reads, or the model cannot be run on the examples.
    """
    if prepared.store is None and prepared.config.data.label_issues:  # which reads them again
        prepared.store = FeatureStore()
    if not is_standard(prepared):
        own: tuple[str, str] = choosing_pooled.OWN
        cells, why = choosing_pooled.candidates(prepared, str(prepared.config.model.pooling), only)
        if not cells:
            return None, own, cells, why
        features = choosing_pooled.features(prepared, [*dict.fromkeys(name for name, _ in cells), own[0]])
    else:
        own = (groups_of(prepared)[-2].name, "mean" if pooling_layer.reads_mean(prepared.loaded.model) else "cls")
        wanted = _upper_half(_kept(prepared)) if only is None else [_group(prepared, only)]
        layers = None if only in (None, LAST) else list(dict.fromkeys([*wanted, own[0]]))  # one pass for all
        poolings = ("mean",) if own[1] == "mean" and layers else None  # not every layer has each
        features = choosing_pooled.features(prepared, layers, poolings)
        cells, why = [(name, "mean") for name in reversed(wanted) if name in features.groups], ""
    features.matrix(*own)
    prepared.frozen = features
    return features, own, cells, why


def _no_comparison(prepared: Prepared) -> str:
    """Why cross-validation cannot be asked, as part of a sentence; empty if it can."""
    config, count = prepared.config, len(prepared.data.train)
    if reason := _no_pooling(prepared):
        return reason
    if config.model.pooling == "auto":
        if not has_new_head(prepared):
            return "the checkpoint's head is kept"
        if prepared.earlier.replay_head is not None:
            return "the head of the replayed task reads what the checkpoint's head reads"
        if reason := unsolvable(prepared):
            return f"the head cannot be solved for: {reason}"
        if config.data.streaming or count > FEW:
            return f"more than {FEW:,} training examples"
        if not is_standard(prepared) and "pooling" not in config.given:  # what is saved loads anywhere, unless asked
            return f"{option('pooling', 'auto')} would compare its layers; plain transformers could not load the head"
    return f"{count} training examples are too few for cross-validation" if count < LEAST_EXAMPLES else ""


def _kept(prepared: Prepared) -> dict[str, int]:
    """{layer group: number of layers up to its end}, of those below the head that a cut can follow.

    Groups can be joined or reordered by rules: what counts is which layers their parameters belong to.
    """
    model, seen = prepared.loaded.model, set[int]()
    kept = {}
    for group in groups_of(prepared)[:-1]:
        seen |= pooling_layer.layer_numbers(model, group.parameters)
        if seen == set(range(len(seen))) and len(seen) >= pooling_layer.least_layers(model):
            kept[group.name] = len(seen)
    return kept


def _upper_half(kept: dict[str, int]) -> list[str]:
    """The groups above the middle of the model.

    The lower half was rarely the best, and from few examples cross-validation often takes it for that: without it 62.8
    instead of 61.2% at 16 per class (MiniLM, Rotten Tomatoes, 20 draws; see `docs/few-labels.md`).
    """
    return [name for name, layers in kept.items() if 2 * layers >= max(kept.values())]


def _group(prepared: Prepared, name: str) -> str:
    """The layer group that `pooling_layer` names.

    Raises:
        UserError: there is none, or the mean of its output cannot be read.
    """
    below, names = [group.name for group in groups_of(prepared)[:-1]], list(_kept(prepared))
    name = below[-1] if name == LAST else name
    if name not in names:
        what = (
            f"the mean of {name!r} cannot be read with this model"
            if name in below
            else f"there is no layer group {name!r} below the head"
        )
        raise UserError(
            f"{what}.", f"Use last, auto, or one of {', '.join(names)}.{nearest(name, names)}", key="pooling_layer"
        )
    return name


def read_chosen(
    prepared: Prepared, is_resumed: bool
) -> tuple[Prepared, pooling_layer.PoolingChange | PooledChange | None]:
    """(the run whose head reads what `pooling` and `pooling_layer` say, what was changed).

    Raises:
        UserError: the model cannot do it.
    """
    pooling = prepared.config.model.pooling
    if pooling == "cls" and not prepared.task.mixes:
        read_first(prepared)
    elif pooling in (*BY_HAND, "cls"):
        if is_standard(prepared):
            return prepared, read_mean(prepared, is_resumed)
        return choosing_pooled.read(prepared, is_resumed)
    return prepared, None


def read_mean(prepared: Prepared, is_resumed: bool) -> pooling_layer.PoolingChange:
    """Let the head read the mean of a layer, standardized over the training examples.

    Raises:
        UserError: the model cannot do it.
    """
    model, name = prepared.loaded.model, _group(prepared, str(prepared.config.model.pooling_layer or LAST))
    known = None if is_resumed else _layer(prepared, name)
    change = pooling_layer.with_mean_pooling(model, _kept(prepared)[name])
    if not is_resumed:  # else the checkpoint holds the weights
        model.to(prepared.config.training.device)
        states = None if known is None else head_states(model, *known)
        states = _states(prepared) if states is None else states
        pooling_layer.set_standardizing(model, states.mean(0), states.std(0, correction=0))
    return change


def _layer(prepared: Prepared, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(means, first tokens) of a layer's output for the training examples; None if it has no token of the kind.

    A run that repeats another one has compared nothing and computes them: its weights are to be the same bit for bit.
    """
    found = prepared.frozen
    if pooling_layer.has_switch(prepared.loaded.model):
        return None
    try:
        if found is None or name not in found.groups:
            found = choosing_pooled.features(prepared, [name], (CLS, MEAN))
        return found.matrix(name, MEAN), found.matrix(name, CLS)
    except UserError:
        return None


def _states(prepared: Prepared) -> torch.Tensor:
    """What the head of the changed model reads of the training examples."""
    model, reader = prepared.loaded.model, Reader.of(prepared.loaded.model, *choosing_pooled.examples(prepared))
    return layer_inputs(
        model,
        pooling_layer.head_reader(model),
        reader.dataset,
        reader.collate,
        batch_size=max(LEAST_BATCH, prepared.config.training.eval_batch_size),
        prepare=reader.prepared,
    )[0]
