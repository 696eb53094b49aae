"""The column `nearest_training_examples` of `errors.csv`: places, labels and cosines, or why there is none."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest

from hf_transfer import fine_tune
from hf_transfer.data.splits import ROW
from hf_transfer.runs import label_issues, run
from hf_transfer.runs import neighbors as module
from hf_transfer.runs.configured import configured
from hf_transfer.runs.frozen import frozen_splits
from hf_transfer.runs.neighbors import KEY
from hf_transfer.runs.prepare import prepare
from tests.helpers import tiny_timm_resnet, with_statistics
from tests.runs.test_label_issues import table
from tests.runs.test_preflight import QUIET, pictures, saved, with_tokens, words_tokenizer

KEYS = QUIET | dict(preflight=False, label_issues=True, max_steps=1)
ONE = re.compile(r"(.+?) \((.+), (-?\d\.\d\d)\)")


@pytest.fixture(autouse=True)
def _labels_are_judged(monkeypatch):
    monkeypatch.setattr(run, "write_label_issues", label_issues.write_label_issues)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return with_tokens(tmp_path_factory.mktemp("models") / "bert", words_tokenizer())


def rows(count, first=0):
    return [(f"{'fine ' * (i % 4)}{'dull ' * (i % 3)}{i}", "pn"[i * i % 7 > 2]) for i in range(first, first + count)]


def neighbors(folder):
    """For each wrong answer, (its row, [(place, label, cosine)])."""
    with (folder / "errors.csv").open(newline="") as file:
        return [
            (int(r["row"]), [ONE.fullmatch(one).groups() for one in r[KEY].split("; ")]) for r in csv.DictReader(file)
        ]


def expected(model, data, split, **keys):
    """{row: three cosines} of the examples of a split, by another pass and in other arithmetic."""
    found = frozen_splits(model, data, poolings=["mean"], use_cpu=True, **keys)
    train, others = (found[name].matrix("last", "mean").double().numpy() for name in ("train", split))
    train, others = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, others))
    examples = prepare(configured(model, data, keys, needs=("model", "data"))).data.splits[split]
    return dict(zip(examples[ROW][:], -np.sort(-others @ train.T, axis=1)[:, :3], strict=True))


@pytest.mark.parametrize("has_test", [False, True])
def test_lines_labels_and_cosines(bert, tmp_path, has_test):
    """Of a split that was drawn from the training data, and of one that is a file of its own."""
    data, out = table(tmp_path / "d.csv", rows(40)), tmp_path / "out"
    keys = dict(test_file=table(tmp_path / "t.csv", rows(12, first=100))) if has_test else {}
    results = fine_tune(bert, data, output_dir=str(out), **KEYS, **keys).results
    split, written = results["metrics_split"], neighbors(out)
    assert split == ("test" if has_test else "validation") and len(written) > 1
    assert results[KEY] == {"layer": "layer.1", "count": 3}
    cosines = expected(bert, data, split, **keys)
    labels = {f"d.csv line {i + 2}": label for i, (_, label) in enumerate(rows(40))}
    held_out = {f"d.csv line {row + 2}" for row in cosines} if not has_test else set()
    for row, near in written:
        assert [float(cosine) for *_, cosine in near] == pytest.approx(cosines[row], abs=0.0051)
        assert all(labels[place] == label and place not in held_out for place, label, _ in near)


def test_pictures_by_path(tmp_path):
    model, out = saved(with_statistics(tiny_timm_resnet()), tmp_path / "m"), tmp_path / "out"
    fine_tune(model, pictures(tmp_path / "d", 12), output_dir=str(out), **KEYS)
    places = [one for _, near in neighbors(out) for one in near]
    assert places and all(f"d/train/{label}/" in place for place, label, _ in places)


def test_why_there_are_none(bert, tmp_path, capsys, monkeypatch):
    data = table(tmp_path / "d.csv", rows(40))
    values = table(tmp_path / "n.csv", [(text, f"{i / 7:.3f}") for i, (text, _) in enumerate(rows(40))])

    def reason(out, data, **keys):
        keys = KEYS | dict(log_level="info") | keys
        results = fine_tune(bert, data, output_dir=str(tmp_path / out), **keys).results
        assert KEY not in (tmp_path / out / "errors.csv").read_text()
        return results[KEY]["skipped"]

    said = "errors.csv: the nearest training examples are left out, because the labels are numbers."
    assert reason("numbers", values) == "the labels are numbers" and said in capsys.readouterr().out
    assert "label_issues is false" in reason("off", data, label_issues=False)
    assert "left out" not in capsys.readouterr().out, "who turned it off knows"
    monkeypatch.setattr(module, "MOST", 11)
    many = table(tmp_path / "t.csv", rows(12, first=100))
    assert reason("many", data, test_file=many) == "the test split has more than 11 examples"
