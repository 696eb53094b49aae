"""`predict` and `evaluate` on what people have: files, frames, arrays, images, and lists of these."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image as Pixels

from hf_transfer import UserError, fine_tune
from hf_transfer.cli.program import main
from hf_transfer.inference.answer_files import write_table

TEXTS = ["good film", "and/or", "reviews.csv", "bad film"]
ROWS = {"text": [f"words {i}" for i in range(24)], "label": ["no", "yes"] * 12}
QUICK = dict(num_train_epochs=1, save_strategy="no", log_level="error", strategy="full", preflight=False)


@pytest.fixture(scope="module")
def texts(tiny_bert_folder, tmp_path_factory):
    return fine_tune(tiny_bert_folder, ROWS, output_dir=str(tmp_path_factory.mktemp("t") / "o"), **QUICK)


@pytest.fixture(scope="module")
def images(tiny_vit_folder, tmp_path_factory):
    pixels = np.random.default_rng(0).integers(0, 255, (24, 8, 8, 3), dtype=np.uint8)
    out = str(tmp_path_factory.mktemp("i") / "o")
    return fine_tune(tiny_vit_folder, (pixels, ["no", "yes"] * 12), output_dir=out, **QUICK)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with files of every kind."""
    monkeypatch.chdir(tmp_path)
    pd.DataFrame({"text": TEXTS}).to_csv("data.csv", index=False)
    Path("data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    Path("lines.txt").write_text("\n".join(TEXTS))
    Path("docs").mkdir()
    Path("docs/a.txt").write_text("\n".join(TEXTS))
    Path("README").write_text("not to be read")
    for i in range(3):
        Pixels.fromarray(np.full((8, 8, 3), 60 * i, np.uint8)).save(f"{i}.png")
    return tmp_path


def shown(answers):
    return [a["input"] for a in answers]


def test_texts_in_every_form(texts, here):
    """Files are read wherever their name stands; a text that only looks like a path stays one."""
    expected = texts.predict(TEXTS)
    assert shown(expected) == TEXTS
    frame, table = pd.DataFrame({"text": TEXTS, "n": range(4)}), Dataset.from_dict({"text": TEXTS})
    forms = ["data.csv", Path("data.jsonl"), "lines.txt", "docs", Path("docs"), [here / "data.csv"], frame, table]
    forms += [{"text": TEXTS}, {"text": pd.Series(TEXTS)}, [frame], [table], (text for text in TEXTS)]
    forms += [[pd.Series(TEXTS[:2]), np.array(TEXTS[2:])], [TEXTS[0], frame["text"][1:3], {"text": TEXTS[3]}]]
    for form in forms:
        assert texts.predict(form) == expected
    mixed = texts.predict(["first", "lines.txt", Path("data.csv"), "last"])
    assert shown(mixed) == ["first", *TEXTS, *TEXTS, "last"]
    assert main(["predict", str(texts.output_dir), "data.csv", "--quiet"]) == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("0.png", r"inputs\[0\]: '0.png' is an image, and the model reads text"),
        (["a", "README"], r"inputs\[1\]: 'README' has an unsupported file type"),
        (["a", "docs"], r"inputs\[1\]: 'docs' could be a text, and there is a folder .*Path\('docs'\)"),
        (
            pd.DataFrame({"text": ["a", "lines.txt"]}),
            r"inputs\[1\]: 'lines.txt' is the name of a file, and stands in a",
        ),
        (Path("none.csv"), r"inputs\[0\]: there is no file or folder 'none.csv'"),
        ([Pixels.new("RGB", (4, 4))], r"inputs\[0\]: .* is not a string"),
        (DatasetDict({"test": Dataset.from_dict(ROWS)}), r"the splits test of a dataset were given.*data\['test'\]"),
        ({"text": ["a", "b"], "n": [1]}, "the columns differ in length: text 2, n 1"),
        (["a", "empty.jsonl"], r"inputs\[1\]: 'empty.jsonl' holds no examples"),
        (["a", "torn.jsonl"], r"inputs\[1\]: 'torn.jsonl:2'"),
    ],
)
def test_what_is_no_text(texts, here, given, said):
    Path("empty.jsonl").write_text("")
    Path("torn.jsonl").write_text('{"text": "a"}\n{"other": 3}\n')
    with pytest.raises(UserError, match=said):
        texts.predict(given)


def test_a_word_that_names_a_folder_can_be_a_text(texts, here):
    one = pd.DataFrame({"text": ["docs"]})
    assert shown(texts.predict(["a", "/", ".", ".."])) == ["a", "/", ".", ".."]
    assert shown(texts.predict([{"text": "docs"}])) == shown(texts.predict(one)) == ["docs"]


def test_images_in_every_form(images, here):
    files = [f"{i}.png" for i in range(3)]
    expected = [a["scores"] for a in images.predict(files)]
    pictures = [Pixels.open(f) for f in files]
    arrays = np.stack([np.asarray(p) for p in pictures])
    Path("list.csv").write_text("image\n" + "\n".join(files) + "\n")
    Path("album").mkdir()
    for f in files:
        Path("album", f).write_bytes(Path(f).read_bytes())
    forms = [map(Path, files), pictures, arrays, [*arrays], "list.csv", "album", Path("album"), pd.Series(files)]
    forms += [pd.DataFrame({"image": pictures}), {"image": pictures}, {"image": arrays}, [arrays[:2], "2.png"]]
    for form in forms:
        assert [a["scores"] for a in images.predict(form)] == expected
    with pytest.raises(UserError, match=r"inputs\[0\]: 'lines.txt' holds text, and the model reads images"):
        images.predict("lines.txt")


def test_probabilities_as_scikit_learn_has_them(texts):
    found, answers = texts.predictor.predict_proba(TEXTS), texts.predict(TEXTS)
    assert found.dtype == np.float64 and found.shape == (4, 2)
    assert found.tolist() == [list(a["scores"].values()) for a in answers]
    assert [texts.predictor.labels[i] for i in found.argmax(1)] == [a["label"] for a in answers]
    assert list(texts.predictor.labels) == ["no", "yes"] and texts.predictor.predict_proba([]).shape == (0, 2)


def test_evaluation_in_every_form(texts, images, here, capsys):
    """Of the labels that the model gives, half are right."""
    right = [a["label"] for a in texts.predict(TEXTS)]
    labels = [*right[:2], *({"no": "yes", "yes": "no"}[label] for label in right[2:])]
    frame = pd.DataFrame({"text": TEXTS, "label": labels})
    frame.to_csv("labeled.csv", index=False)
    forms = [frame, Dataset.from_pandas(frame), frame.to_dict("list"), frame.to_dict("records"), (TEXTS, labels)]
    for form in [*forms, "labeled.csv", Path("labeled.csv"), {"test": frame}]:
        for model in (texts, texts.predictor):
            found = model.evaluate(form)
            assert found["metrics"]["accuracy"] == 0.5 and found["num_examples"] == 4
    assert texts.evaluate(frame)["metrics_split"] == "test" and texts.evaluate(frame)["dataset"] == "in memory"
    assert texts.evaluate(frame.rename(columns={"label": "y"}), label_column_name="y")["metrics"]["accuracy"] == 0.5
    assert main(["evaluate", str(texts.output_dir), "labeled.csv", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]["accuracy"] == 0.5
    pictures = [Pixels.open(f"{i}.png") for i in range(3)]
    right = [a["label"] for a in images.predict(pictures)]
    for given in (pictures, [f"{i}.png" for i in range(3)], np.stack([np.asarray(p) for p in pictures])):
        assert images.evaluate((given, right))["metrics"]["accuracy"] == 1.0
    with pytest.raises(UserError, match="is unlabeled"):
        texts.evaluate(pd.DataFrame({"text": TEXTS}))


# ---- `predict --output` ----


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "CSV"])
def test_answers_as_a_table(texts, here, form, capsys):
    """The same numbers in every form; a text that cannot be read has its row."""
    argv = ["predict", str(texts.output_dir), *TEXTS[:2], 'a\nb, "c"', "", "--output", f"answers.{form}", "--quiet"]
    assert main(argv) == 1 and capsys.readouterr().out == ""
    expected = texts.predict([*TEXTS[:2], 'a\nb, "c"'])
    if form == "jsonl":
        lines = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
        assert lines == [*expected, {"input": "", "error": "empty text"}]
        return
    table = pd.read_parquet("answers.parquet") if form == "parquet" else pd.read_csv(f"answers.{form}", na_filter=False)
    assert list(table.columns) == ["input", "label", "score", "score_no", "score_yes", "error"] and len(table) == 4
    assert table["input"].tolist() == [*shown(expected), ""]
    assert table["label"].tolist()[:3] == [a["label"] for a in expected]
    for name in ("no", "yes"):
        scores = pd.to_numeric(table[f"score_{name}"]).tolist()
        assert scores[:3] == pytest.approx([a["scores"][name] for a in expected]) and scores[3] != scores[3]
    assert table["error"].tolist()[3] == "empty text" and {p.name for p in here.glob("answers*")} == {f"answers.{form}"}


def test_an_output_of_another_kind(texts, here, capsys):
    assert main(["predict", str(texts.output_dir), "a", "--output", "answers.xlsx"]) == 2
    assert "output: 'answers.xlsx' does not end in .csv, .jsonl or .parquet." in capsys.readouterr().err


def test_lists_in_a_table(tmp_path):
    """Answers of several labels, of sets, of pairs and of features; scores in the order of the model's labels."""
    answers = [
        {"input": ["a", "b"], "labels": ["x", "y"], "scores": {"y": 0.5, "x": 0.75}, "features": [1.0, 2.0]},
        {"input": ["c", "d"], "labels": [], "scores": {"x": 0.25}, "abstains": True, "set": ["x"]},
    ]
    (tmp_path / "lines").write_text("".join(json.dumps(a) + "\n" for a in answers))
    for form in (".csv", ".parquet"):
        write_table(tmp_path / "lines", tmp_path / f"t{form}", ["x", "y"], form)
    columns = ["input", "input_pair", "labels", "set", "abstains", "score_x", "score_y", "features"]
    first, second = (tmp_path / "t.csv").read_text().splitlines()[1:]
    assert (tmp_path / "t.csv").read_text().splitlines()[0].split(",") == columns
    assert first == 'a,b,"[""x"", ""y""]",,,0.75,0.5,"[1.0, 2.0]"' and second == 'c,d,[],"[""x""]",true,0.25,,'
    table = pd.read_parquet(tmp_path / "t.parquet")
    assert list(table.columns) == columns and table["labels"][0].tolist() == ["x", "y"] and table["abstains"][1]
