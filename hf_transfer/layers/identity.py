"""What a backbone is: its architecture, its configuration and the bytes of its weights, whatever it is called.

A name says little about weights: a folder is overwritten, a branch on the hub moves. What was trained on a backbone
(an adapter, a checkpoint) therefore records its identity, and is compared with the backbone that is there later. Equal
identities mean bit-identical backbones; paths and names are not part of one.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from hf_transfer.layers.hashing import THREADS, key, tensor_digest, tensor_kind
from hf_transfer.layers.wrappers import core_of, plain_name

# What a task adds to the configuration of its backbone, and what training and saving set in any.
OF_A_TASK = frozenset(
    {
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "label_names",
        "num_classes",
        "architectures",
        "_name_or_path",
        "label_thresholds",
        "conformal",
        "transformers_version",
        "dtype",
        "use_cache",
    }
)


def identity_of(model: nn.Module, without: Collection[str] = ()) -> dict[str, Any]:
    """The identity of a model's backbone, as plain data; reads every weight once (about 1 s per GB).

    Args:
        model: with or without an adapter. What the adapter saves does not count: its own parameters, and the head and
            other modules that train whole.
        without: plain names of more tensors that do not count: those that the checkpoint does not contain.

    Returns:
        `architecture`: name of the class; `configuration`: digest of what is no task's own; `weights`: digest of
        `tensors`; `tensors`: {plain name: digest of dtype, shape and bytes} of parameters and persistent buffers;
        `commit`: of the hub repository, None for a folder.
    """
    core = core_of(model)[1]
    tensors = _digests(dict(_counted(model, frozenset(without))))
    return {
        "architecture": type(core).__name__,
        "configuration": key(_configuration(core)),
        "weights": key(tensors),
        "tensors": tensors,
        "commit": getattr(getattr(core, "config", None), "_commit_hash", None),
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Plain names of the tensors that differ between two identities, or that one of them lacks."""
    old, new = then["tensors"], now["tensors"]
    return sorted(name for name in {*old, *new} if old.get(name) != new.get(name))


def _configuration(core: nn.Module) -> dict[str, str]:
    config: Any = getattr(core, "config", None)
    values = {} if config is None else config.to_dict()
    kept = {k: v for k, v in values.items() if k not in OF_A_TASK}
    return {k: json.dumps(v, sort_keys=True, default=repr) for k, v in kept.items()}


def _counted(model: nn.Module, without: frozenset[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(plain name, tensor) of everything that belongs to the backbone."""
    prefix, core = core_of(model)
    saved = _saved_with_adapter(model) if prefix else frozenset[int]()
    own = tuple(_inside_adapter(core)) if prefix else ()
    for name, tensor in core.state_dict().items():
        if not isinstance(tensor, torch.Tensor) or ".original_module." in f".{name}":
            continue
        plain = plain_name(f"{prefix}{name}", prefix)
        is_own = any(name.startswith(at) and not name.startswith(f"{at}base_layer.") for at in own)
        if not is_own and plain not in without and tensor.untyped_storage()._cdata not in saved:
            yield plain, tensor


def _inside_adapter(core: nn.Module) -> Iterator[str]:
    """Prefixes of the layers that an adapter wraps: all that is in them but the `base_layer` is the adapter's."""
    layers: Any = sys.modules["peft.tuners.tuners_utils"].BaseTunerLayer
    for name, module in core.named_modules():
        if isinstance(module, layers):
            yield f"{name}."


def _saved_with_adapter(model: nn.Module) -> frozenset[int]:
    """The storages of what is saved with an adapter."""
    with warnings.catch_warnings():
        # peft looks up the vocabulary of a backbone on the hub, and warns where the hub is down or switched off.
        warnings.filterwarnings("ignore", message="Unable to fetch remote file|Could not find a config file")
        state = sys.modules["peft"].get_peft_model_state_dict(model)
    return frozenset(tensor.untyped_storage()._cdata for tensor in state.values())


def _digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    names = sorted(tensors)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(tensor_digest, (tensors[name] for name in names))
        return {n: f"{tensor_kind(tensors[n])} {d}" for n, d in zip(names, digests, strict=True)}
