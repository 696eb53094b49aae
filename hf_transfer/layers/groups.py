"""A pretrained model as an ordered list of layer groups, from input to head.

The conventions are the same for timm models and for Hugging Face vision and text models:

- every parameter is in exactly one group (tied parameters once, under their first name);
- the first group is the stem (`stem`, or `embeddings` if the model reads tokens), followed by one group per block;
- layers between two blocks belong to the second one; layers between the last block and the head (a final norm, a
  pooler, `conv_head`) belong to the last block;
- the head is the last group: timm's declared classifier, or everything outside the base model of a Hugging Face model
  and a layer that was added to pool (`models.pooling_layer`).

Everything reduces to one mapping from parameter names to depths. It has three sources, in order of precedence: the
caller's rules, the table `ARCHITECTURE_RULES`, and what the model declares (timm's `group_matcher`, or the block list
of a Hugging Face model).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from hf_transfer.errors import UserError
from hf_transfer.layers.architectures import HEAD, STEM, Depth, Rule
from hf_transfer.layers.declared import architecture_rules, declared_depths, reads_tokens
from hf_transfer.layers.group_names import group_names
from hf_transfer.layers.rules import HEAD_DEPTH, LAST_DEPTH, SYMBOLS, apply_rules, match_rules
from hf_transfer.layers.wrappers import core_of, plain_names, timm_core


@dataclass(frozen=True)
class LayerGroup:
    """The parameters at one depth of a model.

    Attributes:
        name: `stem` or `embeddings`, the path of a block such as `layer.3` or `blocks.2.0`, or `head`.
        parameters: names as in `model.named_parameters()`.
        sizes: number of elements of each parameter.
        requires_grad: whether each parameter required gradients when the groups were created.
    """

    name: str
    parameters: tuple[str, ...]
    sizes: tuple[int, ...]
    requires_grad: tuple[bool, ...]

    @property
    def num_parameters(self) -> int:
        """Total number of elements."""
        return sum(self.sizes)


def layer_groups(model: nn.Module, rules: Sequence[Rule] = ()) -> tuple[LayerGroup, ...]:
    """The layer groups of `model`, input to head.

    Args:
        model: a timm model, a Hugging Face model with a classification head, one of these wrapped by peft, or any
            module whose parameters `rules` cover.
        rules: ordered `(pattern, depth)` pairs, which take precedence over what the model declares. The first pattern
            (regular expression) found in a parameter's name decides. A depth is one of

            - `"stem"`;
            - `"last"`: joins the deepest block;
            - `"head"`;
            - None: 1 + the number that the pattern captures; with several captured numbers, groups are ordered by the
              first one, then the second one, and so on;
            - `"next"`: like None, but one deeper, for what follows that number (the downsampling of a stage);
            - a number (0 is the stem), followed by the numbers that the pattern captures, if any.

    Raises:
        UserError: some parameters are not covered (the message lists them and suggests rules), a pattern is not a
            regular expression or matches nothing, or the model has no head.
    """
    prefix, core = core_of(model)
    parameters = dict(model.named_parameters())
    plain = plain_names(model)
    by_rule = apply_rules(rules, list(dict.fromkeys(plain.values())))
    depths = {n: by_rule[p] for n, p in plain.items() if p in by_rule}
    inner = timm_core(core)[0]
    short = {n: p.removeprefix(inner) for n, p in plain.items()}
    rest = [n for n in parameters if n not in depths]
    if rest:
        ruled = match_rules(architecture_rules(core), list(dict.fromkeys(short[n] for n in rest)))
        declared = declared_depths(core)
        declared = {prefix + n: d for n, d in declared.items()} | {
            n: ruled[short[n]] for n in rest if short[n] in ruled
        }
        # Parameters of a wrapper outside the model (a prompt) precede the model's input.
        outside = {n: SYMBOLS[STEM] for n in rest if not n.startswith(prefix)}
        depths |= {n: d for n, d in (declared | outside).items() if n in rest}
    unplaced = [n for n in parameters if n not in depths]
    if unplaced:
        raise _uncovered(type(core).__name__, unplaced)
    return _make_groups(parameters, depths, short, "embeddings" if reads_tokens(core) else STEM)


def _uncovered(model: str, unplaced: list[str]) -> UserError:
    shown = ", ".join(unplaced[:8]) + (f" and {len(unplaced) - 8} more" if len(unplaced) > 8 else "")
    return UserError(
        f"The layer rules of {model} do not cover {len(unplaced)} parameters: {shown}.",
        "Add ordered rules, for example layer_rules: "
        r"[['^embed', stem], ['^blocks\.(\d+)', null], ['^norm', last], ['^classifier', head]].",
    )


def _make_groups(
    parameters: dict[str, nn.Parameter], depths: dict[str, Depth], short: dict[str, str], stem: str
) -> tuple[LayerGroup, ...]:
    backbone = sorted({d for d in depths.values() if d not in (HEAD_DEPTH, LAST_DEPTH)})
    if HEAD_DEPTH not in depths.values():
        raise UserError(
            "The layer rules find no head in the model.",
            "Add a rule for it, for example layer_rules: [['^classifier', head]].",
        )
    if not backbone:
        raise UserError("The layer rules assign every parameter to the head, which leaves no backbone.")
    own: dict[Depth, list[str]] = {d: [n for n in parameters if depths[n] == d] for d in (*backbone, HEAD_DEPTH)}
    names = group_names([[short[n] for n in own[d]] for d in backbone], stem, SYMBOLS[STEM] in own)
    placed = {n: backbone[-1] if d == LAST_DEPTH else d for n, d in depths.items()}
    groups = []
    for depth, label in zip((*backbone, HEAD_DEPTH), (*names, HEAD), strict=True):
        members = tuple(n for n in parameters if placed[n] == depth)
        sizes = tuple(parameters[n].numel() for n in members)
        groups.append(LayerGroup(label, members, sizes, tuple(parameters[n].requires_grad for n in members)))
    return tuple(groups)
