"""Load a pretrained Hugging Face or timm model with a head for the labels."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging

from hf_transfer import hub_client
from hf_transfer.adapters.configuration import remember_trained
from hf_transfer.adapters.files import adapter_config, put_on
from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.config.places import check_model
from hf_transfer.data.labels import Labels
from hf_transfer.errors import UserError, named, one_line
from hf_transfer.layers.architectures import HEAD
from hf_transfer.layers.groups import layer_groups
from hf_transfer.layers.wrappers import plain_names
from hf_transfer.models.head_keys import settle
from hf_transfer.models.heads import MLPSpec, blank, class_with_head, fresh_head, is_ours, put_head, renew
from hf_transfer.models.image_size import fill_resampled
from hf_transfer.models.timm_names import check_timm_name, prefix_hint, timm_config

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
    """

    model: PreTrainedModel
    labels: Labels
    fresh: tuple[str, ...]
    notes: tuple[str, ...]
    origin: dict[str, Any] = field(default_factory=dict)
    grown: int = 0

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
    """

    model: PreTrainedModel
    missing: set[str]
    origin: dict[str, Any]
    resized: frozenset[str] = frozenset()


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
    name, config = _name(args), read_config(args)
    # Code from a repository brings its own classes, which are in no mapping.
    if type(config) not in auto_class._model_mapping and not args.trust_remote_code:
        kind = auto_class.__name__.removeprefix("AutoModelFor")
        raise UserError(
            f"{name!r} is a {config.model_type} model, which transformers does not support for {kind}.",
            "Use a model that fits the data: a text encoder for texts, an image model for images.",
            key=_KEY,
        )
    return config


def source(args: ModelArguments) -> tuple[str, dict[str, Any]]:
    """(folder or hub id for `from_pretrained`, its keyword arguments).

    Raises:
        UserError: no such folder, and no such model on the hub.
        WorkFailed: the hub cannot be reached.
    """
    name = _name(args)
    if name.startswith("bundled:"):
        from hf_transfer.models.bundled import model_path

        return str(model_path(name)), {}
    options: dict[str, Any] = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path), options
    check_model(name)
    if name.startswith("timm/"):
        check_timm_name(name.removeprefix("timm/"))
    only_cached = _repository(args).only_cached
    whole = not (only_cached or args.from_scratch or args.allow_pickle or args.trust_remote_code) and hub_client.fetch(
        _KEY, name, args.model_revision
    )
    if only_cached or whole:
        options["local_files_only"] = True
    return name, options


def read_config(args: ModelArguments) -> PreTrainedConfig:
    """The checkpoint's configuration, for any kind of model.

    Raises:
        UserError: the model does not exist or its configuration cannot be read.
        WorkFailed: the hub cannot be reached.
    """
    name = _name(args)
    if name.startswith("bundled:"):
        from hf_transfer.models.bundled import model_config

        return model_config(name)
    if name.startswith("timm/") and args.from_scratch:
        return timm_config(name.removeprefix("timm/"))
    place, options = source(args)
    if Path(place).is_dir() and not (Path(place) / "config.json").is_file():
        raise UserError(
            f"folder {name!r} is not a saved model: it has no config.json.",
            "Use a folder written by `save_pretrained` or by a run.",
            key=_KEY,
        )
    try:
        return AutoConfig.from_pretrained(place, **options)
    except (OSError, ValueError, ImportError) as error:
        raise _not_found(name, error) from error


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
    return Loaded(model, labels, tuple(sorted(missing)), tuple(notes), origin)


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
    name = _name(args)
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
    if not name.startswith("bundled:") and (adapter := adapter_config(place, options)) is not None:
        return _with_adapter(args, auto_class, config, adapter, place, options)
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
        raise _not_found(name, error) from error
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
    origin = {} if Path(place).is_dir() else _repository(args).origin
    missing = (set(info["missing_keys"]) & parameters) | mismatched
    missing |= renew(model, missing)
    return Weights(model, missing, origin, frozenset(mismatched))


def _with_adapter(
    args: ModelArguments, auto_class: Any, config: PreTrainedConfig, adapter: PeftConfig, place: str, options: Any
) -> Weights:
    """Load the adapter in `place` on its backbone; see `from_checkpoint`."""
    base = replace(
        args,
        model_name_or_path=adapter.base_model_name_or_path,
        model_revision=adapter.revision or "main",
    )
    weights = (BACKBONES.get() or from_checkpoint)(base, auto_class, config)
    model, missing, origin = weights.model, weights.missing, weights.origin
    model, loaded = put_on(model, place, options, args.restart_adapter)
    if args.restart_adapter:  # parameters missing from the backbone must be saved with the new adapter too
        head = set(layer_groups(model, args.layer_rules or ())[-1].parameters)
        remember_trained(model, loaded - head - missing)
        loaded &= head
    return Weights(model, missing - loaded, origin)


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


def _name(args: ModelArguments) -> str:
    assert args.model_name_or_path, "checked by Config"
    return args.model_name_or_path


def _repository(args: ModelArguments) -> hub_client.Repository:
    """The hub's answer about a model that is not local."""
    try:
        return hub_client.find(_KEY, _name(args), revision=args.model_revision)
    except UserError as error:
        if hint := prefix_hint(_name(args)):
            raise type(error)(error.problem, hint, error.key) from error
        raise


def _not_found(name: str, error: Exception) -> UserError:
    return UserError(
        f"{name!r} cannot be loaded ({one_line(error)}).",
        f"{hub_client.off()}{prefix_hint(name) or 'Use a hub id, a local folder, timm/<name> or bundled:<name>.'}",
        key=_KEY,
    )
