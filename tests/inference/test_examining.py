"""`evaluate` beyond the metrics: subgroups, corrupted inputs and data from elsewhere."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image as Pixels

import hf_transfer
from hf_transfer import UserError, fine_tune
from hf_transfer.cli.program import main

QUICK = dict(num_train_epochs=1, save_strategy="no", log_level="error", strategy="full", preflight=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("examining")


@pytest.fixture(scope="module")
def texts(tiny_bert_folder, place):
    rows = {
        "text": [f"some words about film {i}" for i in range(40)],
        "label": ["no", "yes", "no", "yes"] * 10,
        "source": ["web", "mail", "web", "", "web"] * 8,
        "id": range(40),
    }
    pd.DataFrame(rows).to_csv(place / "d.csv", index=False)
    return fine_tune(tiny_bert_folder, str(place / "d.csv"), output_dir=str(place / "o"), train_val_split=0.4, **QUICK)


@pytest.fixture(scope="module")
def pictures(tiny_vit_folder, place):
    """Classes as folders, and a table about the pictures in each."""
    draw = np.random.default_rng(0)
    for name in ("cat", "dog"):
        folder = place / "p" / name
        folder.mkdir(parents=True)
        for i in range(12):
            Pixels.fromarray(draw.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        table = "file_name,camera\n" + "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(12))
        (folder / "metadata.csv").write_text(table)
    keys = dict(output_dir=str(place / "v"), train_val_split=0.25, **QUICK)
    return fine_tune(tiny_vit_folder, str(place / "p"), **keys)


def refused(model, **keys):
    with pytest.raises(UserError) as caught:
        model.evaluate(**keys)
    return str(caught.value)


def test_subgroups_of_a_table(texts, place, capsys):
    found = texts.evaluate(by="source")
    groups = {one["value"]: one for one in found["subgroups"]["source"]}
    assert found["metrics"] == texts.metrics and None in groups
    assert sum(one["num_examples"] for one in groups.values()) == found["num_examples"] == 16
    right = sum(one["metrics"]["accuracy"] * one["num_examples"] for one in groups.values())
    assert right / 16 == pytest.approx(found["metrics"]["accuracy"])
    assert [one["label"] for one in found["per_class"]] == ["no", "yes"]
    assert found["calibration"]["ece"] == found["metrics"]["ece"]
    assert main(["evaluate", str(place / "o"), "--by", "source,label", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["subgroups"]
    assert again["source"] == json.loads(json.dumps(found["subgroups"]["source"])) and len(again["label"]) == 2
    assert main(["evaluate", str(place / "o"), "--by", "source"]) == 0
    shown = capsys.readouterr().out
    assert "By source:" in shown and "(missing)" in shown and "Calibration: ECE" in shown and "Classes (95%" in shown
    assert "no column 'sorce'" in refused(texts, by="sorce") and "Did you mean 'source'" in refused(texts, by="sorce")
    assert main(["evaluate", str(place / "o"), "--by", "sorce"]) == 2
    assert "by: the data has no column 'sorce'" in capsys.readouterr().err


def test_subgroups_of_a_folder_and_of_data_in_memory(pictures):
    found = pictures.evaluate(by="camera")
    assert [one["value"] for one in found["subgroups"]["camera"]] == ["a", "b"]
    model = hf_transfer.load(pictures.output_dir)
    images = [Pixels.new("RGB", (20, 20), (i * 9, 0, 0)) for i in range(6)]
    frame = {"image": images, "label": ["cat", "dog"] * 3, "site": [1, 1, 2, 2, 2, 3]}
    sizes = [one["num_examples"] for one in model.evaluate(frame, by="site")["subgroups"]["site"]]
    assert sizes == [2, 3, 1]


def test_robustness_of_texts(texts, place, capsys, monkeypatch):
    found = texts.evaluate(robustness=True, max_examples=12)
    table = found["robustness"]
    assert found["metrics"]["accuracy"] == table["clean"] and table["metric"] == "accuracy"
    names = [(c["name"], c["severity"]) for c in table["corruptions"]]
    assert names == [(n, s) for n in ("swap", "drop", "neighbor") for s in (1, 2, 3)]
    values = [c["metrics"]["accuracy"] for c in table["corruptions"]]
    assert table["mean"] == pytest.approx(np.mean(values)) and all(0 < c["changed"] <= 1 for c in table["corruptions"])
    monkeypatch.setattr(texts.predictor, "batch_size", 3)  # chance is the example's, not the batch's
    again = texts.evaluate(robustness=True, max_examples=12)["robustness"]
    assert [c["changed"] for c in again["corruptions"]] == [c["changed"] for c in table["corruptions"]]
    assert [c["metrics"]["accuracy"] for c in again["corruptions"]] == values
    assert main(["evaluate", str(place / "o"), "--robustness", "--max_predict_samples", "12"]) == 0
    shown = capsys.readouterr().out.splitlines()
    (head,) = [i for i, line in enumerate(shown) if line.startswith("Robustness (accuracy by severity")]
    assert [line.split()[0] for line in shown[head + 2 : head + 5]] == ["swap", "drop", "neighbor"]
    monkeypatch.setattr(type(texts.predictor.task), "corruptions", {})
    assert "robustness: no corruptions are known for the inputs of text-classification" in refused(
        texts, robustness=True
    )


def test_robustness_of_pictures(pictures):
    table = pictures.evaluate(robustness=True)["robustness"]
    assert len(table["corruptions"]) == 18 and {c["changed"] for c in table["corruptions"]} == {1.0}


def test_data_from_elsewhere(texts, place, capsys):
    pd.DataFrame({"sentence": ["x y z", "q", "", "w w"], "other": [1, 2, 3, 4]}).to_csv(place / "far.csv", index=False)
    found = texts.evaluate(ood_data=str(place / "far.csv"))
    ood, trained = found["ood"], texts.results["num_train_examples"]
    counts = ood["num_inside"], ood["num_outside"], ood["num_training"]
    assert counts == (found["num_examples"], 3, trained) and set(ood["scores"]) == {
        "energy",
        "neighbors",
        "mahalanobis",
    }
    assert any("It has no text; sentence was read instead" in note for note in found["notes"])
    assert any("1 unusable" in note for note in found["notes"])
    # The scores of the same inputs, one by one, and what the definition makes of them.
    _, inside = texts.predictor.inputs_of()
    scores = texts.predictor.ood_scores([value for (value,) in inside])
    others = texts.predictor.ood_scores(["x y z", "q", "w w"])
    for name, one in ood["scores"].items():
        pairs = np.sign(others[name].to_numpy()[:, None] - scores[name].to_numpy())
        assert one["auroc"] == pytest.approx(((pairs + 1) / 2).mean(), abs=0.03)
    logits = texts.predictor.logits([("q",)])[0]
    assert others["energy"][1] == pytest.approx(-np.log(np.exp(logits).sum()), rel=1e-4)
    assert texts.predictor.ood_scores([]).empty
    assert main(["evaluate", str(place / "o"), "--ood_data", str(place / "far.csv")]) == 0
    shown = capsys.readouterr().out
    assert "3 examples of " in shown and shown.count("AUROC") == 3
    one = texts.evaluate(ood_data={"text": ["a", "b"]}, max_examples=6)["ood"]
    assert (one["num_inside"], one["num_outside"]) == (6, 2)


def test_without_the_training_examples(texts, place):
    model = hf_transfer.load(texts.save(place / "model"))
    frame = {"text": ["a", "b", "c"], "label": ["no", "yes", "no"]}
    found = model.evaluate(frame, ood_data={"text": ["x", "y"]})
    assert list(found["ood"]["scores"]) == ["energy"] and found["ood"]["num_training"] == 0
    assert any("Distances to the training examples are left out" in note for note in found["notes"])


def test_data_from_elsewhere_of_another_kind(texts, pictures, place, capsys):
    assert "ood_data: " in refused(pictures, ood_data=str(place / "d.csv"))
    assert "ood_data: it holds images (column 'image')" in refused(texts, ood_data=str(place / "p"))
    assert "none of the 1 examples can be read" in refused(texts, ood_data={"text": [""]})
    assert main(["evaluate", str(place / "o"), "--ood_data", str(place / "gone.csv")]) == 2
    assert main(["evaluate", str(place / "o"), str(place / "d.csv"), "--ood_data", str(place / "d.csv")]) == 2
    said = capsys.readouterr().err
    assert "ood_data: file or folder" in said and "is the data to evaluate on" in said
    far = pictures.evaluate(ood_data={"image": [Pixels.new("RGB", (9, 9), (0, 250, 0))] * 3})["ood"]
    assert far["num_outside"] == 3 and far["scores"]["neighbors"]["auroc"] > 0.5


def test_a_folder_without_classes(pictures, place):
    (place / "flat").mkdir()
    for i in range(3):
        Pixels.new("RGB", (9, 9), (0, 80 * i, 0)).save(place / "flat" / f"{i}.png")
    (place / "flat" / "broken.png").write_text("no image")
    found = pictures.evaluate(ood_data=str(place / "flat"))
    assert found["ood"]["num_outside"] == 3 and any("1 unusable" in note for note in found["notes"])
