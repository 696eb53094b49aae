"""Tokenized splits are kept under a name that changes with whatever changes the tokens."""

from __future__ import annotations

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.tasks import TASKS
from hf_transfer.tasks.tokenizer_digest import digest

TASK = TASKS["text-classification"]


def tokenizer(words=("[UNK]", "[PAD]", "good", "film"), **options):
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="[UNK]", **{"pad_token": "[PAD]", "model_max_length": 9, **options}
    )


@pytest.mark.parametrize(
    "other",
    [
        lambda: tokenizer(words=("[UNK]", "[PAD]", "film", "good")),
        lambda: tokenizer(model_max_length=3),
        lambda: tokenizer(truncation_side="left"),
        lambda: tokenizer(split_special_tokens=True),
        lambda: tokenizer(pad_token="film"),
        lambda: tokenizer(model_input_names=["input_ids"]),
    ],
)
def test_what_changes_the_tokens_changes_it(other):
    assert digest(tokenizer()) == digest(tokenizer()) != digest(other())
    assert digest(tokenizer(), "a", ("b",)) != digest(tokenizer(), "a", ("c",))
    added = tokenizer()
    added.add_tokens(["dull"])
    assert digest(added) != digest(tokenizer())


def test_calls_do_not_change_it_and_it_does_not_change_calls():
    made, text = tokenizer(), "good film good film"
    before = digest(made)
    made(text, truncation=True, max_length=3, padding="max_length")
    backend = made.backend_tokenizer
    state = (backend.truncation, backend.padding)
    assert state[0]["max_length"] == 3 and state[1]["length"] == 3
    assert digest(made) == before and (backend.truncation, backend.padding) == state


def test_what_cannot_be_pickled_is_left_to_datasets():
    made = tokenizer()
    made.own = lambda text: text
    assert digest(made) is None
    data = Dataset.from_dict({"text": ["good film", "film"], "labels": [0, 1]})
    assert TASK.prepare(data, ("text",), made, DataArguments())["input_ids"] == [[2, 3], [3]]


def test_a_split_is_tokenized_once_and_anew_with_another_tokenizer(tmp_path, tiny_bert_folder, monkeypatch):
    Dataset.from_dict({"text": ["good film", "film"], "labels": [0, 1]}).save_to_disk(tmp_path)
    encoded, encode = [], type(TASK).encode
    monkeypatch.setattr(type(TASK), "encode", lambda *given: encoded.append(1) or encode(*given))

    def prepared(**changes):
        made = AutoTokenizer.from_pretrained(tiny_bert_folder)
        for name, value in changes.items():
            setattr(made, name, value)
        split = TASK.prepare(Dataset.load_from_disk(str(tmp_path)), ("text",), made, DataArguments())
        return len(encoded), split["input_ids"][:]

    (first, ids), again = prepared(), prepared()
    assert first == 1 and again == (1, ids) and len(ids[0]) == 4
    calls, cut = prepared(model_max_length=3)
    assert calls == 2 and [len(row) for row in cut] == [3, 3]


def test_a_task_of_ones_own_counts(tmp_path, tiny_bert_folder):
    """Its class is told by what it does and holds, not by its name: a script is edited and run again."""
    Dataset.from_dict({"text": ["good film"], "labels": [0]}).save_to_disk(tmp_path)
    made = AutoTokenizer.from_pretrained(tiny_bert_folder)

    class Marked(type(TASK)):
        def __init__(self, mark):
            self.mark = mark

        def encode(self, columns, processor):
            return {"input_ids": [[self.mark] for _ in columns[0]]}

    def ids(mark):
        split = Dataset.load_from_disk(str(tmp_path))
        return Marked(mark).prepare(split, ("text",), made, DataArguments())["input_ids"]

    assert [ids(5), ids(6), ids(5)] == [[[5]], [[6]], [[5]]]
