"""Architectures in their smallest form, and how each uses its parameters: what the layer tests and
`docs/architectures.md` are made from.

    python -m tests.architectures        # writes docs/architectures.md

A Hugging Face architecture is one line in `HUGGING_FACE`: its model class and the keys of a tiny configuration. A timm
family is represented by its smallest variant, in `TIMM`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
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

ENCODER_AND_DECODER = dict(
    **dict(d_model=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2),
    **dict(encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=50, max_position_embeddings=32),
)

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
    "GteForSequenceClassification": ENCODER,
    "BigBirdForSequenceClassification": {**ENCODER, "attention_type": "original_full"},
    "LongformerForSequenceClassification": {**ENCODER, "attention_window": 4},
    "MegatronBertForSequenceClassification": ENCODER,
    "RemBertForSequenceClassification": {**ENCODER, "input_embedding_size": 8, "output_embedding_size": 8},
    "Data2VecTextForSequenceClassification": ENCODER,
    "RobertaPreLayerNormForSequenceClassification": ENCODER,
    # ---- encoder-decoders and decoders
    "BartForSequenceClassification": ENCODER_AND_DECODER,
    "MBartForSequenceClassification": ENCODER_AND_DECODER,
    "PLBartForSequenceClassification": ENCODER_AND_DECODER,
    "MvpForSequenceClassification": ENCODER_AND_DECODER,
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
        **dict(image_size=[64, 64], embed_dim=8, depths=[1, 2, 1, 1], num_heads=[1, 1, 1, 1]),
    ),
    "CLIPForImageClassification": dict(vision_config=VISION, text_config=ENCODER),
    "SiglipForImageClassification": dict(vision_config=VISION, text_config=ENCODER),
    "Siglip2ForImageClassification": dict(
        vision_config={**VISION, "num_patches": 16, "num_channels": 3}, text_config=ENCODER
    ),
}

# How many blocks each has, where its configuration does not say it in so many words.
BLOCKS = {
    "AlbertForSequenceClassification": 1,  # one layer, used at every depth
    "EfficientNetForImageClassification": 7,
    "MobileNetV1ForImageClassification": 26,
    "MobileNetV2ForImageClassification": 16,
    "MobileViTForImageClassification": 7,  # 1 + 3 convolutional, 3 with transformers
    "MobileViTV2ForImageClassification": 6,
    "LevitForImageClassification": 8,  # attention and MLP are a block each, and so is the subsampling
    "BloomForSequenceClassification": 3,
}


def number_of_blocks(name: str) -> int:
    """From the configuration, independently of every layer rule."""
    if name in BLOCKS:
        return BLOCKS[name]
    keys = HUGGING_FACE[name]
    keys = keys.get("vision_config", keys)
    for key in ("depths", "depth"):
        if key in keys:
            return sum(keys[key])
    if "block_sizes" in keys:
        return sum(keys["block_sizes"])
    if "encoder_layers" in keys:
        return keys["encoder_layers"] + keys["decoder_layers"]
    if "d_kv" in keys:  # T5: encoder and decoder
        return 2 * keys["num_layers"]
    return next(keys[key] for key in ("num_hidden_layers", "n_layers", "n_layer") if key in keys)


# The smallest variant of every family (module) of timm 1.0.31.
TIMM: tuple[str, ...] = (
    "beit_base_patch16_224",
    "halonet_h1",
    "test_byobnet",
    "cait_xxs24_224",
    "coat_tiny",
    "convit_tiny",
    "convmixer_768_32",
    "test_convnext",
    "cpubone_nano",
    "crossvit_tiny_240",
    "csatv2",
    "cs3darknet_focus_s",
    "cspnext_tiny",
    "davit_tiny",
    "deepseek_vit_412m",
    "deit_tiny_patch16_224",
    "densenet121",
    "dla46x_c",
    "dpn48b",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "test_efficientnet",
    "efficientvim_m1",
    "efficientvit_b0",
    "efficientvit_m0",
    "vit_tiny_patch16_dinov3_qkvb",
    "fasternet_t0",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "gemma4_vit_167m",
    "ghostnet_050",
    "hardcorenas_b",
    "hgnetv2_b0",
    "hiera_tiny_224",
    "sam2_hiera_tiny",
    "hrnet_w18_small",
    "iformer_t",
    "inception_next_atto",
    "inception_resnet_v2",
    "inception_v3",
    "inception_v4",
    "lcnetv2_small",
    "levit_128s",
    "lowformer_b0",
    "test_mambaout",
    "test_coatnet",
    "poolformerv2_s12",
    "caformer_s18",
    "gmlp_ti16_224",
    "mobilenetv3_small_050",
    "mobilenetv5_base",
    "mobilevit_xxs",
    "mvitv2_tiny",
    "naflexvit_base_patch16_parfac_gap",
    "nasnetalarge",
    "nest_tiny",
    "nextvit_small",
    "test_nfnet",
    "pit_ti_224",
    "pnasnet5large",
    "pvt_v2_b0",
    "qwen3_vit_88m",
    "rdnet_tiny",
    "regnetx_002",
    "repghostnet_050",
    "repvit_m1",
    "res2next50",
    "resnest14d",
    "test_resnet",
    "resnetv2_18",
    "rexnet_100",
    "selecsls42",
    "legacy_seresnet18",
    "sequencer2d_s",
    "shvit_s1",
    "skresnet18",
    "starnet_s050",
    "swiftformer_xs",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_224",
    "tiny_vit_5m_224",
    "tnt_s_legacy_patch16_224",
    "tresnet_m",
    "twins_svt_small",
    "vgg11",
    "visformer_tiny",
    "test_vit",
    "vit_tiny_r_s16_p8_224",
    "test_vit_relpos",
    "samvit_base_patch16_224",
    "vitamin_small_224",
    "volo_d1_224",
    "ese_vovnet19b_slim_dw",
    "legacy_xception",
    "xception41p",
    "xcit_nano_12_p8_224",
)

# Where a later group is used before an earlier one is done, and why.
REASONS = {
    "DebertaForSequenceClassification": "relative positions, read inside the first layer and shared by all: stem",
    "cait_xxs24_224": "the class token joins after the patch blocks; timm counts it to the stem",
    "convit_tiny": "the class token joins after the first blocks; timm counts it to the stem",
    "xcit_nano_12_p8_224": "the class token joins after the patch blocks; timm counts it to the stem",
    "coat_tiny": "position encodings of a stage, read inside its first block and shared by all: before it",
    "volo_d1_224": "position embedding added after the first stage; timm counts it to the stem",
    "levit_128s": "two heads (distilled): the second one's norm, which joins the last block, follows the first head",
    "repvit_m1": "two heads (distilled): the second one's norm, which joins the last block, follows the first head",
    "efficientvim_m1": "each stage has an output norm of its own; timm puts them all behind the blocks",
}
# Of the image and text classifiers that people ask for, what is not here.
LEFT_OUT = {
    "DINOv3": "transformers has no classification class for it; timm's `vit_*_dinov3` is in the family `eva`",
    "Dinat": "needs the package natten",
    "DeiT, distilled": "transformers' class computes no loss, so it cannot be trained",
}
# timm declares no `group_matcher` for these: ours are rules, and there is nothing to compare with.
UNDECLARED_BY_TIMM = ("csatv2", "poolformerv2_s12", "caformer_s18", "pit_ti_224")


def hugging_face(name: str) -> Any:
    """The model of `name` in its tiny form, in eval mode, with four labels."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    config = cls.config_class(num_labels=4, **HUGGING_FACE[name])
    if getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = 0
    return cls(config).eval()


def from_timm(name: str) -> Any:
    """The model of `name` without memory for its weights, with four classes."""
    import timm

    with torch.device("meta"):
        return timm.create_model(name, pretrained=False, num_classes=4).eval()


def timm_input(model: Any) -> torch.Tensor:
    return torch.empty(2, *(model.pretrained_cfg.get("input_size") or (3, 224, 224)), device="meta")


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


def overlaps(groups: Any, uses: dict[str, int]) -> list[str]:
    """Where a group is used before an earlier one is done; empty where groups follow the forward pass exactly."""
    found: list[str] = []
    latest, before = -1, ""
    for group in groups:
        seen = sorted((uses[n], n) for n in group.parameters if n in uses)
        if seen and seen[0][0] < latest:
            found.append(f"{group.name} begins with {seen[0][1]}, before {before}")
        if seen and seen[-1][0] > latest:
            latest, before = seen[-1]
    return found


def timm_scales(model: Any, decay: float) -> dict[str, float]:
    """Parameter name -> `lr_scale` by timm's own function."""
    from timm.optim import param_groups_layer_decay

    names = {id(p): n for n, p in model.named_parameters()}
    made = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=decay)
    return {names[id(p)]: group["lr_scale"] for group in made for p in group["params"]}


def our_scales(groups: Any, decay: float) -> dict[str, float]:
    """The same by a plan with `layer_lr_decay`, at a learning rate of 1."""
    from hf_transfer import make_plan
    from hf_transfer.config.arguments.plan import PlanArguments

    class Keys(PlanArguments):
        num_train_epochs = 1.0

    (stage,) = make_plan(Keys(strategy="full", layer_lr_decay=decay, learning_rate=1.0), groups).stages
    return {name: stage.rate(group.name, name) for group in groups for name in group.parameters}


def as_ours(scale: float, decay: float) -> float:
    """timm's scale in our convention: timm's head has a depth of its own, so that its last block gets `decay`; ours
    gets 1, as do the final norm and the head."""
    return min(1.0, scale / decay)


# ---- docs/architectures.md -----------------------------------------------------------------------------------------


def table() -> str:
    import timm

    from hf_transfer import layer_groups

    lines = [
        "# Architectures",
        "",
        f"Made by `make architectures` with transformers {transformers.__version__} and timm {timm.__version__}; the",
        "tests check every line. Groups are counted with stem and head. *Order*: whether each group's parameters are",
        "first used after all those of the groups before it, watched in a forward pass, independently of the rules.",
        "*timm*: whether every parameter's rate under `layer_lr_decay` is that of timm's `param_groups_layer_decay`,",
        "where timm's last block has the rate `decay` and ours has 1 (with the final norm and the head):",
        "ours = min(1, timm's / decay).",
        "",
        "## Hugging Face",
        "",
        "| class | groups | from | to | head | order |",
        "|---|---|---|---|---|---|",
    ]
    for name in HUGGING_FACE:
        model = hugging_face(name)
        groups = layer_groups(model)
        lines.append(f"| `{name}` | {_cells(groups)} | {_order(name, groups, model, lambda m: m(**inputs_of(m)))} |")
    lines += ["", "## timm", "", "One line per family, its smallest variant.", ""]
    lines += ["| family | variant | groups | from | to | head | order | timm |", "|---|---|---|---|---|---|---|---|"]
    for name in TIMM:
        model = from_timm(name)
        groups = layer_groups(model)
        agrees = "not declared"
        if name not in UNDECLARED_BY_TIMM:
            ours, theirs = our_scales(groups, 0.5), timm_scales(model, 0.5)
            agrees = "same" if ours == {n: as_ours(s, 0.5) for n, s in theirs.items()} else "differs"
        family = type(model).__module__.rpartition(".")[2]
        order = _order(name, groups, model, lambda m: m(timm_input(m)))
        lines.append(f"| {family} | `{name}` | {_cells(groups)} | {order} | {agrees} |")
    lines += ["", "## Left out", "", *(f"- {name}: {reason}." for name, reason in LEFT_OUT.items()), ""]
    return "\n".join(lines)


def _cells(groups: Any) -> str:
    head = sorted({name.rpartition(".")[0] for name in groups[-1].parameters})
    return f"{len(groups)} | {groups[1].name} | {groups[-2].name} | {', '.join(head)}"


def _order(name: str, groups: Any, model: Any, run: Callable[[Any], Any]) -> str:
    exact = not overlaps(groups, first_uses(model, lambda: run(model)))
    return "exact" if exact else REASONS.get(name, "WRONG")


def main() -> None:
    transformers.logging.set_verbosity_error()
    place = Path(__file__).parents[1] / "docs" / "architectures.md"
    place.write_text(table(), encoding="utf-8")


if __name__ == "__main__":
    main()
