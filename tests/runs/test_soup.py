"""Soups of runs and checkpoints, and interpolations with the pretrained model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from hf_transfer import UserError, fine_tune
from hf_transfer.adapters.files import merged
from hf_transfer.cli.program import main
from hf_transfer.data.bundled import load_dataset
from hf_transfer.data.record import Record
from hf_transfer.hub.files import results_of
from hf_transfer.inference.predictor import Predictor
from hf_transfer.run_folder import EXAMPLES, INTERPOLATION_PNG
from hf_transfer.runs.candidates import Judge
from hf_transfer.runs.soup import soup, with_pretrained

KEYS = dict(
    strategy="full",
    learning_rate=5e-3,
    num_train_epochs=2,
    max_seq_length=16,
    log_level="error",
    preflight=False,
    expected_accuracy=False,
    calibrate=False,
    data_seed=0,
)


@pytest.fixture(scope="module")
def runs(tiny_bert_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    reviews = load_dataset("bundled:rotten-tomatoes")["train"].shuffle(seed=0)
    data = {}
    for name, numbers in {"train": range(32), "validation": range(32, 52), "test": range(52, 72)}.items():
        names = ["negative", "positive"]
        rows = [{"text": row["text"], "label": names[row["label"]]} for row in reviews.select(numbers)]
        data[f"{name}_file"] = str(root / f"{name}.csv")
        pd.DataFrame(rows).to_csv(data[f"{name}_file"], index=False)
    for seed in (0, 1):
        fine_tune(tiny_bert_folder, output_dir=str(root / f"{seed}"), seed=seed, save_total_limit=5, **data, **KEYS)
    fine_tune(
        tiny_bert_folder, output_dir=str(root / "lora"), adapter="lora", seed=2, save_strategy="no", **data, **KEYS
    )
    return root


def weights(folder):
    return load_file(folder / "model.safetensors")


def scripted(monkeypatch, values):
    """The validation metric of each measurement, in order."""
    left = list(values)
    monkeypatch.setattr(Judge, "measure", lambda self, state, statistics=(): {"accuracy": left.pop(0), "loss": 1.0})
    return left


def test_a_uniform_soup_is_the_mean_and_a_folder_as_of_a_run(runs, tmp_path):
    done = soup([runs / "0", runs / "1"], tmp_path / "soup", method="uniform")
    one, other, both = weights(runs / "0"), weights(runs / "1"), weights(tmp_path / "soup")
    for name, tensor in both.items():
        torch.testing.assert_close(tensor.double(), (one[name].double() + other[name].double()) / 2, rtol=0, atol=1e-7)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "soup")
    assert plain.config.id2label == {0: "negative", 1: "positive"}
    results = json.loads((tmp_path / "soup" / "results.json").read_text())
    assert (
        results["soup"]["candidates"][1]["metrics"]
        == Predictor.load(runs / "1").evaluate(split="validation")["metrics"]
    )
    assert results["soup"]["value"] == results["validation_metrics"]["accuracy"]
    assert results["metrics"] == Predictor.load(tmp_path / "soup").evaluate()["metrics"] == done.results["metrics"]
    assert [c["chosen"] for c in results["soup"]["candidates"]] == [True, True]
    card = (tmp_path / "soup" / "README.md").read_text()
    assert "mean of those of 2 of 2 models (uniform soup)" in card and "all of them (uniform)" in card
    for seed, one in zip("01", results["soup"]["candidates"], strict=True):
        assert f"| {seed} | {one['metrics']['accuracy']:.4f} | yes | `seed` {seed} |" in card
    assert str(tmp_path) not in card and str(runs) not in card and "model-soup" in ModelCard(card).data.tags
    assert not any(f"## {title}" in card for title in ("Training cost", "Confusion matrix"))


@pytest.mark.parametrize(
    ("values", "chosen", "value"),
    [
        pytest.param([0.5, 0.6, 0.7], [True, True], 0.7, marks=pytest.mark.slow),
        ([0.5, 0.6, 0.6], [True, True], 0.6),  # not worse
        ([0.5, 0.6, 0.4], [False, True], 0.6),
        pytest.param([float("nan"), 0.6], [False, True], 0.6, marks=pytest.mark.slow),
    ],
)
def test_a_greedy_soup_takes_what_does_not_make_it_worse(runs, tmp_path, monkeypatch, values, chosen, value):
    left = scripted(monkeypatch, values)
    done = soup([runs / "0", runs / "1"], tmp_path / "soup")
    assert not left
    assert [c["chosen"] for c in done.results["soup"]["candidates"]] == chosen
    assert done.results["soup"]["value"] == value
    if chosen == [False, True]:
        assert all(torch.equal(t, weights(runs / "1")[n]) for n, t in weights(tmp_path / "soup").items())


@pytest.mark.slow
def test_one_run_gives_its_checkpoints(runs, tmp_path):
    done = soup([runs / "0"], tmp_path / "soup", method="uniform")
    names = [c["name"].rpartition("/")[2] for c in done.results["soup"]["candidates"]]
    assert len(names) == 2 and all(name.startswith("checkpoint-") for name in names)
    parts = [weights(runs / "0" / name)["classifier.weight"].double() for name in names]
    torch.testing.assert_close(weights(tmp_path / "soup")["classifier.weight"].double(), sum(parts) / 2)


def test_adapters_are_averaged_by_their_updates(runs, tmp_path):
    soup([runs / "lora", runs / "0"], tmp_path / "soup", method="uniform")
    one, other = merged(Predictor.load(runs / "lora").model).state_dict(), weights(runs / "0")
    for name, tensor in weights(tmp_path / "soup").items():
        torch.testing.assert_close(tensor, (one[name] + other[name]) / 2)
    assert not (tmp_path / "soup" / "adapter_config.json").exists()
    card = (tmp_path / "soup" / "README.md").read_text()
    assert "Adapters were merged into the weights first" in card and "`adapter` lora" in card


def test_an_interpolation_keeps_the_best_alpha_and_the_new_head(runs, tmp_path, tiny_bert_folder, monkeypatch):
    left = scripted(monkeypatch, [0.5, 0.7, 0.7, 0.6])
    done = with_pretrained(runs / "0", tmp_path / "wise", [1, 0.25, 0, 0.5])
    assert not left and done.results["interpolation"]["alpha"] == 0.25
    assert [p["alpha"] for p in done.results["interpolation"]["curve"]] == [0, 0.25, 0.5, 1]
    start, end, mixed = (
        load_file(f"{tiny_bert_folder}/model.safetensors"),
        weights(runs / "0"),
        weights(tmp_path / "wise"),
    )
    fresh = set(done.results["interpolation"]["fine_tuned_only"])
    assert {"classifier.weight", "classifier.bias"} <= fresh
    for name, tensor in mixed.items():
        expected = end[name] if name in fresh else 0.75 * start[name] + 0.25 * end[name]
        torch.testing.assert_close(tensor, expected)
    assert (tmp_path / "wise" / INTERPOLATION_PNG).stat().st_size > 1000
    card = (tmp_path / "wise" / "README.md").read_text()
    assert (
        "0.75 · pretrained + 0.25 · fine-tuned." in card and "Alpha 0.25 was kept: the best validation metric" in card
    )
    assert "| 0 | 0.5000 |\n| **0.25** | **0.7000** |\n| 0.5 | 0.7000 |\n| 1 | 0.6000 |" in card
    assert "the same for every alpha: `classifier.bias`, `classifier.weight`." in card


@pytest.mark.slow
def test_the_ends_of_an_interpolation_are_measured_as_they_are(runs, tmp_path):
    done = with_pretrained(runs / "0", tmp_path / "wise", [0, 1])
    at_end = done.results["interpolation"]["curve"][1]["metrics"]
    assert at_end == Predictor.load(runs / "0").evaluate(split="validation")["metrics"]


@pytest.mark.slow
def test_the_command(runs, tmp_path, capsys):
    assert main(["soup", str(runs / "0"), str(runs / "1"), "--output_dir", str(tmp_path / "soup")]) == 0
    said = capsys.readouterr().out
    assert "Greedy soup of" in said and "on validation" in said
    assert (
        main(["soup", str(runs / "0"), "--with_pretrained", "--alphas", "0,1", "--output_dir", str(tmp_path / "w")])
        == 0
    )
    assert "Kept alpha" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "soup"), "--json"]) == 0


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "A RUN is needed"),
        (["{runs}/0"], "output_dir: it is missing"),
        (["{runs}/0", "{runs}/1", "--with_pretrained", "--output_dir", "{new}"], "one RUN is interpolated"),
        (["{runs}/0", "--alphas", "0,1", "--output_dir", "{new}"], "no effect without with_pretrained"),
        (["{runs}/0", "--with_pretrained", "--alphas", "2", "--output_dir", "{new}"], "numbers from 0 to 1"),
        (["{runs}/0", "{runs}/0", "--output_dir", "{new}"], "named twice"),
        (["{runs}/nothing", "--output_dir", "{new}"], "is no folder"),
        (["{runs}/lora", "--output_dir", "{new}"], "has no checkpoints"),
        (["{runs}/0", "{runs}/1", "--output_dir", "{runs}/0"], "holds a model already"),
        (["{runs}/0", "{runs}/1", "--metric", "mae", "--output_dir", "{new}"], "'mae' is not one of loss, accuracy"),
        (["{runs}/0", "{runs}/1", "--method", "best", "--output_dir", "{new}"], "greedy, uniform"),
    ],
)
def test_what_makes_no_sense_is_refused(runs, tmp_path, capsys, argv, sentence):
    words = [word.format(runs=runs, new=tmp_path / "new") for word in argv]
    assert main(["soup", *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def edited(runs, tmp_path, change):
    """A copy of a run of which a file was changed."""
    copy = shutil.copytree(runs / "1", tmp_path / "copy")
    change(copy)
    return copy


def set_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda r: set_json(r / "config.json", lambda c: c.update(id2label={"0": "bad", "1": "good"})),
            "different labels",
        ),
        (
            lambda r: set_json(r / "config.json", lambda c: c.update(hidden_act="relu")),
            "architectures .hidden_act differ",
        ),
        (lambda r: set_json(r / "results.json", lambda c: c["backbone"].update(weights="x")), "different backbones"),
    ],
)
def test_what_does_not_belong_together_is_refused(runs, tmp_path, change, sentence):
    copy = edited(runs, tmp_path, change)
    with pytest.raises(UserError, match=sentence):
        soup([runs / "0", copy], tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


@pytest.mark.parametrize(("split", "what"), [("validation", "judged"), ("test", "measured")])
def test_a_run_that_trained_on_what_is_held_out_is_refused(runs, tmp_path, split, what):
    def trained_on_it(run):
        record = Record.load(run / EXAMPLES)
        splits = {**record.splits, "train": record.splits[split], split: record.splits["train"]}
        replace(record, splits=splits).save(run / EXAMPLES)

    copy = edited(runs, tmp_path, trained_on_it)
    with pytest.raises(UserError, match=f"trained on 20 of the 20 {split} examples that the average is {what} on"):
        soup([runs / "0", copy], tmp_path / "soup")


def test_an_average_of_an_unfinished_run_has_no_card(runs, tmp_path):
    copy = edited(runs, tmp_path, lambda r: (r / "results.json").unlink())
    soup([copy / "checkpoint-4", runs / "0"], tmp_path / "soup", method="uniform")
    assert not (tmp_path / "soup" / "README.md").exists()
    with pytest.raises(UserError, match="the run that it was made from was not finished"):
        results_of(tmp_path / "soup")


def test_other_weights_than_the_run_started_from_are_refused(runs, tmp_path):
    copy = edited(runs, tmp_path, lambda r: set_json(r / "results.json", lambda c: c["backbone"].update(weights="x")))
    with pytest.raises(UserError, match="not those that the run started from"):
        with_pretrained(copy, tmp_path / "wise")
