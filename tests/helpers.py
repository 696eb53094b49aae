"""Tiny models and data for exact tests: seconds on a CPU, no network."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Any

import torch
import transformers
from datasets import Dataset

from hf_transfer import TransferArguments
from hf_transfer.models import bundled as bundled_models
from hf_transfer.models.heads import MLPSpec, last_linear, put_head

LENGTH = 6
VOCABULARY = 40
TOKENS = 5_000  # a run loads its tokenizer three times, which takes 0.2 s with all 30,000
PIXELS = 32
# Whatever the version calls it.
CHECKPOINTING = next(
    f.name for f in fields(TransferArguments) if f.name in ("activation_checkpointing", "gradient_checkpointing")
)


@cache
def _commonest_tokens() -> tuple[str, ...]:
    ids = transformers.AutoTokenizer.from_pretrained(bundled_models.model_path("bundled:minilm-l6")).get_vocab()
    return tuple(token for token in sorted(ids, key=ids.__getitem__) if not token.startswith("[unused"))[:TOKENS]


def small_tokenizer(length: int) -> Any:
    """Of the first `TOKENS` of the real vocabulary, characters and the commonest words; reads `length` tokens."""
    vocabulary = {token: i for i, token in enumerate(_commonest_tokens())}
    return transformers.BertTokenizer(vocab=vocabulary, model_max_length=length)


def tiny_bert(layers: int = 2, dropout: float = 0.0, labels: int = 2, **config: Any) -> Any:
    """Groups: embeddings, layer.0 …, head; with a pooler, which joins the last layer."""
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=8,
            num_attention_heads=2,
            intermediate_size=16,
            num_hidden_layers=layers,
            max_position_embeddings=16,
            num_labels=labels,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            **{"vocab_size": VOCABULARY, **config},
        )
    )


def tiny_vit(layers: int = 2, dropout: float = 0.0, labels: int = 2) -> Any:
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=8,
            num_attention_heads=2,
            intermediate_size=16,
            num_hidden_layers=layers,
            image_size=PIXELS,
            patch_size=16,
            num_labels=labels,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def tiny_timm_vit(labels: int = 2, **model_args: Any) -> Any:
    torch.manual_seed(0)
    return transformers.TimmWrapperForImageClassification(
        transformers.TimmWrapperConfig(
            architecture="vit_tiny_patch16_224",
            num_labels=labels,
            model_args={"img_size": PIXELS, "embed_dim": 12, "depth": 2, "num_heads": 2, **model_args},
        )
    )


def tiny_timm_resnet(labels: int = 2) -> Any:
    """A timm ResNet-10-T of few channels, with BatchNorm: groups stem, layer1.0 … layer4.0, head."""
    torch.manual_seed(0)
    return transformers.TimmWrapperForImageClassification(
        transformers.TimmWrapperConfig(
            architecture="resnet10t", num_labels=labels, model_args={"channels": (8, 16, 24, 32), "stem_width": 4}
        )
    )


def with_mlp(model: Any, **sizes: Any) -> Any:
    """The model, with a small MLP as its head; see `MLPSpec`."""
    torch.manual_seed(1)
    put_head(model, MLPSpec(last_linear(model)[-1], **{"hidden_size": 6, **sizes}))
    return model


def with_statistics(model: Any) -> Any:
    """The model, with BatchNorm statistics as pretraining leaves them, not 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.5, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model


def texts(size: int = 20, labels: int = 2, seed: int = 0) -> Dataset:
    g = torch.Generator().manual_seed(seed)
    return Dataset.from_dict(
        {
            "input_ids": torch.randint(0, VOCABULARY, (size, LENGTH), generator=g).tolist(),
            "labels": torch.randint(0, labels, (size,), generator=g).tolist(),
        }
    )


def separable_texts(size: int = 20, seed: int = 0) -> Dataset:
    """Texts of two classes that have no token in common, so that a few steps tell them apart."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (size,), generator=g)
    ids = torch.randint(0, VOCABULARY // 2, (size, LENGTH), generator=g) + labels[:, None] * (VOCABULARY // 2)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


@cache
def _taught() -> dict[str, torch.Tensor]:
    model, data = tiny_bert(), separable_texts(64, seed=5).with_format("torch")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(12):
        optimizer.zero_grad()
        model(input_ids=data["input_ids"][:], labels=data["labels"][:]).loss.backward()
        optimizer.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def knowing_bert(dropout: float = 0.0) -> Any:
    """A model of `separable_texts`, which answers with both classes."""
    model = tiny_bert(dropout=dropout)
    model.load_state_dict(_taught())
    return model


def ragged_texts(size: int = 20, labels: int = 2, seed: int = 0) -> Dataset:
    """Texts of 3 to 14 tokens, no two equal: for `pad`."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 15, (size,), generator=g).tolist()
    rows = [torch.randint(1, VOCABULARY, (n,), generator=g).tolist() for n in lengths]
    assert len({tuple(row) for row in rows}) == size
    return Dataset.from_dict({"input_ids": rows, "labels": torch.randint(0, labels, (size,), generator=g).tolist()})


def pad(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A collator: token 0 fills up to the longest."""
    longest = max(len(e["input_ids"]) for e in examples)
    rows = [[*e["input_ids"], *[0] * (longest - len(e["input_ids"]))] for e in examples]
    ids = torch.tensor(rows)
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "labels": torch.tensor([e["labels"] for e in examples]),
    }


def soft_texts(size: int = 20, seed: int = 0) -> Dataset:
    """`texts` with shares of two labels, as mixup gives."""
    shares = torch.softmax(torch.randn(size, 2, generator=torch.Generator().manual_seed(seed + 1)), -1).tolist()
    return texts(size, seed=seed).remove_columns("labels").add_column("labels", shares)


def images(size: int = 20, labels: int = 2, seed: int = 0) -> Dataset:
    g = torch.Generator().manual_seed(seed)
    return Dataset.from_dict(
        {
            "pixel_values": torch.randn(size, 3, PIXELS, PIXELS, generator=g).tolist(),
            "labels": torch.randint(0, labels, (size,), generator=g).tolist(),
        }
    )


def arguments(output_dir: Any, **keys: Any) -> TransferArguments:
    """Quiet, on the CPU, nothing saved, every step logged."""
    defaults = dict(
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        num_train_epochs=2,
        dataloader_pin_memory=False,
        report_to="none",
    )
    return TransferArguments(str(output_dir), **{**defaults, **keys})


def copy_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    return {k: v.detach().clone() for k, v in state.items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of what differs, by so much as one bit."""
    return {k for k in before if not torch.equal(before[k], after[k])}
