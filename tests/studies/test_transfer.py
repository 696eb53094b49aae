"""Whether pretraining helped: the verdicts, what a reference has in common with its row, and real cases of each."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from hf_transfer import UserError, compare, fine_tune
from hf_transfer.cli.program import main
from hf_transfer.data.bundled import load_dataset
from hf_transfer.studies.grid import Row
from hf_transfer.studies.transfer import judge, read_against, reference_of
from tests.studies.conftest import QUICK


@pytest.mark.parametrize(
    ("metric", "values", "reference", "verdict"),
    [
        ("accuracy", [0.9, 0.92, 0.91], [0.5, 0.55, 0.52], "helped"),
        ("accuracy", [0.5, 0.55, 0.52], [0.9, 0.92, 0.91], "hurt"),
        ("accuracy", [0.5, 0.9, 0.6], [0.6, 0.7, 0.65], "no difference"),
        ("rmse", [0.5, 0.55, 0.52], [0.9, 0.92, 0.91], "helped"),  # smaller is better
        ("rmse", [0.9, 0.92, 0.91], [0.5, 0.55, 0.52], "hurt"),
        ("accuracy", [0.9], [0.5], "not known"),
        ("accuracy", [0.9, 0.9], [0.5, 0.5], "not known"),
    ],
)
def test_the_verdict_follows_the_interval(metric, values, reference, verdict):
    found = judge("scratch", metric, dict(enumerate(values)), dict(enumerate(reference)))
    assert found.verdict == verdict and found.verdict in found.line("row")
    assert ("not known" not in verdict) or found.why_not


def test_a_reference_leaves_out_how_a_model_is_transferred_and_keeps_the_rest():
    row = Row({"strategy": "gradual", "learning_rate": 1e-5, "weight_decay": 0.1, "num_train_epochs": 3.0})
    found = reference_of(row, "scratch", {"learning_rate": 1e-3}, {"num_train_epochs": 7.0, "max_steps": -1})
    assert found.settings.pop("learning_rate") == 1e-3
    assert found.settings == {"strategy": "scratch", "weight_decay": 0.1, "num_train_epochs": 7.0, "max_steps": -1}
    assert {"learning_rate", "layer_lr_decay", "adapter", "l2_sp_alpha", "unfreeze_interval"} <= found.without
    assert not {"max_hours", "augmentation", "lr_scheduler_type", "warmup_steps"} & found.without


@pytest.mark.parametrize(
    ("against", "said"),
    [
        (["scratch", "scratch"], "against: a reference is named twice."),
        (["linear_probe"], "Did you mean 'linear-probe'?"),
        (
            {"scratch": {"learning_rat": 1}},
            "against: scratch: learning_rat is not a key. Did you mean 'learning_rate'?",
        ),
        ({"scratch": {"num_train_epochs": 1}}, "against: scratch: num_train_epochs is that of the row"),
        ({"scratch": 5}, "against: scratch: expected a mapping of keys to values, got 5."),
    ],
)
def test_wrong_references_are_refused(against, said):
    with pytest.raises(UserError) as raised:
        read_against(against)
    assert said in str(raised.value)


def test_the_budget_is_that_of_the_row_and_the_card_has_the_verdict(tiny_bert_folder, reviews, tmp_path):
    keys = {**QUICK, **reviews, "strategy": "full", "per_device_train_batch_size": 4, "max_steps": 3}
    frame = compare(
        tiny_bert_folder,
        output_dir=tmp_path,
        seeds=(0,),
        against=["scratch", "linear-probe"],
        estimate=False,
        talks=False,
        **keys,
    )
    whole = json.loads((tmp_path / "compare.json").read_text())
    assert len(whole["references"]) == 2 and not frame.attrs["failures"]
    for one in whole["references"]:
        run = yaml.safe_load((tmp_path / "cells" / one["cell"] / "run.yaml").read_text())
        assert (run["max_steps"], run["per_device_train_batch_size"]) == (3, 4)
    (cell,) = map(Path, frame.attrs["cells"]["as given"])
    results, card = json.loads((cell / "results.json").read_text()), (cell / "README.md").read_text()
    assert [one["against"] for one in results["transfer"]] == ["scratch", "linear-probe"]
    assert "## Transfer" in card and "| random weights |" in card and "the test split was left alone" in card
    verdicts = [one["verdict"] for one in whole["rows"][0]["transfer"]]
    assert list(frame.loc[0, ["against_scratch", "against_linear-probe"]]) == verdicts


# ---- real cases ----


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A task that a tiny model learns from random weights: which of two words a text has."""
    root = tmp_path_factory.mktemp("words")
    generator = torch.Generator().manual_seed(0)
    fill = ["the", "film", "a", "of", "and", "story"]

    def text(word):
        drawn = torch.randint(0, len(fill), (6,), generator=generator).tolist()
        return " ".join([*(fill[i] for i in drawn[:3]), word, *(fill[i] for i in drawn[3:])])

    files = {}
    for name, count in (("train", 256), ("validation", 64)):
        rows = [{"text": text(("good", "bad")[i % 2]), "label": ("yes", "no")[i % 2]} for i in range(count)]
        files[f"{name}_file"] = str(root / f"{name}.csv")
        pd.DataFrame(rows).to_csv(files[f"{name}_file"], index=False)
    return files


@pytest.fixture(scope="module")
def learner(tiny_bert_folder, tmp_path_factory):
    """A model of random weights, wide enough to learn `words` in 64 steps."""
    folder = tmp_path_factory.mktemp("models") / "learner"
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_attention_heads=2, intermediate_size=64, num_hidden_layers=1)
    config = BertConfig(vocab_size=5000, max_position_embeddings=16, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert_folder).save_pretrained(folder)
    return folder


def command(model, data, folder, *more):
    keys = {**QUICK, **data, "data_facts": False, "num_train_epochs": 2, "learning_rate": 5e-3, "strategy": "full"}
    words = [word for name, value in keys.items() for word in (f"--{name}", str(value))]
    base = ["compare", "--model_name_or_path", str(model), "--output_dir", str(folder), "--seeds", "0,1,2,3"]
    return main(
        [*base, *words, "--against", "{scratch: {learning_rate: 5e-3}}", "--strict", "--estimate", "false", *more]
    )


def verdict_in(folder):
    whole = json.loads((folder / "compare.json").read_text())
    return [one["verdict"] for one in whole["rows"][0]["transfer"]]


@pytest.mark.slow
def test_broken_weights_hurt(learner, words, tmp_path, capsys):
    """Weights in which every activation is saturated learn nothing in the time that random ones need."""
    model = AutoModelForSequenceClassification.from_pretrained(learner)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0) if parameter.ndim == 1 else parameter.fill_(5.0)
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(learner).save_pretrained(tmp_path / "broken")
    assert command(tmp_path / "broken", words, tmp_path / "out", "--metric", "loss") == 1
    assert verdict_in(tmp_path / "out") == ["hurt"] and "hurt: as given (against scratch)" in capsys.readouterr().err


@pytest.mark.slow
def test_random_weights_are_no_different_from_random_weights(learner, words, tmp_path):
    assert command(learner, words, tmp_path / "out", "--metric", "loss") == 0
    assert verdict_in(tmp_path / "out") == ["no difference"]


@pytest.mark.slow
def test_what_was_learnt_before_helps_with_few_examples(learner, words, tmp_path):
    keys = {**QUICK, **words, "num_train_epochs": 4, "learning_rate": 5e-3, "log_level": "error"}
    fine_tune(str(learner), output_dir=str(tmp_path / "before"), strategy="full", save_strategy="no", **keys)
    few = {**words, "max_train_samples": 32}
    assert command(tmp_path / "before", few, tmp_path / "out", "--metric", "loss") == 0
    assert verdict_in(tmp_path / "out") == ["helped"]


# ---- real weights ----


@pytest.fixture(scope="module")
def sentiment(tmp_path_factory):
    """(reviews with their labels, the same reviews with labels that say nothing), as files by key."""
    root, rows = tmp_path_factory.mktemp("sentiment"), load_dataset("bundled:rotten-tomatoes")["train"].shuffle(seed=0)
    drawn = torch.Generator().manual_seed(0)
    files: dict[str, dict[str, str]] = {"true": {}, "random": {}}
    for name, numbers in {"train": range(160), "validation": range(160, 280)}.items():
        part = rows.select(numbers)
        labels = {"true": part["label"], "random": torch.randint(0, 2, (len(part),), generator=drawn).tolist()}
        for kind, own in labels.items():
            files[kind][f"{name}_file"] = str(root / f"{kind}-{name}.csv")
            frame = pd.DataFrame({"text": part["text"], "label": [("negative", "positive")[one] for one in own]})
            frame.to_csv(files[kind][f"{name}_file"], index=False)
    return files


def verdicts(data, folder, against, rate, steps):
    """(exit code, verdicts) of MiniLM, all of it trained for some steps at a rate, over three seeds."""
    keys = {**QUICK, **data, "data_facts": False, "max_seq_length": 24, "strategy": "full", "save_strategy": "no"}
    keys |= {"learning_rate": rate, "max_steps": steps, "per_device_train_batch_size": 4, "eval_strategy": "no"}
    keys |= {"against": against, "estimate": False}
    argv = ["compare", "--model_name_or_path", "bundled:minilm-l6", "--output_dir", str(folder), "--seeds", "0,1,2"]
    code = main([*argv, *(word for name, value in keys.items() for word in (f"--{name}", str(value))), "--strict"])
    (row,) = json.loads((folder / "compare.json").read_text())["rows"]
    return code, [one["verdict"] for one in row["transfer"]]


@pytest.mark.slow
def test_a_rate_that_destroys_real_weights_hurts(sentiment, tmp_path, capsys):
    """At a hundred times the rate, little is left of what the frozen features are worth."""
    against = "{linear-probe: {probe_solver: lbfgs}}"
    assert verdicts(sentiment["true"], tmp_path, against, 2e-2, 20) == (1, ["hurt"])
    assert "as given (against linear-probe)" in capsys.readouterr().err


@pytest.mark.slow
def test_labels_that_say_nothing_make_no_difference(sentiment, tmp_path):
    against = "{linear-probe: {probe_solver: lbfgs}, scratch: {}}"
    assert verdicts(sentiment["random"], tmp_path, against, 2e-4, 20) == (0, ["no difference", "no difference"])


@pytest.mark.slow
def test_real_weights_help(sentiment, tmp_path):
    """MiniLM on 160 reviews, against the same network from random weights."""
    assert verdicts(sentiment["true"], tmp_path, "scratch", 2e-4, 100) == (0, ["helped"])
