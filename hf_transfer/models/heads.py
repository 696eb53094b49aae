"""An MLP in place of the last linear layer of a model's head (`head: mlp`).

    dropout → linear(width, hidden) → [BatchNorm] → ReLU → dropout → linear(hidden, outputs)

as in most guides to transfer learning (fastai's `create_head`, for one). Everything around it stays the model's own:
how it pools, and the layers of its head below the last one. RoBERTa's and ELECTRA's `classifier.dense`, DistilBERT's
`pre_classifier` and ModernBERT's `head` belong to modules that choose the token to read, or were pretrained, so they
are kept, and the MLP follows them.

The configuration says where the MLP is (`HEAD_KEY`), and `class_with_head` makes a class that builds it, so that
`from_pretrained` finds all weights. Plain `AutoModelFor…` does not read the key. The MLP holds a tensor under the name
of the weight that it replaced, so that a plain `from_pretrained` stops with an error about its shape, instead of a
warning about missing weights and random predictions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.errors import UserError
from hf_transfer.layers.forward_pass import REFUSALS
from hf_transfer.layers.groups import layer_groups
from hf_transfer.layers.head_layers import ends_with_linear, in_order, owners, shown

HEAD_KEY = "hf_transfer_head"  # in the configuration
MLP = "mlp"
LINEAR = "linear"
BATCH = "batch"
HIDDEN_SIZE = 512  # fastai's
DROPOUT = (0.25, 0.5)  # fastai's: half of it before the hidden layer


# ---- the module ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MLPSpec:
    """What an MLP head is.

    Attributes:
        path: of the linear layer that it replaces, in the model without an adapter.
        hidden_size: units of the hidden layer.
        dropout: probabilities before the hidden and before the last layer.
        norm: `batch` for BatchNorm before the ReLU, or `none`.
    """

    path: str
    hidden_size: int = HIDDEN_SIZE
    dropout: tuple[float, float] = DROPOUT
    norm: str = "none"

    @classmethod
    def of(cls, config: Any) -> MLPSpec | None:
        """What a configuration says; None if its head is the model's own."""
        said = vars(config).get(HEAD_KEY)
        if said is None:
            return None
        return cls(said["path"], int(said["hidden_size"]), tuple(said["dropout"]), said["norm"])

    def to_dict(self) -> dict[str, Any]:
        """As the configuration holds it."""
        return {"type": MLP, **asdict(self), "dropout": list(self.dropout)}

    def fits(self, other: MLPSpec) -> bool:
        """Whether the weights of `other` fit: dropout has none."""
        return replace(self, dropout=other.dropout) == other

    def __str__(self) -> str:
        norm = ", BatchNorm" if self.norm == BATCH else ""
        return f"MLP of {self.hidden_size} hidden units{norm}, dropout {self.dropout[0]:g} and {self.dropout[1]:g}"


def head_of(config: Any) -> dict[str, Any]:
    """A model's kind of head with its sizes, for `results.json`."""
    spec = MLPSpec.of(config)
    return {"type": LINEAR} if spec is None else spec.to_dict()


class MLPHead(nn.Module):
    """See the module. Maps (examples, width), or (…, width) without BatchNorm, to (…, outputs).

    Args:
        width: of what the head reads.
        outputs: number of logits.
        spec: its sizes.
        bias: whether the last layer has one, as the layer that it replaces.
    """

    weight: torch.Tensor

    def __init__(self, width: int, outputs: int, spec: MLPSpec, bias: bool = True):
        super().__init__()
        self.dropout = nn.Dropout(spec.dropout[0])
        # BatchNorm subtracts any bias: its gradient would be rounding alone.
        self.hidden = nn.Linear(width, spec.hidden_size, bias=spec.norm != BATCH)
        self.norm = nn.BatchNorm1d(spec.hidden_size) if spec.norm == BATCH else None
        self.activation = nn.ReLU()
        self.output_dropout = nn.Dropout(spec.dropout[1])
        self.output = nn.Linear(spec.hidden_size, outputs, bias=bias)
        # Of another shape than any weight of a linear layer: see the module.
        self.register_buffer("weight", torch.zeros(1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits.

        Raises:
            UserError: BatchNorm, and the model classifies every token.
        """
        hidden = self.hidden(self.dropout(features))
        if self.norm is not None:
            if hidden.ndim != 2:
                raise UserError(
                    "batch is not possible for this model: its head reads every token, padding included, which "
                    "BatchNorm would count.",
                    "Set head_norm: none.",
                    key="head_norm",
                )
            hidden = self.norm(hidden)
        logits: torch.Tensor = self.output(self.output_dropout(self.activation(hidden)))
        return logits


# ---- putting it on a model -------------------------------------------------------------------------------------------


def put_head(model: PreTrainedModel, spec: MLPSpec) -> MLPHead:
    """Replace the linear layer at `spec.path` by a new MLP, and note it in the configuration.

    Args:
        model: without an adapter.
        spec: what to put where; `last_linear` finds the place.
    """
    layer: Any = model.get_submodule(spec.path)
    with layer.weight.device:
        head = MLPHead(layer.in_features, layer.out_features, spec, bias=layer.bias is not None)
    model.set_submodule(spec.path, head.to(layer.weight.dtype))
    setattr(model.config, HEAD_KEY, spec.to_dict())
    return head


def class_with_head(cls: Any, config: PreTrainedConfig) -> Any:
    """`cls`, or where `config` has an MLP head a subclass that builds it; `cls` is what instances should become.

    Args:
        cls: class of a model.
        config: of the model.
    """
    if MLPSpec.of(config) is None:
        return cls

    def init(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        if (spec := MLPSpec.of(config)) is not None:  # a second load may be told another configuration
            put_head(self, spec)

    return type(cls.__name__, (cls,), {"__init__": init, "__module__": cls.__module__})


def last_linear(model: PreTrainedModel, layer_rules: Any = ()) -> list[str]:
    """The paths of the layers of a model's head, in order; the last is the linear layer whose output is the logits.

    Raises:
        UserError: the head does not end with one linear layer.
    """
    names = [name for name, _ in model.named_parameters()]
    rules = [rule for rule in layer_rules or () if any(re.search(rule[0], name) for name in names)]
    paths = owners(in_order(model, set(layer_groups(model, rules)[-1].parameters)))
    if not ends_with_linear(model, paths):
        raise UserError(
            f"mlp replaces the linear layer that the head ends with, and the head of this model is "
            f"{shown(model, paths)}.",
            "Use head: linear, or a model whose head ends with one linear layer.",
            key="head",
        )
    return paths


def blank(auto_class: Any, config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model of a configuration with its own head, without memory where the class allows it."""
    options = {"trust_remote_code": True} if trust_remote_code else {}
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto_class.from_config(config, **options)
    except REFUSALS:  # some classes compute with values while they are built
        model = auto_class.from_config(config, **options)
    return model


@torch.no_grad()
def renew(model: nn.Module, missing: set[str] | None = None, last_only: bool = False) -> set[str]:
    """Draw new weights for the MLP head of a model.

    Args:
        model: with or without an adapter, of whose copies of the head all get the same weights.
        missing: plain names of parameters that have no values; layers without any of them are left alone. None: all.
        last_only: only the last layer.

    Returns:
        Plain names of the parameters that are new.
    """
    heads = [module for module in model.modules() if isinstance(module, MLPHead)]
    spec, new = MLPSpec.of(model.config), set[str]()
    if not heads or spec is None:
        return new
    for name, layer in heads[0].named_children():
        own = {f"{spec.path}.{name}.{n}" for n, _ in layer.named_parameters()}
        if own and (missing is None or own & missing) and (name == "output" or not last_only):
            layer.reset_parameters()  # type: ignore[operator]
            new |= own
    heads[0].weight.zero_()
    for other in heads[1:]:
        other.load_state_dict(heads[0].state_dict())
    return new


# ---- keys ------------------------------------------------------------------------------------------------------------


def check(values: Mapping[str, Any]) -> list[str]:
    """Problems of the keys, one sentence each."""
    if values["head"] != MLP:
        head = "without head: mlp" if values["head"] is None else f"with head: {values['head']}"
        return [
            f"{name} has no effect {head}; add head: mlp, or leave it out."
            for name in ("head_hidden_size", "head_dropout", "head_norm")
            if values[name] is not None
        ]
    try:
        _dropout(values["head_dropout"])
    except UserError as error:
        return [str(error)]
    return []


def _dropout(given: Any) -> tuple[float, float] | None:
    """One value for both places, or two.

    Raises:
        UserError: it is neither.
    """
    if given is None:
        return None
    both = list(given) if isinstance(given, list | tuple) else [given, given]
    are_numbers = all(isinstance(p, int | float) and not isinstance(p, bool) and 0 <= p < 1 for p in both)
    if len(both) == 1 and isinstance(given, list | tuple):
        both = both * 2
    if len(both) != 2 or not are_numbers:
        raise UserError(
            "expected one probability, or two (before the hidden and before the last layer), each at least 0 and below "
            f"1, got {given}.",
            key="head_dropout",
        )
    return float(both[0]), float(both[1])


@dataclass(frozen=True)
class HeadChange:
    """What the keys make of a checkpoint's head.

    Attributes:
        is_fresh: whether the head is a new one although the checkpoint may have one that fits.
        notes: messages for the user.
    """

    is_fresh: bool = False
    notes: tuple[str, ...] = ()


def settle(args: ModelArguments, auto_class: Any, config: PreTrainedConfig) -> HeadChange:
    """Decide on the head that a model gets, and write it into `config`.

    Without the key `head` the checkpoint's kind of head is kept. `head: mlp` keeps an MLP of the sizes that are given.

    Raises:
        UserError: the model's head does not end with one linear layer.
    """
    own = MLPSpec.of(config)
    if args.head == LINEAR and own is not None:
        delattr(config, HEAD_KEY)
        return HeadChange(True, (f"head: linear replaces the checkpoint's head, an {own}.",))
    if args.head != MLP:
        return HeadChange()
    *below, path = last_linear(blank(auto_class, config, args.trust_remote_code), args.layer_rules)
    start = own or MLPSpec(path)
    wanted = MLPSpec(
        path,
        args.head_hidden_size or start.hidden_size,
        _dropout(args.head_dropout) or start.dropout,
        args.head_norm or start.norm,
    )
    setattr(config, HEAD_KEY, wanted.to_dict())
    if own is not None and wanted.fits(own):
        return HeadChange(False, (f"head: mlp: the checkpoint's {own}, is kept.",) if wanted == own else ())
    replaced = f"the checkpoint's {own}" if own is not None else f"the linear layer {path}"
    kept = f" The layers of the head below it ({', '.join(below)}) are kept." if below else ""
    return HeadChange(True, (f"head: mlp: an {wanted}, replaces {replaced}.{kept}",))
