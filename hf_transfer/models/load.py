"""Load a pretrained Hugging Face or timm model with a head for the labels."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging

from hf_transfer.adapters.backbone import refuse_adapter
from hf_transfer.adapters.configuration import remember_trained
from hf_transfer.adapters.files import put_on
from hf_transfer.config.arguments.model import MAIN, ModelArguments
from hf_transfer.data.labels import Labels
from hf_transfer.errors import UserError, named
from hf_transfer.layers.architectures import HEAD
from hf_transfer.layers.groups import layer_groups
from hf_transfer.layers.wrappers import plain_names
from hf_transfer.models.head_keys import settle
from hf_transfer.models.heads import MLPSpec, blank, class_with_head, fresh_head, is_ours, put_head, renew
from hf_transfer.models.image_size import fill_resampled
from hf_transfer.models.source import (
    adapter_of,
    backbone_of,
    name_of,
    named_as,
    not_loaded,
    read_config,
    repository,
    source,
)

_KEY = "model_name_or_path"
_some = partial(named, most=4)


@dataclass
class Loaded:
    """A model ready to train.

    Attributes:
        model: the model, with a head for `labels`.
        labels: the labels, in the checkpoint's order if it has the same ones.
        fresh: names of newly initialized parameters that the checkpoint does not contain; they train with the head.
        notes: messages for the user.
        origin: license and language of the hub repository that the weights come from, if it states them.
        grown: number of embeddings that were added for tokens beyond the checkpoint's last one.
        revision: of the hub repository of the backbone, where it was named.
    """

    model: PreTrainedModel
    labels: Labels
    fresh: tuple[str, ...]
    notes: tuple[str, ...]
    origin: dict[str, Any] = field(default_factory=dict)
    grown: int = 0
    revision: str | None = None

    @property
    def layer_rules(self) -> list[tuple[str, str]]:
        """Rules that put the newly initialized parameters into the head's group."""
        return [(f"^{re.escape(name)}$", HEAD) for name in self.fresh]


class Weights(NamedTuple):
    """A model as a checkpoint has it.

    Attributes:
        model: in fp32.
        missing: names of the parameters missing from the checkpoint.
        origin: see `Loaded`; for an adapter, of its backbone.
        resized: those of `missing` that the checkpoint holds in another shape.
        revision: of the hub repository of the backbone, where it was named.
    """

    model: PreTrainedModel
    missing: set[str]
    origin: dict[str, Any]
    resized: frozenset[str] = frozenset()
    revision: str | None = None


# What loads the backbones of adapters; None loads each from its checkpoint.
BACKBONES: ContextVar[Callable[[ModelArguments, Any, PreTrainedConfig], Weights] | None] = ContextVar(
    "backbones", default=None
)


def load_config(args: ModelArguments, auto_class: Any) -> PreTrainedConfig:
    """The checkpoint's configuration.

    Raises:
        UserError: the model does not exist, or `auto_class` does not support it.
        WorkFailed: the hub cannot be reached.
    """
    name, config = name_of(args), read_config(args)
    # Code from a repository brings its own classes, which are in no mapping.
    if type(config) not in auto_class._model_mapping and not args.trust_remote_code:
        kind = auto_class.__name__.removeprefix("AutoModelFor")
        raise UserError(
            f"{name!r} is a {config.model_type} model, which transformers does not support for {kind}.",
            "Use a model that fits the data: a text encoder for texts, an image model for images.",
            key=_KEY,
        )
    return config


def load_model(args: ModelArguments, auto_class: Any, config: PreTrainedConfig, labels: Labels) -> Loaded:
    """Load a model; it keeps the checkpoint's head if the labels are the same, and gets a new head otherwise.

    Args:
        args: model keys.
        auto_class: transformers auto class, e.g. `AutoModelForSequenceClassification`.
        config: configuration from `load_config`, including changes made by the task (image size).
        labels: labels to predict.

    Raises:
        UserError: the model cannot be loaded, its weights are not safetensors, or it cannot be trained.
        WorkFailed: the hub cannot be reached.
    """
    before, own = set(_label_names(config)), set((config.id2label or {}).values())
    generic = labels.generic(config)
    labels = labels.in_order_of(config)
    for key, value in labels.config_kwargs.items():
        setattr(config, key, value)
    if config.model_type == "timm_wrapper":  # a saved configuration would keep the names of its previous labels
        config.label_names = list(labels.names)
    change = settle(args, auto_class, config)
    # transformers prints a table of missing and mismatched weights; `notes` sums it up in one line.
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        weights = from_checkpoint(args, auto_class, config)
        model, missing, origin = weights.model, weights.missing, weights.origin
        notes = list(change.notes)
        if args.from_scratch:
            if change.path:
                put_head(model, change.spec, change.path)
            notes.append("Training from scratch: all weights are randomly initialized.")
            return Loaded(model, labels, (), tuple(notes))
        head = _head_of(model, args)
        has_head = not missing & head or bool(weights.resized & head)
        if change.path:
            missing = put_head(model, change.spec, change.path, missing)
            head = _head_of(model, args)
            missing |= fresh_head(model, auto_class, head, whole=True)
        elif not missing & head and set(labels.names) not in (before, own) and not generic:
            missing |= fresh_head(model, auto_class, head)
    finally:
        transformers_logging.set_verbosity(verbosity)
    known = own if before or has_head else set[str]()
    notes += _notes_on_weights(labels, known, own if generic else set(), missing, head)
    return Loaded(model, labels, tuple(sorted(missing)), tuple(notes), origin, revision=weights.revision)


def _notes_on_weights(
    labels: Labels, known: set[str], taken: set[str], missing: set[str], head: set[str]
) -> Iterator[str]:
    """What is new in a model, for the user.

    Args:
        labels: to predict.
        known: what the checkpoint predicts; empty without a head.
        taken: its generic names that `labels` are taken for, if any.
        missing: plain names of the parameters without trained values.
        head: plain names of the parameters of the head.
    """
    if missing & head:
        yield (
            f"Newly initialized head with {len(labels.names)} outputs ({_some(labels.names)}); "
            f"{f'the checkpoint predicts {_some(sorted(known))}' if known else 'the checkpoint has none'}."
        )
    elif taken:
        yield f"The checkpoint's head is kept: its {_some(sorted(taken))} are taken for {_some(labels.names)}."
    if body := sorted(missing - head):
        yield f"Missing from the checkpoint and trained with the head: {_some(body)}."


def from_checkpoint(args: ModelArguments, auto_class: Any, config: PreTrainedConfig) -> Weights:
    """Load a checkpoint; an adapter is loaded with its backbone."""
    if not args.from_scratch and not name_of(args).startswith("bundled:"):
        place, options = source(args)
        if (adapter := adapter_of(args, place, options)) is not None:
            return _with_adapter(args, auto_class, config, adapter, place)
    return backbone(args, auto_class, config)


def backbone(args: ModelArguments, auto_class: Any, config: PreTrainedConfig) -> Weights:
    """Load a checkpoint that is no adapter."""
    name = name_of(args)
    if args.from_scratch:
        model = auto_class.from_config(config, dtype=torch.float32)
        return Weights(with_head(Weights(model, set(), {}), config).model, set(), {})
    if name.startswith("bundled:"):
        from hf_transfer.models.bundled import load_weights

        loaded = load_weights(name, auto_class, config)
        if loaded is not None:
            loaded[0].name_or_path = name
            return with_head(Weights(*loaded, origin={}), config)
    place, options = source(args)
    cls = auto_class if not is_ours(config) else type(blank(auto_class, config, args.trust_remote_code))
    load = partial(
        class_with_head(cls, config).from_pretrained,
        place,
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
        use_safetensors=None if args.allow_pickle else True,
        **options,
    )
    try:
        model, info = load(config=config, output_loading_info=True)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise not_loaded(args, error) from error
    if cls is not auto_class:
        model.__class__ = cls
    if "labels" not in inspect.signature(model.forward).parameters:
        raise UserError(
            f"{name!r} is a {type(model).__name__}, which computes no loss and cannot be trained.",
            "Use the non-distilled version of the model (for DeiT, facebook/deit-base-patch16-224).",
            key=_KEY,
        )
    for parameter in model.parameters():  # memory-mapped weights may be unaligned, which changes sums in the last bit
        parameter.data = parameter.data.clone()
    parameters = {n for n, _ in model.named_parameters()}
    mismatched = {entry[0] for entry in info["mismatched_keys"]} & parameters
    mismatched -= fill_resampled(model, sorted(mismatched), load)
    origin = {} if Path(place).is_dir() else repository(args).origin
    missing = (set(info["missing_keys"]) & parameters) | mismatched
    missing |= renew(model, missing)
    revision = None if Path(place).is_dir() or args.model_revision == MAIN else args.model_revision
    return Weights(model, missing, origin, frozenset(mismatched), revision)


def _with_adapter(
    args: ModelArguments, auto_class: Any, config: PreTrainedConfig, adapter: PeftConfig, place: str
) -> Weights:
    """Load the adapter in `place` on its backbone; see `from_checkpoint`."""
    base = backbone_of(args, adapter)
    name = name_of(base)
    if not name.startswith("bundled:") and adapter_of(base, *source(base)) is not None:
        raise refuse_adapter(name, name_of(args))
    weights = (BACKBONES.get() or backbone)(base, auto_class, config)
    head = _head_of(weights.model, args)
    with named_as(args, place):
        model, loaded = put_on(
            weights.model, adapter, place, args.restart_adapter, head, weights.missing, args.allow_pickle
        )
    if args.restart_adapter:  # parameters missing from the backbone must be saved with the new adapter too
        own_head = set(layer_groups(model, args.layer_rules or ())[-1].parameters)
        remember_trained(model, loaded - own_head - weights.missing)
        loaded &= own_head
    return weights._replace(model=model, missing=weights.missing - loaded)


def with_head(weights: Weights, config: PreTrainedConfig) -> Weights:
    """A model with its own head, and with a new MLP in its place if `config` says so."""
    spec = MLPSpec.of(config)
    return weights if spec is None else weights._replace(missing=put_head(weights.model, spec, "", weights.missing))


def _head_of(model: PreTrainedModel, args: ModelArguments) -> set[str]:
    """Plain names of its parameters."""
    plain = plain_names(model)
    return {plain[name] for name in layer_groups(model, args.layer_rules or ())[-1].parameters}


def names_in_checkpoint(args: ModelArguments) -> tuple[str, ...]:
    """The checkpoint's class names in the order of its outputs; empty if it has none.

    Raises:
        UserError: the model does not exist or its configuration cannot be read.
        WorkFailed: the hub cannot be reached.
    """
    return _label_names(read_config(args))


def _label_names(config: PreTrainedConfig) -> tuple[str, ...]:
    """The checkpoint's class names; empty if they are only `LABEL_0`, `LABEL_1`, …"""
    names = tuple(str(name) for _, name in sorted((config.id2label or {}).items()))
    return () if all(re.fullmatch(r"LABEL_\d+", n) for n in names) else names
