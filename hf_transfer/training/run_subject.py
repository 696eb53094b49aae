"""What a run is about: its examples, the backbone that it starts from, and the adapter on it, as facts to compare.

All are compared by content. A path or a name decides nothing: the same images under another mount are the same
examples, and a folder that was overwritten is another backbone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import __version__ as transformers_version

from hf_transfer.adapters.attach import is_adapted, peft_type
from hf_transfer.adapters.backbone import remember
from hf_transfer.errors import listed
from hf_transfer.features.column_digests import ColumnDigests
from hf_transfer.layers.hashing import Undecidable, key
from hf_transfer.layers.identity import differences, identity_of

SAMPLED = 64
_LABELS = ("label", "labels", "label_ids")
_ROWS = 65_536  # labels that are read at once
# Of an adapter's configuration: where its backbone is, how it was loaded, and what follows from the run's length.
_NOT_ITS_OWN = (
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "auto_mapping",
    "runtime_config",
)
_OF_THE_RUN = {"ADALORA": ("total_step", "tinit", "tfinal", "deltaT", "rank_pattern")}

# ---- examples ------------------------------------------------------------------------------------------------------


def data_facts(data: Any, label_names: Collection[str] | None = None) -> dict[str, Any]:
    """What tells a training set from another one.

    Args:
        data: the training set.
        label_names: its label columns; those that Trainer knows by default.

    Returns:
        `examples`: their number, None for a stream; `inputs`: digest of up to `SAMPLED` examples; `labels`: digest of
        all labels. Both are None for other kinds than a `datasets.Dataset`.
    """
    facts: dict[str, Any] = {"examples": len(data) if hasattr(data, "__len__") else None}
    if not isinstance(data, Dataset) or not len(data):
        return facts | {"inputs": None, "labels": None, "data": None}
    names = [name for name in data.column_names if name in (label_names or _LABELS)]
    return facts | {"inputs": sampled(data), "labels": _labels(data, names), "data": _sampled_before(data)}


def sampled(data: Dataset) -> str:
    """Digest of the columns and of up to `SAMPLED` rows, of an image its bytes and not its path."""
    rows = _some_rows(data)
    return hashlib.sha256(f"{data.column_names} {[_content(row) for row in rows]}".encode()).hexdigest()[:16]


def _sampled_before(data: Dataset) -> str:
    """As checkpoints of earlier versions have it: of an image that is a file, the path."""
    return hashlib.sha256(f"{data.column_names} {_some_rows(data)}".encode()).hexdigest()[:16]


def _some_rows(data: Dataset) -> list[dict[str, Any]]:
    at = sorted({i * (len(data) - 1) // max(1, SAMPLED - 1) for i in range(SAMPLED)})
    rows: list[dict[str, Any]] = data.with_format("arrow")[at].to_pylist()
    return rows


def _content(cell: Any) -> Any:
    """A cell, with the digest of its bytes in place of an image; of a file that cannot be read, its name."""
    if isinstance(cell, list):
        return [_content(one) for one in cell]
    if not isinstance(cell, dict):
        return cell
    if set(cell) != {"bytes", "path"}:
        return {name: _content(one) for name, one in cell.items()}
    if cell["bytes"] is not None:
        return hashlib.sha256(cell["bytes"]).hexdigest()
    path = Path(str(cell["path"]))
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError):
        return path.name


def _labels(data: Dataset, names: Sequence[str]) -> str | None:
    if not names:
        return None
    digests, columns = ColumnDigests(texts_may_be_paths=False), data.with_format("arrow").select_columns(list(names))
    try:
        for start in range(0, len(data), _ROWS):
            for batch in columns[start : start + _ROWS].combine_chunks().to_batches():
                for name in names:
                    digests.add(name, batch.column(name))
    except Undecidable:
        return None
    return key(digests.digests())


def _changed_data(then: Mapping[str, Any], now: Mapping[str, Any], what: str = "training examples") -> Iterable[str]:
    if then["examples"] != now["examples"]:
        yield f"{what}: {_count(then['examples'])} then, {_count(now['examples'])} now"
        return
    names = ("inputs", "labels") if "inputs" in then else ("data",)  # of an earlier version
    changed = [name for name in names if then[name] != now[name]]
    if changed == ["labels"]:
        yield f"the labels of the {what} differ (same examples)"
    elif changed:
        yield f"the {what} differ (same number, other content)"


def _count(number: int | None) -> str:
    return "a stream" if number is None else f"{number:,}"


# ---- the backbone and its adapter ----------------------------------------------------------------------------------


def backbone_facts(model: nn.Module, fresh: Collection[str] = (), is_random: bool = False) -> dict[str, Any]:
    """The identity of the backbone that a run starts from; see `layers.identity`. Reads every weight once.

    Args:
        model: as it was loaded.
        fresh: names of the parameters that the checkpoint does not contain.
        is_random: whether its weights are random, so that only the architecture counts.
    """
    if is_random:
        fresh = set(model.state_dict())
    # What a configuration contains depends on the version.
    identity = remember(model) if is_adapted(model) else identity_of(model, fresh)
    return identity | {"transformers": transformers_version}


def _changed_backbone(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[str]:
    tensors = differences(then, now)
    if then["architecture"] != now["architecture"]:
        yield f"backbone: {then['architecture']} then, {now['architecture']} now"
    elif tensors:
        count = len({*then["tensors"], *now["tensors"]})
        yield f"backbone: other weights ({len(tensors)} of {count} tensors differ: {listed(tensors, 2)})"
    elif then["configuration"] != now["configuration"] and then.get("transformers") == now.get("transformers"):
        yield "backbone: another configuration (same weights)"


def adapter_facts(model: Any) -> dict[str, Any] | None:
    """The configuration of a model's adapter, as plain data; None without one."""
    if not is_adapted(model):
        return None
    left_out = {*_NOT_ITS_OWN, *_OF_THE_RUN.get(peft_type(model), ())}
    own = model.active_peft_config.to_dict()
    return {name: plain(value) for name, value in sorted(own.items()) if name not in left_out}


def _changed_adapter(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[str]:
    for name in (n for n in then if n in now and then[n] != now[n]):  # another version of peft has other ones
        old, new = then[name], now[name]
        if isinstance(old, list) and isinstance(new, list):
            gone, added = ([n for n in some if n not in rest] for some, rest in ((old, new), (new, old)))
            told = [f"{listed(which, 2)} {when} only" for which, when in ((gone, "then"), (added, "now")) if which]
            yield f"adapter {name}: {len(old)} then, {len(new)} now ({'; '.join(told) or 'another order'})"
        else:
            yield f"adapter {name}: {old!r} then, {new!r} now"


def changed(then: Mapping[str, Any], now: Mapping[str, Any], keys: Collection[str]) -> list[str]:
    """Differences between the subjects of two runs, one phrase each. What an earlier version left out is not compared.

    Args:
        then: facts at the checkpoint.
        now: facts of this run.
        keys: that differ; an adapter differs with its keys, which say it in the user's words.
    """
    told = list(_changed_data(then, now))
    if then.get("target") and now.get("target"):
        told += _changed_data(then["target"], now["target"], "target examples")
    if then.get("backbone") and now.get("backbone"):
        told += _changed_backbone(then["backbone"], now["backbone"])
    if then.get("adapter") and now.get("adapter") and not any(k == "adapter" or k.startswith("lora_") for k in keys):
        told += _changed_adapter(then["adapter"], now["adapter"])
    return told


def plain(value: Any) -> Any:
    """A value as JSON returns it; a set in order."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return json.loads(json.dumps(getattr(value, "value", value), default=str))
