"""HeadBank: many tasks on one backbone in memory."""

from __future__ import annotations

import random
import runpy
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM

from hf_transfer import HeadBank, Predictor, UserError, fine_tune
from hf_transfer.inference.served import Served
from tests.helpers import TOKENS, small_tokenizer

ROOT = Path(__file__).parents[2]
MLP = {"head": "mlp", "head_hidden_size": 4, "head_norm": "batch"}
TASKS = {  # name: (labels, adapter)
    "tone": (("bad", "good"), "lora"),
    "topic": (("art", "law", "sport"), "ia3"),
    "tongue": (("de", "en", "fr", "it", "pl"), "bottleneck"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    sizes = dict(hidden_size=16, num_attention_heads=1, intermediate_size=32, num_hidden_layers=1)
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**sizes, vocab_size=TOKENS, max_position_embeddings=64)).save_pretrained(folder)
    small_tokenizer(64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """A run per task, of other labels, another adapter and another kind of head, far from its beginning."""
    made = {}
    for i, (name, (labels, adapter)) in enumerate(TASKS.items()):
        folder = tmp_path_factory.mktemp(name)
        rows = [f"word{j} of {j % len(labels)},{labels[j % len(labels)]}" for j in range(40)]
        (folder / "a.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
        keys = dict(num_train_epochs=2, learning_rate=0.05, save_strategy="no", seed=i, log_level="error")
        keys |= MLP if name == "topic" else {}
        fine_tune(str(base), str(folder / "a.csv"), output_dir=str(folder / "out"), adapter=adapter, **keys)
        made[name] = folder / "out"
    return made


@pytest.fixture(scope="module")
def bank(runs):
    made = HeadBank()
    for name, folder in runs.items():
        made.add(name, folder)
    return made


def test_each_task_answers_as_its_run_alone(bank, runs):
    texts = ["a word", "and a longer line of words", "word3 of 1"]
    for name, folder in runs.items():
        alone = Predictor.load(folder).predict(texts)
        assert bank.predict(texts, task=name) == alone
        assert set(alone[0]["scores"]) == set(TASKS[name][0])
    assert bank.list() == {name: labels for name, (labels, _) in TASKS.items()}
    assert len(bank) == 3 and "topic" in bank and "topic" in repr(bank)
    mixed = bank.predict(texts, task_per_input=["topic", "tone", "topic"])
    first, second = bank.predict([texts[0], texts[2]], task="topic"), bank.predict(texts[1], task="tone")
    assert mixed == [{**first[0], "task": "topic"}, {**second[0], "task": "tone"}, {**first[1], "task": "topic"}]


def test_several_tasks_of_each_input(bank, tmp_path):
    """In the same form for any number of inputs, also for as many as there are tasks."""
    texts = ["a word", "and a longer line of words", "word3 of 1"]
    (tmp_path / "x.txt").write_text("\n".join(texts))
    each = {name: bank.predict(texts, task=name, top_k=1) for name in TASKS}
    expected = [{name: each[name][i] for name in TASKS} for i in range(3)]
    for given in (texts, iter(texts), tmp_path / "x.txt"):
        assert bank.predict(given, task=list(TASKS), top_k=1) == expected
    (alone,) = bank.predict(texts[0], task="tone", top_k=1)
    assert bank.predict(texts[0], task=("tone",), top_k=1) == [{"tone": alone}]


def test_each_task_is_measured_as_its_run_alone(bank, runs):
    """Also its loss, for which some models keep the number of labels outside their configuration."""
    for name, folder in runs.items():
        assert bank.evaluate(name) == Predictor.load(folder).evaluate()
    other = {"text": ["word1 of 1", "word2 of 0"], "label": ["good", "bad"]}
    assert bank.evaluate("tone", other) == Predictor.load(runs["tone"]).evaluate(other)


def test_a_bank_is_saved_and_loaded_elsewhere(bank, runs, tmp_path):
    """Bit for bit, with what its runs held out; after a move, and on top of nothing."""
    texts = ["a word", "and a longer line of words"]
    saved = HeadBank().add("a/b", runs["tone"], stride=4).add("A-B", runs["topic"]).add("tongue", runs["tongue"])
    saved.save(tmp_path / "deep" / "bank")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["bank"]
    (tmp_path / "deep" / "bank").rename(tmp_path / "moved")
    again = HeadBank.load(str(tmp_path / "moved"))
    assert list(again.list()) == ["a/b", "A-B", "tongue"] and again.nbytes == saved.nbytes
    for name in again.list():
        assert again.predict(texts, task=name) == saved.predict(texts, task=name)
        assert again.evaluate(name) == saved.evaluate(name)
    assert again._tasks["a/b"][0].views.stride == 4
    with pytest.raises(UserError, match="exists already"):
        bank.save(tmp_path / "moved")
    with pytest.raises(UserError, match="it has no task to save"):
        HeadBank().save(tmp_path / "none")
    with pytest.raises(UserError, match=r"is not a folder that HeadBank\.save wrote"):
        HeadBank.load(runs["tone"])
    assert not (tmp_path / "none").exists()


def test_a_task_costs_its_adapter_and_its_head(bank, runs):
    """To the byte: every tensor of the backbone is shared."""
    one = HeadBank().add("tone", runs["tone"])
    sizes = [one.nbytes]
    for name in ("topic", "tongue"):
        one.add(name, runs[name])
        sizes.append(one.nbytes)
        saved = load_file(runs[name] / "adapter_model.safetensors").values()
        assert sizes[-1] - sizes[-2] == sum(t.numel() * t.element_size() for t in saved)
        assert sizes[-1] - sizes[-2] < 0.02 * sizes[0]
    one.remove("topic")
    assert "topic" not in one and one.nbytes == sizes[2] - (sizes[1] - sizes[0])


@pytest.mark.parametrize("requests", [200, pytest.param(1250, marks=pytest.mark.slow)])
def test_threads_never_get_another_tasks_answer(requests, bank):
    """8 threads with so many requests each, tasks added and removed meanwhile; threads change every 0.1 ms."""
    texts = [f"word{i} of {i % 3}" for i in range(4)]
    stop = threading.Event()

    def ask(seed):
        draw = random.Random(seed)
        wrong = 0
        for _ in range(requests):
            name, text = draw.choice(list(TASKS)), draw.choice(texts)
            wrong += bank.predict(text, task=name)[0] != expected[name, text]
        return wrong

    def disturb():
        predictor = bank._tasks["tone"]
        while not stop.wait(0.01):
            bank._tasks["other"] = predictor
            bank.remove("other")

    disturber = threading.Thread(target=disturb)
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    torch.set_num_threads(1)  # also for what is expected: the number of threads may change the last bit
    try:
        expected = {(name, t): bank.predict(t, task=name)[0] for name in TASKS for t in texts}
        disturber.start()
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, range(8))) == [0] * 8
    finally:
        torch.set_num_threads(threads)
        sys.setswitchinterval(interval)
        stop.set()
        disturber.join()


def test_what_cannot_be_in_a_bank_is_refused(bank, base, runs, tmp_path):
    with pytest.raises(UserError, match=r"no 'tonge'.*Did you mean 'tongue'"):
        bank.predict("x", task="tonge")
    with pytest.raises(UserError, match="task_per_input: 2 tasks were given for 3 inputs"):
        bank.predict(["x", "y", "z"], task_per_input=["tone", "topic"])
    with pytest.raises(UserError, match=r"'tone' was given twice; .* use task_per_input"):
        bank.predict(["x", "y", "z"], task=["tone", "topic", "tone"])
    with pytest.raises(UserError, match="give task or task_per_input"):
        bank.predict(["x"])
    (tmp_path / "two.txt").write_text("one\ntwo")
    with pytest.raises(UserError, match="a file or a folder among the inputs stands for several"):
        bank.predict(["x", str(tmp_path / "two.txt")], task_per_input=["tone", "topic"])
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"word {i},{'xy'[i % 2]}\n" for i in range(16)))
    keys = dict(num_train_epochs=1, save_strategy="no", log_level="error", dataset_name=str(tmp_path / "a.csv"))
    fine_tune(str(base), output_dir=str(tmp_path / "whole"), strategy="linear-probe", **keys)
    with pytest.raises(UserError, match="is a whole model, not an adapter"):
        bank.add("whole", tmp_path / "whole")
    fine_tune(str(tmp_path / "whole"), output_dir=str(tmp_path / "other"), strategy="lora", **keys)
    with pytest.raises(UserError, match="Use one bank per backbone"):
        bank.add("other", tmp_path / "other")
    assert set(bank.list()) == set(TASKS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image", "text"])
def test_three_data_sets_on_one_backbone(kind, tmp_path, monkeypatch, capsys):
    """The recipes, on a few examples: each task is as good in the bank as alone, and costs its file's bytes."""
    monkeypatch.chdir(tmp_path)
    many = runpy.run_path(str(ROOT / "recipes" / "many_tasks.py"))
    few = ("--max_train_samples", "24", "--max_eval_samples", "16", "--max_predict_samples", "16", "--quiet")
    many["main"](ROOT / "recipes" / f"{kind}_classification" / "three_datasets", [*few, "--num_train_epochs", "1"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()][-3:]
    labels = {"digits": 10, "photos": 2, "typefaces": 5, "kinds": 3, "reviews": 2, "topics": 7}
    assert [int(row[1]) for row in rows] == [labels[row[0]] for row in rows]
    assert all(row[2] == row[3] for row in rows)
    for _, _, _, _, file, memory in rows[1:]:
        assert float(memory) == pytest.approx(float(file), abs=0.05)


def test_a_bank_or_its_runs_are_served(bank, runs, tmp_path):
    """The tasks of a saved bank, or of runs, by the names of their folders; a bank alone."""
    saved = HeadBank().add("mood", runs["tone"]).add("topic", runs["topic"]).save(tmp_path / "bank")
    folders = [Path(shutil.copytree(runs[name], tmp_path / name)) for name in ("tone", "topic")]
    text = ["a word", "and a longer line of words"]
    for served, names in ((Served.load([str(saved)]), ("mood", "topic")), (Served.load(folders), ("tone", "topic"))):
        assert served.names == names
        for name, task in zip(names, ("tone", "topic"), strict=True):
            assert served[name].predict(text) == bank.predict(text, task=task)
    assert Served.load([str(folders[1])])["topic"].predict(text) == bank.predict(text, task="topic")
    assert served["tone"].model.get_input_embeddings().weight is served["topic"].model.get_input_embeddings().weight
    with pytest.raises(UserError, match="is a bank, and other words are given with it"):
        Served.load([str(saved), *folders])
    with pytest.raises(UserError, match=r"^coverage: task 'mood': 0\.999 needs at least 999 validation examples"):
        Served.load([str(saved)], coverage=0.999)
