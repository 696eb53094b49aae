"""Several looks at an example: the right ones, and their logits pooled."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image as Pixels
from transformers import AutoTokenizer

from hf_transfer import Predictor, UserError, fine_tune
from hf_transfer.cli.program import main
from hf_transfer.config.arguments.views import Views
from hf_transfer.tasks.text_classification import windows
from hf_transfer.tasks.views import looks, most_looks, pooled

KEYS = dict(num_train_epochs=1, save_strategy="no", strategy="full", log_level="error", learning_rate=1e-2)


def picture(seed=0, size=(48, 40)):
    return Pixels.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def image_run(tiny_vit_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(24):
        place = folder / "d" / ("cat", "dog")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        picture(i).save(place / f"{i}.png")
    keys = {**KEYS, "augmentation": "basic", "output_dir": str(folder / "o"), "train_val_split": 0.25}
    return fine_tune(tiny_vit_folder, str(folder / "d"), **keys)


@pytest.fixture(scope="module")
def text_run(tiny_bert_folder, tmp_path_factory):
    """A model that reads 16 tokens, and texts of 3 to 42 words."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    words = ["good", "bad", "film", "plot", "actor", "music", "long", "short"]
    rows = [(" ".join(rng.choice(words, 3 + i)), "ab"[i % 2]) for i in range(40)]
    (folder / "t.csv").write_text("text,label\n" + "\n".join(f"{t},{c}" for t, c in rows))
    keys = {**KEYS, "output_dir": str(folder / "o"), "train_val_split": 0.25}
    return fine_tune(tiny_bert_folder, str(folder / "t.csv"), **keys)


def logits_of(predictor, *examples):
    return predictor.logits([(e,) for e in examples])[0]


# ---- looks ---------------------------------------------------------------------------------------------------------


def test_looks_at_a_picture():
    image = picture()
    plain, mirrored = list(looks(image, 6, False)), list(looks(image, 12, True))
    assert len(plain) == most_looks(False) == 6 and len(mirrored) == most_looks(True) == 12
    whole, middle, corner = (np.asarray(look) for look in plain[:3])
    pixels = np.asarray(image)
    assert (whole == pixels).all() and middle.shape == corner.shape == (35, 42, 3)
    assert (corner == pixels[:35, :42]).all() and (middle == pixels[2:37, 3:45]).all()
    assert (np.asarray(mirrored[1]) == pixels[:, ::-1]).all() and (np.asarray(mirrored[5]) == corner[:, ::-1]).all()
    assert len({look.tobytes() for look in mirrored}) == 12
    assert next(iter(looks(Pixels.new("RGB", (1, 1)), 1, False))).size == (1, 1)
    assert len(list(looks(Pixels.new("RGB", (1, 1)), 12, True))) == 12


def test_rows_of_an_example_are_pooled():
    rows = np.array([[1.0, 5.0], [3.0, 1.0], [7.0, 7.0]], dtype=np.float32)
    assert pooled(rows, [0, 0, 1], "mean").tolist() == [[2, 3], [7, 7]]
    assert pooled(rows, [0, 0, 1], "max").tolist() == [[3, 5], [7, 7]]
    assert pooled(rows, [0, 1, 2], "max") is rows and pooled(rows, [0, 0, 1], "mean").dtype == np.float32


def test_windows_cover_a_text_and_share_what_was_asked(tiny_bert_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert_folder)
    letters = "a b c d e f g h i j k l m n o p q r s t u v w x y z"
    found, owners = windows([[letters, "short", letters]], tokenizer, 4)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in found["input_ids"]]
    assert owners == [0, 0, 0, 1, 2, 2, 2] and texts[3] == "short"
    assert texts[:3] == ["a b c d e f g h i j k l m n", "k l m n o p q r s t u v w x", "u v w x y z"] == texts[4:]
    assert set(found) == {"input_ids", "token_type_ids", "attention_mask"}
    pairs = [["x y", letters, letters, "x"], [letters, "x y", letters, "y"]]
    found, owners = windows(pairs, tokenizer, 2)
    texts = [tokenizer.decode(ids) for ids in found["input_ids"]]
    assert owners == [0, 0, 0, 1, 1, 1, 2, 3], "where neither leaves room, both are cut"
    assert texts[0] == "[CLS] x y [SEP] a b c d e f g h i j k [SEP]" and texts[2].endswith("s t u v w x y z [SEP]")
    assert all(t.endswith("[SEP] x y [SEP]") for t in texts[3:6])
    with pytest.raises(UserError, match="windows of 14 tokens cannot overlap by 14"):
        windows([["a"]], tokenizer, 14)
    with pytest.raises(UserError, match="windows of 7 tokens cannot overlap by 7"):
        windows([["a"], ["b"]], tokenizer, 7)


# ---- predictions and metrics ---------------------------------------------------------------------------------------


def test_an_images_logits_are_the_mean_over_its_looks(image_run):
    image = picture(99)
    alone = image_run.predictor
    several = alone.looking(tta=12)
    each = np.concatenate([logits_of(alone, look) for look in looks(image, 12, True)])
    assert logits_of(several, image)[0] == pytest.approx(each.mean(0), abs=1e-5)
    assert logits_of(alone.looking(tta=12, pool="max"), image)[0] == pytest.approx(each.max(0), abs=1e-5)
    assert logits_of(several, image).tolist() == logits_of(several, image).tolist()
    assert np.ptp(each[:, 0]) > 1e-4, "the looks differ, or nothing is tested"
    vector = several.predict([image], features=True)[0]["features"]
    vectors = [alone.predict([look], features=True)[0]["features"] for look in looks(image, 12, True)]
    assert vector == pytest.approx(np.mean(vectors, 0), abs=1e-5)
    with pytest.raises(UserError, match="tta: 13 exceeds the maximum of 12 views"):
        logits_of(alone.looking(tta=13), image)


def test_a_run_without_mirroring_is_not_looked_at_in_a_mirror(image_run):
    from dataclasses import replace

    for keys in ({"augmentation": "none"}, {"horizontal_flip": 0.0}):
        plain = replace(image_run.predictor, data=replace(image_run.predictor.data, **keys))
        with pytest.raises(UserError, match=r"tta: 7 exceeds the maximum of 6 views per image \(none mirrored"):
            logits_of(plain.looking(tta=7), picture())


def test_a_long_texts_logits_are_pooled_over_its_windows(text_run):
    predictor = text_run.predictor
    parts = ["a b c d e f g h i j k l m n", "k l m n o p q r s t u v w x", "u v w x y z"]
    each = np.concatenate([logits_of(predictor, part) for part in parts])
    letters = "a b c d e f g h i j k l m n o p q r s t u v w x y z"
    found = logits_of(predictor.looking(stride=4), letters, "short")
    assert found[0] == pytest.approx(each.mean(0), abs=1e-5)
    assert found[1] == pytest.approx(logits_of(predictor, "short")[0], abs=1e-5)
    assert logits_of(predictor.looking(stride=4, pool="max"), letters)[0] == pytest.approx(each.max(0), abs=1e-5)
    assert text_run.predict(["short", letters], stride=4)[1]["scores"] != text_run.predict([letters])[0]["scores"]


@pytest.mark.parametrize(("kind", "views"), [("image", {"tta": 4}), ("text", {"stride": 3})])
def test_metrics_are_of_the_pooled_logits(kind, views, request):
    run = request.getfixturevalue(f"{kind}_run")
    found = run.evaluate(**views)
    predictor = run.predictor.looking(**views)
    _, examples, (column,), *_ = predictor._held_out()
    rows = [predictor.task.read(value) for value in examples[column]]
    logits = torch.tensor(np.concatenate([logits_of(predictor, row) for row in rows]))
    labels = torch.tensor(examples["labels"][:])
    assert found["metrics"]["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), abs=1e-5)
    assert found["metrics"]["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))
    assert set(found["metrics"]) == set(run.metrics) and found["num_examples"] == len(labels)
    assert found["metrics"]["loss"] != pytest.approx(run.metrics["loss"], abs=1e-7)


def test_one_look_is_what_there_was_before(image_run, text_run):
    for run in (image_run, text_run):
        assert run.evaluate(tta=1)["metrics"] == pytest.approx(run.metrics)


def test_on_the_command_line(image_run, text_run, capsys, tmp_path):
    assert main(["evaluate", str(image_run.output_dir), "--tta", "2", "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"] == pytest.approx(image_run.evaluate(tta=2)["metrics"], abs=1e-5)
    long = "good film " * 30
    assert main(["predict", str(text_run.output_dir), long, "--stride", "5", "--pool", "max", "--quiet"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["scores"] == pytest.approx(text_run.predict([long], stride=5, pool="max")[0]["scores"], abs=1e-5)
    for run, words, said in (
        (text_run, ["--tta", "2"], "tta: only applies to images"),
        (text_run, ["--stride", "-1"], "stride: expected a number at least 0, got -1"),
        (text_run, ["--stride", "3", "--pool", "middle"], "is not one of mean, max"),
        (image_run, ["--stride", "3"], "stride: only applies to text"),
        (image_run, ["--tta", "0"], "tta: expected a positive number, got 0"),
    ):
        assert main(["evaluate", str(run.output_dir), *words, "--quiet"]) == 2
        assert said in capsys.readouterr().err


def test_what_is_no_key_of_looking():
    predictor = Predictor(None, None, None, None)
    with pytest.raises(UserError, match=r"tto is no key of how a model looks\. Did you mean 'tta'"):
        predictor.looking(tto=2)
    with pytest.raises(UserError, match="pool: 'sum' is not one of mean, max"):
        Views.of({"pool": "sum"})
