"""An evaluation that is worse than one before, beyond chance."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from transformers import EvalPrediction

from hf_transfer import fine_tune
from hf_transfer.evaluation import metrics
from hf_transfer.evaluation.metric_table import LEADING
from hf_transfer.evaluation.noise import contributions, difference_error
from hf_transfer.training.course import Course

SINGLE, MULTI, VALUE = "single_label_classification", "multi_label_classification", "regression"


def drawn(kind, size=4000, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(size, 1 if kind == VALUE else 3))
    if kind == SINGLE:
        return logits + np.eye(3)[labels := rng.integers(0, 3, size)], labels
    if kind == MULTI:
        return logits, (rng.random((size, 3)) < 0.4).astype(float)
    return logits, logits[:, 0] + rng.normal(size=size)


@pytest.mark.parametrize("kind", [SINGLE, MULTI, VALUE])
def test_contributions_have_the_metric_as_mean_and_its_error(kind):
    """The standard error is that of the bootstrap."""
    logits, labels = drawn(kind)
    found = contributions(kind, logits, labels)
    name = LEADING[kind][0]
    assert found.mean() == pytest.approx(metrics.compute(kind, logits, labels)[name])
    low, high = metrics.intervals(kind, logits, labels)[name]
    assert found.std() / len(found) ** 0.5 == pytest.approx((high - low) / 3.92, rel=0.15)


@pytest.mark.parametrize("kind", [MULTI, VALUE])
def test_nothing_predicted_and_nothing_wrong(kind):
    labels = np.zeros((3, 2)) if kind == MULTI else np.zeros(3)
    assert not contributions(kind, labels.reshape(3, -1) - (kind == MULTI), labels).any()
    assert difference_error(np.ones(1), None) == np.inf


def course(kind=SINGLE):
    made = Course(kind)
    made.trainer = SimpleNamespace(is_in_train=True, state=SimpleNamespace(epoch=1.0, log_history=[]))
    return made, made.watching(lambda p: {})


def answers(right, size=100):
    """Predictions of which the first so many are right."""
    labels = np.zeros(size, int)
    return EvalPrediction(np.eye(2)[(np.arange(size) >= right).astype(int)], labels)


def test_a_drop_beyond_chance_is_seen():
    made, evaluate = course()
    for epoch, right, drops in ((1, 60, False), (2, 65, False), (3, 62, False), (4, 35, True), (5, 64, False)):
        made.trainer.state.epoch = float(epoch)
        evaluate(answers(right))
        assert (made.drop is not None) == drops
    assert made.compare(answers(30)).to_dict() == dict(
        metric="accuracy", value=0.3, best=0.65, best_epoch=2.0, examples=100
    )
    assert str(made.compare(answers(30))) == "worse than 0.6500 at epoch 2.00, by more than chance"
    made.trainer.is_in_train = False
    evaluate(answers(100))  # of another split
    assert made.compare(answers(66)) is None


def test_pairs_tell_more_than_two_separate_evaluations():
    """Six examples of 100 that were right and are wrong now are no accident, 60 and 54 of others may be."""
    made, evaluate = course()
    evaluate(answers(70))
    assert made.compare(answers(62)) is not None
    resumed, _ = course()
    resumed.trainer.state.log_history = [{"eval_accuracy": 0.70, "epoch": 3.0, "step": 9}]
    assert resumed.compare(answers(62)) is None
    assert resumed.compare(answers(40)).best_epoch == 3.0


def test_an_error_that_grows_is_a_drop_too():
    made, evaluate = course(VALUE)
    labels = np.arange(50.0)
    noise = np.random.default_rng(0).normal(size=50)
    evaluate(EvalPrediction((labels + noise)[:, None], labels))
    assert made.compare(EvalPrediction((labels + 0.5 * noise)[:, None], labels)) is None
    assert made.compare(EvalPrediction((labels + 3 * noise)[:, None], labels)).metric == "rmse"
    assert made.compare(EvalPrediction((labels * np.nan)[:, None], labels)) is None


def test_a_run_that_gets_worse_says_so(tmp_path, tiny_bert_folder, capsys, monkeypatch):
    shares = iter([0.75, 0.25, 0.25])  # two epochs, then the last weights
    monkeypatch.setattr(
        "hf_transfer.training.course.contributions",
        lambda kind, logits, labels: (np.arange(len(labels)) < next(shares) * len(labels)).astype(float),
    )
    rows = [f"{'abcdefgh'[i % 8]},{'xy'[i % 2]}\n" for i in range(160)]
    (tmp_path / "data.csv").write_text("text,label\n" + "".join(rows))
    keys = dict(preflight=False, data_facts=False, strategy="linear-probe", num_train_epochs=2, calibrate=False)
    run = fine_tune(tiny_bert_folder, train_file=str(tmp_path / "data.csv"), output_dir=str(tmp_path / "out"), **keys)
    out = capsys.readouterr().out
    assert run.results["kept"]["drop"]["value"] == 0.25
    validations = [line for line in out.splitlines() if line.startswith("  validation at")]
    assert [line.endswith(" (worse than 0.7500 at epoch 1.00, by more than chance)") for line in validations] == [0, 1]
    assert "Warning: training made the model worse: validation accuracy fell from 0.7500 at epoch 1.00 to 0.25" in out
