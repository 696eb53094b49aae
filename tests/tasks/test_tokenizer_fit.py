"""A tokenizer that does not fit its model is found, and mended or refused, before anything is computed with it."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from hf_transfer import Predictor, UserError, fine_tune
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.data.labels import Labels
from hf_transfer.tasks import TASKS

WORDS = ["a", "good", "bad", "film", "was", "it", "and", "very", "dull", "lovely"]
LABELS = Labels("single_label_classification", ("LABEL_0", "LABEL_1"))
KEYS = dict(num_train_epochs=1, save_strategy="no", strategy="full", log_level="error", use_cpu=True)


def tokenizer(specials, template=None, **options):
    """A tokenizer of whole words; `specials` are its first tokens."""
    plain = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*specials, *WORDS])}, unk_token=specials[-1]))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        ids = [(t, i) for i, t in enumerate(specials)]
        plain.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token=specials[-1], **options)


def saved(folder, model, made):
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def load(folder, **keys):
    return TASKS["text-classification"].load(ModelArguments(str(folder)), DataArguments(**keys), LABELS)


def logits(model, made, texts):
    with torch.no_grad():
        return model.eval()(**made(texts, padding=True, return_tensors="pt")).logits


def gpt2(folder, side="right", pad="[PAD]", config_pad=None, eos="<end>"):
    torch.manual_seed(0)
    made = tokenizer(["<end>", "[PAD]", "[UNK]"], eos_token=eos, pad_token=pad, padding_side=side,
                     model_input_names=["input_ids", "attention_mask"])  # fmt: skip
    config = GPT2Config(vocab_size=13, n_embd=16, n_layer=1, n_head=2, n_positions=32, num_labels=2, bos_token_id=0,
                        eos_token_id=0, pad_token_id=config_pad, initializer_range=0.5)  # fmt: skip
    return saved(folder, GPT2ForSequenceClassification(config), made)


@pytest.mark.parametrize(
    ("side", "pad", "config_pad", "said"),
    [
        ("right", "[PAD]", 1, []),
        ("right", "[PAD]", 0, ["config.pad_token_id is 1, the tokenizer's padding token, instead of 0."]),
        ("left", "[PAD]", 1, ["Texts are padded on the right: padded on the left, the model counts the padding."]),
        ("left", "[PAD]", 5, ["config.pad_token_id is 1", "Texts are padded on the right"]),
        ("right", None, None, ["The tokenizer has no padding token; '<end>' pads."]),
        ("right", None, -1, ["The tokenizer has no padding token; '<end>' pads."]),
    ],
)
def test_an_answer_does_not_depend_on_its_batch(side, pad, config_pad, said, tmp_path):
    loaded, made = load(gpt2(tmp_path, side, pad, config_pad))
    texts = ["a good film", "it was", "a very very dull film and bad"]
    together = logits(loaded.model, made, texts)
    alone = torch.cat([logits(loaded.model, made, [text]) for text in texts])
    assert torch.allclose(together, alone, atol=1e-5) and together.std() > 0.01
    assert len(loaded.notes) == len(said) and all(s in n for s, n in zip(said, loaded.notes, strict=True))
    assert loaded.model.config.pad_token_id == made.pad_token_id, "as plain transformers reads it"


def test_nothing_to_pad_with(tmp_path):
    with pytest.raises(UserError, match="neither a padding token nor an end token"):
        load(gpt2(tmp_path, pad=None, eos=None))


def test_an_encoder_keeps_its_configuration(tmp_path):
    """RoBERTa counts positions from the padding id of its configuration on."""
    made = tokenizer(["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s>", pad_token="<pad>", eos_token="</s>")
    config = RobertaConfig(vocab_size=14, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=8, max_position_embeddings=20, pad_token_id=1)  # fmt: skip
    loaded, made = load(saved(tmp_path, RobertaModel(config), made))
    assert loaded.model.config.pad_token_id == 1 and made.model_max_length == 18
    assert not [n for n in loaded.notes if "pad" in n]
    logits(loaded.model, made, ["good " * 16])
    with pytest.raises(UserError, match="max_seq_length: 19 exceeds the model's maximum of 18 tokens"):
        load(tmp_path, max_seq_length=19)


def bert(folder, made=None, rows=14):
    config = BertConfig(vocab_size=rows, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
                        max_position_embeddings=32)  # fmt: skip
    model = BertModel(config)
    if made is None:
        model.save_pretrained(folder)
        return folder
    return saved(folder, model, made)


def bert_tokenizer():
    return tokenizer(["[PAD]", "[CLS]", "[SEP]", "[UNK]"], "[CLS] $A [SEP]", pad_token="[PAD]", cls_token="[CLS]",
                     sep_token="[SEP]")  # fmt: skip


def test_a_folder_without_a_vocabulary(tmp_path):
    with pytest.raises(
        UserError, match=r"holds no tokenizer: the one that was made for it knows \d special tokens and no"
    ):
        load(bert(tmp_path))


def test_added_tokens_get_embeddings_that_are_trained_and_saved(tmp_path):
    made = bert_tokenizer()
    made.add_tokens(["<user>", "<place>"])
    folder = bert(tmp_path / "bert", made)
    (tmp_path / "t.csv").write_text(
        "text,label\n" + "".join(f"<user> film {w},{i % 2}\n" for i, w in enumerate(WORDS * 3))
    )
    run = fine_tune(str(folder), f"{tmp_path}/t.csv", output_dir=f"{tmp_path}/o", **KEYS)
    assert run.predictor.model.get_input_embeddings().num_embeddings == 16
    again = Predictor.load(run.output_dir)
    assert again.predict(["<user> good"]) == run.predict(["<user> good"])
    with pytest.raises(UserError, match="adapter: the tokenizer has 2 more tokens than the model has embeddings"):
        fine_tune(str(folder), f"{tmp_path}/t.csv", output_dir=f"{tmp_path}/a", **{**KEYS, "strategy": "lora"})
    made.add_tokens(["<late>"])
    made.save_pretrained(run.output_dir)
    with pytest.raises(UserError, match=r"RUN: the tokenizer of .* has 1 more tokens than the model has embeddings"):
        Predictor.load(run.output_dir)


def test_new_embeddings_are_the_mean_and_draw_nothing(tmp_path):
    made = bert_tokenizer()
    made.add_tokens(["<user>"])
    folder = bert(tmp_path, made)
    torch.manual_seed(5)
    loaded, _ = load(folder)
    weight = loaded.model.get_input_embeddings().weight
    assert torch.allclose(weight[14], weight[:14].mean(0)) and loaded.grown == 1


def test_an_end_token_in_a_text_is_characters(tmp_path):
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    plain = Tokenizer(models.BPE(unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=specials, initial_alphabet=letters, show_progress=False)
    plain.train_from_iterator(WORDS, trainer)
    plain.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    inputs = ["input_ids", "attention_mask"]
    made = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", pad_token="<pad>", eos_token="</s>",
                                   unk_token="<unk>", model_input_names=inputs)  # fmt: skip
    config = BartConfig(vocab_size=len(made), d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=64,
                        num_labels=2)  # fmt: skip
    loaded, made = load(saved(tmp_path, BartForSequenceClassification(config), made))
    assert loaded.notes[-1] == "'</s>' in a text is read as characters, not as the end of the text."
    assert logits(loaded.model, made, ["a good </s> film", "it was"]).shape == (2, 2)


def test_asking_a_model_changes_nothing(tmp_path):
    folder = gpt2(tmp_path, config_pad=0)
    torch.manual_seed(1)
    loaded, _ = load(folder)
    after = torch.rand(1)
    torch.manual_seed(1)
    plain = GPT2ForSequenceClassification.from_pretrained(folder)
    assert torch.equal(after, torch.rand(1)) and loaded.model.training == plain.training
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.model.state_dict().values(), plain.state_dict().values(), strict=True)
    )
