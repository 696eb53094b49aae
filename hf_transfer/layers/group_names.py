"""Names of layer groups, from the paths of their parameters."""

from __future__ import annotations

from collections import Counter


def group_names(members: list[list[str]], stem: str, has_stem: bool) -> list[str]:
    """Names of the backbone groups: the stem's, or the path of the block without the prefix that all blocks share.

    Args:
        members: parameter names of each group, input to output.
        stem: name of the stem.
        has_stem: whether the first group is the stem.
    """
    paths = [_block_path(m) for m in members]
    paths = [_deepened(p, m, paths) for p, m in zip(paths, members, strict=True)]
    shared = _common_path([p[:-1] for p in paths[1:] if p])
    # Drop "bert.encoder.", keep the name of the list: "layer.3".
    names = [".".join(p[max(len(shared) - 1, 0) :]) or f"group.{i}" for i, p in enumerate(paths)]
    if has_stem or not shared or paths[0][: len(shared)] != shared:
        names[0] = stem
    return [f"{n}.{i}" if names.count(n) > 1 else n for i, n in enumerate(names)]


def _block_path(members: list[str]) -> list[str]:
    """The path of the numbered module that contains a group's parameters, as a list of its parts; may be empty.

    Parameters without a number in their path, such as those of a final norm, do not count.
    """
    paths = [m.split(".")[:-1] for m in members]
    numbered = [p for p in paths if any(part.isdigit() for part in p)]
    shared = _common_path(numbered or paths)
    while numbered and shared and not shared[-1].isdigit():
        shared.pop()  # a block with a single sub-module is still named after its number
    if not shared:  # parts of several lists or stages: use the one that contains most parameters
        prefixes = [_to_last_number(p) for p in numbered] or [p[:1] for p in paths if p]
        shared = list(Counter(map(tuple, prefixes)).most_common(1)[0][0]) if prefixes else []
    return shared


def _to_last_number(path: list[str]) -> list[str]:
    last = max(i for i, part in enumerate(path) if part.isdigit())
    return path[: last + 1]


def _deepened(path: list[str], members: list[str], paths: list[list[str]]) -> list[str]:
    """`path`, or the path of a block inside it if `path` also contains blocks of other groups.

    The downsampling of a stage is in the same group as the stage's first block: that group is named
    `stages.1.blocks.0`, not `stages.1`, which also contains the later blocks.
    """
    inside = [p for p in paths if path and len(p) > len(path) and p[: len(path)] == path]
    if not inside:
        return path
    depth = min(len(p) for p in inside)
    candidates = Counter(tuple(m.split(".")[:depth]) for m in members if m.count(".") > depth)
    candidates = Counter({c: n for c, n in candidates.items() if c[-1].isdigit()})
    return list(candidates.most_common(1)[0][0]) if candidates else path


def _common_path(paths: list[list[str]]) -> list[str]:
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return shared
