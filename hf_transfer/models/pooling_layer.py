"""A text classifier that reads the mean over the tokens of any layer, inside the standard architecture.

The head of most text encoders reads the first token of the last layer. On little data, the mean over the unmasked
tokens of a middle layer often separates the classes better, but no key of a BERT says so, and a wrapper would need
code of ours to be loaded. One ordinary transformer layer can compute it instead: `with_mean_pooling` drops the layers
above layer k and appends one in which

- the query is zero, so that every unmasked token gets the same attention, whatever the keys are;
- the value is the identity and the attention's output `MEAN_WEIGHT` times the identity, so that the attention adds
  30 times the mean to each token;
- the feed-forward output is zero, and both LayerNorms have weight 1 and bias 0.

Its first token, which the head reads, is LayerNorm(LayerNorm(30 * mean + first)): the direction of the mean, with
1/30 of the first token. `num_hidden_layers` is k + 1 and everything else is stock, so that plain
`AutoModelForSequenceClassification.from_pretrained` loads the saved model and all its weights can be fine-tuned: keys
and feed-forward input keep the weights of the layer whose place it takes (of the last layer if there is none), so that
queries and feed-forward output get gradients.

What each architecture makes of it (`pooling_architectures`):

- BERT, ERNIE, RoBERTa, XLM-RoBERTa, CamemBERT, data2vec, ELECTRA, DistilBERT: as above.
- DeBERTa, both versions: content-to-position scores vanish with the query; position-to-content scores need the query
  of the positions to be zero too. The convolution of DeBERTa-v2 follows the first layer, so k is at least 1 there.
- ModernBERT: its head can read the mean itself (`classifier_pooling`). No layer is added; the head reads the mean of
  `final_norm` of layer k, and its dense layer gets a bias (`classifier_bias`).
- ALBERT, MPNet and pre-norm models are refused, each with its reason, and so is every other class.

The added layer is the model's pooling, not part of its backbone: the configuration remembers it under the name
`POOLING_LAYER`, and `layer_groups` puts it into the head. Every change is verified on a ragged batch (`max_error`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_transfer.errors import UserError
from hf_transfer.layers.architectures import POOLING_LAYER
from hf_transfer.models.pooling_architectures import (
    ARCHITECTURES,
    MEAN_WEIGHT,
    NEARLY_LINEAR,
    REFUSED,
    Architecture,
    Block,
    activation_name,
    state_of,
)

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # others: half precision
_HALF_TOLERANCE = 0.1
_WITHOUT = Architecture()
_UNKNOWN = "no such change is known for its class"


@dataclass(frozen=True)
class PoolingChange:
    """What `with_mean_pooling` changed.

    Attributes:
        architecture: class of the model.
        kept: number of layers below the pooling; 0 is the mean of the embeddings.
        dropped: number of layers above them, which are gone.
        added: path of the layer that computes the mean; None if the head does.
        max_error: largest difference, on a small ragged batch, between the state that the head reads and the formula
            of this module, relative to the largest element if that is above 1.
    """

    architecture: str
    kept: int
    dropped: int
    added: str | None
    max_error: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {"pooling": "mean", **asdict(self)}

    def __str__(self) -> str:
        read = f"the mean over the tokens of layer {self.kept}" if self.kept else "the mean over the embeddings"
        out = f"; {self.dropped} layer{'s' * (self.dropped != 1)} above it left out" if self.dropped else ""
        layer = f", which an added layer ({self.added}) computes" if self.added else ""
        return f"the head reads {read}{layer}{out}"


def with_mean_pooling(model: PreTrainedModel, keep: int) -> PoolingChange:
    """Make a sequence classification model read the mean over the unmasked tokens of a layer, in place.

    The head keeps its weights, which were made for another state: see `set_standardizing`.

    Args:
        model: a model of transformers with its head, not wrapped by an adapter. One that was changed before is changed
            again, from the layers that it still has.
        keep: number of layers to keep, whose last one is read; 0 reads the embeddings.

    Raises:
        UserError: the architecture cannot do it, `keep` is not one of its layers, or the changed model does not
            compute the mean (with a version of transformers that computes something else).
    """
    architecture = _architecture(model)
    layers: Any = model.base_model.get_submodule(architecture.layers)
    total = len(layers) - (_pooling_layer(model) is not None)
    _check_keep(model, keep, total)
    if architecture.block is None:
        _read_mean_in_head(model, architecture, keep)
    else:
        layer = layers[keep] if keep < len(layers) else copy.deepcopy(layers[-1])
        for module in layer.modules():
            if "layer_idx" in vars(module):
                module.layer_idx = keep
        _make_mean(layer, architecture.block)
        _set_layers(model, architecture, [*layers[:keep], layer])
        setattr(model.config, POOLING_LAYER, keep)
    added = None if architecture.block is None else f"{model.base_model_prefix}.{architecture.layers}.{keep}"
    name = type(model).__name__
    error = _max_error(model, architecture)
    if not error <= _TOLERANCE.get(model.dtype, _HALF_TOLERANCE):
        raise UserError(
            f"{name} with {keep} layers does not compute the mean over the tokens (it is off by {error:.2g}).",
            "Use the first token of the last layer, or another model.",
        )
    return PoolingChange(name, keep, total - keep, added, error)


def set_standardizing(model: PreTrainedModel, mean: torch.Tensor, sd: torch.Tensor) -> nn.Linear:
    """Make the head's first layer standardize the state that it reads, in the nearly linear range of its activation.

    A linear head can then be solved for on the input of the last layer, as on standardized features.

    Args:
        model: as `with_mean_pooling` leaves it.
        mean: mean of the state over the training set, (width,).
        sd: its standard deviation, (width,). Elements that are constant have no influence on the head.

    Returns:
        The last linear layer, on whose input the head is to be solved for.

    Raises:
        UserError: the architecture or its activation function is not supported.
    """
    architecture = _architecture(model)
    dense: Any = model.get_submodule(architecture.dense)
    last: Any = model.get_submodule(architecture.last)
    width = dense.in_features
    if mean.shape != (width,) or sd.shape != (width,) or not bool((mean.isfinite() & sd.isfinite() & (sd >= 0)).all()):
        raise ValueError(f"mean and sd must be finite, of shape ({width},), and sd not negative")
    activation = activation_name(architecture, model.config)
    if activation not in NEARLY_LINEAR:
        raise UserError(
            f"{type(model).__name__}: no nearly linear range is known for the head's activation {activation!r}.",
            f"Known are {', '.join(NEARLY_LINEAR)}.",
        )
    scale, shift = NEARLY_LINEAR[activation]
    sd, mean = sd.double(), mean.double()
    weight = torch.where(sd > 1e-6 * sd.max(), scale / sd.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
    with torch.no_grad():
        dense.weight.copy_(torch.diag(weight))
        if dense.bias is not None:
            dense.bias.copy_(shift - weight * mean)
        if architecture.norm is not None:
            _reset(model.get_submodule(architecture.norm))
    return last


def head_reader(model: PreTrainedModel) -> nn.Module:
    """The head's first layer, which reads the pooled state."""
    return model.get_submodule(_architecture(model).dense)


def refusal(model: nn.Module) -> str:
    """Why the model's head cannot read the mean of a layer, as part of a sentence; empty if it can."""
    name = type(model).__name__
    if name not in ARCHITECTURES:
        return f"{name}: {REFUSED.get(name, _UNKNOWN)}"
    if vars(model.config).get("is_decoder"):
        return f"{name} is configured as a decoder, whose first token sees no other"
    return ""


# ---- checks ----------------------------------------------------------------------------------------------------------


def _architecture(model: nn.Module) -> Architecture:
    name = type(model).__name__
    if name not in ARCHITECTURES:
        reason = REFUSED.get(name, _UNKNOWN)
        known = ", ".join(sorted(n.removesuffix("ForSequenceClassification") for n in ARCHITECTURES))
        raise UserError(f"{name} cannot read the mean of a layer: {reason}.", f"This works for {known}.")
    if vars(model.config).get("is_decoder"):
        raise UserError(
            f"{name} cannot read the mean of a layer: it is configured as a decoder, whose first token sees no other.",
            "Load it with is_decoder: false.",
        )
    return ARCHITECTURES[name]


def _check_keep(model: PreTrainedModel, keep: int, total: int) -> None:
    """Check the number of layers to keep.

    Raises:
        UserError: the model cannot keep so many or so few.
    """
    name, why = type(model).__name__, _why_not_embeddings(model)
    least = least_layers(model)
    if not least <= keep <= total:
        raise UserError(
            f"{name} cannot read the mean of layer {keep}: it has {total} layer{'s' * (total != 1)}"
            f"{why if keep == 0 else ''}.",
            f"Use a number from {least} to {total}{'' if least else ', where 0 is the mean of the embeddings'}.",
        )


def layer_numbers(model: PreTrainedModel, parameters: Iterable[str]) -> set[int]:
    """The numbers of the layers that parameters belong to, by the names of the parameters in the model."""
    found = re.compile(rf"(?:^|\.){re.escape(_architecture(model).layers)}\.(\d+)\.")
    return {int(match[1]) for name in parameters if (match := found.search(name))}


def has_switch(model: nn.Module) -> bool:
    """Whether the configuration says what the head reads."""
    return ARCHITECTURES.get(type(model).__name__, _WITHOUT).block is None


def reads_mean(model: nn.Module) -> bool:
    """Whether the head reads the mean over the tokens: by its configuration, or through a layer that was added."""
    keys = vars(model.config)
    return keys.get(POOLING_LAYER) is not None or (has_switch(model) and keys.get("classifier_pooling") == "mean")


def least_layers(model: PreTrainedModel) -> int:
    """The least number of layers that can be kept."""
    return 1 if _why_not_embeddings(model) else 0


def _why_not_embeddings(model: PreTrainedModel) -> str:
    """Why the mean of the embeddings cannot be read; empty if it can."""
    name = type(model).__name__
    if name == "ModernBertForSequenceClassification":
        return "; without layers it has no backbone"
    if name == "DebertaV2ForSequenceClassification" and model.base_model.encoder.conv is not None:
        return "; its convolution follows the first layer and would change the mean"
    return ""


def _pooling_layer(model: PreTrainedModel) -> int | None:
    """The number of the layer that an earlier change added."""
    number: int | None = vars(model.config).get(POOLING_LAYER)
    return number


@torch.no_grad()
def _max_error(model: PreTrainedModel, architecture: Architecture) -> float:
    """See `PoolingChange.max_error`."""
    base, config = model.base_model, model.config
    reader = base.final_norm if architecture.block is None else base.get_submodule(architecture.layers)[-1]
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        reader.register_forward_pre_hook(lambda _, args: seen.update(layer=args[0])),
        model.get_submodule(architecture.dense).register_forward_pre_hook(lambda _, args: seen.update(head=args[0])),
    ]
    ids = torch.arange(14, device=model.device).reshape(2, 7) * 5 % (config.vocab_size - 2) + 2
    ids = torch.where(ids == (config.pad_token_id or 0), 1, ids)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    training = model.training
    try:
        model.eval()(input_ids=ids, attention_mask=mask)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    weights = (mask / mask.sum(1, keepdim=True))[..., None].to(seen["layer"].dtype)
    if architecture.block is None:
        expected = (reader(seen["layer"]) * weights).sum(1)
    else:
        expected = state_of(reader, architecture.block, (seen["layer"] * weights).sum(1), seen["layer"][:, 0])
    return float((seen["head"] - expected).abs().max() / expected.abs().max().clamp(min=1.0))


# ---- changes ---------------------------------------------------------------------------------------------------------


def _set_layers(model: PreTrainedModel, architecture: Architecture, layers: list[nn.Module]) -> None:
    model.base_model.set_submodule(architecture.layers, nn.ModuleList(layers))
    model.config.num_hidden_layers = len(layers)


@torch.no_grad()
def _make_mean(layer: nn.Module, block: Block) -> None:
    """Set the weights of a post-norm layer so that it computes the mean over the unmasked tokens."""
    modules = dict(layer.named_modules())
    output: Any = modules[block.output]
    identity = torch.eye(output.in_features, dtype=output.weight.dtype, device=output.weight.device)
    for path in block.zero:
        if path in modules:  # which position projections there are depends on the configuration
            _set(modules[path], 0.0)
    if block.value == "attention.self.in_proj":
        _set_packed(modules["attention.self"], identity)
    else:
        _set(modules[block.value], identity)
    _set(output, MEAN_WEIGHT * identity)
    for path in block.norms:
        _reset(modules[path])


def _set(layer: Any, weight: torch.Tensor | float) -> None:
    layer.weight.copy_(torch.as_tensor(weight).expand_as(layer.weight))
    layer.bias.zero_()


def _set_packed(attention: Any, identity: torch.Tensor) -> None:
    """DeBERTa's first version: each head's rows of one weight are its query, its key and its value."""
    heads, width = attention.num_attention_heads, identity.shape[0]
    rows = attention.in_proj.weight.view(heads, 3, width // heads, width)
    rows[:, 0] = 0.0
    rows[:, 2] = identity.view(heads, width // heads, width)
    attention.q_bias.zero_()
    attention.v_bias.zero_()
    if attention.head_weights_proj is not None:  # heads mixed after the softmax; before it, all scores are zero
        attention.head_weights_proj.weight.copy_(torch.eye(heads))


def _reset(norm: Any) -> None:
    """A LayerNorm's weights as they are initialized; it may have no bias."""
    norm.weight.fill_(1.0)
    if norm.bias is not None:
        norm.bias.zero_()


def _read_mean_in_head(model: PreTrainedModel, architecture: Architecture, keep: int) -> None:
    """ModernBERT: keep the first layers, and let the head read their mean."""
    config: Any = model.config
    dense: Any = model.get_submodule(architecture.dense)
    layers: Any = model.base_model.get_submodule(architecture.layers)
    config.layer_types = config.layer_types[:keep]
    _set_layers(model, architecture, list(layers[:keep]))
    config.classifier_pooling, config.classifier_bias = "mean", True
    if dense.bias is None:
        dense.bias = nn.Parameter(dense.weight.new_zeros(dense.out_features))
