"""`predict` and `evaluate`: the same numbers as the trainer's own evaluation, from every form of input."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image
from scipy.special import softmax
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_transfer import UserError, fine_tune
from hf_transfer.cli.program import main
from hf_transfer.data import bundled
from hf_transfer.data.labels import LABELS
from hf_transfer.inference.predictor import Predictor
from tests import warm
from tests.helpers import TOKENS, small_tokenizer, tiny_bert

TEXTS = [
    "a film of rare beauty, funny and wise",
    "dull",
    "NA",
    "it is what it is, and there is rather a lot of it; two hours, in fact",
    'he said "no", twice',
    "null",
    "über café",
]
HUSH = dict(save_strategy="no", log_level="error", num_train_epochs=1)


REVIEWS = dict(
    dataset_name="bundled:rotten-tomatoes",
    max_train_samples=64,
    max_eval_samples=16,
    max_predict_samples=45,
    per_device_eval_batch_size=4,
    **HUSH,
)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    keys = REVIEWS | {"strategy": "partial", "learning_rate": 2e-4, "max_train_samples": 32}
    return fine_tune("bundled:minilm-l6", output_dir=str(folder / "out"), **keys)


@pytest.fixture(scope="module")
def light_run(tiny_bert_folder, tmp_path_factory):
    """For what is about inputs and answers, in many commands: a model that is loaded at once, and trained far."""
    folder = tmp_path_factory.mktemp("light")
    return fine_tune(tiny_bert_folder, output_dir=str(folder / "out"), strategy="full", learning_rate=0.02, **REVIEWS)


@pytest.fixture(scope="module")
def image_run(tmp_path_factory):
    return fine_tune(
        "bundled:efficientnet-lite0",
        "bundled:digits",
        output_dir=str(tmp_path_factory.mktemp("image") / "out"),
        strategy="linear-probe",
        image_size=32,
        max_train_samples=60,
        max_eval_samples=20,
        max_predict_samples=30,
        **HUSH,
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Ten digits of the test split as files, in two folders."""
    root = tmp_path_factory.mktemp("pictures")
    for i, row in enumerate(bundled.load_dataset("bundled:digits")["test"].select(range(10))):
        folder = root / ("a" if i < 5 else "b")
        folder.mkdir(exist_ok=True)
        row["image"].save(folder / f"{i}.png")
    (root / "a" / ".hidden.png").write_bytes(b"")
    (root / "a" / "Thumbs.db").write_bytes(b"")
    return root


def answers(capsys, *argv) -> list[dict]:
    """What the command answers in this process; every line of standard output is JSON."""
    assert main([*map(str, argv)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# ---- the same numbers ----------------------------------------------------------------------------------------------


def held_out(predictor):
    """What a run held out, as the model reads it."""
    held_out = predictor._held_out()
    return predictor.task.prepare(held_out.examples, held_out.inputs, predictor.processor, predictor.data)


@pytest.mark.parametrize("which", ["text_run", "image_run"])
def test_predictions_are_the_trainers_own_bit_for_bit(which, request):
    run = request.getfixturevalue(which)
    predictor = run.predictor
    prepared = held_out(predictor)
    theirs = run.trainer.predict(prepared)
    column = "text" if which == "text_run" else "image"
    data = bundled.load_dataset(predictor.data.dataset_name)["test"]
    if which == "text_run":  # the prepared split holds tokens only: find its texts again
        by_ids = {tuple(predictor.processor(t, truncation=True)["input_ids"]): t for t in data["text"]}
        inputs = [by_ids[tuple(ids)] for ids in prepared["input_ids"]]
    else:
        inputs = [row["image"] for row in prepared.with_format(None)]
    assert column in ("text", "image") and len(inputs) == len(prepared)
    ours = run.predict(inputs)
    scores = softmax(theirs.predictions.astype(np.float64), axis=-1)
    names = run.results["labels"]
    assert [a["label"] for a in ours] == [names[i] for i in theirs.predictions.argmax(-1)]
    assert [list(a["scores"].values()) for a in ours] == scores.tolist()
    right = [names[label] == a["label"] for label, a in zip(theirs.label_ids, ours, strict=True)]
    assert np.mean(right) == run.metrics["accuracy"]


@pytest.mark.parametrize("which", ["text_run", "image_run"])
def test_evaluate_repeats_the_results_of_training(which, request, capsys):
    run = request.getfixturevalue(which)
    assert main(["evaluate", str(run.output_dir), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"] == run.metrics and found["intervals"] == run.results["intervals"]
    assert found["metrics_split"] == "test" and found["num_examples"] == len(run.predictor._held_out().examples)
    assert run.evaluate()["metrics"] == run.metrics
    assert run.evaluate(split="validation")["metrics"] == run.results["validation_metrics"]


def test_evaluate_in_words(text_run, capsys):
    assert main(["evaluate", str(text_run.output_dir)]) == 0
    out = capsys.readouterr().out
    assert f"accuracy         {text_run.metrics['accuracy']:.4f}   95% CI" in out and "(45 examples)" in out


def test_evaluate_takes_labels_by_name(light_run, tmp_path, capsys):
    """In another order, in every form of data; metrics against scikit-learn on the predictions."""
    rows = [
        {"text": t, "label": "positive" if i % 3 else "negative"}
        for i, t in enumerate(TEXTS)
        if t not in ("NA", "null")
    ]
    rows.sort(key=lambda r: r["label"], reverse=True)
    data = Dataset.from_list(rows)
    data.to_csv(tmp_path / "x.csv")
    data.to_parquet(tmp_path / "x.parquet")
    data.save_to_disk(str(tmp_path / "disk"))
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    predicted = [a["label"] for a in light_run.predict([r["text"] for r in rows])]
    expected = np.mean([p == r["label"] for p, r in zip(predicted, rows, strict=True)])
    for option, place in (
        ("--test_file", tmp_path / "x.csv"),
        ("--test_file", tmp_path / "x.parquet"),
        ("--test_file", tmp_path / "x.jsonl"),
        ("--dataset_name", tmp_path / "disk"),
    ):
        assert main(["evaluate", str(light_run.output_dir), option, str(place), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["metrics"]["accuracy"] == expected and found["num_examples"] == len(rows)
        assert found["dataset"] == str(place)
    other = light_run.evaluate(test_file=str(tmp_path / "x.csv"))
    assert other["metrics"]["accuracy"] == expected


# ---- forms of input ------------------------------------------------------------------------------------------------


def test_every_form_of_text_gives_the_same_answers(light_run, tmp_path, capsys):
    """`NA`, `null`, quotes and accents are texts; tables are not read through pandas."""
    run = light_run.output_dir
    expected = light_run.predict(TEXTS)
    assert [a["input"] for a in expected] == TEXTS and set(expected[0]) == {"input", "label", "score", "scores"}
    assert len({a["score"] for a in expected}) == len(TEXTS)
    with (tmp_path / "x.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(TEXTS)])
    with (tmp_path / "x.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([["text"], *([t] for t in TEXTS)])
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS) + "\n\n")
    (tmp_path / "x.json").write_text(json.dumps([{"text": t} for t in TEXTS], indent=1))
    Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / "x.parquet")
    (tmp_path / "x.txt").write_text("\r\n".join(TEXTS))
    for name in ("x.csv", "x.tsv", "x.jsonl", "x.json", "x.parquet", "x.txt"):
        assert answers(capsys, "predict", run, tmp_path / name) == expected, name
    assert answers(capsys, "predict", run, *TEXTS) == expected
    assert answers(capsys, "predict", run, "--", *TEXTS) == expected
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "2.txt").write_text("\n".join(TEXTS[4:]))
    (tmp_path / "folder" / "1.csv").write_text("text\n" + "\n".join(f'"{t}"' for t in TEXTS[:4]))
    assert answers(capsys, "predict", run, tmp_path / "folder") == expected
    assert answers(capsys, "predict", run, tmp_path / "x.csv", "--output", tmp_path / "out.jsonl") == []
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == expected


def test_a_fresh_process_gives_them_too_and_says_nothing_else(text_run):
    """The batches of standard input are those of the list where it comes at once."""
    argv = [sys.executable, "-m", "hf_transfer", "predict", str(text_run.output_dir), "-"]
    done = subprocess.run(argv, capture_output=True, input="\n".join(TEXTS).encode(), check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    found = [json.loads(line) for line in done.stdout.decode().splitlines()]
    for answer, ours in zip(found, text_run.predict(TEXTS), strict=True):
        assert answer["scores"] == pytest.approx(ours["scores"], rel=1e-5)
        assert [answer[k] for k in ("input", "label")] == [ours[k] for k in ("input", "label")]


def test_standard_input_is_answered_line_by_line(light_run):
    """A writer that waits for each answer gets it: nothing waits for a full batch."""
    (theirs, ours), (answers, told) = os.pipe(), os.pipe()

    def connect():
        os.dup2(theirs, 0)
        os.dup2(told, 1)
        for end in (ours, told):
            os.close(end)

    process = warm.start("predict", light_run.output_dir, "-", first=connect)
    os.close(theirs)
    os.close(told)
    with os.fdopen(ours, "w") as given, os.fdopen(answers) as answered:
        for text in ("fine", "not fine"):
            given.write(f"{text}\n")
            given.flush()
            line = answered.readline()
            assert line, process.wait()
            assert json.loads(line)["input"] == text
        given.close()
        assert answered.read() == "" and process.wait().returncode == 0


def test_every_form_of_picture_gives_the_same_answers(image_run, pictures, tmp_path, capsys):
    run, files = image_run.output_dir, sorted(pictures.rglob("[0-9].png"))
    expected = image_run.predict([str(f) for f in files])
    assert [a["input"] for a in expected] == [str(f) for f in files]
    assert answers(capsys, "predict", run, pictures) == expected
    assert answers(capsys, "predict", run, *files) == expected
    scores = [a["scores"] for a in expected]
    assert [a["scores"] for a in image_run.predict([Image.open(f) for f in files])] == scores
    assert [a["scores"] for a in image_run.predict([np.asarray(Image.open(f)) for f in files])] == scores
    (pictures / "list.csv").write_text("\n".join(["image", *(str(f.relative_to(pictures)) for f in files)]))
    assert answers(capsys, "predict", run, pictures / "list.csv") == expected
    column = Features({"image": ImageColumn(), "id": Value("int64")})
    rows = {"image": [{"bytes": f.read_bytes(), "path": None} for f in files], "id": list(range(10))}
    Dataset.from_dict(rows, column).to_parquet(tmp_path / "x.parquet")
    inside = answers(capsys, "predict", run, tmp_path / "x.parquet")
    assert [a["scores"] for a in inside] == scores and inside[3]["input"] == f"{tmp_path}/x.parquet:4"


def test_a_broken_picture_is_answered_in_its_place(image_run, pictures, capsys):
    broken = pictures / "a" / "3.jpg"
    broken.write_bytes((pictures / "a" / "3.png").read_bytes()[:60])
    try:
        code = main(["predict", str(image_run.output_dir), str(pictures / "a")])
    finally:
        broken.unlink()
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and "1 of 6 inputs could not be read" in err
    assert [Path(a["input"]).name for a in found] == ["0.png", "1.png", "2.png", "3.jpg", "3.png", "4.png"]
    assert "cannot be read as an image" in found[3]["error"] and all("label" in a for a in found if a is not found[3])


# ---- what is answered ----------------------------------------------------------------------------------------------


def test_top_k(image_run, pictures):
    whole = image_run.predict(str(pictures / "a" / "0.png"))[0]
    best = image_run.predict(str(pictures / "a" / "0.png"), top_k=3)[0]
    order = sorted(whole["scores"], key=whole["scores"].get, reverse=True)
    assert list(best["scores"]) == order[:3] and best["label"] == order[0] == whole["label"]
    assert list(whole["scores"]) == list("0123456789") and sum(whole["scores"].values()) == pytest.approx(1)


@pytest.mark.parametrize("which", ["text_run", "image_run"])
def test_features_are_what_the_head_receives(which, request, pictures):
    """The head applied to them gives the logits."""
    run = request.getfixturevalue(which)
    items = TEXTS if which == "text_run" else sorted(map(str, pictures.rglob("[0-9].png")))
    found = run.predict(items, features=True)
    head = {n.split(".")[-1]: p for n, p in run.model.named_parameters() if "classifier" in n}
    features = torch.tensor([a["features"] for a in found])
    scores = torch.softmax(features @ head["weight"].T + head["bias"], -1)
    assert torch.allclose(scores, torch.tensor([list(a["scores"].values()) for a in found]), atol=1e-5)


def _predictor(folder, model, **config) -> Predictor:
    for name, value in config.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    small_tokenizer(16).save_pretrained(folder)
    return Predictor.load(str(folder))


def test_features_of_a_decoder_are_those_of_the_last_token(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=8, n_layer=2, n_head=2, vocab_size=TOKENS, n_positions=16, num_labels=3, pad_token_id=0
    )
    predictor = _predictor(tmp_path, transformers.GPT2ForSequenceClassification(config))
    found = predictor.predict(["one", "one two three four"], features=True)
    logits = torch.tensor([a["features"] for a in found]) @ predictor.model.score.weight.T
    assert torch.allclose(logits.softmax(-1), torch.tensor([list(a["scores"].values()) for a in found]), atol=1e-5)


def test_a_saved_model_of_nobodys_keeps_its_head(tmp_path):
    """Without label names, and without any file of ours."""
    model = tiny_bert(vocab_size=TOKENS, labels=3)
    head = model.classifier.weight.detach().clone()
    predictor = _predictor(tmp_path, model)
    assert torch.equal(predictor.model.classifier.weight, head)
    assert list(predictor.predict("hello")[0]["scores"]) == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_several_labels_and_values(tmp_path):
    model = tiny_bert(vocab_size=TOKENS, labels=3)
    torch.nn.init.constant_(model.classifier.weight, 0)
    model.classifier.bias.data = torch.tensor([2.0, -1.0, 0.5])
    names = {0: "a", 1: "b", 2: "c"}
    several = _predictor(tmp_path / "m", model, problem_type="multi_label_classification", id2label=names)
    (answer,) = several.predict("x")
    sigmoid = {n: 1 / (1 + np.exp(-z)) for n, z in zip("abc", (2.0, -1.0, 0.5), strict=True)}
    assert answer["labels"] == ["a", "c"] and answer["scores"] == pytest.approx(sigmoid)
    assert set(answer) == {"input", "labels", "scores"}
    one = tiny_bert(vocab_size=TOKENS, labels=1)
    torch.nn.init.constant_(one.classifier.weight, 0)
    one.classifier.bias.data = torch.tensor([2.5])
    assert _predictor(tmp_path / "r", one).predict(["x"]) == [{"input": "x", "value": 2.5}]


def test_pairs(tmp_path, capsys):
    """Columns as in training; a lone text is answered with what is missing."""
    rows = [{"premise": f"p {i}", "hypothesis": f"h {i}", "label": "yn"[i % 2]} for i in range(24)]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    _predictor(tmp_path / "base", tiny_bert(vocab_size=TOKENS))
    run = fine_tune(str(tmp_path / "base"), str(tmp_path / "train.jsonl"), output_dir=str(tmp_path / "o"), **HUSH)
    expected = run.predict([("p 1", "h 1"), {"premise": "p 2", "hypothesis": "h 2", "label": "y"}])
    assert [a["input"] for a in expected] == [["p 1", "h 1"], ["p 2", "h 2"]]
    (tmp_path / "x.csv").write_text("hypothesis,premise\nh 1,p 1\nh 2,p 2\n")
    found = answers(capsys, "predict", tmp_path / "o", tmp_path / "x.csv")
    assert found == expected
    assert main(["predict", str(tmp_path / "o"), "lone"]) == 1
    assert "the model reads premise and hypothesis" in capsys.readouterr().err


def test_python_says_which_input_is_wrong(light_run, image_run):
    with pytest.raises(UserError, match=r"inputs\[1\]: 3 is not a string"):
        light_run.predict(["a", 3])
    with pytest.raises(UserError, match=r"inputs\[0\]: cannot be read as an image"):
        image_run.predict("nowhere.png")
    assert light_run.predict([]) == []


# ---- Result --------------------------------------------------------------------------------------------------------


def test_a_result_reads_well_and_can_be_saved_elsewhere(text_run, tmp_path):
    text = repr(text_run)
    assert "Result of bundled:minilm-l6 on bundled:rotten-tomatoes (partial, 1 stage, " in text
    assert f"accuracy         {text_run.metrics['accuracy']:.4f}" in text and str(text_run.output_dir) in text
    saved = text_run.save(tmp_path / "elsewhere" / "deep")
    assert {p.name for p in saved.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    again = AutoModelForSequenceClassification.from_pretrained(saved)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), text_run.model.parameters(), strict=True))
    assert Predictor.load(str(saved)).predict(TEXTS[:4]) == text_run.predict(TEXTS[:4])


def test_evaluation_is_trainers_own(text_run):
    """A plain Trainer on the saved folder reports the same loss and logits."""
    prepared = held_out(text_run.predictor)
    model = AutoModelForSequenceClassification.from_pretrained(text_run.output_dir)
    args = TrainingArguments("unused", per_device_eval_batch_size=4, disable_tqdm=True, dataloader_pin_memory=False)
    plain = Trainer(model, args, data_collator=text_run.trainer.data_collator).predict(prepared)
    # Tensors lie elsewhere in memory after loading, which may cost the last bit.
    assert plain.metrics["test_loss"] == pytest.approx(text_run.metrics["loss"], rel=1e-5)
    assert LABELS in prepared.column_names


# ---- what is easily got wrong --------------------------------------------------------------------------------------


def test_a_picture_is_turned_as_its_camera_says(image_run, tmp_path):
    """As `datasets` turns it in training and evaluation: most photographs of a telephone are stored lying."""
    picture = Image.fromarray(np.arange(24 * 40 * 3, dtype=np.uint8).reshape(24, 40, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "x.jpg", exif=exif)
    theirs = Dataset.from_dict({"image": [str(tmp_path / "x.jpg")]}).cast_column("image", ImageColumn())[0]["image"]
    ours = image_run.predictor.task.read(str(tmp_path / "x.jpg"))
    assert ours.size == theirs.size == (24, 40) and np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_words_that_are_hard_to_tell_from_files(light_run, tmp_path, capsys, monkeypatch):
    run = light_run.output_dir
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("not to be read")
    long = "a text longer than any name of a file may be, " * 20
    assert [a["input"] for a in answers(capsys, "predict", run, long, long)] == [long, long]
    assert main(["predict", str(run), "", "x"]) == 1
    nothing, one = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert nothing == {"input": "", "error": "empty text"} and one["input"] == "x"
    end, ours = os.pipe()  # what a shell makes of <(printf 'one\ntwo')
    os.write(ours, b"one\ntwo")
    os.close(ours)
    assert [a["input"] for a in answers(capsys, "predict", run, f"/dev/fd/{end}")] == ["one", "two"]
    os.close(end)


def test_a_row_that_cannot_be_read_costs_no_other(light_run, tmp_path, capsys):
    rows = ['{"text": "\\ud800 half a character"}', '{"text": "whole"}', '{"text": 7}']
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    (tmp_path / "x.csv").write_text("text,id\na,1,2\nb,2\n")
    assert main(["predict", str(light_run.output_dir), str(tmp_path / "x.jsonl"), str(tmp_path / "x.csv")]) == 1
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wrong = [
        "not valid Unicode (half a character)",
        None,
        "7 is not a string",
        "it has 3 cells, and the header has 2; a cell that contains a ',' has to stand in double quotes",
        None,
    ]
    assert [a.get("error") for a in found] == wrong


def test_answers_go_where_they_are_asked_to(light_run, tmp_path, capsys):
    """A link stays a link; a device is written to, not replaced."""
    (tmp_path / "real.jsonl").write_text("old")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    assert main(["predict", str(light_run.output_dir), "x", "--output", str(tmp_path / "link.jsonl")]) == 0
    assert (tmp_path / "link.jsonl").is_symlink() and json.loads((tmp_path / "real.jsonl").read_text())["input"] == "x"
    assert main(["predict", str(light_run.output_dir), "x", "--output", "/dev/stderr"]) == 0
    assert not Path("/dev/stderr").is_file() or Path("/dev/stderr").is_symlink()
    assert {p.name for p in tmp_path.iterdir()} == {"real.jsonl", "link.jsonl"}


def test_json_has_no_nan(tmp_path, capsys):
    model = tiny_bert(vocab_size=TOKENS)
    torch.nn.init.constant_(model.classifier.weight, float("nan"))
    _predictor(tmp_path, model)
    (found,) = answers(capsys, "predict", tmp_path, "x")
    assert found["score"] is None


def test_texts_and_pairs_for_a_model_that_says_nothing(tmp_path):
    predictor = _predictor(tmp_path, tiny_bert(vocab_size=TOKENS))
    found = predictor.predict(["a", ("b", "c"), "d"])
    assert [a["input"] for a in found] == ["a", ["b", "c"], "d"]
    assert found[1]["scores"] == predictor.predict([("b", "c")])[0]["scores"]


def test_python_callers_are_checked_too(light_run, tmp_path):
    with pytest.raises(UserError, match="the model reads text: give one"):
        light_run.predict([("a", "b")])
    with pytest.raises(UserError, match="top_k: 0 is not positive"):
        light_run.predict("a", top_k=0)
    with pytest.raises(UserError, match="Did you mean 'per_device_eval_batch_size'"):
        Predictor.load(light_run.output_dir, per_device_eval_batch=3)
    with pytest.raises(UserError, match="Did you mean 'test_file'"):
        light_run.evaluate(tst_file="x")
    assert light_run.predict([{"text": "hello", "label": "x"}])[0]["input"] == "hello"
    assert Predictor.load(light_run.output_dir).seed == 42 and len(repr(light_run.predictor)) < 2000
    assert light_run.evaluate(max_examples=10)["num_examples"] == 10
    assert light_run.evaluate(split="val", max_examples=3)["num_examples"] == 3
    with pytest.raises(UserError, match="no split 'tset'"):
        light_run.evaluate(split="tset")


def test_a_run_file_that_no_run_wrote(tmp_path):
    _predictor(tmp_path, tiny_bert(vocab_size=TOKENS))
    for text in ("task: foo", "per_device_eval_batch_size: many", "- a list"):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(UserError, match=r"RUN: .*run\.yaml' is not what a run writes"):
            Predictor.load(tmp_path)


def test_every_held_out_example_counts(tmp_path):
    """`dataloader_drop_last` is for training; the splits' seed may be 0."""
    _predictor(tmp_path / "base", tiny_bert(vocab_size=TOKENS))
    rows = ["text,label", *(f"t {i},{'ab'[i % 2]}" for i in range(30))]
    (tmp_path / "x.csv").write_text("\n".join(rows))
    keys = dict(output_dir=str(tmp_path / "o"), dataloader_drop_last=True, per_device_eval_batch_size=8, data_seed=0)
    run = fine_tune(str(tmp_path / "base"), str(tmp_path / "x.csv"), **keys, train_val_split=0.4, refit=False, **HUSH)
    assert run.predictor.seed == 0 and run.evaluate()["metrics"] == run.metrics
    assert run.evaluate()["num_examples"] == 12
    assert run.results["intervals"]["accuracy"][1] < 1


def test_a_failing_evaluation_does_not_cost_the_model(tmp_path, monkeypatch):
    _predictor(tmp_path / "base", tiny_bert(vocab_size=TOKENS))
    (tmp_path / "x.csv").write_text("\n".join(["text,label", *(f"t {i},{'ab'[i % 2]}" for i in range(20))]))
    monkeypatch.setattr("hf_transfer.runs.run.measured", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fine_tune(str(tmp_path / "base"), str(tmp_path / "x.csv"), output_dir=str(tmp_path / "o"), **HUSH)
    assert (tmp_path / "o" / "model.safetensors").is_file() and not (tmp_path / "o" / "results.json").exists()
