"""The names of timm's models, read from its source files: importing timm and torch takes seconds, this a tenth."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

from hf_transfer.errors import closest


def unknown_model(name: str) -> str:
    """What to say of a name that timm's sources do not have; empty if they have it, or if timm is not installed.

    Args:
        name: of an architecture, with or without the tag of its weights (`resnet50.a1_in1k`), without `timm/`.
    """
    architecture, source = name.split(".")[0], _source()
    # An older name is no function any more, but the key or the value of a mapping.
    mentioned = rf"""(\bdef |['"]){re.escape(architecture)}(\(|['".])"""
    return "" if not source or re.search(mentioned, source) else no_model(architecture)


def no_model(architecture: str) -> str:
    """That timm has no such model, with the nearest name that it has."""
    near = closest(architecture, re.findall(r"^@register_model\s*\ndef (\w+)\(", _source(), re.MULTILINE))
    return f"timm has no model {architecture!r}." + (f" Did you mean 'timm/{near}'?" if near else "")


@cache
def _source() -> str:
    """The text of all modules with models; empty if timm is not installed."""
    spec = importlib.util.find_spec("timm")
    folders = [Path(folder) / "models" for folder in (spec.submodule_search_locations if spec else None) or ()]
    files = (file for folder in folders for file in sorted(folder.glob("*.py")))
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
