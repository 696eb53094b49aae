"""`errors`, `confusion_matrix`, `history` and curves of a run and of a loaded model; `errors.csv`."""

from __future__ import annotations

import io
import json

import pandas as pd
import pytest
from PIL import Image as Pixels

import hf_transfer
from hf_transfer import UserError, fine_tune
from hf_transfer.cli.program import main

QUICK = dict(num_train_epochs=1, save_strategy="no", log_level="error", strategy="full", preflight=False)
ROWS = {"text": [f"words {i}" for i in range(24)], "label": ["no", "yes", "no"] * 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("reviewing")


@pytest.fixture(scope="module")
def run(tiny_bert_folder, place):
    pd.DataFrame(ROWS).to_csv(place / "d.csv", index=False)
    return fine_tune(tiny_bert_folder, str(place / "d.csv"), output_dir=str(place / "o"), **QUICK)


def test_wrong_answers_of_the_split_that_was_measured(run, place):
    wrong = run.errors()
    assert list(wrong.columns) == ["input", "row", "true", "predicted", "probability", "loss"]
    assert 1 - len(wrong) / run.evaluate()["num_examples"] == run.metrics["accuracy"] < 1
    assert wrong["loss"].is_monotonic_decreasing
    for answer, row in zip(run.predict(list(wrong["input"])), wrong.itertuples(), strict=True):
        assert (answer["label"], answer["score"]) == (row.predicted, pytest.approx(row.probability))
        assert ROWS["text"][row.row] == row.input and ROWS["label"][row.row] == row.true != row.predicted
    written = pd.read_csv(run.output_dir / "errors.csv")
    pd.testing.assert_frame_equal(written, wrong, check_dtype=False)


def test_of_other_data(run):
    """A model that is loaded knows as much as the run."""
    model = hf_transfer.load(run.output_dir)
    pd.testing.assert_frame_equal(model.errors(), run.errors())
    pd.testing.assert_frame_equal(model.confusion_matrix(), run.confusion_matrix())
    said = [a["label"] for a in run.predict(["a", "b", "c"])]
    other = [{"yes": "no", "no": "yes"}[said[0]], *said[1:]]
    for one in (run, model):
        assert one.errors((["a", "b", "c"], other))["input"].tolist() == ["a"]
        counts = one.confusion_matrix({"text": ["a", "b", "c"], "label": other})
        assert counts.loc[other[0], said[0]] >= 1 and counts.to_numpy().sum() == 3
    assert run.labels == list(model.labels) == list(run.confusion_matrix().columns) == ["no", "yes"]
    assert run.predict_proba(["a"]).tolist() == model.predict_proba(["a"]).tolist()
    assert run.confusion_matrix(split="train").to_numpy().sum() == run.results["num_train_examples"]


def test_evaluate_writes_wrong_answers_from_the_pass_of_the_metrics(run, place, capsys, monkeypatch):
    passes, own = [], hf_transfer.Predictor._measured
    monkeypatch.setattr(hf_transfer.Predictor, "_measured", lambda self, data: passes.append(1) or own(self, data))
    monkeypatch.setattr(hf_transfer.Predictor, "logits", None)  # a second pass would fail
    file, folder = place / "wrong.csv", str(run.output_dir)
    assert main(["evaluate", folder, "--errors_file", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    wrong = pd.read_csv(file)
    assert passes == [1] and found["metrics"] == run.metrics
    assert len(wrong) == round((1 - found["metrics"]["accuracy"]) * found["num_examples"]) > 0
    assert any("without the nearest training examples" in note for note in found["notes"])
    ours = pd.read_csv(run.output_dir / "errors.csv")
    pd.testing.assert_frame_equal(wrong, ours[list(wrong.columns)])
    assert main(["evaluate", folder, "--errors_file", f"{folder}/errors.csv"]) == 2
    assert "is what the run wrote" in capsys.readouterr().err


def test_the_course_of_training(run, tmp_path):
    model = hf_transfer.load(run.output_dir)
    pd.testing.assert_frame_equal(model.history, run.history)
    assert {"step", "loss", "eval_loss", "eval_accuracy", "learning_rate.head"} <= set(run.history.columns)
    assert run.history["step"].is_monotonic_increasing
    picture = io.BytesIO()
    run.plot_curves().savefig(picture)
    assert Pixels.open(picture).size[0] > 300
    saved = hf_transfer.load(run.save(tmp_path / "model"))
    with pytest.raises(UserError, match=r"history: .* has no history.jsonl"):
        saved.plot_curves()


def test_numbers_pairs_and_images(tiny_bert_folder, tiny_vit_folder, place):
    pairs = ([("a", f"b {i}") for i in range(12)], [i / 3 for i in range(12)])
    run = fine_tune(tiny_bert_folder, pairs, output_dir=str(place / "r"), **QUICK)
    wrong = run.errors()
    assert list(wrong.columns) == ["input", "input_pair", "row", "true", "predicted", "loss"] and len(wrong) == 3
    assert pairs[0][wrong["row"][0]] == (wrong["input"][0], wrong["input_pair"][0])
    assert pd.read_csv(run.output_dir / "errors.csv")["row"].tolist() == wrong["row"].tolist()
    with pytest.raises(UserError, match="confusion_matrix: it is for one class per example"):
        run.confusion_matrix()
    with pytest.raises(UserError, match="predict_proba: the model predicts a number"):
        run.predict_proba([("a", "b")])
    for i in range(12):
        (place / "i" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Pixels.new("RGB", (8, 8), (20 * i, 0, 0)).save(place / "i" / "ab"[i % 2] / f"{i}.png")
    run = fine_tune(tiny_vit_folder, str(place / "i"), output_dir=str(place / "v"), **QUICK)
    wrong = run.errors(split="train")
    places = wrong[["input", "true"]].to_numpy()
    assert len(wrong) and all(path.startswith(str(place / "i" / true)) for path, true in places)
