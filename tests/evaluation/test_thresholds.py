"""Thresholds of several labels: tuned on validation, saved, and used by everything that answers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.special import logit
from sklearn.metrics import f1_score

from hf_transfer import Predictor, fine_tune
from hf_transfer.evaluation.metrics import best_thresholds


def test_no_other_threshold_has_a_higher_f1():
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 3)) < [0.3, 0.5, 0.8]).astype(int)
    logits = labels * 1.5 + rng.normal(size=(60, 3)) - [2, 0, -1]
    found = best_thresholds(logits, labels)
    for z, y, t in zip(logits.T, labels.T, found, strict=True):
        ours = f1_score(y, z > logit(t))
        assert ours == pytest.approx(max(f1_score(y, z > limit) for limit in [*z, z.min() - 1]))


def test_where_little_can_be_learnt_it_stays_one_half():
    labels = np.array([[1, 0, 1]] * 4 + [[0, 0, 1]] * 6)
    logits = np.random.default_rng(0).normal(size=(10, 3))
    assert best_thresholds(logits, labels) == [0.5, 0.5, 0.5]
    assert best_thresholds(logits, labels, least=4)[0] != 0.5
    assert best_thresholds(np.full((10, 1), 2.0), np.array([[1], [0]] * 5)) == [pytest.approx(0.5 / (1 + np.exp(-2.0)))]


def test_a_run_tunes_saves_and_uses_them(tiny_bert_folder, tmp_path):
    rows = [
        {"text": f"words {i} {'red' * (i % 2)}", "label": [["red"], ["red", "round"], []][i % 3]} for i in range(60)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    keys = dict(
        train_file=str(tmp_path / "t.jsonl"),
        train_val_split=0.4,
        num_train_epochs=1,
        save_strategy="no",
        strategy="full",
        log_level="error",
    )
    run = fine_tune(tiny_bert_folder, output_dir=str(tmp_path / "a"), **keys)
    saved = json.loads((tmp_path / "a" / "config.json").read_text())["label_thresholds"]
    assert set(saved) == {"red", "round"} and set(saved.values()) != {0.5}
    again = Predictor.load(run.output_dir)
    assert again.evaluate()["metrics"] == pytest.approx(run.metrics)
    for answer in again.predict([r["text"] for r in rows[:8]]):
        assert answer["labels"] == [n for n, p in answer["scores"].items() if p > saved[n]]
    path = tmp_path / "a" / "config.json"  # whatever was tuned: each label has its own threshold
    path.write_text(json.dumps(json.loads(path.read_text()) | {"label_thresholds": {"red": 0.01, "round": 0.99}}))
    assert [a["labels"] for a in Predictor.load(run.output_dir).predict(["red", "words 3"])] == [["red"], ["red"]]
    plain = fine_tune(tiny_bert_folder, output_dir=str(tmp_path / "b"), tune_thresholds=False, **keys)
    assert "label_thresholds" not in json.loads((tmp_path / "b" / "config.json").read_text())
    assert plain.metrics["loss"] == pytest.approx(run.metrics["loss"])
    assert plain.metrics["map"] == pytest.approx(run.metrics["map"])
    assert run.metrics["f1_macro"] >= plain.metrics["f1_macro"]  # it was tuned on the split that is reported here
