"""A pretrained model as an ordered list of layer groups, from input to head.

Conventions, the same for timm, Hugging Face vision and Hugging Face text models:

- every parameter is in exactly one group (tied parameters once, under their first name);
- the first group is the stem (`stem`, or `embeddings` where the model reads tokens), then one group per block;
- what sits between two blocks joins the block after it, what sits between the last block and the head (a final
  norm, a pooler, `conv_head`) joins the last block;
- the head is last and alone: timm's declared classifier, or what a Hugging Face model holds outside its base model.

Everything reduces to one mapping, parameter name -> depth. Three sources fill it, the first that speaks wins: the
caller's rules, the table `ARCHITECTURE_RULES`, and what the model declares (timm's `group_matcher`, the block list
of a Hugging Face model).
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_transfer.errors import UserError, nearest
from hf_transfer.layers.architectures import ARCHITECTURE_RULES, HEAD, LAST, NEXT, STEM, Depth, Rule

_HEAD_DEPTH: Depth = (math.inf,)
_LAST_DEPTH: Depth = (math.inf, -1.0)  # placeholder: becomes the deepest backbone group
_SYMBOLS: dict[str, Depth] = {STEM: (0.0,), LAST: _LAST_DEPTH, HEAD: _HEAD_DEPTH}
_HEAD_NAMES = re.compile(r"^(classifier|score|head|fc|classification_head|logits_proj|cls_classifier)(\.|$)")


@dataclass(frozen=True)
class LayerGroup:
    """One depth of a model.

    Attributes:
        name: `stem` or `embeddings`, a block's path such as `layer.3` or `blocks.2.0`, or `head`.
        parameters: names as in `model.named_parameters()`.
        sizes: scalars in each of them.
        requires_grad: whether each of them required a gradient when the groups were made.
    """

    name: str
    parameters: tuple[str, ...]
    sizes: tuple[int, ...]
    requires_grad: tuple[bool, ...]

    @property
    def num_parameters(self) -> int:
        return sum(self.sizes)


def layer_groups(model: nn.Module, rules: Sequence[Rule] = ()) -> tuple[LayerGroup, ...]:
    """The layer groups of `model`, input to head.

    Args:
        model: a timm model, a Hugging Face model with a classification head, either wrapped by peft, or any module
            that `rules` cover.
        rules: ordered `(pattern, depth)` pairs that come before everything the model declares; the first whose
            regular expression is found in a parameter's name wins. A depth is `"stem"`, `"last"` (joins the deepest
            block), `"head"`, None: 1 + the number that the pattern captures (several captures order by the first,
            then the second, ...), `"next"`: as None, but with what comes after that number (a stage's downsampling),
            or a number (0 is the stem), which orders before what the pattern captures, if it does.

    Raises:
        UserError: parameters that no rule places (they are named, with rules to add), a pattern that matches
            nothing or is not a regular expression, or a model without a head.
    """
    prefix, core = _core(model)
    parameters = dict(model.named_parameters())
    plain = plain_names(model)
    by_rule = _apply_rules(rules, list(dict.fromkeys(plain.values())))
    depths = {n: by_rule[p] for n, p in plain.items() if p in by_rule}
    inner = _timm_model(core)[0]
    short = {n: p.removeprefix(inner) for n, p in plain.items()}
    rest = [n for n in parameters if n not in depths]
    if rest:
        ruled = _match_rules(_architecture_rules(core), list(dict.fromkeys(short[n] for n in rest)))
        declared = _declared_depths(core)
        declared = {prefix + n: d for n, d in declared.items()} | {
            n: ruled[short[n]] for n in rest if short[n] in ruled
        }
        # What a wrapper holds outside the model (a prompt) is put before its input.
        outside = {n: _SYMBOLS[STEM] for n in rest if not n.startswith(prefix)}
        depths |= {n: d for n, d in (declared | outside).items() if n in rest}
    unplaced = [n for n in parameters if n not in depths]
    if unplaced:
        raise _uncovered(type(core).__name__, unplaced)
    return _make_groups(parameters, depths, short, "embeddings" if _reads_tokens(core) else STEM)


_WRAPPED = re.compile(r"\.(?:base_layer|original_module|modules_to_save\.[^.]+|ln_tuning_layers\.[^.]+)(?=\.|$)")


def plain_names(model: nn.Module) -> dict[str, str]:
    """Parameter name -> the name it has in the model without peft's wrappers; an adapter's own is in its host layer.

    `base_model.model.bert.pooler.modules_to_save.default.dense.weight` is `bert.pooler.dense.weight`.
    """
    prefix, core = _core(model)
    if core is model:
        return {n: n for n, _ in model.named_parameters()}
    return {n: _WRAPPED.sub("", n.removeprefix(prefix)) for n, _ in model.named_parameters()}


def _core(model: nn.Module) -> tuple[str, nn.Module]:
    """The name prefix and the module that declares the architecture, inside any peft wrapper."""
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel):
        core = model.get_base_model()
        prefix = next(name for name, module in model.named_modules() if module is core)
        return f"{prefix}.", core
    return "", model


def _pretrained(core: nn.Module) -> Any:
    """`core` as a `transformers.PreTrainedModel`, or None where it is none."""
    transformers = sys.modules.get("transformers")
    return core if transformers is not None and isinstance(core, transformers.PreTrainedModel) else None


def _architecture_rules(core: nn.Module) -> tuple[Rule, ...]:
    model, timm_model = _pretrained(core), _timm_model(core)[1]
    if timm_model is not None:
        return () if hasattr(timm_model, "group_matcher") else ARCHITECTURE_RULES.get(type(timm_model).__name__, ())
    return ARCHITECTURE_RULES.get(model.config.model_type, ()) if model is not None else ()


def _reads_tokens(core: nn.Module) -> bool:
    model = _pretrained(core)
    return model is not None and model.main_input_name == "input_ids"


# ---- rules ---------------------------------------------------------------------------------------------------------


def _apply_rules(rules: Sequence[Rule], names: Iterable[str]) -> dict[str, Depth]:
    names = list(names)
    for pattern, _ in rules:
        try:
            found = any(re.search(pattern, n) for n in names)
        except re.error as error:
            raise UserError(f"layer_rules: {pattern!r} is not a regular expression ({error}).") from error
        if not found:
            raise UserError(
                f"layer_rules: the pattern {pattern!r} matches no parameter.",
                f"The first names are {', '.join(names[:3])}.",
            )
    return _match_rules(rules, names)


def _match_rules(rules: Sequence[Rule], names: Iterable[str]) -> dict[str, Depth]:
    depths: dict[str, Depth] = {}
    before_next: set[str] = set()
    for name in names:
        for pattern, depth in rules:
            match = re.search(pattern, name)
            if match:
                depths[name] = _depth(depth, match)
                before_next |= {name} if depth == NEXT else set()
                break
    # What is "next" to the last block has no block to join: it follows it.
    deepest = max((d for n, d in depths.items() if n not in before_next and d[0] < math.inf), default=_LAST_DEPTH)
    return {n: _LAST_DEPTH if n in before_next and d > deepest else d for n, d in depths.items()}


def _depth(depth: int | str | None, match: re.Match[str]) -> Depth:
    if isinstance(depth, str) and depth != NEXT:
        if depth not in _SYMBOLS:
            raise UserError(
                f"layer_rules: the depth {depth!r} is not known.",
                "Use a number, stem, last, head, next, or null for the number that the pattern captures."
                f"{nearest(depth, [*_SYMBOLS, NEXT])}",
            )
        return _SYMBOLS[depth]
    numbers = [float(g) for g in match.groups() if g is not None and g.isdigit()]
    if isinstance(depth, int | float):
        return _shortest((float(depth), *numbers))
    if not numbers:
        raise UserError(
            f"layer_rules: the pattern {match.re.pattern!r} has no depth and captures no number.",
            r"Give a depth, or capture one, as in '^blocks\.(\d+)'.",
        )
    first = 1 + numbers[0] + (depth == NEXT)
    return _shortest((first, *(numbers[1:] if depth is None else ())))


def _shortest(depth: Depth) -> Depth:
    """Without trailing zeros: what precedes the first block of a stage is at its depth, so that they are one group."""
    while len(depth) > 1 and depth[-1] == 0:
        depth = depth[:-1]
    return depth


def _uncovered(model: str, unplaced: list[str]) -> UserError:
    shown = ", ".join(unplaced[:8]) + (f" and {len(unplaced) - 8} more" if len(unplaced) > 8 else "")
    return UserError(
        f"No layer rule of {model} places {len(unplaced)} parameters: {shown}.",
        "Add ordered rules, for example layer_rules: "
        r"[['^embed', stem], ['^blocks\.(\d+)', null], ['^norm', last], ['^classifier', head]].",
    )


# ---- what models declare -------------------------------------------------------------------------------------------


def _declared_depths(core: nn.Module) -> dict[str, Depth]:
    timm_name, timm_model = _timm_model(core)
    if timm_model is not None:
        return {timm_name + n: d for n, d in _timm_depths(timm_model).items()}
    return _block_list_depths(core)


def _timm_model(core: nn.Module) -> tuple[str, Any]:
    """(name prefix, the timm model) of a timm model or of transformers' wrapper round one."""
    model = _pretrained(core)
    if model is not None:
        return ("timm_model.", model.timm_model) if model.config.model_type == "timm_wrapper" else ("", None)
    is_timm = "timm" in sys.modules and type(core).__module__.startswith("timm.")
    return "", core if is_timm or hasattr(core, "group_matcher") else None


def _timm_depths(model: Any) -> dict[str, Depth]:
    """timm's own order (`group_matcher`), with the declared classifier apart as the head."""
    if not hasattr(model, "group_matcher"):
        return {}  # `ARCHITECTURE_RULES` may know its class
    from timm.models import group_parameters

    by_group = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    # A class built directly, not by `timm.create_model`, declares no classifier: its name must do.
    declared = (model.pretrained_cfg.get("classifier") or ()) if hasattr(model, "pretrained_cfg") else ()
    heads = (declared,) if isinstance(declared, str) else tuple(declared)

    def is_head(name: str) -> bool:
        return any(name == h or name.startswith(f"{h}.") for h in heads) if heads else bool(_HEAD_NAMES.match(name))

    depths: dict[str, Depth] = {n: _HEAD_DEPTH if is_head(n) else (float(g),) for n, g in by_group.items()}
    # timm leaves what follows the blocks in the classifier's group: it is backbone, so it joins the last block.
    head_groups = {by_group[n] for n in by_group if is_head(n)}
    with_blocks = {g for g in by_group.values() if g not in head_groups}
    return {n: _LAST_DEPTH if d != _HEAD_DEPTH and by_group[n] not in with_blocks else d for n, d in depths.items()}


def _block_list_depths(core: nn.Module) -> dict[str, Depth]:
    """Depths from the model's list of repeated blocks; what lies outside it is placed by definition order."""
    blocks = _blocks(core)
    if not blocks:
        return {}
    names = [n for n, _ in core.named_parameters()]
    is_head = _head_test(core)
    block_of = {n: i for i, block in enumerate(blocks) for n in names if n.startswith(f"{block}.")}
    depths: dict[str, Depth] = {}
    upcoming = 0  # the block that the next parameters precede
    for name in names:
        if name in block_of:
            depths[name] = (1.0 + block_of[name],)
            upcoming = max(upcoming, block_of[name] + 1)
        elif is_head(name):
            depths[name] = _HEAD_DEPTH
        elif upcoming == 0:
            depths[name] = _SYMBOLS[STEM]
        else:
            depths[name] = (1.0 + upcoming,) if upcoming < len(blocks) else _LAST_DEPTH
    return depths


def _blocks(core: nn.Module) -> list[str]:
    """Paths of the outermost repeated blocks, in definition order."""
    layers = sys.modules.get("transformers.modeling_layers")
    model = _pretrained(core)
    declared = (model._no_split_modules or ()) if model is not None else ()
    lists = [
        [f"{name}.{i}" for i in range(len(module))]
        for name, module in sorted(
            (
                (n, m)
                for n, m in core.named_modules()
                if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1
            ),
            key=lambda item: -sum(p.numel() for p in item[1].parameters()),
        )
    ]
    ways = [
        _outermost(core, lambda m: isinstance(m, layers.GradientCheckpointingLayer)) if layers is not None else [],
        _outermost(core, lambda m: type(m).__name__ in declared),
        *([max(lists, key=lambda found: (len(found) > 1, -lists.index(found)))] if lists else []),
    ]
    # A model of one layer is a model too, but two blocks are a surer sign than one.
    return next((found for found in ways if len(found) > 1), next((found for found in ways if found), []))


def _outermost(core: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[str]:
    found: list[str] = []
    for name, module in core.named_modules():
        inside = any(name.startswith(f"{f}.") for f in found)
        if name and wanted(module) and not inside and any(True for _ in module.parameters()):
            found.append(name)
    return found


def _head_test(core: nn.Module) -> Callable[[str], bool]:
    model = _pretrained(core)
    if model is not None and model.base_model is not model:
        return lambda name: not name.startswith(f"{model.base_model_prefix}.")
    return lambda name: bool(_HEAD_NAMES.match(name))


# ---- groups --------------------------------------------------------------------------------------------------------


def _make_groups(
    parameters: dict[str, nn.Parameter], depths: dict[str, Depth], short: dict[str, str], stem: str
) -> tuple[LayerGroup, ...]:
    backbone = sorted({d for d in depths.values() if d not in (_HEAD_DEPTH, _LAST_DEPTH)})
    if _HEAD_DEPTH not in depths.values():
        raise UserError(
            "The model has no head that the layer rules know.",
            "Name it with a rule, for example layer_rules: [['^classifier', head]].",
        )
    if not backbone:
        raise UserError("The layer rules place every parameter in the head, which leaves no backbone.")
    own: dict[Depth, list[str]] = {d: [n for n in parameters if depths[n] == d] for d in (*backbone, _HEAD_DEPTH)}
    names = _group_names([[short[n] for n in own[d]] for d in backbone], stem, _SYMBOLS[STEM] in own)
    placed = {n: backbone[-1] if d == _LAST_DEPTH else d for n, d in depths.items()}
    groups = []
    for depth, label in zip((*backbone, _HEAD_DEPTH), (*names, HEAD), strict=True):
        members = tuple(n for n in parameters if placed[n] == depth)
        sizes = tuple(parameters[n].numel() for n in members)
        groups.append(LayerGroup(label, members, sizes, tuple(parameters[n].requires_grad for n in members)))
    return tuple(groups)


def _group_names(members: list[list[str]], stem: str, has_stem: bool) -> list[str]:
    """A name for each backbone group: the stem's, or the block's path without what all blocks share."""
    paths = [_block_path(m) for m in members]
    paths = [_deepened(p, m, paths) for p, m in zip(paths, members, strict=True)]
    shared = _common_path([p[:-1] for p in paths[1:] if p])
    # "bert.encoder." goes, the list's own name stays: "layer.3".
    names = [".".join(p[max(len(shared) - 1, 0) :]) or f"group.{i}" for i, p in enumerate(paths)]
    if has_stem or not shared or paths[0][: len(shared)] != shared:
        names[0] = stem
    return [f"{n}.{i}" if names.count(n) > 1 else n for i, n in enumerate(names)]


def _block_path(members: list[str]) -> list[str]:
    """The parts of the path of the numbered module that holds a group's parameters; empty where they share none.

    What has no number in its path only joined the block (a final norm): it has no say in the block's name.
    """
    paths = [m.split(".")[:-1] for m in members]
    numbered = [p for p in paths if any(part.isdigit() for part in p)]
    shared = _common_path(numbered or paths)
    while numbered and shared and not shared[-1].isdigit():
        shared.pop()  # a block with a single sub-module is still named after its number
    if not shared:  # parts of several lists or stages: the place that most of them are in
        places = [_to_last_number(p) for p in numbered] or [p[:1] for p in paths if p]
        shared = list(Counter(map(tuple, places)).most_common(1)[0][0]) if places else []
    return shared


def _to_last_number(path: list[str]) -> list[str]:
    last = max(i for i, part in enumerate(path) if part.isdigit())
    return path[: last + 1]


def _deepened(path: list[str], members: list[str], paths: list[list[str]]) -> list[str]:
    """`path`, or that of the block inside it where it also holds other groups' blocks.

    A stage's downsampling shares the group of the stage's first block: the group is `stages.1.blocks.0`, not
    `stages.1`, which holds the later blocks too.
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
