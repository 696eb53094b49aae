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
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_transfer.errors import UserError
from hf_transfer.layers.forward_pass import REFUSALS
from hf_transfer.layers.groups import layer_groups
from hf_transfer.layers.head_layers import ends_with_linear, in_order, owners, shown
from hf_transfer.layers.wrappers import core_of, plain_name, plain_names
from hf_transfer.models.pooled_head import PooledLinear, PoolingSpec, put_pooling

HEAD_KEY = "hf_transfer_head"  # in the configuration
MLP = "mlp"
LINEAR = "linear"
POOLED = "pooled"  # a linear layer on a pooled layer, where the architecture does not offer it
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
    spec, pooling = MLPSpec.of(config), PoolingSpec.of(config)
    if pooling is not None:
        several = {"layers": [one.layer for one in pooling.parts]} if pooling.others else {}
        return {"type": POOLED, "pooling": pooling.pooling, "layer": pooling.layer, **several}
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


def put_head(model: Any, spec: MLPSpec | None, path: str = "", missing: Collection[str] = ()) -> set[str]:
    """Replace the last layer of a model's head by a new one, and note it in the configuration.

    Args:
        model: with or without an adapter, whose copy of the layer is replaced too.
        spec: of the MLP; None for a linear layer.
        path: of the layer in the model without an adapter (default: `spec.path`); `last_linear` finds it.
        missing: plain names of parameters that have no trained values.

    Returns:
        The same after the change, with the new parameters, which are as torch initializes them.
    """
    path, prefix = path or (spec.path if spec is not None else ""), core_of(model)[0]
    new = set[str]()
    for name, module in list(model.named_modules()):
        if plain_name(name, prefix) != path or not isinstance(module, nn.Linear | MLPHead):
            continue
        first, last = (module.hidden, module.output) if isinstance(module, MLPHead) else (module, module)
        width, outputs, bias = first.in_features, last.out_features, last.bias is not None
        with last.weight.device:
            made = nn.Linear(width, outputs, bias) if spec is None else MLPHead(width, outputs, spec, bias)
        model.set_submodule(name, made.to(last.weight.dtype).requires_grad_(last.weight.requires_grad))
        new = {f"{path}.{n}" for n, _ in made.named_parameters()}
    if spec is not None:
        setattr(model.config, HEAD_KEY, spec.to_dict())
    else:
        vars(model.config).pop(HEAD_KEY, None)
    return new | {name for name in missing if not name.startswith(f"{path}.")}


def is_ours(config: PreTrainedConfig) -> bool:
    """Whether a configuration has an MLP head, or a head on a pooled layer: plain transformers builds neither."""
    return MLPSpec.of(config) is not None or PoolingSpec.of(config) is not None


def class_with_head(cls: Any, config: PreTrainedConfig) -> Any:
    """`cls`, or where `config` has a head of ours a subclass that builds it; `cls` is what instances should become.

    Args:
        cls: class of a model.
        config: of the model.
    """
    if not is_ours(config):
        return cls

    def init(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        if (spec := MLPSpec.of(config)) is not None:  # a second load may be told another configuration
            put_head(self, spec)
        if (pooling := PoolingSpec.of(config)) is not None:
            put_pooling(self, pooling)

    return type(cls.__name__, (cls,), {"__init__": init, "__module__": cls.__module__})


def last_linear(model: PreTrainedModel, layer_rules: Any = ()) -> list[str]:
    """The paths of the layers of a model's head, in order; the last is the linear layer whose output is the logits.

    Raises:
        UserError: the head does not end with one linear layer.
    """
    names = [name for name, _ in model.named_parameters()]
    rules = [rule for rule in layer_rules or () if _applies(rule[0], names)]
    paths = owners(in_order(model, set(layer_groups(model, rules)[-1].parameters)))
    if not ends_with_linear(model, paths):
        raise UserError(
            f"mlp replaces the linear layer that the head ends with, and the head of this model is "
            f"{shown(model, paths)}.",
            "Use head: linear, or a model whose head ends with one linear layer.",
            key="head",
        )
    return paths


def _applies(pattern: str, names: Sequence[str]) -> bool:
    """Whether a rule concerns this head: one for layers of an MLP matches nothing before it is there."""
    try:
        return any(re.search(pattern, name) for name in names)
    except re.error:
        return True  # `layer_groups` says what is wrong with it


def blank(auto_class: Any, config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model of a configuration with its own head, without memory where the class allows it."""
    options = {"trust_remote_code": True} if trust_remote_code else {}
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto_class.from_config(config, **options)
    except REFUSALS:  # some classes compute with values while they are built
        model = auto_class.from_config(config, **options)
    return model


def unfilled(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and configuration, without memory where the class allows it."""
    cls = class_with_head(type(model), model.config)
    try:
        with torch.device("meta"):
            made: PreTrainedModel = cls(model.config)
    except REFUSALS:
        made = cls(model.config)
    return made


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


def fresh_head(model: PreTrainedModel, auto_class: Any, head: Collection[str], whole: bool = False) -> set[str]:
    """Reinitialize the output layer of a head that has the right size but other classes; returns its parameters.

    Args:
        model: with or without an adapter.
        auto_class: builds such a model.
        head: plain names of the parameters of its head.
        whole: of an MLP, all layers.
    """
    if MLPSpec.of(model.config) is not None:
        return renew(model, last_only=not whole)
    if (pooling := PoolingSpec.of(model.config)) is not None:
        last = next(module for module in model.modules() if isinstance(module, PooledLinear))
        last.output.reset_parameters()
        return {f"{pooling.head}.output.{name}" for name, _ in last.output.named_parameters()}
    own = dict(auto_class.from_config(model.config).named_parameters())
    outputs = model.config.num_labels
    replaced, plain = set(), plain_names(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if plain[name] in head and parameter.shape[0] == outputs:
                parameter.copy_(own[plain[name]])
                replaced.add(plain[name])
    return replaced
