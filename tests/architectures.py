"""Architectures in their smallest form, and how each uses its parameters: what the layer tests and
`docs/architectures.md` are made from.

    python -m tests.architectures        # writes docs/architectures.md

A Hugging Face architecture is one line in `HUGGING_FACE`: its model class and the keys of a tiny configuration. A timm
family is represented by its smallest variant, in `TIMM`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

ENCODER = dict(
    hidden_size=8, num_attention_heads=2, intermediate_size=16, num_hidden_layers=3, vocab_size=50, pad_token_id=0
)
DECODER = {**ENCODER, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
VISION = dict(
    hidden_size=8, num_attention_heads=2, intermediate_size=16, num_hidden_layers=3, image_size=32, patch_size=8
)
STAGES = dict(embed_dim=8, depths=[1, 2], num_heads=[2, 2], image_size=32, patch_size=2, window_size=4)
CONVNEXT = dict(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, image_size=32)

# Class of transformers -> keys of its configuration. The configuration's class is the model's own.
HUGGING_FACE: dict[str, dict[str, Any]] = {
    # ---- text encoders
    "BertForSequenceClassification": ENCODER,
    "RobertaForSequenceClassification": ENCODER,
    "XLMRobertaForSequenceClassification": ENCODER,
    "XLMRobertaXLForSequenceClassification": ENCODER,
    "CamembertForSequenceClassification": ENCODER,
    "DistilBertForSequenceClassification": dict(dim=8, n_heads=2, hidden_dim=16, n_layers=3, vocab_size=50),
    "AlbertForSequenceClassification": {**ENCODER, "embedding_size": 4},
    "ElectraForSequenceClassification": {**ENCODER, "embedding_size": 6},
    "DebertaForSequenceClassification": {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "DebertaV2ForSequenceClassification": {
        **ENCODER,
        **dict(relative_attention=True, pos_att_type=["c2p", "p2c"], conv_kernel_size=3, norm_rel_ebd="layer_norm"),
        **dict(position_buckets=4, share_att_key=True),
    },
    "MPNetForSequenceClassification": ENCODER,
    "ModernBertForSequenceClassification": {
        **ENCODER,
        **dict(bos_token_id=0, eos_token_id=0, cls_token_id=0, sep_token_id=0),
    },
    "XLNetForSequenceClassification": dict(d_model=8, n_layer=3, n_head=2, d_inner=16, vocab_size=50),
    "XLMForSequenceClassification": dict(emb_dim=8, n_layers=3, n_heads=2, vocab_size=50, n_words=50),
    "FlaubertForSequenceClassification": dict(emb_dim=8, n_layers=3, n_heads=2, vocab_size=50, n_words=50),
    "FunnelForSequenceClassification": dict(
        block_sizes=[1, 2], num_decoder_layers=1, d_model=8, n_head=2, d_head=4, d_inner=16, vocab_size=50
    ),
    "RoFormerForSequenceClassification": {**ENCODER, "embedding_size": 8},
    "SqueezeBertForSequenceClassification": {**ENCODER, "embedding_size": 8},
    "MobileBertForSequenceClassification": {
        **ENCODER,
        **dict(embedding_size=8, intra_bottleneck_size=8, num_feedforward_networks=1),
    },
    "ConvBertForSequenceClassification": {**ENCODER, "embedding_size": 8, "head_ratio": 1, "conv_kernel_size": 3},
    "IBertForSequenceClassification": ENCODER,
    "ErnieForSequenceClassification": ENCODER,
    "EsmForSequenceClassification": {**ENCODER, "position_embedding_type": "rotary"},
    "FNetForSequenceClassification": {**ENCODER, "tpu_short_seq_length": 8},
    "NystromformerForSequenceClassification": {**ENCODER, "segment_means_seq_len": 8, "num_landmarks": 2},
    "LayoutLMForSequenceClassification": ENCODER,
    "NomicBertForSequenceClassification": ENCODER,
    "EuroBertForSequenceClassification": DECODER,
    "BigBirdForSequenceClassification": {**ENCODER, "attention_type": "original_full"},
    "LongformerForSequenceClassification": {**ENCODER, "attention_window": 4},
    "MegatronBertForSequenceClassification": ENCODER,
    "RemBertForSequenceClassification": {**ENCODER, "input_embedding_size": 8, "output_embedding_size": 8},
    "Data2VecTextForSequenceClassification": ENCODER,
    "RobertaPreLayerNormForSequenceClassification": ENCODER,
    # ---- encoder-decoders and decoders
    "BartForSequenceClassification": dict(
        **dict(d_model=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2),
        **dict(encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=50, max_position_embeddings=32),
    ),
    "MBartForSequenceClassification": dict(
        **dict(d_model=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2),
        **dict(encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=50, max_position_embeddings=32),
    ),
    "MT5ForSequenceClassification": dict(
        **dict(d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=50),
        **dict(decoder_start_token_id=0, eos_token_id=2),
    ),
    "T5ForSequenceClassification": dict(
        **dict(d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=50),
        **dict(decoder_start_token_id=0, eos_token_id=2),
    ),
    "GPT2ForSequenceClassification": dict(n_embd=8, n_head=2, n_layer=3, vocab_size=50, bos_token_id=1, eos_token_id=2),
    "OPTForSequenceClassification": dict(
        **dict(hidden_size=8, num_attention_heads=2, ffn_dim=16, num_hidden_layers=3, vocab_size=50),
        **dict(word_embed_proj_dim=8, max_position_embeddings=32, bos_token_id=1, eos_token_id=2),
    ),
    "GPTNeoXForSequenceClassification": {k: v for k, v in DECODER.items() if k != "num_key_value_heads"},
    "LlamaForSequenceClassification": DECODER,
    "MistralForSequenceClassification": DECODER,
    "Qwen2ForSequenceClassification": DECODER,
    "Qwen3ForSequenceClassification": {**DECODER, "head_dim": 4},
    "GemmaForSequenceClassification": {**DECODER, "head_dim": 4},
    "Gemma2ForSequenceClassification": {**DECODER, "head_dim": 4},
    "PhiForSequenceClassification": DECODER,
    "Phi3ForSequenceClassification": DECODER,
    "FalconForSequenceClassification": {k: v for k, v in DECODER.items() if k != "num_key_value_heads"},
    "BloomForSequenceClassification": dict(hidden_size=8, n_layer=3, n_head=2, vocab_size=50, pad_token_id=0),
    "MixtralForSequenceClassification": {**DECODER, "num_local_experts": 2, "num_experts_per_tok": 1},
    # ---- vision
    "ViTForImageClassification": VISION,
    "DeiTForImageClassification": VISION,
    "BeitForImageClassification": {**VISION, "use_relative_position_bias": True, "layer_scale_init_value": 0.1},
    "Data2VecVisionForImageClassification": VISION,
    "ViTMSNForImageClassification": VISION,
    "Dinov2ForImageClassification": {k: v for k, v in VISION.items() if k != "intermediate_size"},
    "Dinov2WithRegistersForImageClassification": {k: v for k, v in VISION.items() if k != "intermediate_size"},
    "IJepaForImageClassification": VISION,
    "SwinForImageClassification": STAGES,
    "Swinv2ForImageClassification": STAGES,
    "DonutSwinForImageClassification": STAGES,
    "ConvNextForImageClassification": CONVNEXT,
    "ConvNextV2ForImageClassification": CONVNEXT,
    "ResNetForImageClassification": dict(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2], layer_type="basic"),
    "RegNetForImageClassification": dict(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2], groups_width=4),
    "EfficientNetForImageClassification": dict(
        **dict(image_size=32, width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=128, depth_divisor=8),
    ),
    "MobileNetV1ForImageClassification": dict(image_size=32, depth_multiplier=0.1),
    "MobileNetV2ForImageClassification": dict(image_size=32, depth_multiplier=0.1),
    "MobileViTForImageClassification": dict(
        **dict(image_size=64, hidden_sizes=[8, 8, 8], neck_hidden_sizes=[4, 4, 8, 8, 8, 8, 16], num_attention_heads=2),
    ),
    "MobileViTV2ForImageClassification": dict(image_size=64, width_multiplier=0.25),
    "LevitForImageClassification": dict(
        **dict(
            image_size=64, hidden_sizes=[8, 16, 24], num_attention_heads=[1, 2, 3], depths=[1, 1, 1], key_dim=[4, 4, 4]
        ),
        **dict(
            attention_ratio=[2, 2, 2],
            mlp_ratio=[2, 2, 2],
            down_ops=[["Subsample", 4, 2, 4, 2, 2], ["Subsample", 4, 4, 4, 2, 2]],
        ),
    ),
    "PvtForImageClassification": dict(
        **dict(image_size=64, hidden_sizes=[8, 8, 16, 16], depths=[1, 2, 1, 1], num_attention_heads=[1, 1, 2, 2]),
        **dict(sequence_reduction_ratios=[8, 4, 2, 1], mlp_ratios=[2, 2, 2, 2]),
    ),
    "PvtV2ForImageClassification": dict(
        **dict(image_size=64, hidden_sizes=[8, 8, 16, 16], depths=[1, 2, 1, 1], num_attention_heads=[1, 1, 2, 2]),
        **dict(mlp_ratios=[2, 2, 2, 2]),
    ),
    "CvtForImageClassification": dict(embed_dim=[8, 16, 24], num_heads=[1, 2, 3], depth=[1, 2, 3]),
    "PoolFormerForImageClassification": dict(hidden_sizes=[8, 8, 16, 16], depths=[1, 2, 1, 1]),
    "FocalNetForImageClassification": dict(
        **dict(image_size=32, patch_size=4, embed_dim=8, hidden_sizes=[8, 16], depths=[1, 2], focal_levels=[2, 2]),
        **dict(focal_windows=[3, 3]),
    ),
    "SegformerForImageClassification": dict(
        **dict(
            hidden_sizes=[8, 8, 16, 16], depths=[1, 2, 1, 1], num_attention_heads=[1, 1, 2, 2], sr_ratios=[8, 4, 2, 1]
        ),
    ),
    "SwiftFormerForImageClassification": dict(image_size=64, depths=[1, 1, 1, 1], embed_dims=[8, 8, 16, 16]),
    "BitForImageClassification": dict(embedding_size=8, hidden_sizes=[32, 64], depths=[1, 2], num_groups=4),
    "HieraForImageClassification": dict(
        **dict(image_size=[64, 64], embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1]),
    ),
    "CLIPForImageClassification": dict(vision_config=VISION, text_config=ENCODER),
    "SiglipForImageClassification": dict(vision_config=VISION, text_config=ENCODER),
    "Siglip2ForImageClassification": dict(
        vision_config={**VISION, "num_patches": 16, "num_channels": 3}, text_config=ENCODER
    ),
}


def hugging_face(name: str) -> Any:
    """The model of `name` in its tiny form, in eval mode, with four labels."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    config = cls.config_class(num_labels=4, **HUGGING_FACE[name])
    if getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = 0
    return cls(config).eval()


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    """A batch of two that the model reads."""
    if model.config.model_type == "siglip2":  # reads patches, of images of any shape
        size = torch.tensor([[4, 4], [4, 4]])
        patches, mask = torch.randn(2, 16, 3 * 8 * 8), torch.ones(2, 16, dtype=torch.long)
        return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": size}
    if model.main_input_name == "pixel_values":
        size = model.config.to_dict().get("image_size") or model.config.to_dict().get("vision_config", {}).get(
            "image_size"
        )
        size = size[0] if isinstance(size, list | tuple) else size or 64
        return {"pixel_values": torch.randn(2, getattr(model.config, "num_channels", 3), size, size)}
    ids = torch.randint(5, 50, (2, 8))
    ids[:, -1] = 2  # BART classifies the last end-of-sentence token
    return {"input_ids": ids}


class _FirstUses(TorchFunctionMode):
    """Notes the order in which parameters first enter a function of torch."""

    def __init__(self, model: nn.Module):
        self.names = {id(p): n for n, p in model.named_parameters()}
        self.order: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        # Reading its shape or device is no use.
        looks = getattr(func, "__name__", "") in ("__get__", "size", "dim", "stride") and not torch.is_tensor(found)
        for value in _flat([*args, *(kwargs or {}).values()]):
            name = self.names.get(id(value))
            if name is not None and not looks:
                self.order.setdefault(name, len(self.order))
        return found


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def first_uses(model: nn.Module, run: Callable[[], Any]) -> dict[str, int]:
    """Parameter name -> when the forward pass first uses it; what it never uses is left out.

    Independent of every layer rule: it watches torch's functions.
    """
    watch = _FirstUses(model)
    with torch.no_grad(), watch:
        run()
    return watch.order


@dataclass(frozen=True)
class Order:
    """How well groups follow the forward pass.

    Attributes:
        sorted: the groups' first uses rise from one to the next.
        overlaps: pairs of neighbours where the later one is used before the earlier one is done, with the parameters.
        unused: parameters that the forward pass does not use.
    """

    sorted: bool
    overlaps: tuple[str, ...]
    unused: tuple[str, ...]


def order_of(groups: Any, uses: dict[str, int]) -> Order:
    spans = []
    for group in groups:
        seen = {uses[n]: n for n in group.parameters if n in uses}
        if seen:
            spans.append((group.name, min(seen), max(seen), seen))
    overlaps = []
    for i, (name, first, _, seen) in enumerate(spans):
        for other, _, last, earlier in spans[:i]:
            if last > first:
                late = [earlier[t] for t in sorted(earlier) if t > first]
                overlaps.append(f"{other} > {name}: {late[0]} after {seen[first]}")
    starts = [first for _, first, *_ in spans]
    unused = tuple(n for g in groups for n in g.parameters if n not in uses)
    return Order(starts == sorted(starts), tuple(overlaps), unused)
