"""`label_issues.csv`: what looks wrong is named as the user knows it, and the run is the same without it."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import hf_transfer
from hf_transfer import UserError, fine_tune
from hf_transfer.analysis.pooling_choice import choose_pooling
from hf_transfer.features import FeatureStore
from hf_transfer.files import as_json
from hf_transfer.layers.groups import layer_groups
from hf_transfer.runs import choosing_layers, label_issues, run
from hf_transfer.runs.choosing import choose
from hf_transfer.runs.configured import configured
from hf_transfer.runs.prepare import prepare
from tests import warm
from tests.helpers import tiny_timm_resnet, with_statistics
from tests.runs.test_preflight import QUIET, pictures, saved, with_tokens, words_tokenizer

KEYS = QUIET | dict(preflight=False, label_issues=True)
HEADER = ["place", "verdict", "given", "suggested", "probability", "score"]
WRONG = (4, 31)  # rows


@pytest.fixture(autouse=True)
def _labels_are_judged(monkeypatch):
    monkeypatch.setattr(run, "write_label_issues", label_issues.write_label_issues)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return with_tokens(tmp_path_factory.mktemp("models") / "bert", words_tokenizer())


def rows(count=60):
    """Texts of two kinds, and their labels, two of which are wrong."""
    texts = [f"{('fine ' if i % 2 else 'dull ') * (2 + i % 4)}{i % 3}" for i in range(count)]
    return [(text, "pn"[i % 2 != (i in WRONG)]) for i, text in enumerate(texts)]


def table(path, examples):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *examples])
    return str(path)


def read(folder):
    with (folder / "label_issues.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_file_names_line_labels_and_text(bert, tmp_path, capsys):
    """A cell of three lines moves the lines of all rows below it."""
    examples = rows()
    examples[1] = ("fine\nfilm\n3", "n")
    data = table(tmp_path / "d.csv", examples)
    result = fine_tune(bert, data, output_dir=str(tmp_path / "o"), **KEYS | dict(log_level="info"))
    found = read(result.output_dir)
    assert list(found[0]) == [*HEADER, "text"]
    wrong = [row for row in found if row["verdict"] == "wrong"]
    assert {(row["place"], row["given"], row["suggested"], row["text"]) for row in wrong} == {
        ("d.csv line 8", "n", "p", "dull dull 1"),
        ("d.csv line 35", "p", "n", "fine fine fine fine fine 1"),
    }
    assert all(0 <= float(row["score"]) < 0.3 and float(row["probability"]) < 0.1 for row in wrong)
    about = json.loads((result.output_dir / "results.json").read_text())["label_issues"]
    assert about == as_json(result.results["label_issues"])
    assert (about["wrong"], about["judged"], about["left_out"], about["classes_left_out"]) == (2, 60, 0, 0), (
        "also those held out for validation"
    )
    said = capsys.readouterr().out
    assert "2 labels look wrong" in said and "the likeliest first: label_issues.csv" in said


def test_a_run_is_the_same_without_it(tmp_path):
    """BatchNorm, augmentation and Python's random numbers: weights, logs and what is drawn afterwards."""
    model, data = saved(with_statistics(tiny_timm_resnet()), tmp_path / "m"), pictures(tmp_path / "d", 18)
    keys = KEYS | dict(augmentation="basic", logging_steps=1, per_device_train_batch_size=8, batchnorm="train")

    def trained(**more):
        out = tmp_path / f"o{len(more)}"
        result = fine_tune(model, data, output_dir=str(out), **keys | more)
        drawn = random.random(), np.random.rand(), torch.rand(1).item()
        logs = [
            {k: v for k, v in log.items() if "second" not in k and "time" not in k}
            for log in result.trainer.state.log_history
        ]
        return load_file(out / "model.safetensors"), logs, drawn, result

    weights, logs, drawn, result = trained(label_issues=False)
    assert result.results["label_issues"] is None and not (result.output_dir / "label_issues.csv").exists()
    others, *rest, result = trained()
    assert result.results["label_issues"]["judged"] == 18
    assert all(torch.equal(weights[name], others[name]) for name in weights) and [logs, drawn] == rest


def test_what_the_comparison_of_layers_has_computed_is_not_computed_again(bert, tmp_path):
    keys = KEYS | dict(output_dir=str(tmp_path / "o"), train_file=table(tmp_path / "d.csv", rows()))
    prepared = prepare(configured(bert, None, keys))
    assert choosing_layers.compare(prepared, fine_tunes=False)[0] is not None and prepared.store is not None
    examples, model = label_issues.Examples(prepared, ("train", "validation")), prepared.loaded.model
    model.config.use_cache = False  # as Trainer leaves it
    model.save_pretrained(tmp_path / "m")  # as the preflight does, which names the class in the configuration
    shared = examples.features(model, layer_groups(model))
    distinct = {text for text, _ in rows()} - set(prepared.data.train["text"])
    assert shared.computed == len(distinct) < len(shared)
    alone = examples.features(model, layer_groups(model), FeatureStore())
    for group in alone.groups:
        pooling = None if group == "head" else "mean"
        torch.testing.assert_close(shared.matrix(group, pooling), alone.matrix(group, pooling))


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_it_is_found_again_where_layers_above_are_left_out(bert, tmp_path, monkeypatch, pooling):
    """Not where the head's pooling changes the output of the last of them."""

    def lowest(*problem, **keys):
        found = choose_pooling(*problem, **keys)
        return replace(found, best=next(one for one in found.candidates if one.group == "layer.0"))

    monkeypatch.setattr(choosing_layers, "choose_pooling", lowest)
    keys = KEYS | dict(
        output_dir=str(tmp_path / "o"),
        train_file=table(tmp_path / "d.csv", rows()),
        pooling=pooling,
        pooling_layer="auto",
    )
    prepared = choose(prepare(configured(bert, None, keys)))
    examples, model = label_issues.Examples(prepared, ("train", "validation")), prepared.loaded.model
    shared = examples.features(model, layer_groups(model))
    distinct = {text for text, _ in rows()}
    assert distinct == set(prepared.data.train["text"])
    assert shared.computed == (0 if pooling == "mean" else len(distinct))
    alone = examples.features(model, layer_groups(model), FeatureStore())
    assert alone.computed == len(distinct) and "layer.0" in alone.groups == shared.groups
    for group in (name for name in alone.groups if name != "head"):
        torch.testing.assert_close(shared.matrix(group, "mean"), alone.matrix(group, "mean"))
    with torch.no_grad():  # weights are compared all the same
        model.bert.embeddings.word_embeddings.weight[-1] += 1
    assert examples.features(model, layer_groups(model)).computed == len(distinct)


def test_images_are_named_by_their_path(tmp_path):
    model, data = saved(with_statistics(tiny_timm_resnet()), tmp_path / "m"), pictures(tmp_path / "d", 18)
    found = hf_transfer.label_issues(model, data, use_cpu=True, log_level="error")
    assert found.judged == 22, "of all splits"
    places = {issue.place.rpartition(" of the ")[2] for issue in found.issues}
    assert places <= {"train split", "validation split"}
    assert all(str(tmp_path / "d") in issue.inputs["image"] for issue in found.issues)


def test_data_of_several_files(bert, tmp_path):
    """Positions of a file's rows, where the split has two."""
    examples = rows()
    for name, part in (("a", examples[:20]), ("b", examples[20:])):
        table(tmp_path / f"{name}.csv", part)
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps({"text": f"{text} a", "label": label}) + "\n" for text, label in rows(20)))
    found = hf_transfer.label_issues(
        bert, None, train_file=str(tmp_path / "[ab].csv"), test_file=str(test), use_cpu=True, log_level="error"
    )
    wrong = {issue.place for issue in found.issues if issue.verdict == "wrong"}
    assert found.judged == 80 and wrong == {"a.csv line 6", "b.csv line 13", "test.jsonl row 5"}


def test_several_labels(bert, tmp_path):
    examples = [(text, f"{label}{'|r' if i % 3 == 0 else ''}") for i, (text, label) in enumerate(rows())]
    data = table(tmp_path / "d.csv", examples)
    result = fine_tune(bert, data, output_dir=str(tmp_path / "o"), label_delimiter="|", **KEYS)
    found = {row["place"]: row for row in read(result.output_dir) if row["verdict"] == "wrong"}
    assert found["d.csv line 6"]["given"] == "n" and found["d.csv line 6"]["suggested"].startswith("p")


def test_why_nothing_was_looked_for(bert, tmp_path, monkeypatch, capsys):
    data = table(tmp_path / "d.csv", rows())
    numbers = table(tmp_path / "n.csv", [(text, f"{i / 7:.3f}") for i, (text, _) in enumerate(rows())])
    alone = table(tmp_path / "alone.csv", [*rows(4)[::2], ("fine", "n")])

    def reason(out, data, **keys):
        result = fine_tune(bert, data, output_dir=str(tmp_path / out), **KEYS | dict(log_level="info") | keys)
        assert not (tmp_path / out / "label_issues.csv").exists()
        return result.results["label_issues"]["skipped"]

    assert reason("numbers", numbers) == "the labels are numbers"
    assert "Label issues: not looked for, because the labels are numbers." in capsys.readouterr().out
    assert reason("scratch", data, from_scratch=True, strategy="scratch") == "the model is not pretrained"
    assert reason("stream", data, streaming=True, max_steps=2, max_eval_samples=10) == "the training data is a stream"
    monkeypatch.setattr(label_issues, "MOST", 59)
    assert reason("many", data) == "there are 60 examples, more than 59"
    monkeypatch.setattr(label_issues, "MOST_VALUES", 100)
    monkeypatch.setattr(label_issues, "MOST", 60)
    assert reason("classes", data) == "60 examples of 2 classes take too long"
    monkeypatch.undo()
    monkeypatch.setattr(run, "write_label_issues", label_issues.write_label_issues)
    with pytest.raises(UserError, match="cannot be looked for: the labels are numbers"):
        hf_transfer.label_issues(bert, numbers, use_cpu=True)
    with pytest.warns(UserWarning, match="labels were not checked. Labels can only be compared where two classes"):
        assert reason("alone", alone, validation_file=data)


def test_a_resumed_run_keeps_the_file(bert, tmp_path):
    """The weights that it goes on from know the wrong labels."""
    data, out = table(tmp_path / "d.csv", rows()), tmp_path / "o"
    keys = KEYS | dict(save_strategy="epoch", num_train_epochs=2)
    first = fine_tune(bert, data, output_dir=str(out), **keys).results["label_issues"]
    for path in (out / "results.json", *out.glob("checkpoint-1[0-9]")):
        path.unlink() if path.is_file() else __import__("shutil").rmtree(path)
    written = (out / "label_issues.csv").read_bytes()
    again = fine_tune(bert, data, output_dir=str(out), resume_from_checkpoint="auto", **keys)
    assert (out / "label_issues.csv").read_bytes() == written
    assert again.results["label_issues"] == first, "from the checkpoint"
    (out / "results.json").unlink()
    (out / "label_issues.csv").unlink()
    again = fine_tune(bert, data, output_dir=str(out), resume_from_checkpoint="auto", **keys)
    assert "its first part left no label_issues.csv" in again.results["label_issues"]["skipped"]
    fine_tune(bert, data, output_dir=str(out), overwrite_output_dir=True, **KEYS | dict(label_issues=False))
    assert not (out / "label_issues.csv").exists()


def test_ranks_share_the_pass_and_one_writes(bert, tmp_path):
    data = table(tmp_path / "d.csv", rows())
    keys = KEYS | dict(output_dir=str(tmp_path / "two"), max_steps=1)

    def as_rank():
        return 0 if fine_tune(bert, data, **keys).trainer.args.world_size == 2 else 1

    assert warm.ranks(2, as_rank, tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()[-3000:]
    fine_tune(bert, data, **keys | dict(output_dir=str(tmp_path / "one")))
    two, one = read(tmp_path / "two"), read(tmp_path / "one")
    assert [row["place"] for row in two] == [row["place"] for row in one] != []


def test_a_column_that_has_the_name_of_ours(tmp_path):
    issue = label_issues.QuestionableLabel(
        "row 1", "wrong", "a", "b", 0.05, 0.1, {"score": "1–0, said he", "text": "x\ny"}
    )
    found = label_issues.LabelIssues((issue,), 10, 0, 0, 0.9, ("layer.1",), (0.1,), 1.0)
    found.save(tmp_path / "label_issues.csv")
    (row,) = read(tmp_path)
    assert row["input score"] == "1–0, said he" and row["text"] == "x\ny" and row["score"] == "0.1000"
