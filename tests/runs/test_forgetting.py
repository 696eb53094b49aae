"""The checkpoint's own task, watched while something else is learnt."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from hf_transfer import UserError, fine_tune
from hf_transfer.adapters.files import merged
from hf_transfer.cli.program import main
from hf_transfer.data.bundled import load_dataset
from hf_transfer.inference.predictor import Predictor
from hf_transfer.runs import run
from hf_transfer.runs.candidates import Judge
from hf_transfer.runs.own_task import OwnTask
from hf_transfer.runs.soup import with_pretrained

ROOT = Path(__file__).parents[2]
KEYS = dict(
    strategy="full",
    learning_rate=5e-3,
    num_train_epochs=2,
    max_seq_length=16,
    log_level="error",
    preflight=False,
    expected_accuracy=False,
    calibrate=False,
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, tiny_bert_folder):
    """Files of an old task and a new one, and a model that was trained for the old one."""
    root = tmp_path_factory.mktemp("tasks")
    texts = load_dataset("bundled:rotten-tomatoes")["train"].shuffle(seed=0)["text"][:140]
    for name, words in {"old": ("bad", "good"), "new": ("short", "middle", "long")}.items():
        labels = [words[len(text) % len(words)] for text in texts]
        table = pd.DataFrame({"text": texts, "label": labels})
        for split, rows in {"train": slice(32), "validation": slice(32, 52), "test": slice(52, 72)}.items():
            table[rows].to_csv(root / f"{name}-{split}.csv", index=False)
    fine_tune(tiny_bert_folder, output_dir=str(root / "model"), save_strategy="no", **files(root, "old"), **KEYS)
    return root


def files(root, name):
    return {f"{split}_file": str(root / f"{name}-{split}.csv") for split in ("train", "validation", "test")}


def learnt(tasks, folder, **keys):
    old = str(tasks / "old-test.csv")
    keys = {"save_strategy": "no", "forgetting_dataset_name": old, **KEYS, **keys}
    return fine_tune(str(tasks / "model"), output_dir=str(folder), **files(tasks, "new"), **keys)


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"adapter": "lora"},
        pytest.param({"ema_decay": 0.5}, marks=pytest.mark.slow),
    ],
)
def test_the_old_task_is_measured_before_while_and_after(tasks, tmp_path, keys):
    result = learnt(tasks, tmp_path / "out", **keys)
    found = result.results["forgetting"]
    before = Predictor.load(tasks / "model")
    assert found["before"] == before.evaluate(str(tasks / "old-test.csv"))["metrics"]["accuracy"]
    assert found["num_examples"] == 20 and [point["step"] for point in found["curve"]] == [0, 4, 8]
    assert found["after"] == found["curve"][-1]["accuracy"]
    assert (tmp_path / "out" / "forgetting.png").stat().st_size > 1000
    logged = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    assert sum("forgetting_accuracy" in line for line in logged) == 3
    # The saved backbone, with the old head put on by hand.
    now = merged(Predictor.load(tmp_path / "out").model).state_dict()
    state = {n: t.clone() for n, t in before.model.state_dict().items()}
    mixed = {n: t if n.startswith("classifier") else now[n] for n, t in state.items()}
    before.model.load_state_dict(mixed)
    by_hand = before.evaluate(str(tasks / "old-test.csv"))["metrics"]
    assert found["metrics"]["accuracy"] == by_hand["accuracy"]
    assert found["metrics"]["loss"] == pytest.approx(by_hand["loss"], abs=1e-5)
    assert any(not torch.equal(state[n], t) for n, t in now.items() if n in state and "layer.1" in n)


@pytest.mark.slow
def test_training_is_the_same_whether_it_is_watched_or_not(tasks, tmp_path):
    watched = learnt(tasks, tmp_path / "a").model.state_dict()
    alone = learnt(tasks, tmp_path / "b", forgetting_dataset_name=None).model.state_dict()
    assert all(torch.equal(watched[n], t) for n, t in alone.items())


def test_a_checkpoint_without_a_head_is_refused(tasks, tmp_path):
    with pytest.raises(UserError, match="has no head of its own"):
        fine_tune(
            "bundled:minilm-l6",
            output_dir=str(tmp_path / "out"),
            forgetting_dataset_name=str(tasks / "old-test.csv"),
            **files(tasks, "new"),
            **KEYS,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.assign(label="long"), "unknown label 'long'. Use labeled examples of the task .*labels bad, good"),
        (lambda t: t.assign(label=range(len(t))), "unknown labels '0', '1'"),
        (lambda t: t[["text"]], "the data has no label column"),
        (lambda t: t[["label"]], "no input column for text-classification. Use labeled"),
        (lambda t: t[:0], "has no examples"),
        (None, "does not exist"),
    ],
)
def test_data_that_is_not_of_the_heads_task_is_refused(tasks, tmp_path, change, sentence):
    path = tmp_path / "old.csv"
    if change is not None:
        change(pd.read_csv(tasks / "old-test.csv")).to_csv(path, index=False)
    with pytest.raises(UserError, match=sentence) as error:
        OwnTask(str(tasks / "model"), str(path))
    said = str(error.value)
    assert said.startswith("forgetting_dataset_name: ")
    assert not any(key in said for key in ("text_column_name", "label_column_name", "on_bad_example", " split="))


def test_it_is_refused_before_anything_is_computed(tasks, tmp_path, monkeypatch, capsys):
    """By a run and by its plan."""
    monkeypatch.setattr(run, "choose", lambda *_: pytest.fail("the data had not been read"))
    with pytest.raises(UserError, match="unknown labels"):
        learnt(tasks, tmp_path / "out", forgetting_dataset_name=str(tasks / "new-test.csv"))
    assert not (tmp_path / "out").exists()
    words = [f"--{name}={path}" for name, path in files(tasks, "new").items()]
    watched = f"--forgetting_dataset_name={tasks / 'new-test.csv'}"
    assert main(["plan", str(tasks / "model"), *words, "--strategy=full", watched]) == 2
    assert "forgetting_dataset_name: " in capsys.readouterr().err


def test_columns_with_other_names_are_found(tasks, tmp_path):
    table = pd.read_csv(tasks / "old-test.csv").rename(columns={"text": "sentence", "label": "class"})
    table.to_csv(tmp_path / "old.csv", index=False)
    own, other = (OwnTask(str(tasks / "model"), str(p)) for p in (tasks / "old-test.csv", tmp_path / "old.csv"))
    state = Predictor.load(tasks / "model").model.state_dict()
    assert other.measure(state) == own.measure(state)
    assert "Watched: It has no text and no label; sentence and class was read." in other.notes


def test_examples_that_the_head_was_trained_on_are_left_out(tasks, tmp_path):
    parts = [pd.read_csv(tasks / f"old-{split}.csv") for split in ("test", "train")]
    pd.concat([parts[0], parts[1][:5]]).to_csv(tmp_path / "old.csv", index=False)
    task = OwnTask(str(tasks / "model"), str(tmp_path / "old.csv"))
    assert len(task) == 20
    assert "5 of 25 examples were trained on and are left out" in " ".join(task.notes)
    with pytest.raises(UserError, match=r"All 32 examples .* were trained on .*other than its training examples"):
        OwnTask(str(tasks / "model"), str(tasks / "old-train.csv"))


def test_unnamed_labels_that_cannot_be_matched_are_refused(tasks, tiny_bert_folder):
    with pytest.raises(UserError) as error:
        OwnTask(tiny_bert_folder, str(tasks / "old-test.csv"))
    assert "forgetting_dataset_name" in str(error.value) and "LABEL_0" in str(error.value)


def interrupted(folder, copy):
    """A copy of a finished run, as if it had been killed after its first checkpoint."""
    shutil.copytree(folder, copy)
    for path in (copy / "results.json", copy / "model.safetensors"):
        path.unlink()
    saved = sorted(copy.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    assert len(saved) == 2
    shutil.rmtree(saved[1])
    return copy


SAVED = {"save_strategy": "epoch", "save_total_limit": 3}


def test_a_resumed_run_has_the_same_curve(tasks, tmp_path):
    whole = learnt(tasks, tmp_path / "whole", **SAVED)
    copy = interrupted(tmp_path / "whole", tmp_path / "copy")
    with pytest.raises(UserError, match=r"the examples of forgetting_dataset_name: '20 .* then, '5 .* now"):
        learnt(tasks, copy, resume_from_checkpoint="auto", max_forgetting_samples=5, **SAVED)
    resumed = learnt(tasks, copy, resume_from_checkpoint="auto", **SAVED)
    assert resumed.trainer.resumed_at == 4
    found = resumed.results["forgetting"]
    assert found == whole.results["forgetting"] and [point["step"] for point in found["curve"]] == [0, 4, 8]
    one, other = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(one[n], t) for n, t in other.items())


@pytest.mark.slow
def test_a_run_that_is_watched_from_a_checkpoint_on_knows_what_was_before(tasks, tmp_path):
    whole = learnt(tasks, tmp_path / "whole").results["forgetting"]
    learnt(tasks, tmp_path / "alone", forgetting_dataset_name=None, **SAVED)
    late = learnt(tasks, interrupted(tmp_path / "alone", tmp_path / "late"), resume_from_checkpoint="auto", **SAVED)
    assert late.results["forgetting"] == {**whole, "curve": [whole["curve"][0], whole["curve"][2]]}


def test_an_adapter_that_cannot_be_merged_is_refused(tasks, tmp_path):
    with pytest.raises(UserError, match="cannot be put on this adapter"):
        learnt(tasks, tmp_path / "out", adapter="bottleneck")


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"forgetting_dataset_name": None, "max_forgetting_samples": 5}, "no effect without forgetting_dataset_name"),
        ({"strategy": "scratch"}, "can forget nothing"),
    ],
)
def test_keys_that_make_no_sense_are_refused(tasks, tmp_path, keys, sentence):
    with pytest.raises(UserError, match=sentence):
        learnt(tasks, tmp_path / "out", **keys)


def test_an_interpolation_shows_both_tasks_and_keeps_the_old_one(tasks, tmp_path, monkeypatch):
    learnt(tasks, tmp_path / "out")
    new, old = iter([0.5, 0.695, 0.7, 0.69]), iter([0.9, 0.8, 0.7, 0.8])
    monkeypatch.setattr(Judge, "measure", lambda self, state, statistics=(): {"accuracy": next(new)})
    monkeypatch.setattr(OwnTask, "measure", lambda self, state, trainer=None: {"accuracy": next(old)})
    found = with_pretrained(tmp_path / "out", tmp_path / "wise", [0, 0.3, 0.6, 1]).results["interpolation"]
    assert found["alpha"] == 0.3 and "within 0.01" in found["rule"]
    assert [p["old_metrics"]["accuracy"] for p in found["curve"]] == [0.9, 0.8, 0.7, 0.8]
    card = (tmp_path / "wise" / "README.md").read_text()
    assert "| alpha | validation `accuracy` | `accuracy` of the old task, old-test.csv |" in card
    assert "| **0.3** | **0.6950** | **0.8000** |" in card and str(tasks) not in card


@pytest.mark.slow
def test_the_old_task_at_both_ends_is_as_before_and_after_training(tasks, tmp_path):
    result = learnt(tasks, tmp_path / "out")
    found = with_pretrained(tmp_path / "out", tmp_path / "wise", [0, 1]).results["interpolation"]
    ends = [point["old_metrics"]["accuracy"] for point in found["curve"]]
    assert ends == [result.results["forgetting"]["before"], result.results["forgetting"]["after"]]


@pytest.fixture
def recipes(tasks, tmp_path, monkeypatch, tiny_bert_folder):
    """Two recipes of the two tasks, in a folder, and the script that runs them in sequence."""
    monkeypatch.chdir(tmp_path)
    for place, name in enumerate(("old", "new")):
        keys = {"model_name_or_path": tiny_bert_folder, "save_strategy": "no", **files(tasks, name), **KEYS}
        (tmp_path / f"{place}-{name}.yaml").write_text(yaml.safe_dump(keys))
    return runpy.run_path(str(ROOT / "recipes" / "continual.py"))["main"]


def test_tasks_in_sequence_are_measured_after_each_step(recipes, tmp_path, tasks, capsys):
    later = ["--ewc_lambda", "1", "--ewc_dataset_name", "{before}", "--learning_rate", "0.1"]
    rows = recipes(tmp_path, ["--quiet"], later)
    first, second = tmp_path / "out" / "continual" / "0-old", tmp_path / "out" / "continual" / "1-new"
    own = [json.loads((run / "results.json").read_text())["metrics"]["accuracy"] for run in (first, second)]
    task = OwnTask(str(first), str(tasks / "old-test.csv"))
    after = task.measure(Predictor.load(second).model.state_dict())["accuracy"]
    assert rows == [[own[0]], [after, own[1]]] and after != own[0]
    assert yaml.safe_load((second / "run.yaml").read_text())["ewc_dataset_name"] == str(tasks / "old-train.csv")
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].split() == ["forgotten", f"{own[0] - after:.3f}"]


def test_adapters_in_sequence_forget_nothing(recipes, tmp_path, capsys):
    rows = recipes(tmp_path, ["--quiet", "--strategy", "lora", "--learning_rate", "1e-2"], [])
    assert rows[0][0] == rows[1][0] and len(rows[1]) == 2
    assert "nothing is forgotten" in capsys.readouterr().out
