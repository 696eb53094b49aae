"""How each text encoder is made to read the mean of a layer, as data: paths of modules; see `pooling_layer`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

MEAN_WEIGHT = 30.0  # of the mean beside the token that it is added to


@dataclass(frozen=True)
class Block:
    """Paths inside one post-norm transformer layer.

    Attributes:
        zero: layers whose output is set to zero: the query (also that of positions) and the feed-forward output.
        value: the attention's value layer; in DeBERTa's first version, the packed query, key and value layer.
        output: the attention's output layer.
        norms: the two LayerNorms, in order.
    """

    zero: tuple[str, ...] = ("attention.self.query", "output.dense")
    value: str = "attention.self.value"
    output: str = "attention.output.dense"
    norms: tuple[str, str] = ("attention.output.LayerNorm", "output.LayerNorm")


@dataclass(frozen=True)
class Architecture:
    """Paths in a model with a sequence classification head.

    Attributes:
        layers: the list of layers, in the base model.
        block: the layer to append; None if the head itself can read the mean (`classifier_pooling`).
        dense: the head's first layer, which reads the pooled state.
        activation: its activation function, or the key of the configuration that names it.
        last: the linear layer whose output are the logits.
        norm: a LayerNorm between the activation and the last layer.
    """

    layers: str = "encoder.layer"
    block: Block | None = Block()
    dense: str = "classifier.dense"
    activation: str = "tanh"
    last: str = "classifier.out_proj"
    norm: str | None = None


_TANH_POOLER = Architecture(dense="pooler.dense", last="classifier")
_DEBERTA = Architecture(
    block=Block(
        zero=("attention.self.query_proj", "attention.self.pos_query_proj", "output.dense"),
        value="attention.self.value_proj",
    ),
    dense="pooler.dense",
    activation="pooler_hidden_act",
    last="classifier",
)

# Class of transformers -> where its parts are.
ARCHITECTURES: dict[str, Architecture] = {
    "BertForSequenceClassification": replace(_TANH_POOLER, dense="bert.pooler.dense"),
    "ErnieForSequenceClassification": replace(_TANH_POOLER, dense="ernie.pooler.dense"),
    "RobertaForSequenceClassification": Architecture(),
    "XLMRobertaForSequenceClassification": Architecture(),
    "CamembertForSequenceClassification": Architecture(),
    "Data2VecTextForSequenceClassification": Architecture(),
    "ElectraForSequenceClassification": Architecture(activation="gelu"),
    "DistilBertForSequenceClassification": Architecture(
        layers="transformer.layer",
        block=Block(
            zero=("attention.q_lin", "ffn.lin2"),
            value="attention.v_lin",
            output="attention.out_lin",
            norms=("sa_layer_norm", "output_layer_norm"),
        ),
        dense="pre_classifier",
        activation="relu",
        last="classifier",
    ),
    "DebertaForSequenceClassification": replace(
        _DEBERTA, block=Block(zero=("attention.self.pos_q_proj", "output.dense"), value="attention.self.in_proj")
    ),
    "DebertaV2ForSequenceClassification": _DEBERTA,
    "ModernBertForSequenceClassification": Architecture(
        layers="layers",
        block=None,
        dense="head.dense",
        activation="classifier_activation",
        last="classifier",
        norm="head.norm",
    ),
}

_PRE_NORM = "its layers end without a LayerNorm (pre-norm), so an added layer cannot replace the state of a token"
# Class of transformers -> why its head cannot read the mean of a layer.
REFUSED: dict[str, str] = {
    "AlbertForSequenceClassification": "all its depths share one layer, so that none can be added",
    "MPNetForSequenceClassification": (
        "its position bias is shared by all layers, so that no layer of it weighs all tokens equally"
    ),
    "RobertaPreLayerNormForSequenceClassification": _PRE_NORM,
    "XLMRobertaXLForSequenceClassification": _PRE_NORM,
    "MegatronBertForSequenceClassification": _PRE_NORM,
}


# Activation function -> (scale, shift) of a standardized input at which it is nearly linear. tanh is linear around
# zero. ReLU and GELU are the identity for positive inputs: a value is lost (ReLU) or distorted (GELU, by 0.17 at most
# above -3.7) only if it is more than three standard deviations below the mean. A larger shift would lose less, but
# dropout after the activation multiplies it: at 3 its noise is three times that of a centered feature.
NEARLY_LINEAR: dict[str, tuple[float, float]] = {
    "tanh": (0.5, 0.0),
    "linear": (1.0, 0.0),
    **dict.fromkeys(("relu", "gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_pytorch_tanh"), (1.0, 3.0)),
}


def activation_name(architecture: Architecture, config: Any) -> str:
    """The name of the head's activation function."""
    return str(vars(config).get(architecture.activation, architecture.activation))


def state_of(layer: nn.Module, block: Block, mean: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """(examples, width) first token of the layer that computes the mean, which the head reads; see `pooling_layer`.

    Args:
        layer: with the norms.
        block: of its architecture.
        mean: (examples, width) over the unmasked tokens of the layer below.
        first: (examples, width) first token of the layer below.
    """
    state = MEAN_WEIGHT * mean + first
    for path in block.norms:
        state = layer.get_submodule(path)(state)
    return state


@torch.no_grad()
def head_states(model: Any, mean: torch.Tensor, first: torch.Tensor) -> torch.Tensor | None:
    """`state_of` of a model that `with_mean_pooling` has changed; None if it has no layer that computes the mean."""
    architecture = ARCHITECTURES[type(model).__name__]
    if architecture.block is None:
        return None
    layer = model.base_model.get_submodule(architecture.layers)[-1]
    return state_of(layer, architecture.block, mean.to(model.device), first.to(model.device))
