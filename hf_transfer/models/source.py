"""Where a model is read from: a folder, a bundled package, the hub or its cache; and its configuration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from peft import PeftConfig
from transformers import AutoConfig, PreTrainedConfig

from hf_transfer import hub_client
from hf_transfer.adapters.files import adapter_config
from hf_transfer.config.arguments.model import MAIN, ModelArguments
from hf_transfer.config.places import check_model
from hf_transfer.errors import UserError, WorkFailed, listed, one_line
from hf_transfer.models.adapter_heads import config_with_head
from hf_transfer.models.timm_names import check_timm_name, prefix_hint, timm_config
from hf_transfer.run_folder import EXPORT, PROCESSOR

_KEY = "model_name_or_path"
_CONFIG, _ADAPTER_CONFIG = "config.json", hub_client.ADAPTER_CONFIG


def name_of(args: ModelArguments) -> str:
    assert args.model_name_or_path, "checked by Config"
    return args.model_name_or_path


def source(args: ModelArguments) -> tuple[str, dict[str, Any]]:
    """(folder or hub id for `from_pretrained`, its keyword arguments).

    An adapter on the hub is read from its folder in the cache: peft would ask the hub about each of its files again.

    Raises:
        UserError: no such folder, and no such model on the hub.
        WorkFailed: the hub cannot be reached.
    """
    name = name_of(args)
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
    found = repository(args)
    if folder := hub_client.adapter_folder(_KEY, name, args.model_revision, found, args.allow_pickle):
        return str(folder), options
    whole = not (found.only_cached or args.from_scratch or args.allow_pickle or args.trust_remote_code)
    whole = whole and hub_client.fetch(_KEY, name, args.model_revision)
    is_partial = not args.from_scratch and hub_client.lacks_weights(name, args.model_revision)
    if is_partial and (found.only_cached or hub_client.off()):
        raise _partly_cached(name)
    if found.only_cached or whole:
        options["local_files_only"] = True
    return name, options


def processor_source(args: ModelArguments) -> tuple[str, dict[str, Any]]:
    """`source` of the tokenizer or image processor: that of the backbone for an adapter that was saved without one."""
    place, options = source(args)
    has_own = any((Path(place) / name).is_file() for name in PROCESSOR)
    if not has_own and (adapter := adapter_of(args, place, options)) is not None:
        return source(backbone_of(args, adapter))
    return place, options


def adapter_of(args: ModelArguments, place: str, options: dict[str, Any]) -> PeftConfig | None:
    """peft's configuration in a folder that `source` gave; None if there is no adapter.

    Raises:
        UserError: the configuration cannot be read, or its backbone is missing.
    """
    if name_of(args).startswith("bundled:") or not Path(place).is_dir():
        return None
    with named_as(args, place):
        return adapter_config(place, options)


def backbone_of(args: ModelArguments, adapter: PeftConfig) -> ModelArguments:
    """The keys that load the backbone of an adapter."""
    return replace(args, model_name_or_path=adapter.base_model_name_or_path, model_revision=adapter.revision or MAIN)


@contextlib.contextmanager
def named_as(args: ModelArguments, place: str) -> Iterator[None]:
    """Context in which errors name an adapter as the user does, not by its folder in the cache."""
    try:
        yield
    except UserError as error:
        if repr(place) not in error.problem:
            raise
        raise type(error)(error.problem.replace(repr(place), repr(name_of(args))), error.fix, error.key) from error


def read_config(args: ModelArguments) -> PreTrainedConfig:
    """The checkpoint's configuration, for any kind of model.

    Raises:
        UserError: the model does not exist or its configuration cannot be read.
        WorkFailed: the hub cannot be reached.
    """
    name = name_of(args)
    _check_revision(args)
    if name.startswith("bundled:"):
        from hf_transfer.models.bundled import model_config

        return model_config(name)
    if name.startswith("timm/") and args.from_scratch:
        return timm_config(name.removeprefix("timm/"))
    place, options = source(args)
    if Path(place).is_dir() and not (Path(place) / _CONFIG).is_file():
        if (adapter := adapter_of(args, place, options)) is None:
            raise UserError(
                f"folder {name!r} is not a saved model: it has no config.json.",
                "Use a folder written by `save_pretrained` or by a run.",
                key=_KEY,
            )
        with named_as(args, place):  # as peft alone saves one
            return config_with_head(place, adapter, read_config(backbone_of(args, adapter)), args.allow_pickle)
    if not Path(place).is_dir():
        _check_files(args)
    try:
        return AutoConfig.from_pretrained(place, **options)
    except (OSError, ValueError, ImportError) as error:
        raise not_loaded(args, error) from error


def _check_files(args: ModelArguments) -> None:
    """Raises:
    UserError: a repository that was asked about holds no configuration.
    """
    files = repository(args).files
    if files and _CONFIG not in files:
        raise UserError(
            f"{name_of(args)!r} on {HfApi().endpoint} is neither a saved model nor an adapter: it has no {_CONFIG}, "
            f"and holds {listed(files)}.",
            "Use the hub id of a model that transformers, timm or peft saved.",
            key=_KEY,
        )


def _check_revision(args: ModelArguments) -> None:
    """Raises:
    UserError: a revision is asked of a model that has none.
    """
    name = name_of(args)
    if args.model_revision != MAIN and (name.startswith("bundled:") or Path(name).expanduser().is_dir()):
        kind = "bundled" if name.startswith("bundled:") else "a local folder"
        raise UserError(
            f"{name!r} is {kind}, and only models on a hub have revisions (got {args.model_revision!r}).",
            "Leave it out, or use the hub id.",
            key="model_revision",
        )


def repository(args: ModelArguments) -> hub_client.Repository:
    """The hub's answer about a model that is not local."""
    try:
        return hub_client.find(_KEY, name_of(args), revision=args.model_revision)
    except UserError as error:
        if hint := prefix_hint(name_of(args)):
            raise type(error)(error.problem, hint, error.key) from error
        raise


def _partly_cached(name: str) -> WorkFailed:
    """The error of a download that was not finished, and cannot be finished now."""
    why = hub_client.off() or f"The hub at {HfApi().endpoint} cannot be reached. "
    return WorkFailed(
        f"{name!r} cannot be loaded: the cache holds only some of its files.",
        f"{why}Run the same command again when it can be downloaded.",
        _KEY,
    )


def not_loaded(args: ModelArguments, error: Exception) -> UserError:
    """A library's refusal to load a model, as an error for the user.

    Where a file is missing, transformers blames the connection, because it was told to read the cache alone.
    """
    name, cause = name_of(args), one_line(error)
    if (Path(name).expanduser() / EXPORT).is_file():
        return UserError(
            f"{name!r} is an exported model, which has no weights for torch.", "Use its run's folder.", _KEY
        )
    is_local = name.startswith("bundled:") or Path(name).expanduser().is_dir()
    if not is_local and "couldn't connect to" in cause.lower() and not hub_client.off():
        found, endpoint = repository(args), HfApi().endpoint
        if found.only_cached:
            return _partly_cached(name)
        return UserError(
            f"{name!r} on {endpoint} cannot be loaded: a file is missing there. It holds {listed(found.files, 8)}.",
            "Use a repository with config.json, model.safetensors and the files of a tokenizer or image processor.",
            _KEY,
        )
    return UserError(
        f"{name!r} cannot be loaded ({cause}).",
        f"{hub_client.off()}{prefix_hint(name) or 'Use a hub id, a local folder, timm/<name> or bundled:<name>.'}",
        key=_KEY,
    )
