"""`refit`: what is measured is of the first head, what is saved was solved for on all labels, and both are said."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from sklearn.linear_model import LogisticRegression, Ridge

from hf_transfer import Predictor, UserError, fine_tune
from hf_transfer.cli.program import main
from hf_transfer.data.record import Record
from hf_transfer.features.convex_head import Problem
from hf_transfer.keys import keys
from hf_transfer.run_folder import EXAMPLES
from hf_transfer.runs.choosing import choose
from hf_transfer.runs.prepare import make_trainer, prepare, prepare_splits
from hf_transfer.runs.refitting import choose as refits
from hf_transfer.runs.soup import soup
from hf_transfer.settings import Config
from tests.runs.helpers import plain_logits, sentences

KEYS = dict(
    strategy="linear-probe",
    probe_solver="lbfgs",
    pooling=None,
    train_val_split=0.25,
    data_facts=False,
    preflight=False,
    label_issues=False,
    report_to="none",
    use_cpu=True,
)


def rows(count: int, kind: str = "classes", first: int = 0) -> dict[str, list[Any]]:
    """Texts of which a word says the label, mostly; their order in a table of columns."""
    numbers = range(first, first + count)
    texts = [f"{'a ' * (i % 3)}film {i} {'fine' if i % 2 else 'dull'} {'man' if i % 3 else 'day'}" for i in numbers]
    labels: list[Any] = ["xy"[i % 2] if i % 7 else "z" for i in numbers]
    if kind == "several":
        labels = [
            [*(["odd"] if i % 2 else []), *(["three"] if i % 3 else []), *["any"] * (i % 5 == 0)] for i in numbers
        ]
    if kind == "numbers":
        labels = [i % 2 + 0.5 * (i % 3) + 0.01 * i for i in numbers]
    return {"text": texts, "label": labels}


def run(model: str, folder: Any, kind: str = "classes", **more: Any) -> Any:
    data = DatasetDict(train=Dataset.from_dict(rows(48, kind)), test=Dataset.from_dict(rows(30, kind, 60)))
    return fine_tune(model, data, output_dir=str(folder), **{**KEYS, "log_level": "error", **more})


def head_inputs(result: Any, split: str) -> torch.Tensor:
    """(examples, width) what the classifier reads of a split."""
    seen: list[torch.Tensor] = []
    model, texts = result.model.eval(), list(result.predictor._held_out(None, split).examples["text"])
    handle = model.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for text in texts:
            model(**result.predictor.processor(text, return_tensors="pt").to(model.device))
    handle.remove()
    return torch.cat(seen).double()


def every(result: Any) -> tuple[torch.Tensor, np.ndarray]:
    """(features, labels) of the training and validation examples of a run."""
    splits = ("train", "validation")
    labels = [result.predictor._held_out(None, split).examples["labels"][:] for split in splits]
    return torch.cat([head_inputs(result, split) for split in splits]), np.concatenate([np.array(y) for y in labels])


def standardized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean, sd = x.mean(0), x.std(0, correction=0)
    return (x - mean) / sd.clamp(min=0.1 * float(sd.median())), mean, sd


@pytest.fixture(scope="module")
def pair(tiny_bert_folder, tmp_path_factory):
    """The same run with a test split: solved for again, and not."""
    folder = tmp_path_factory.mktemp("pair")
    return [run(tiny_bert_folder, folder / str(value), refit=value, calibrate=True) for value in ("auto", False)]


@pytest.fixture(scope="module")
def table(tiny_bert_folder, tmp_path_factory):
    """Runs on a table without a test split: solved for again, and not."""
    folder = tmp_path_factory.mktemp("table")
    file = str(folder / "train.csv")
    Dataset.from_dict(rows(44)).to_csv(file)
    more = {**KEYS, "log_level": "error"}
    return [
        fine_tune(tiny_bert_folder, train_file=file, output_dir=str(folder / str(v)), refit=v, **more)
        for v in ("auto", False)
    ]


def test_the_saved_head_is_that_of_scikit_learn_on_all_labels(pair):
    again, first = pair
    x, y = every(again)
    solution = again.results["refit"]["solution"]
    assert (solution["examples"], solution["held_out"]) == (48, 12) == (len(x), 12)
    assert solution["l2"] == again.results["probe"]["l2"] == first.results["probe"]["l2"]
    z = standardized(x)[0].numpy()
    peer = LogisticRegression(C=1 / (solution["l2"] * len(x)), tol=1e-10, max_iter=10_000).fit(z, y)
    temperature = again.results["calibration"]["temperature"]
    assert temperature == pytest.approx(first.results["calibration"]["temperature"]) and temperature != 1
    with torch.no_grad():
        own = again.model.classifier(x.float()).double().numpy() * temperature
    np.testing.assert_allclose(own, peer.decision_function(z), atol=2e-3 * np.abs(own).max())
    assert solution["loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(torch.tensor(own), torch.tensor(y))), rel=1e-3
    )


def test_validation_is_of_the_first_head_and_test_of_the_saved_one(pair):
    again, first = pair
    assert again.results["validation_metrics"] == first.results["validation_metrics"]
    assert again.results["calibration"] == first.results["calibration"]
    assert again.results["kept"] == first.results["kept"] == {"weights": "solution"}
    assert again.model.config.conformal == first.model.config.conformal
    assert again.metrics != first.metrics
    loaded = Predictor.load(again.output_dir)
    test = Dataset.from_dict(rows(30, first=60))
    assert loaded.evaluate(test)["metrics"] == again.metrics
    texts = rows(4)["text"]
    same = plain_logits(again.output_dir, texts) - plain_logits(first.output_dir, texts)
    assert float(same.abs().max()) > 1e-3
    assert first.results["refit"] == {"value": False, "why": "", "solution": None}
    files = [yaml.safe_load((one.output_dir / "run.yaml").read_text())["refit"] for one in pair]
    assert files == [True, False]


def test_run_yaml_repeats_it_bit_for_bit(pair, tmp_path):
    again = pair[0]
    values = yaml.safe_load((again.output_dir / "run.yaml").read_text())
    own = {n: v for n, v in values.items() if n in KEYS or n in ("refit", "calibrate", "seed")}
    more = run(values["model_name_or_path"], tmp_path / "out", **own)
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, more.model.state_dict()[name]), name


def test_without_a_test_split_the_metrics_are_said_to_be_of_the_first_head(table, capsys):
    again, first = table
    assert again.metrics == first.metrics == again.results["validation_metrics"]
    assert again.results["intervals"] == first.results["intervals"]
    card = (again.output_dir / "README.md").read_text()
    assert "These metrics are of a head that was fitted to the 33 training examples." in card
    assert "fitted again with the same penalty to all 44 examples, the 11 held out for validation too" in card
    assert "fitted again" not in (first.output_dir / "README.md").read_text()


def test_what_was_trained_on_is_not_measured_as_if_it_were_held_out(table, capsys):
    again, first = table
    folder = str(again.output_dir)
    assert Record.load(again.output_dir / EXAMPLES).refitted and not Record.load(first.output_dir / EXAMPLES).refitted
    assert main(["evaluate", folder]) == 2
    assert re.search(r"holds out no example any more.*11 validation\s+examples", capsys.readouterr().err, re.DOTALL)
    with pytest.raises(UserError, match="refit: true"):
        again.errors()
    found = again.evaluate(split="validation")
    assert found["num_examples"] == 11 and "11 of these 11 examples were trained on" in found["notes"][0]
    assert found["metrics"]["loss"] < again.metrics["loss"]
    assert first.evaluate()["metrics"] == first.metrics and first.evaluate()["notes"] == []
    held_out = list(first.predictor._held_out(None, "validation").examples["text"])
    other = Dataset.from_dict({"text": [*held_out, "a new film fine"], "label": ["x"] * 11 + ["y"]})
    left = Predictor.load(folder).evaluate(other)
    assert left["left_out"] == {"trained_on": 11} and left["num_examples"] == 1


def test_weights_cannot_be_chosen_on_what_they_were_solved_for_on(table, tmp_path):
    again, first = table
    with pytest.raises(UserError, match=r"trained on 11 of the 11 validation examples.*refit: false"):
        soup([again.output_dir, first.output_dir], tmp_path / "soup")


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("classes", {"class_weights": "auto", "logit_adjustment": "f1_macro", "calibrate": True}),
        ("several", {"tune_thresholds": True, "calibrate": True}),
        ("numbers", {}),
    ],
)
def test_of_every_kind(kind, more, tiny_bert_folder, tmp_path):
    """The saved logits are those of a solution on all examples, divided and shifted as the first head's were."""
    result = run(tiny_bert_folder, tmp_path / "out", kind, **more)
    (x, y), results = every(result), result.results
    problem_type, loss = results["problem_type"], result.trainer.objective.loss
    labels = torch.tensor(y) if kind == "classes" else torch.tensor(y, dtype=torch.float64).reshape(len(y), -1)
    outputs = len(results["labels"]) if kind != "numbers" else 1
    problem = Problem(problem_type, x.float(), labels, outputs, loss and loss.weights)
    wanted = problem.exact(results["refit"]["solution"]["l2"]).logits(x)
    if calibration := results["calibration"]:
        wanted = wanted / calibration["temperature"]
    if (adjustment := results["logit_adjustment"]) and adjustment["strength"]:
        wanted = wanted + torch.tensor(adjustment["offsets"])
    with torch.no_grad():
        own = result.model.classifier(x.float()).double()
    torch.testing.assert_close(own, wanted, rtol=0, atol=2e-3 * float(wanted.abs().max()))
    if kind == "numbers":
        z = standardized(x)[0].numpy()
        ridge = Ridge(alpha=results["refit"]["solution"]["l2"] * len(x), tol=1e-10).fit(z, y)
        np.testing.assert_allclose(own[:, 0].numpy(), ridge.predict(z), atol=2e-3 * np.abs(y).max())
    if kind == "several":
        assert len(result.model.config.label_thresholds) == 3


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"strategy": "full", "probe_solver": "sgd"}, "the head is not solved for"),
        ({"validation_file": True}, "the validation split is the data's own"),
        ({"max_train_samples": 40}, "44 examples with those held out would be more than max_train_samples: 40"),
    ],
)
def test_where_there_is_nothing_to_add(more, why, tiny_bert_folder, tmp_path):
    file = sentences(tmp_path / "train.csv")
    if "validation_file" in more:
        more = {"validation_file": sentences(tmp_path / "validation.csv", 10)}
    own = {**KEYS, **more, "train_val_split": None if "validation_file" in more else 0.25}
    given = dict(model_name_or_path=tiny_bert_folder, train_file=file, output_dir=str(tmp_path / "out"), **own)

    def made(**refit):
        prepared = choose(prepare(Config.from_sources({}, {**given, **refit})))
        splits = prepare_splits(prepared)
        return prepared, make_trainer(prepared, splits["train"], splits["validation"])

    found = refits(*made())
    assert not found.value and found.why == why
    if own["strategy"] == "full":
        assert refits(*made(refit=True)).value, "several trainings: tests/runs/test_trainings.py"
    else:
        with pytest.raises(UserError, match=re.escape(why)):
            refits(*made(refit=True))


def test_runs_of_a_comparison_keep_their_validation_split(tiny_bert_folder, tmp_path):
    file = sentences(tmp_path / "train.csv")
    given = dict(model_name_or_path=tiny_bert_folder, train_file=file, output_dir=str(tmp_path / "out"), **KEYS)
    prepared = choose(prepare(Config.from_sources({}, given)))
    splits = prepare_splits(prepared)
    trainer = make_trainer(prepared, splits["train"], splits["validation"])
    assert refits(prepared, trainer).value
    assert not refits(prepared, trainer, is_one_of_several=True).value


def test_a_wrong_word_is_refused():
    assert keys()["refit"].default == "auto"
    with pytest.raises(UserError, match=r"refit: .*maybe"):
        Config.from_sources({}, {"model_name_or_path": "m", "train_file": "f", "output_dir": "o", "refit": "maybe"})


def test_the_run_says_it(tiny_bert_folder, tmp_path, capsys):
    file = sentences(tmp_path / "train.csv")
    words = [f"--{name}={json.dumps(value)}" for name, value in KEYS.items() if value is not None]
    out = str(tmp_path / "out")
    where = [f"--model_name_or_path={tiny_bert_folder}", f"--train_file={file}", f"--output_dir={out}", "--pooling=cls"]
    assert main(["train", *where, *(w.replace('"', "") for w in words)]) == 0
    said = capsys.readouterr().out
    assert "refit: on: measured on the 11 validation examples, the head is solved for again on all 44" in said
    assert "solved for again on all 44 examples (refit); all metrics above are of the head of the 33" in said
    assert f"evaluate {out}" not in said
