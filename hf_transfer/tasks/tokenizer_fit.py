"""A tokenizer and a model that are used together must fit: vocabulary, embeddings, padding, positions, end tokens.

Instead of trusting lists of architectures, the model itself is asked, with inputs of a few made-up tokens: whether
padding changes its answer, and whether a second end token does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_transfer.errors import UserError

UNBOUNDED = 10**9  # tokenizers without a limit report 1e30
_DEFAULT_LENGTH = 512
_TOLERANCE = 1e-3  # relative to the largest logit; a wrong position or a pad token that is read changes much more
_PROBE, _PADS = 5, 3  # made-up words, and padding tokens beside them


def check_tokenizer(tokenizer: Any, vocabulary: Mapping[str, int], name: str) -> list[str]:
    """Check what can be said without the model, and choose a padding token where there is none; returns notes.

    Args:
        tokenizer: may get a padding token.
        vocabulary: ids by token, as `get_vocab` returns them: a copy of all tokens, so that it is asked for once.
        name: the model's.

    Raises:
        UserError: the tokenizer has no vocabulary, or neither a padding nor an end token.
    """
    if vocabulary.keys() <= {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}:
        raise UserError(
            f"{name!r} holds no tokenizer: the one that was made for it knows {len(tokenizer)} special tokens and no "
            "words.",
            "Copy the tokenizer files of the original model (tokenizer.json, or vocab.txt and kin) beside its weights.",
            key="model_name_or_path",
        )
    if tokenizer.pad_token is not None:
        return []
    if tokenizer.eos_token is None:
        raise UserError(
            f"the tokenizer of {name!r} has neither a padding token nor an end token to pad with.",
            "Set its pad_token and save it (tokenizer.pad_token = …; tokenizer.save_pretrained(folder)).",
            key="model_name_or_path",
        )
    tokenizer.pad_token = tokenizer.eos_token
    return [f"The tokenizer has no padding token; {tokenizer.eos_token!r} pads."]


def grow_embeddings(model: Any, vocabulary: Mapping[str, int]) -> int:
    """Add embeddings for tokens beyond the last one; returns how many.

    A new row is the mean of the others, which changes the model's answers least (Hewitt 2021, "Initializing new word
    embeddings for pretrained language models").
    """
    embeddings = model.get_input_embeddings()
    rows, needed = int(embeddings.num_embeddings), max(vocabulary.values()) + 1
    if needed <= rows:
        return 0
    with torch.random.fork_rng(devices=[]):
        model.resize_token_embeddings(needed, mean_resizing=False)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[rows:] = weight[:rows].mean(0)
    return needed - rows


def max_tokens(model: Any, tokenizer: Any) -> int:
    """The longest input in tokens that model and tokenizer read.

    RoBERTa and its kin count positions from the padding token's id on, so that as many of them are out of reach.
    """
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or UNBOUNDED
    for name, module in model.named_modules():
        learned = isinstance(module, nn.Embedding) and name.rpartition(".")[2] == "position_embeddings"
        if learned and module.padding_idx is not None:
            positions = min(positions, int(module.num_embeddings) - int(module.padding_idx) - 1)
    limit = min(tokenizer.model_max_length, positions)
    return _DEFAULT_LENGTH if limit >= UNBOUNDED else int(limit)


def settle(model: Any, tokenizer: Any, vocabulary: Mapping[str, int]) -> list[str]:
    """Set padding and special tokens so that an answer depends on its own text alone; returns notes.

    Some models read the padding token's id to find the last token of a text, and models with learned positions count
    the padding on the left. Models whose answer depends on padding whatever is set are left as they are, with a note.
    BART and its kin classify the one end token of a text, so that an end token inside a text is read as characters.
    """
    text = _made_up(tokenizer, vocabulary)
    if not _runs(model, tokenizer, text):
        return []
    notes = []
    if _reads_end_tokens(model, tokenizer, text) and not tokenizer.split_special_tokens:
        tokenizer.split_special_tokens = True
        notes.append(f"{tokenizer.eos_token!r} in a text is read as characters, not as the end of the text.")
    return [*notes, *_settle_padding(model, tokenizer, text)]


def _settle_padding(model: Any, tokenizer: Any, text: str) -> list[str]:
    config, side = model.config, tokenizer.padding_side
    before = config.pad_token_id
    for pad, padding_side in (
        (before, side),
        (tokenizer.pad_token_id, side),
        (before, "right"),
        (tokenizer.pad_token_id, "right"),
    ):
        config.pad_token_id, tokenizer.padding_side = pad, padding_side
        if not _depends_on_padding(model, tokenizer, text):
            notes = []
            if pad != before:
                notes.append(f"config.pad_token_id is {pad}, the tokenizer's padding token, instead of {before}.")
            if padding_side != side:
                notes.append(f"Texts are padded on the right: padded on the {side}, the model counts the padding.")
            return notes
    config.pad_token_id, tokenizer.padding_side = before, side
    return [f"Answers of {type(model).__name__} depend on the padding of their batch; longer batches change them."]


def _depends_on_padding(model: Any, tokenizer: Any, text: str) -> bool:
    ids = _encoded(tokenizer, text)
    pads, rest, ones = [tokenizer.pad_token_id] * _PADS, [0] * _PADS, [1] * len(ids)
    alone = _logits(model, tokenizer, [ids], [ones])
    if tokenizer.padding_side == "left":
        padded = _logits(model, tokenizer, [pads + ids], [rest + ones])
    else:
        padded = _logits(model, tokenizer, [ids + pads], [ones + rest])
    if alone is None or padded is None:
        return True
    return bool((alone - padded).abs().max() > _TOLERANCE * (alone.abs().max() + 1e-6))


def _reads_end_tokens(model: Any, tokenizer: Any, text: str) -> bool:
    """Whether the model refuses texts with different numbers of end tokens."""
    end = model.config.get_text_config().eos_token_id
    if not isinstance(end, int) or end >= model.get_input_embeddings().num_embeddings:
        return False
    ids = _encoded(tokenizer, text)
    other = next((i for i in ids if i != end), end)
    try:
        _forward(model, tokenizer, [[other, *ids], [end, *ids]], [[1] * (len(ids) + 1)] * 2)
    except (RuntimeError, ValueError) as error:
        return "<eos>" in str(error)
    return False


def _runs(model: Any, tokenizer: Any, text: str) -> bool:
    """Whether the model answers a made-up text at all: one that does not cannot be asked here."""
    ids = _encoded(tokenizer, text)
    return _logits(model, tokenizer, [ids], [[1] * len(ids)]) is not None


def _made_up(tokenizer: Any, vocabulary: Mapping[str, int]) -> str:
    """A text of a few words that the tokenizer knows."""
    special = set(tokenizer.all_special_tokens)
    words = sorted(t for t in vocabulary if t.isascii() and t.isalpha() and t not in special)
    words = words or sorted(vocabulary.keys() - special)
    return " ".join(words[len(words) // 2 :][:_PROBE])


def _encoded(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, with the special tokens that every text gets."""
    return list(tokenizer(text, truncation=True, verbose=False)["input_ids"])


def _logits(
    model: Any, tokenizer: Any, ids: Sequence[Sequence[int]], mask: Sequence[Sequence[int]]
) -> torch.Tensor | None:
    try:
        return _forward(model, tokenizer, ids, mask)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None


def _forward(model: Any, tokenizer: Any, ids: Sequence[Sequence[int]], mask: Sequence[Sequence[int]]) -> torch.Tensor:
    device = next(model.parameters()).device
    batch = {"input_ids": torch.tensor(ids, device=device)}
    if "attention_mask" in tokenizer.model_input_names:
        batch["attention_mask"] = torch.tensor(mask, device=device)
    with _asked(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        logits: torch.Tensor = model(**batch).logits.float()
    return logits


@contextmanager
def _asked(model: nn.Module) -> Iterator[None]:
    """Context in which the model is in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
