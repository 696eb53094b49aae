"""Rules for architectures whose layer order cannot be read off the model, as data: (pattern, depth) pairs."""

from __future__ import annotations

HEAD = "head"
LAST = "last"
NEXT = "next"
STEM = "stem"
Depth = tuple[float, ...]
Rule = tuple[str, int | str | None]
# The key of a Hugging Face configuration that holds the number of a layer that pools instead of being part of the
# backbone (`models.pooling_layer`): that layer, and a pooler after it, belong to the head.
POOLING_LAYER = "hf_transfer_pooling_layer"
# A rule is (regular expression searched in the parameter's name, depth); see `layer_groups`. One entry per
# `model_type` of a Hugging Face configuration, or per timm class.
_PATCHES_AND_BLOCKS: tuple[Rule, ...] = (
    (r"patch_embeddings\.0\.", STEM),
    (r"patch_embeddings\.(\d+)", None),
    (r"block\.(\d+)\.(\d+)", None),
    ("^norm", LAST),
)
_STAGES_OF_LAYERS: tuple[Rule, ...] = (
    (r"stages\.(\d+)\.(?:layers\.(\d+)|downsampling_layer)", None),
    (r"stages\.(\d+)\.downsample", NEXT),
)
_STAGES_OF_BLOCKS: tuple[Rule, ...] = (
    (r"(?:stages|layers)\.0\.patch_embedding", STEM),
    (r"(?:stages|layers)\.(\d+)\.(?:blocks\.(\d+)|patch_embedding)", None),
    (r"(?:stages|layers)\.(\d+)\.(?:downsample|layer_norm)", NEXT),
)
_ENCODER_AND_DECODER: tuple[Rule, ...] = (
    (r"encoder\.layers\.(\d+)", None),
    (r"decoder\.layers\.(\d+)", 1000),
    (r"decoder\.(?:embed_positions|layernorm_embedding)|encoder\.layer_norm", 1000),
    (r"decoder\.layer_norm", LAST),
    (r"shared|embed", STEM),
)
_LISTS_SIDE_BY_SIDE: tuple[Rule, ...] = (
    (r"(?:attentions|layer_norm1|ffns|layer_norm2)\.(\d+)", None),
    (r"embeddings|layer_norm_emb", STEM),
)
_MOBILEVIT: tuple[Rule, ...] = ((r"encoder\.layer\.([01])\.layer\.(\d+)", None), (r"encoder\.layer\.(\d+)", None))
_RESIDUAL_LAYERS: tuple[Rule, ...] = (("embedder", STEM), *_STAGES_OF_LAYERS, ("^classifier", HEAD))
ARCHITECTURE_RULES: dict[str, tuple[Rule, ...]] = {
    # Relative position embeddings are stored next to the layers but used by the first one; the convolution follows it.
    "deberta": ((r"encoder\.(rel_embeddings|LayerNorm)", STEM),),
    "deberta-v2": ((r"encoder\.(rel_embeddings|LayerNorm)", STEM), (r"encoder\.conv", 2)),
    "mpnet": ((r"encoder\.relative_attention_bias", STEM),),
    # All depths share one set of layers.
    "albert": (("embedding", STEM), (r"albert_layer_groups\.(\d+)", None), ("pooler", LAST), ("^classifier", HEAD)),
    # Each part of the layers has its own list, or the layers are defined after modules that follow them.
    "xlm": _LISTS_SIDE_BY_SIDE,
    "flaubert": _LISTS_SIDE_BY_SIDE,
    "bart": _ENCODER_AND_DECODER,
    "mbart": _ENCODER_AND_DECODER,
    "plbart": _ENCODER_AND_DECODER,
    "mvp": _ENCODER_AND_DECODER,
    "nomic_bert": (("pooler", LAST),),
    "gte": (("pooler", LAST),),
    "opt": ((r"decoder\.(final_layer_norm|project_out)", LAST),),
    "funnel": ((r"blocks\.(\d+)\.(\d+)", None),),
    # Stages contain residual layers or blocks, and downsampling between them.
    "resnet": _RESIDUAL_LAYERS,
    "regnet": _RESIDUAL_LAYERS,
    "bit": _STAGES_OF_LAYERS,
    "convnext": _STAGES_OF_LAYERS,
    "convnextv2": _STAGES_OF_LAYERS,
    "focalnet": _STAGES_OF_LAYERS,
    "hiera": _STAGES_OF_LAYERS,
    "swin": _STAGES_OF_BLOCKS,
    "swinv2": _STAGES_OF_BLOCKS,
    "donut-swin": _STAGES_OF_BLOCKS,
    "pvt_v2": _STAGES_OF_BLOCKS,
    "segformer": _STAGES_OF_BLOCKS,
    "pvt": _PATCHES_AND_BLOCKS,
    "poolformer": _PATCHES_AND_BLOCKS,
    "cvt": (("^layernorm", LAST),),
    "mobilevit": _MOBILEVIT,
    "mobilevitv2": _MOBILEVIT,
    "swiftformer": (
        (r"network\.(\d+)\.blocks\.(\d+)", None),
        (r"network\.(\d+)\.(?:proj|norm)", NEXT),
        ("^norm", LAST),
    ),
    # timm classes without a `group_matcher`.
    "PoolingVisionTransformer": (
        (r"embed|cls_token", STEM),
        (r"transformers\.(\d+)\.(?:blocks\.(\d+)|pool)", None),
        ("^norm", LAST),
        ("^head", HEAD),
    ),
    "MetaFormer": (
        ("^stem", STEM),
        (r"stages\.(\d+)\.(?:blocks\.(\d+)|downsample)", None),
        (r"^head\.fc\.(fc1|norm)", LAST),
        (r"^head\.fc", HEAD),
        ("^head", LAST),
    ),
    "CSATv2": (
        ("^stem", STEM),
        (r"stages\.(\d+)\.(\d+)", None),
        (r"^head\.fc", HEAD),
        ("^(head|norm)", LAST),
    ),
}
