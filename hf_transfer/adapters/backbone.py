"""The backbone of an adapter: where it is, and whether it is the one that the adapter was trained on.

`backbone.json` next to an adapter holds the identity of its backbone (`layers.identity`); peft does not read it. The
name and the revision of the backbone stand in peft's `adapter_config.json`, so that plain peft loads the same one.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from peft import PeftModel

from hf_transfer.config.places import is_path
from hf_transfer.errors import UserError, listed, one_line
from hf_transfer.files import write_json
from hf_transfer.layers.identity import differences, identity_of
from hf_transfer.run_folder import BACKBONE

_ATTRIBUTE = "hf_transfer_backbone"  # of a model with an adapter: the identity of its backbone
_KEY = "model_name_or_path"


def located(base: str, place: str) -> str:
    """The backbone that an adapter names: a relative path counts from the adapter's folder; a hub id is as it is.

    Args:
        base: what `adapter_config.json` names.
        place: folder of the adapter.

    Raises:
        UserError: there is no such folder, or it is the adapter's own or that of another adapter.
    """
    folder, path = Path(place), Path(base).expanduser()
    if not path.is_absolute():
        beside = folder / path
        if folder.is_dir() and beside.is_dir():
            path = beside.resolve()
        elif path.is_dir() or is_path(base):
            raise UserError(
                f"the adapter in {place!r} names its backbone {base!r}, which is relative to the adapter's folder, and "
                "there is no such folder.",
                "Write the backbone's absolute path into base_model_name_or_path of adapter_config.json"
                + (f": the working directory has {str(path.resolve())!r}." if path.is_dir() else "."),
                key=_KEY,
            )
        else:
            return base
    if not path.is_dir():
        raise UserError(
            f"the adapter in {place!r} requires the backbone {str(path)!r}, which does not exist.",
            "Restore the folder, or set its new path in adapter_config.json.",
            key=_KEY,
        )
    if folder.is_dir() and path.resolve() == folder.resolve():
        raise UserError(
            f"the adapter in {place!r} names its own folder as its backbone.",
            "Set base_model_name_or_path in its adapter_config.json to the model that it was trained on.",
            key=_KEY,
        )
    return str(path)


def refuse_adapter(base: str, place: str) -> UserError:
    """The error for an adapter whose backbone has an adapter itself."""
    return UserError(
        f"the adapter in {place!r} was trained on {base!r}, which holds an adapter itself.",
        f"Merge that adapter into its backbone, and name the merged model in adapter_config.json; or remove "
        f"adapter_config.json from {base!r} if a whole model was saved there since.",
        key=_KEY,
    )


def unfit(base: str, place: str, lacking: Collection[str], resized: Collection[str]) -> UserError:
    """The error for a backbone without parameters that an adapter was trained on.

    Args:
        base: the backbone.
        place: folder of the adapter.
        lacking: plain names of the parameters that would be random.
        resized: those of another shape.
    """
    reshaped = [name for name in lacking if name in resized]
    absent = [name for name in lacking if name not in resized]
    what = [f"it lacks {listed(absent, 3)}"] if absent else []
    what += [f"of another shape: {listed(reshaped, 3)}"] if reshaped else []
    return UserError(
        f"the backbone {base!r} is not the one that the adapter in {place!r} was trained on: {'; '.join(what)}.",
        "Restore the backbone, or name the right one in adapter_config.json.",
        key=_KEY,
    )


# ---- identity ------------------------------------------------------------------------------------------------------


def remember(model: PeftModel, identity: dict[str, Any] | None = None) -> dict[str, Any]:
    """The identity of an adapted model's backbone, found out once: its backbone is frozen."""
    known = vars(model).get(_ATTRIBUTE)
    if known is None or identity is not None:
        known = identity or identity_of(model)
        setattr(model, _ATTRIBUTE, known)
    return dict(known)


def write(model: PeftModel, folder: str | Path) -> None:
    """Write `backbone.json` next to an adapter."""
    revision = model.active_peft_config.revision
    write_json(Path(folder) / BACKBONE, {**remember(model), "revision": revision})


def check(model: PeftModel, place: str) -> None:
    """Check that the backbone under an adapter is the one that it was trained on; one without a record passes.

    Only tensors of the same shape are compared: position embeddings that were resampled for another image size, and
    layers that a pooled head leaves out, are no other backbone. What the backbone lacks is checked where it is loaded.

    Args:
        model: with the adapter.
        place: folder of the adapter.

    Raises:
        UserError: it is another one, with the names of what differs; or the record cannot be read.
    """
    now, then = identity_of(model), _recorded(place)
    if then is None:
        remember(model, {**now, "commit": None})
        return
    old, new = then["tensors"], now["tensors"]
    common = {n for n in old if n in new and old[n].rpartition(" ")[0] == new[n].rpartition(" ")[0]}
    differing = [name for name in differences(then, now) if name in common]
    if differing:
        raise UserError(
            f"the backbone {model.active_peft_config.base_model_name_or_path!r} is not the one that the adapter in "
            f"{place!r} was trained on: {len(differing)} of {len(common)} tensors differ ({listed(differing, 3)}).",
            f"{_remedy(then)}; or delete {BACKBONE} next to the adapter to use it on this backbone all the same.",
            key=_KEY,
        )
    remember(model, then)


def _remedy(then: dict[str, Any]) -> str:
    at = f' (set "revision" in adapter_config.json to its commit {then["commit"]})' if then.get("commit") else ""
    return f"Restore the backbone, or name the right one in adapter_config.json{at}"


def _recorded(place: str) -> dict[str, Any] | None:
    path = Path(place) / BACKBONE
    if not path.is_file():
        return None
    try:
        identity: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(value, str) for value in identity["tensors"].values()):
            raise ValueError("no digests")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{BACKBONE} of the adapter in {place!r} cannot be read ({one_line(error)}).",
            "Restore it, or delete it: the backbone is then not compared with the one that was trained on.",
            key=_KEY,
        ) from error
    return identity
