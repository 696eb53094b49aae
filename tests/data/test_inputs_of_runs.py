"""Runs on data as people have it: each form through `fine_tune`, `evaluate` and back."""

from __future__ import annotations

import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as Pixels

from hf_transfer import Predictor, UserError, fine_tune
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.load import load_splits

KEYS = dict(num_train_epochs=1, save_strategy="no", strategy="full", log_level="error")


def pictures(folder, names):
    """A small picture per name, all different."""
    rng = np.random.default_rng(0)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Pixels.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)).save(path)


def test_a_pattern_of_files(tmp_path):
    for i in range(3):
        (tmp_path / f"part-{i}.csv").write_text(f"text,label\na{i},x\nb{i},y\n")
    (tmp_path / "other.csv").write_text("text,label\nno,x\n")
    for keys in ({"dataset_name": f"{tmp_path}/part-*.csv"}, {"train_file": f"{tmp_path}/part-?.csv"}):
        assert load_splits(DataArguments(**keys))["train"]["text"][:] == ["a0", "b0", "a1", "b1", "a2", "b2"]
    (tmp_path / "part-3.jsonl").write_text("{}")
    for name, said in (("none-*.csv", "no file matches"), ("part-*", "of different formats")):
        with pytest.raises(UserError, match=said):
            load_splits(DataArguments(dataset_name=f"{tmp_path}/{name}"))


def test_words_that_pandas_takes_for_nothing(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nNA,None\nnull,b\nN/A,None\nplain,\n")
    train = load_splits(DataArguments(dataset_name=f"{tmp_path}/a.csv"))["train"]
    assert train["text"][:] == ["NA", "null", "N/A", "plain"] and train["label"][:] == ["None", "b", "None", None]


def test_a_class_folder_that_is_called_like_a_split(tmp_path):
    pictures(tmp_path, [f"{c}/{i}.png" for c in ("cat", "test_tube") for i in range(2)])
    splits = load_splits(DataArguments(dataset_name=str(tmp_path)))
    assert list(splits) == ["train"] and splits["train"]["label"][:] == [0, 0, 1, 1]


def test_an_image_folder_with_splits(tmp_path):
    pictures(tmp_path, [f"{s}/{c}/{i}.png" for s in ("train", "val", "Test") for c in ("cat", "dog") for i in range(2)])
    splits = load_splits(DataArguments(dataset_name=str(tmp_path)))
    assert {k: len(v) for k, v in splits.items()} == {"train": 4, "validation": 4, "test": 4}


def test_paths_of_images_are_relative_to_their_table(tmp_path, monkeypatch):
    """Each table's own folder, whatever the working directory, also where it holds a file of that name."""
    for place, level in (("a", 10), ("b", 200), ("here", 90)):
        (tmp_path / place).mkdir()
        Pixels.new("L", (4, 4), level).save(tmp_path / place / "1.png")
        (tmp_path / place / "t.csv").write_text("image,label\n1.png,x\n1.png,y\n")
    monkeypatch.chdir(tmp_path / "here")
    train = load_splits(DataArguments(dataset_name=f"{tmp_path}/[ab]/t.csv"))["train"]
    assert [cell["path"] for cell in train["image"]] == [str(tmp_path / p / "1.png") for p in "aabb"]
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "t.csv").write_text("picture,label\n1.png,x\n")
    args = DataArguments(dataset_name=f"{tmp_path}/far/t.csv", image_column_name="picture")
    assert load_splits(args)["train"]["picture"][0]["path"] == str(tmp_path / "here" / "1.png")


def test_paths_of_other_systems_and_addresses_in_a_table(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("1.png", "b\\2.png"):
        Pixels.new("L", (4, 4)).save(tmp_path / "a" / name)
    (tmp_path / "t.csv").write_text("image,label\na\\1.png,x\na/b\\2.png,y\n")
    train = load_splits(DataArguments(train_file=f"{tmp_path}/t.csv"))["train"]
    assert [cell["path"] for cell in train["image"]] == [f"{tmp_path}/a/1.png", f"{tmp_path}/a/b\\2.png"]
    for address in ("https://host/1.png", "file:///a/1.png", "s3://bucket/1.png"):
        (tmp_path / "t.csv").write_text(f"image,label\n{address},x\n")
        with pytest.raises(
            UserError, match=rf"image_column_name: column 'image' of .* holds addresses \('{address}'\)"
        ):
            load_splits(DataArguments(train_file=f"{tmp_path}/t.csv"))


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_images_in_a_table_with_numbers_or_several_labels(problem, tiny_vit_folder, tmp_path, monkeypatch):
    """Trained from a relative path, evaluated from another folder."""
    pictures(tmp_path / "d", [f"p/{i}.png" for i in range(20)])
    label = {"regression": lambda i: i / 7, "multi_label_classification": lambda i: ["a", "b"][: i % 3]}[problem]
    rows = [json.dumps({"file_name": f"p/{i}.png", "label": label(i)}) for i in range(20)]
    (tmp_path / "d" / "train.jsonl").write_text("\n".join(rows))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    run = fine_tune(tiny_vit_folder, "d/train.jsonl", output_dir="o", train_val_split=0.3, **KEYS)
    assert run.results["problem_type"] == problem and run.results["task"] == "image-classification"
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = Predictor.load(tmp_path / "o").evaluate()
    assert again["metrics"] == pytest.approx(run.metrics) and again["num_examples"] == 6


def test_one_column_per_label_through_a_run(tiny_bert_folder, tmp_path):
    rows = "\n".join(f"words {i},{i % 2},{int(i % 3 == 0)}" for i in range(20))
    (tmp_path / "t.csv").write_text(f"text,spam,rude\n{rows}\n")
    keys = dict(label_column_name=["spam", "rude"], output_dir=str(tmp_path / "o"), train_val_split=0.3, **KEYS)
    run = fine_tune(tiny_bert_folder, str(tmp_path / "t.csv"), **keys)
    assert run.results["labels"] == ["spam", "rude"]
    assert Predictor.load(run.output_dir).evaluate()["metrics"] == pytest.approx(run.metrics)
    assert set(run.predict(["a text"])[0]) == {"input", "labels", "scores"}


def test_a_model_that_reads_grey_pictures(gray_vit_folder, tmp_path):
    """Colours become grey with PIL's weights, and the one mean is the checkpoint's."""
    pictures(tmp_path / "d", [f"{c}/{i}.png" for c in "ab" for i in range(6)])
    run = fine_tune(gray_vit_folder, str(tmp_path / "d"), output_dir=str(tmp_path / "o"), train_val_split=0.3, **KEYS)
    batch = run.predictor.task.encode([[Pixels.new("RGB", (4, 4), (255, 0, 0))]], run.predictor.processor)
    assert batch["pixel_values"].shape == (1, 1, 32, 32)
    assert batch["pixel_values"].unique().tolist() == pytest.approx([(76 / 255 - 0.5) / 0.5])
    saved = json.loads((tmp_path / "o" / "preprocessor_config.json").read_text())
    assert saved["image_mean"] == [0.5] == saved["image_std"]


@pytest.mark.parametrize("form", ["save_to_disk", "parquet pattern"])
def test_images_inside_a_data_set(form, tiny_vit_folder, tmp_path):
    """As the hub's image data sets are: the bytes in a column, classes with names, splits beside each other."""
    rng = np.random.default_rng(0)
    features = Features({"img": Image(), "fine": ClassLabel(names=["owl", "elk", "yak"])})

    def part(size):
        cells = [Pixels.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)) for _ in range(size)]
        return Dataset.from_dict({"img": cells, "fine": [i % 3 for i in range(size)]}, features=features)

    if form == "save_to_disk":
        DatasetDict({"train": part(18), "test": part(6)}).save_to_disk(str(tmp_path / "d"))
        keys = {"dataset_name": str(tmp_path / "d")}
    else:
        for i, size in enumerate((9, 9, 6)):
            part(size).to_parquet(tmp_path / (f"train-{i}.parquet" if i < 2 else "held.parquet"))
        keys = {"train_file": f"{tmp_path}/train-*.parquet", "test_file": f"{tmp_path}/held.parquet"}
    run = fine_tune(tiny_vit_folder, **keys, output_dir=str(tmp_path / "o"), train_val_split=0.35, **KEYS)
    assert run.results["labels"] == ["owl", "elk", "yak"] and run.results["metrics_split"] == "test"
    assert {n: s["examples"] for n, s in run.results["data_facts"]["splits"].items()} == {
        "train": 11, "validation": 7, "test": 6,
    }  # fmt: skip
    assert run.results["data_facts"]["splits"]["train"]["sizes"]["width"][0] == 12
    assert Predictor.load(run.output_dir).evaluate()["metrics"] == pytest.approx(run.metrics)


def test_whole_numbers_as_a_regression_of_pairs(tiny_bert_folder, tmp_path):
    rows = [{"sentence1": f"one {i}", "sentence2": f"two {i}", "label": i % 6} for i in range(20)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    keys = dict(output_dir=str(tmp_path / "o"), train_val_split=0.3, problem_type="regression", **KEYS)
    run = fine_tune(tiny_bert_folder, str(tmp_path / "t.jsonl"), **keys)
    assert run.results["problem_type"] == "regression" and {"mae", "rmse"} <= set(run.metrics)
    assert set(run.predict([("one", "two")])[0]) == {"input", "value"}
    assert Predictor.load(run.output_dir).columns == ("sentence1", "sentence2")
    (tmp_path / "s.jsonl").write_text("\n".join(json.dumps({**r, "label": f"n{r['label']}"}) for r in rows))
    with pytest.raises(UserError, match="regression expects numbers, but column 'label' contains 'n0'"):
        fine_tune(tiny_bert_folder, str(tmp_path / "s.jsonl"), **keys | {"output_dir": str(tmp_path / "p")})


def test_codes_are_read_alike_by_train_evaluate_and_predict(tiny_bert_folder, tmp_path):
    """Texts and labels that look like numbers, in files that look different on their own."""
    codes = ["01", "1", "1E2"]
    rows = [(f"{1000 + i}", codes[i % 3]) for i in range(30)]
    body = "text;label\n" + "".join(f"{text};{label}\n" for text, label in rows)
    (tmp_path / "train.csv").write_text(body, encoding="utf-16")
    (tmp_path / "test.csv").write_text("label,text\n" + "".join(f"1,{text}\n" for text, _ in rows[1:30:3]))
    run = fine_tune(tiny_bert_folder, str(tmp_path), output_dir=str(tmp_path / "o"), train_val_split=0.3, **KEYS)
    assert run.results["labels"] == ["01", "1", "1E2"] and run.results["metrics_split"] == "test"
    decided = run.results["data_facts"]["decided"]
    assert "train.csv: the cells are separated by semicolons." in decided and "train.csv: read as UTF-16." in decided
    assert "Columns: input 'text'; label 'label': 3 classes." in decided
    predictor = Predictor.load(run.output_dir)
    other = predictor.evaluate(predictor.other_data(test_file=f"{tmp_path}/test.csv"))
    assert other["metrics"] == pytest.approx(run.metrics)
    answers = list(predictor.stream(predictor.read([f"{tmp_path}/test.csv"])))
    assert [a["input"] for a in answers] == [text for text, _ in rows[1:30:3]]
    right = sum(a["label"] == "1" for a in answers)
    assert right / len(answers) == pytest.approx(run.metrics["accuracy"])
