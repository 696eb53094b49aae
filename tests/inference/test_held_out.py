"""`evaluate` on data that has changed since the run, or that the run has seen."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from datasets import Dataset

from hf_transfer import Predictor, UserError, fine_tune
from hf_transfer.cli.program import main
from hf_transfer.run_folder import EXAMPLES

KEYS = dict(strategy="full", num_train_epochs=1, save_strategy="no", log_level="error")
ROWS = [(f"review number {i} of a film", "ab"[i % 2]) for i in range(60)]


def write(path: Path, rows, header=("text", "label")) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


@pytest.fixture(scope="module")
def drawn(tiny_bert_folder, tmp_path_factory):
    """A run that held out six of its sixty rows itself: (run, its file)."""
    folder = tmp_path_factory.mktemp("drawn")
    file = write(folder / "train.csv", ROWS)
    keys = dict(output_dir=str(folder / "out"), train_val_split=0.1, **KEYS)
    return fine_tune(tiny_bert_folder, train_file=file, **keys), folder / "train.csv"


@pytest.fixture(scope="module")
def given(tiny_bert_folder, tmp_path_factory):
    """A run whose validation and test splits are files: (run, the file of the test split)."""
    folder = tmp_path_factory.mktemp("given")
    files = {f"{n}_file": write(folder / f"{n}.csv", ROWS[i::3]) for i, n in enumerate(("train", "validation", "test"))}
    run = fine_tune(tiny_bert_folder, **files, output_dir=str(folder / "out"), on_bad_example="skip", **KEYS)
    return run, folder / "test.csv"


def held_out(run) -> set[str]:
    """Texts of the validation split of a fresh run."""
    return set(run.predictor._held_out(None, "validation").examples["text"])


def test_nothing_is_said_of_unchanged_data(drawn, given, capsys):
    for run, file in (drawn, given):
        write(file, ROWS if run is drawn[0] else ROWS[2::3])
        found = run.evaluate()
        assert found["metrics"] == run.metrics and found["notes"] == [] and found["left_out"] == {}
        assert main(["evaluate", str(run.output_dir), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["metrics"] == run.metrics


def test_what_the_run_drew_is_recognized_in_changed_data(drawn):
    """Another order, new rows and lost rows: the same examples are measured, none that was trained on."""
    run, file = drawn
    write(file, ROWS)
    held = held_out(run)
    write(file, ROWS[::-1])
    assert run.evaluate()["metrics"] == pytest.approx(run.metrics) and run.evaluate()["notes"] == []
    write(file, [*((f"new {i}", "a") for i in range(7)), *ROWS[3:][::-1]])
    found = run.predictor._held_out()
    lost = len(held & {t for t, _ in ROWS[:3]})
    assert set(found.examples["text"]) == held - {t for t, _ in ROWS[:3]}
    told = f"train: 7 new, {3 - lost} gone" + (f"; validation: {lost} gone" if lost else "")
    assert found.notes == (f"The data has changed since the run ({told}).",)
    write(file, [r for r in ROWS if r[0] not in held])
    with pytest.raises(UserError, match="None of the 6 examples that the run held out for validation is left"):
        run.evaluate()


def test_another_label_is_told(drawn):
    run, file = drawn
    write(file, ROWS)
    held = held_out(run)
    write(file, [(t, "ba"["ab".index(label)]) if t in held else (t, label) for t, label in ROWS])
    found = run.evaluate()
    assert found["notes"] == ["The data has changed since the run (validation: 6 with another label)."]
    assert found["metrics"]["accuracy"] == pytest.approx(1 - run.metrics["accuracy"])


def test_training_examples_in_a_changed_test_split_are_left_out_counted_and_named(given, capsys):
    run, file = given
    write(file, [*ROWS[2:20:3], *ROWS[0:12:3], ("quite new", "a")])
    assert main(["evaluate", str(run.output_dir)]) == 0
    out = capsys.readouterr().out
    assert "on test of" in out and "(7 examples)" in out
    assert "Note: The data has changed since the run (test: 5 new, 14 gone)." in out
    assert "Note: 4 of 11 examples were trained on and are left out: row 6 ('review number 0 of a film'), row 7 " in out
    assert "9 of a film'), row 8" not in out and "and 1 more." in out
    write(file, ROWS[0::3])
    with pytest.raises(UserError, match=r"All 20 examples of the test split were trained on \(row 0 .*split='train'"):
        run.evaluate()
    assert main(["evaluate", str(run.output_dir), "--split", "train"]) == 0
    assert "Note: 20 of these 20 examples were trained on: the metrics do not say" in capsys.readouterr().out


def test_other_data_is_measured_without_what_was_trained_on(drawn, tmp_path):
    run, file = drawn
    write(file, ROWS)
    held = held_out(run)
    other = write(tmp_path / "other.csv", [*ROWS, ("quite new", "b")])
    found = run.evaluate(test_file=other)
    assert found["num_examples"] == 7 and found["left_out"] == {"trained_on": 54}
    loaded = Predictor.load(run.output_dir)
    assert set(loaded._held_out(loaded.other_data(test_file=other)).examples["text"]) == {*held, "quite new"}
    Dataset.from_list([{"text": t, "label": label} for t, label in ROWS if t not in held]).save_to_disk(tmp_path / "d")
    with pytest.raises(UserError, match="All 54 examples of the test split were trained on"):
        run.evaluate(test_file=write(tmp_path / "seen.csv", [r for r in ROWS if r[0] not in held]))
    with pytest.raises(UserError, match="All 54 examples of the train split were trained on"):
        run.evaluate(str(tmp_path / "d"))  # its only split, which nobody asked for by name
    found = run.evaluate(str(tmp_path / "d"), split="train")
    assert found["num_examples"] == 54 and found["notes"][0].startswith("54 of these 54 examples were trained on")


def test_bad_examples_of_other_data_are_treated_as_the_run_says(drawn, given, tmp_path):
    fresh = [(f"something else {i}", "ab"[i % 2]) for i in range(40)]
    for bad, reason in (((" ", "a"), "empty text"), (("odd", "c"), "unknown label 'c'"), (("odd", ""), "label")):
        file = write(tmp_path / "bad.csv", [*fresh, bad])
        with pytest.raises(UserError, match=reason):
            drawn[0].evaluate(test_file=file)
        found = given[0].evaluate(test_file=file)
        assert found["num_examples"] == 40 and found["left_out"] == {"unusable": 1}
        assert found["notes"][0].startswith("1 unusable examples are left out (row 40") and reason in found["notes"][0]
    with pytest.raises(UserError, match="max_bad_fraction: 3 of 43 examples are unusable"):
        given[0].evaluate(test_file=write(tmp_path / "bad.csv", [*fresh, *[("", "a")] * 3]))
    with pytest.raises(UserError, match=r"inputs\[1\]: empty text"):
        drawn[0].predict(["a text", " \n"])


def test_data_without_labels_is_called_that(drawn, tmp_path):
    texts = [(f"something else {i}",) for i in range(9)]
    with pytest.raises(UserError, match=r"The test split \(9 examples\) is unlabeled: it has no column 'label'"):
        drawn[0].evaluate(test_file=write(tmp_path / "u.csv", texts, ("text",)))
    with pytest.raises(UserError, match="is unlabeled: column 'label' is empty"):
        drawn[0].evaluate(test_file=write(tmp_path / "u.csv", [(*t, "") for t in texts]))


def test_a_run_trains_with_an_unlabeled_test_file_and_one_of_another_type(tiny_bert_folder, tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": t, "label": n}) for t, n in ROWS))
    files = {"train_file": f"{tmp_path}/train.jsonl", "test_file": f"{tmp_path}/test.jsonl"}
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps({"text": t}) for t, _ in ROWS))
    run = fine_tune(tiny_bert_folder, **files, output_dir=f"{tmp_path}/o", **KEYS)
    assert run.results["metrics_split"] == "validation"
    with pytest.raises(UserError, match="split: the test split has no labels"):
        run.evaluate(split="test")
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps({"text": i, "label": "ab"[i % 2]}) for i in range(5)))
    run = fine_tune(tiny_bert_folder, **files, output_dir=f"{tmp_path}/o2", data_facts=False, **KEYS)
    assert run.results["metrics_split"] == "test" and run.evaluate()["num_examples"] == 5
    assert (run.output_dir / EXAMPLES).is_file(), "without data facts too"
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps({"text": i / 2, "label": "a"}) for i in range(5)))
    with pytest.raises(UserError, match="Column 'text' contains float64 in the test split, but text in the training"):
        run.evaluate()


def test_a_run_whose_groups_stay_together(tiny_bert_folder, tmp_path):
    """The column of the groups is neither text nor label, and is said to be used."""
    rows = [(f"{t} and what it says at some length", f"viewer {i // 4}", label) for i, (t, label) in enumerate(ROWS)]
    file = write(tmp_path / "train.csv", rows, ("review", "viewer", "verdict"))
    keys = dict(split_group_column_name="viewer", train_file=file, output_dir=f"{tmp_path}/o", **KEYS)
    run = fine_tune(tiny_bert_folder, **keys)
    assert (run.predictor.data.text_column_name, run.predictor.data.label_column_name) == ("review", "verdict")
    decided = run.results["data_facts"]["decided"]
    assert any("groups 'viewer'" in line for line in decided) and not any("Not used" in line for line in decided)
    held = set(run.predictor._held_out().examples["viewer"])
    assert run.results["num_train_examples"] == 60 - 4 * len(held) and run.evaluate()["metrics"] == run.metrics
    write(tmp_path / "train.csv", rows[::-1], ("review", "viewer", "verdict"))
    again = Predictor.load(run.output_dir)
    assert set(again._held_out().examples["viewer"]) == held and again._held_out().notes == ()
    new = [("quite new", "viewer 3", "a"), ("new too", "viewer 99", "b")]
    test = write(tmp_path / "test.csv", new, ("review", "viewer", "verdict"))
    run = fine_tune(tiny_bert_folder, **keys, test_file=test, overwrite_output_dir=True)
    (leak,) = run.results["data_facts"]["group_leaks"]
    assert (leak["kept"], leak["groups"], leak["examples"], leak["shown"]) == ("test", 1, 1, ("viewer 3",))


def test_a_folder_without_the_record_evaluates_with_a_note(drawn, tmp_path):
    run, file = drawn
    write(file, ROWS)
    shutil.copytree(run.output_dir, tmp_path / "old", ignore=shutil.ignore_patterns(EXAMPLES))
    old = Predictor.load(tmp_path / "old")
    found = old.evaluate()
    assert found["metrics"] == run.metrics
    assert found["notes"] == [
        "Examples that were trained on are not recognized: the run's folder has no record of them."
    ]
    other = old.evaluate(old.other_data(test_file=str(file)))
    assert other["num_examples"] == 60 and other["notes"] == found["notes"]
