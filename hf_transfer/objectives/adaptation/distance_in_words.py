"""The distance of two domains in words, from what a plan and `results.json` say of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ALIKE = 0.3  # of the proxy A-distance, below which a classifier of some hundred examples is hardly better than chance


def before_in_words(found: Mapping[str, Any]) -> str:
    """The distance before training; `found` is `domain_distance` of a plan, or `distance` of a run."""
    if "skipped" in found:
        return f"Domain distance: not measured, because {found['skipped']}."
    first = found["before"]
    alike = first["proxy_a_distance"] < _ALIKE
    says = " It hardly can: there is little to adapt to." if alike else ""
    return (
        f"Domain distance ({found['layer']}, {found['examples']:,} examples of each domain): a linear classifier tells "
        f"source and target apart in {1 - first['error']:.1%} of cases, proxy A-distance "
        f"{first['proxy_a_distance']:.2f} of 2; MMD {first['mmd']:.3f}.{says}"
    )


def both_in_words(found: Mapping[str, Any] | None) -> str:
    """The distance before and after training; empty where it was not measured."""
    if not found or "after" not in found:
        return ""
    first, last = found["before"], found["after"]
    what = "once the source is aligned" if found["aligned"] else "after training"
    return (
        f"Domain distance ({found['layer']}): proxy A-distance {first['proxy_a_distance']:.2f} before, "
        f"{last['proxy_a_distance']:.2f} {what}; MMD {first['mmd']:.3f}, then {last['mmd']:.3f}"
    )
