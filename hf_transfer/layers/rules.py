"""Match ordered (pattern, depth) rules against parameter names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from hf_transfer.errors import UserError, nearest
from hf_transfer.layers.architectures import HEAD, LAST, NEXT, STEM, Depth, Rule

HEAD_DEPTH: Depth = (math.inf,)
LAST_DEPTH: Depth = (math.inf, -1.0)  # placeholder: becomes the deepest backbone group
SYMBOLS: dict[str, Depth] = {STEM: (0.0,), LAST: LAST_DEPTH, HEAD: HEAD_DEPTH}


def apply_rules(rules: Sequence[Rule], names: Iterable[str]) -> dict[str, Depth]:
    """`match_rules` for the rules of a user, which must all be valid and match something.

    Raises:
        UserError: a pattern is not a regular expression or matches no parameter, or a depth is invalid.
    """
    names = list(names)
    for pattern, _ in rules:
        try:
            matches = any(re.search(pattern, n) for n in names)
        except re.error as error:
            raise UserError(f"layer_rules: {pattern!r} is not a regular expression ({error}).") from error
        if not matches:
            raise UserError(
                f"layer_rules: pattern {pattern!r} matches no parameter.",
                f"The first parameters are {', '.join(names[:3])}.",
            )
    return match_rules(rules, names)


def match_rules(rules: Sequence[Rule], names: Iterable[str]) -> dict[str, Depth]:
    """Depth of each parameter that a rule matches; the first matching rule decides."""
    depths: dict[str, Depth] = {}
    before_next: set[str] = set()
    for name in names:
        for pattern, depth in rules:
            match = re.search(pattern, name)
            if match:
                depths[name] = _depth(depth, match)
                before_next |= {name} if depth == NEXT else set()
                break
    # After the last block there is no next one: such parameters join the last block.
    deepest = max((d for n, d in depths.items() if n not in before_next and d[0] < math.inf), default=LAST_DEPTH)
    return {n: LAST_DEPTH if n in before_next and d > deepest else d for n, d in depths.items()}


def _depth(depth: int | str | None, match: re.Match[str]) -> Depth:
    if isinstance(depth, str) and depth != NEXT:
        if depth not in SYMBOLS:
            raise UserError(
                f"layer_rules: unknown depth {depth!r}.",
                "Use a number, stem, last, head, next, or null for the number captured by the pattern."
                f"{nearest(depth, [*SYMBOLS, NEXT])}",
            )
        return SYMBOLS[depth]
    numbers = [float(g) for g in match.groups() if g is not None and g.isdigit()]
    if isinstance(depth, int | float):
        return _shortest((float(depth), *numbers))
    if not numbers:
        raise UserError(
            f"layer_rules: pattern {match.re.pattern!r} has no depth and captures no number.",
            r"Specify a depth, or capture a number, as in '^blocks\.(\d+)'.",
        )
    first = 1 + numbers[0] + (depth == NEXT)
    return _shortest((first, *(numbers[1:] if depth is None else ())))


def _shortest(depth: Depth) -> Depth:
    """`depth` without trailing zeros, so that parameters before the first block of a stage are grouped with it."""
    while len(depth) > 1 and depth[-1] == 0:
        depth = depth[:-1]
    return depth
