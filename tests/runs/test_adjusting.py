"""`logit_adjustment`: the saved model answers with the offsets everywhere, and what cannot have them is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_transfer import Predictor, fine_tune
from hf_transfer.errors import UserError
from tests.runs.helpers import plain_logits

WORDS = ["red film", "good day", "the man", "no way", "all in"]
KEYS = dict(
    train_val_split=0.5,
    num_train_epochs=6,
    strategy="full",
    learning_rate=1e-2,
    save_strategy="no",
    eval_strategy="no",
    data_facts=False,
    preflight=False,
    label_issues=False,
    log_level="error",
    use_cpu=True,
)


def rows(kind: str = "one") -> Dataset:
    """Of the rare label are half of the texts with `red`, and none else."""
    labels: list[Any] = ["rare" if i % 10 == 0 else "common" for i in range(150)]
    if kind == "several":
        labels = [[label] for label in labels]
    if kind == "number":
        labels = [float(len(label)) + i / 100 for i, label in enumerate(labels)]
    return Dataset.from_dict({"text": [f"{WORDS[i % 5]} {i}" for i in range(150)], "label": labels})


@pytest.fixture(scope="module")
def both(tiny_bert_folder, tmp_path_factory):
    """The same run with and without it."""
    folder = tmp_path_factory.mktemp("runs")
    rows().to_csv(folder / "data.csv")
    return [
        fine_tune(
            tiny_bert_folder, str(folder / "data.csv"), output_dir=str(folder / value), logit_adjustment=value, **KEYS
        )
        for value in ("f1_macro", "none")
    ]


def test_plain_transformers_answers_with_the_offsets(both):
    ours, none = both
    chosen = ours.results["logit_adjustment"]
    assert none.results["logit_adjustment"] is None and ours.results["calibration"] == none.results["calibration"]
    assert chosen["strength"] > 0 and chosen["split"] == "validation" and chosen["examples"] == 75
    expected = plain_logits(none.output_dir, WORDS) + torch.tensor(chosen["offsets"])
    torch.testing.assert_close(plain_logits(ours.output_dir, WORDS), expected, rtol=1e-5, atol=1e-5)
    assert ours.results["validation_metrics"]["f1_macro"] == pytest.approx(chosen["after"])
    assert none.results["validation_metrics"]["f1_macro"] == pytest.approx(chosen["before"])
    again = Predictor.load(ours.output_dir)
    assert again.evaluate(split="validation")["metrics"]["f1_macro"] == pytest.approx(chosen["after"])
    assert [a["label"] for a in again.predict(WORDS)] == [a["label"] for a in ours.predict(WORDS)]


def test_files_say_so(both):
    ours, _ = both
    saved = json.loads((ours.output_dir / "results.json").read_text())["logit_adjustment"]
    assert saved == ours.results["logit_adjustment"]
    cards = [(run.output_dir / "README.md").read_text() for run in both]
    assert f"Logit adjustment: strength {saved['strength']:.2f}, chosen on 75" in cards[0]
    assert "Logit adjustment:" not in cards[1]


def test_an_adapter_saves_them(tiny_bert_folder, tmp_path):
    keys = KEYS | {"adapter": "lora", "logit_adjustment": "recall_macro", "calibrate": False}
    run = fine_tune(tiny_bert_folder, rows(), output_dir=str(tmp_path), **keys)
    own = torch.tensor([[a["scores"][n] for n in ("common", "rare")] for a in run.predict(WORDS)])
    torch.testing.assert_close(
        plain_logits(tmp_path, WORDS, tiny_bert_folder).softmax(-1), own, rtol=1e-4, atol=1e-4, check_dtype=False
    )
    assert run.results["logit_adjustment"]["metric"] == "recall_macro"


@pytest.mark.parametrize(
    ("keys", "kind", "said"),
    [
        ({}, "several", "logit_adjustment: f1_macro needs one label per example.*tune_thresholds"),
        ({}, "number", "logit_adjustment: f1_macro needs one label per example, and this is a regression"),
        ({"logit_adjustment": "f1"}, "one", "logit_adjustment: .*'f1'"),
    ],
)
def test_what_cannot_have_them_is_refused(keys, kind, said, tiny_bert_folder, tmp_path):
    keys = KEYS | {"logit_adjustment": "f1_macro"} | keys
    with pytest.raises(UserError, match=said):
        fine_tune(tiny_bert_folder, rows(kind), output_dir=str(tmp_path / "out"), **keys)
    assert not (tmp_path / "out").exists()
