"""Runs inside a folder of data are no data."""

from __future__ import annotations

import json

from hf_transfer import fine_tune
from hf_transfer.cli.program import main
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.image_tree import visible_files, walk
from hf_transfer.data.locate import locate
from hf_transfer.data.run_outputs import is_run_file, is_run_folder

ROWS = [{"text": f"text number {i}", "label": "ab"[i % 2]} for i in range(30)]


def run_folder(folder, *others):
    folder.mkdir(parents=True)
    for name in ("run.yaml", *others):
        (folder / name).write_text("{}")
    return folder


def test_folders_of_runs_hold_no_images_to_train_on(tmp_path):
    finished = run_folder(tmp_path / "train" / "deep" / "out", "results.json", "config.json", "curves.png")
    begun = run_folder(tmp_path / "begun", "examples.npz")
    (finished / "checkpoint-3").mkdir()
    run_folder(tmp_path / "recipe")  # a file of that name alone is no run
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "config.json").write_text("{}")
    (tmp_path / "cats" / "1.png").write_text("")
    assert walk(tmp_path).tally["images"] == 1 and walk(tmp_path).tally["output of a run"] == 6
    assert {p.name for p in visible_files(tmp_path)} == {"1.png", "config.json", "run.yaml"}
    assert is_run_folder(begun) and not is_run_folder(tmp_path) and not is_run_folder(tmp_path / "none")


def test_files_of_a_run_are_known_by_name_and_others_next_to_them_may_be_data(tmp_path):
    out = run_folder(
        tmp_path / "out", "results.json", "adapter_config.json", "answers.jsonl", "model-1-of-2.safetensors"
    )
    (out / "checkpoint-7").mkdir()
    written = ("results.json", "run.yaml", "report.html", "forgetting.png", "curves.png", "adapter_config.json")
    for name in (*written, "checkpoint-7/trainer_state.json"):
        assert is_run_file(out / name), name
    assert not is_run_file(out / "answers.jsonl") and not is_run_file(tmp_path / "results.json")
    (tmp_path / "d.json").write_text(json.dumps(ROWS))
    found = locate(DataArguments(dataset_name=f"{tmp_path}/**/*.json*"))
    assert [p.name for p in found.tables.paths["train"]] == ["d.json", "answers.jsonl"]


def test_a_run_writes_next_to_its_tables_and_is_evaluated_and_repeated(tiny_bert_folder, tmp_path, capsys):
    (tmp_path / "part.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    keys = dict(strategy="full", num_train_epochs=1, save_strategy="no", log_level="error")
    run = fine_tune(tiny_bert_folder, str(tmp_path), output_dir=str(tmp_path), **keys)
    assert (tmp_path / "results.json").is_file() and run.results["num_train_examples"] == 24
    assert main(["evaluate", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == run.metrics
    again = fine_tune(tiny_bert_folder, str(tmp_path), output_dir=str(tmp_path / "out"), **keys)
    assert again.metrics == run.metrics
