"""The accuracy that `plan` and a run expect: of what it is told, and that nothing is changed by it."""

from __future__ import annotations

import json

import pytest
import torch

from hf_transfer import fine_tune
from hf_transfer.runs import run as run_module
from hf_transfer.runs.choosing import choose
from hf_transfer.runs.expecting import expect, unsuited
from hf_transfer.runs.label_issues import write_label_issues
from hf_transfer.runs.prepare import make_trainer, prepare, prepare_splits
from hf_transfer.settings import Config
from tests.runs.helpers import sentences, three_layers

QUIET = dict(use_cpu=True, log_level="error", report_to="none", save_strategy="no", preflight=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return sentences(tmp_path_factory.mktemp("data") / "train.csv")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return three_layers(tmp_path_factory.mktemp("model"))


def ready(tmp_path, **keys):
    """(a prepared run, its trainer)."""
    config = Config.from_sources({}, {"output_dir": str(tmp_path / "out"), **QUIET, **keys})
    prepared = choose(prepare(config))
    splits = prepare_splits(prepared)
    return prepared, make_trainer(prepared, splits["train"], splits["validation"])


def test_the_run_is_predicted_and_neither_model_nor_random_numbers_change(model, data, tmp_path):
    prepared, trainer = ready(tmp_path, model_name_or_path=model, train_file=data)
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    state = torch.get_rng_state()
    found = expect(prepared, trainer)
    assert found.examples == found.looked_at == len(prepared.data.train) and found.split == "validation"
    assert found.split_examples == len(prepared.data.splits["validation"])
    assert 0 < found.low < found.accuracy < found.high < 1 and found.layer in [g.name for g in trainer.layer_groups]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())
    assert expect(prepared, trainer) == found


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_of_a_head_alone_only_what_it_reads_counts(model, data, tmp_path, solver):
    keys = dict(strategy="linear-probe", probe_solver=solver, pooling="cls")
    found = expect(*ready(tmp_path, model_name_or_path=model, train_file=data, **keys))
    assert found.measured_with == "" and found.accuracy == pytest.approx(found.frozen)
    assert found.layer in ("head", "layer.2")


def test_what_cannot_be_predicted_says_why(model, data, tmp_path):
    few = ready(tmp_path, model_name_or_path=model, train_file=data, max_train_samples=16)
    assert expect(*few) == "16 training examples are too few for cross-validation"
    scratch = ready(tmp_path, model_name_or_path=model, train_file=data, strategy="scratch")
    assert expect(*scratch).startswith("random weights")
    numbers = tmp_path / "numbers.csv"
    numbers.write_text("text,label\n" + "".join(f"film {i},{i / 7:.3f}\n" for i in range(40)))
    values, _ = ready(tmp_path, model_name_or_path=model, train_file=str(numbers))
    assert unsuited(values) == "accuracy is of one class per example"
    many = tmp_path / "many.csv"
    many.write_text("text,label\n" + "".join(f"film {i},c{i % 12}\n" for i in range(48)))
    classes, _ = ready(tmp_path, model_name_or_path=model, train_file=str(many))
    assert "of 12 classes are too few" in unsuited(classes)


def test_a_run_says_and_writes_it_and_a_resumed_one_keeps_it(model, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_module, "write_label_issues", write_label_issues)
    keys = dict(train_file=data, output_dir=str(tmp_path / "out"), num_train_epochs=2, strategy="full", use_cpu=True)
    keys |= dict(report_to="none", preflight=False, save_strategy="epoch", log_level="warning")
    first = fine_tune(model, **keys).results["expected"]
    assert f"Expected validation accuracy: about {first['accuracy']:.2f}" in capsys.readouterr().out
    (tmp_path / "out" / "results.json").unlink()
    again = fine_tune(model, resume_from_checkpoint="auto", **keys).results["expected"]
    assert again == json.loads(json.dumps(first)) and "Expected" not in capsys.readouterr().out
    without = fine_tune(model, overwrite_output_dir=True, expected_accuracy=False, **keys)
    assert without.results["expected"] is None
