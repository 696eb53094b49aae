"""`refit` of a run that fine-tunes: what is saved is the mean of several trainings, and what is measured is said."""

from __future__ import annotations

import re
import shutil
from typing import Any

import numpy as np
import pandas
import pytest
import torch
import yaml

from hf_transfer import Predictor, UserError
from hf_transfer.analysis.few_labels import Choice
from hf_transfer.cli.program import main
from hf_transfer.data.record import Record
from hf_transfer.evaluation import conformal, metrics, standing
from hf_transfer.evaluation.calibration import fit_temperature
from hf_transfer.evaluation.thresholds import logits_of
from hf_transfer.hub import card_sections
from hf_transfer.inference.benchmarking import benchmark
from hf_transfer.models.averaging import Mean
from hf_transfer.report import answers as answer_sections
from hf_transfer.report.run_files import RunFiles
from hf_transfer.run_folder import EXAMPLES, RUN_FILE
from hf_transfer.runs import ending, trainings
from hf_transfer.runs.calibrating import choose as calibrates
from hf_transfer.runs.choosing import choose
from hf_transfer.runs.prepare import make_trainer, prepare, prepare_splits
from hf_transfer.runs.preview import plan_only
from hf_transfer.runs.refitting import calibrates_on
from hf_transfer.runs.refitting import choose as refits
from hf_transfer.settings import Config
from tests.runs.helpers import plain_logits, sentences
from tests.runs.test_refitting import KEYS as SOLVED
from tests.runs.test_refitting import rows
from tests.runs.test_refitting import run as run_on

KEYS = {"strategy": "full", "probe_solver": "sgd", "num_train_epochs": 1, "learning_rate": 1e-3, "calibrate": True}


def run(model: str, folder: Any, kind: str = "classes", **more: Any) -> Any:
    return run_on(model, folder, kind, **{**KEYS, **more})


@pytest.fixture(scope="module")
def pair(tiny_bert_folder, tmp_path_factory):
    """(the mean of several trainings, one training alone, the states of the further ones when they were finished)."""
    folder, made = tmp_path_factory.mktemp("pair"), []
    make, patch = trainings._trainer, pytest.MonkeyPatch()
    patch.setattr(trainings, "_trainer", lambda *given: made.append(make(*given)) or made[-1])
    states: list[dict[str, torch.Tensor]] = []
    including = Mean.including
    patch.setattr(Mean, "including", lambda own, state: states.append(dict(state)) or including(own, state))
    both = [run(tiny_bert_folder, folder / str(value), refit=value) for value in (True, False)]
    patch.undo()
    return *both, states, made


def test_the_saved_weights_are_the_mean_of_all_trainings(pair):
    several, alone, states, _ = pair
    assert len(states) == 4 == several.results["refit"]["solution"]["trainings"]  # a quarter is held out
    temperatures = [one.results["calibration"]["temperature"] for one in (several, alone)]
    for name, value in several.model.state_dict().items():
        by, alone_by = temperatures if name.startswith("classifier") else (1.0, 1.0)
        wanted = torch.stack([state[name].double() for state in states]).mean(0) / by
        torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-8)
        own = alone.model.state_dict()[name] * alone_by
        torch.testing.assert_close(states[0][name], own, rtol=1e-6, atol=1e-8)  # the first is the run without refit
    apart = [float((states[0]["classifier.weight"] - state["classifier.weight"]).abs().max()) for state in states[1:]]
    assert min(apart) > 1e-4
    texts = rows(4)["text"]
    with torch.no_grad():
        own = several.model(**several.predictor.processor(texts, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(plain_logits(several.output_dir, texts), own, rtol=1e-4, atol=1e-5)


def test_each_holds_out_examples_of_its_own(pair):
    several, _, _, made = pair
    held_out = list(several.predictor._held_out(None, "validation").examples["text"])
    ids = several.predictor.processor(rows(48)["text"])["input_ids"]
    known = {tuple(one): i for i, one in enumerate(ids)}
    parts = [[known[tuple(one)] for one in again.eval_dataset["input_ids"]] for again in made]
    parts.append([rows(48)["text"].index(text) for text in held_out])
    assert sorted(np.concatenate(parts)) == list(range(48)), "each example is held out once"
    for again, part in zip(made, parts, strict=False):
        trained = {known[tuple(one)] for one in again.train_dataset["input_ids"]}
        assert trained == set(range(48)) - set(part)


def test_what_was_measured_before_is_of_the_first(pair):
    several, alone, *_ = pair
    assert several.results["validation_metrics"] == alone.results["validation_metrics"]
    assert several.metrics != alone.metrics
    assert Predictor.load(several.output_dir).evaluate(rows(30, first=60))["metrics"]["loss"] == pytest.approx(
        several.metrics["loss"], rel=1e-5
    )
    histories = [(one.output_dir / "history.jsonl").read_text().count("\n") for one in (several, alone)]
    assert histories[0] == histories[1], "the further trainings log nothing"
    assert Record.load(several.output_dir / EXAMPLES).refitted and not Record.load(alone.output_dir / EXAMPLES).refitted
    card = (several.output_dir / "README.md").read_text()
    assert "the mean of 4 trainings" in card and "4 trainings" not in (alone.output_dir / "README.md").read_text()
    assert main(["report", str(several.output_dir)]) == 0
    page = re.sub(r"\s+", " ", (several.output_dir / "report.html").read_text())
    assert "mean of the weights of 4 trainings" in page and "48 examples together: accuracy" in page


def test_the_mean_is_measured_and_calibrated_on_what_each_held_out(pair):
    """On the answers of the states that were averaged, all examples together."""
    several, _, states, made = pair
    kept = {name: value.clone() for name, value in several.model.state_dict().items()}
    answers, labels = [], []
    held_out = [several.trainer.eval_dataset, *(again.eval_dataset for again in made)]
    for state, examples in zip(states, held_out, strict=True):
        several.model.load_state_dict(state)
        answer = several.trainer.predict(examples)
        answers.append(logits_of(answer.predictions))
        labels.append(answer.label_ids)
    several.model.load_state_dict(kept)
    logits, truth = np.concatenate(answers), np.concatenate(labels)
    right = logits.argmax(-1) == truth
    said = several.results["refit"]["solution"]["held_out_metric"]
    assert (said["metric"], said["examples"], said["value"]) == ("accuracy", 48, pytest.approx(np.mean(right)))
    assert said["standard_error"] == pytest.approx(np.std(right, ddof=1) / 48**0.5)
    most = np.bincount(several.trainer.train_dataset["labels"]).argmax()
    constant = np.mean(truth == most)
    assert said["interval"] == metrics.intervals("single_label_classification", logits, truth)["accuracy"]
    assert said["baseline"] == pytest.approx(constant)
    assert said["verdict"] == standing.verdict("accuracy", {"accuracy": constant}, {"accuracy": said["interval"]})
    fitted = several.results["calibration"]
    assert fitted["temperature"] == pytest.approx(fit_temperature(logits, truth, None).temperature, rel=1e-4)
    assert (fitted["examples"], fitted["split"]) == (48, "held out")
    stored = Predictor.load(several.output_dir).model.config.conformal
    wanted = conformal.record_of(logits / fitted["temperature"], truth)
    assert stored["examples"] == 48 and np.allclose(stored["scores"], wanted["scores"], atol=1e-4)
    sentence = f"48 examples together: accuracy {np.mean(right):.4f}"
    measured = several.results | {"metrics_split": "validation"}
    assert sentence in " ".join(card_sections._refit(measured)) and sentence in " ".join(ending.ending(several.results))
    assert "48 examples, each held out by one training" in (several.output_dir / "README.md").read_text()


@pytest.mark.parametrize(("own", "words"), [("worse", "Worse than"), ("not significantly better", "Not significantly")])
def test_whether_it_is_better_than_the_baseline_is_judged_on_all_that_was_held_out(own, words, pair):
    """Where there is a test split, on that."""
    solution = pair[0].results["refit"]["solution"]
    judged = solution["held_out_metric"] | {"verdict": own, "value": 0.3, "interval": [0.2, 0.4]}
    results = pair[0].results | {"refit": {"solution": solution | {"held_out_metric": judged}}}
    measured = results | {"metrics_split": "validation"}
    (said,) = [line for line in ending.ending(measured) if "the baseline, which" in line]
    assert said.startswith(words) and "0.3000 (95% CI 0.2000 to 0.4000) on 48 examples, each held out by" in said
    (other,) = [line for line in ending.ending(results) if "the baseline, which" in line]
    assert "held out" not in other and other.startswith("Better than") == (results["baseline"]["verdict"] == "better")
    doubts = [" ".join(card_sections._doubt(one)) for one in (measured, results)]
    assert "on all 48 examples that the trainings held out" in doubts[0] and "trainings" not in doubts[1]
    shown = [
        str(answer_sections._verdict(RunFiles(pair[0].output_dir, one), one["baseline"])) for one in (measured, results)
    ]
    assert words in shown[0] and "48 examples, each held out" in shown[0] and "held out" not in shown[1]


def test_where_nothing_is_held_out_any_more_what_was_measured_before_is_said(pair, tmp_path, capsys):
    several = pair[0]
    shutil.copytree(several.output_dir, folder := tmp_path / "run")
    keys = yaml.safe_load((folder / RUN_FILE).read_text())
    pandas.DataFrame(rows(48)).to_csv(tmp_path / "train.csv", index=False)
    keys |= {"dataset_name": None, "train_file": str(tmp_path / "train.csv")}
    (folder / RUN_FILE).write_text(yaml.safe_dump(keys))
    said = several.results["refit"]["solution"]["held_out_metric"]
    assert main(["evaluate", str(folder)]) == 2
    error = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "holds out no example any more" in error
    assert f"48 examples together: accuracy {said['value']:.4f} (standard error" in error
    table = benchmark(folder, forms=["pt2"], seconds=0.01)
    assert any("12 of these 12 examples were trained on" in note for note in table.notes)
    assert any("12 of these 12 examples were trained on" in line for line in table.lines())


@pytest.mark.parametrize(("count", "why"), [(24, ""), (19, "there are 19 validation examples, fewer than 20")])
def test_all_that_is_held_out_counts_for_the_calibration(count, why, tiny_bert_folder, tmp_path):
    given = {**SOLVED, **KEYS, "refit": True, "output_dir": str(tmp_path / "out"), "calibrate": "auto"}
    given |= dict(model_name_or_path=tiny_bert_folder, train_file=sentences(tmp_path / "train.csv", count))
    prepared = choose(prepare(Config.from_sources({}, given)))
    splits = prepare_splits(prepared)
    trainer = make_trainer(prepared, splits["train"], splits["validation"])
    refit = refits(prepared, trainer)
    assert trainings.held_out(prepared) == count
    found = calibrates(trainer, "single_label_classification", calibrates_on(refit, prepared, trainer))
    assert (found.value, found.why) == (not why, why)
    assert not calibrates(trainer, "single_label_classification").value, "one training alone has too few"


@pytest.mark.parametrize(("answers", "expects"), [(99, True), (100, False)])
def test_a_loss_is_expected_of_the_mean_where_there_are_few_answers(answers, expects, monkeypatch):
    seen = []
    monkeypatch.setattr(trainings, "expected_loss", lambda trainer: 0.5)
    monkeypatch.setattr(trainings, "divide", lambda trainer, temperature: seen.append(temperature))
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(answers, 2)), rng.integers(0, 2, answers)
    fitted = trainings._redo(None, logits, labels, fit_temperature(logits, labels), None)
    assert fitted == fit_temperature(logits, labels, 0.5 if expects else None) and seen == [fitted.temperature]
    assert fitted != fit_temperature(logits, labels, None if expects else 0.5)


def test_run_yaml_repeats_it_bit_for_bit(pair, tmp_path):
    several = pair[0]
    values = yaml.safe_load((several.output_dir / "run.yaml").read_text())
    own = {n: v for n, v in values.items() if n in {**SOLVED, **KEYS} or n in ("refit", "seed")}
    again = run(values["model_name_or_path"], tmp_path / "out", **own)
    for name, value in several.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_a_run_that_was_interrupted_goes_on_to_the_same_mean(tiny_bert_folder, tmp_path):
    """The further trainings begin where the first did, with what `pooling` computed from the training examples."""
    keys = {"refit": True, "pooling": "mean", "num_train_epochs": 2, "save_strategy": "epoch", "save_total_limit": None}
    whole = run(tiny_bert_folder, tmp_path / "whole", **keys)
    shutil.copytree(whole.output_dir, tmp_path / "part")
    _, last = sorted((tmp_path / "part").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    shutil.rmtree(last)
    (tmp_path / "part" / "results.json").unlink()
    part = run(tiny_bert_folder, tmp_path / "part", **keys, resume_from_checkpoint="auto")
    assert part.results["calibration"] == whole.results["calibration"]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, part.model.state_dict()[name]), name


def test_a_mean_that_is_worse_is_not_saved(pair, tiny_bert_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(trainings, "_is_worse", lambda *given: True)
    kept = run(tiny_bert_folder, tmp_path / "out", refit=True)
    for name, value in pair[1].model.state_dict().items():
        assert torch.equal(value, kept.model.state_dict()[name]), name
    refit = kept.results["refit"]
    assert not refit["value"] and "worse on the validation split" in refit["why"] and refit["solution"] is None
    assert not Record.load(tmp_path / "out" / EXAMPLES).refitted


def test_plan_says_what_the_others_take(tiny_bert_folder, tmp_path, capsys):
    given = {**SOLVED, **KEYS, "refit": True, "output_dir": str(tmp_path / "out"), "expected_accuracy": False}
    given |= dict(model_name_or_path=tiny_bert_folder, train_file=sentences(tmp_path / "train.csv"))
    plan_only(Config.from_sources({}, given))
    assert re.search(r"refit: on: after the 11 .* 3 more trainings \(about .*\) hold out", capsys.readouterr().out)


def test_worse_by_more_than_chance():
    class Answers:
        def __init__(self, right: int):
            self.label_ids = np.zeros(40, dtype=int)
            self.predictions = np.tile([1.0, 0.0], (40, 1))
            self.predictions[right:] = [0.0, 1.0]

    kind = "single_label_classification"
    assert trainings._is_worse(kind, Answers(20), Answers(38))
    assert not trainings._is_worse(kind, Answers(36), Answers(38)) and not trainings._is_worse(
        kind, Answers(38), Answers(20)
    )


@pytest.mark.parametrize("kind", ["several", "numbers"])
def test_of_every_kind(kind, tiny_bert_folder, tmp_path):
    result = run(tiny_bert_folder, tmp_path / "out", kind, refit=True, calibrate=kind == "several")
    assert result.results["refit"]["solution"]["trainings"] == 4
    assert (result.results["refit"]["solution"]["calibration"] is not None) == (kind == "several")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"validation_file": True}, "the validation split is the data's own"),
        ({"adapter": "lora"}, "the mean of adapters is not the adapter of the mean"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end: True is for one training"),
        ({"max_hours": 1.0}, "max_hours: 1.0 is for one training"),
        ({"ema_decay": 0.9}, "ema_decay: 0.9 is for one training"),
        ({"max_train_samples": 40}, "44 examples with those held out would be more than max_train_samples: 40"),
    ],
)
def test_where_it_is_not_possible(more, why, tiny_bert_folder, tmp_path):
    file = sentences(tmp_path / "train.csv")
    if "validation_file" in more:
        more = {"validation_file": sentences(tmp_path / "validation.csv", 10)}
    own = {**SOLVED, **KEYS, **more, "train_val_split": None if "validation_file" in more else 0.25, "refit": True}
    if "load_best_model_at_end" in own:
        own |= {"save_strategy": "epoch", "eval_strategy": "epoch"}
    given = dict(model_name_or_path=tiny_bert_folder, train_file=file, output_dir=str(tmp_path / "out"), **own)
    prepared = choose(prepare(Config.from_sources({}, given)))
    splits = prepare_splits(prepared)
    trainer = make_trainer(prepared, splits["train"], splits["validation"])
    with pytest.raises(UserError, match=re.escape(why)):
        refits(prepared, trainer)


@pytest.mark.parametrize(
    ("more", "count", "averages"),
    [
        ({}, 44, True),
        ({}, 400, False),
        ({"refit": False}, 44, False),
        ({"num_train_epochs": 3.0}, 44, False),  # how long to train is decided already
        ({"max_steps": 10}, 44, False),
        ({"strategy": "two-phase", "head_init": "probe"}, 44, False),
        ({"adapter": "lora"}, 44, False),
        ({"early_stopping_patience": 2}, 44, False),
        ({"effort": "quick"}, 44, False),
        ({"effort": "best"}, 44, True),  # does no more than that
        ({"among": True}, 44, False),  # runs that are compared need the validation split
        ({"label_column_name": "several"}, 44, False),  # not measured
    ],
)
def test_few_sentences_are_trained_on_several_times_where_auto_decides_how_long(
    more, count, averages, tiny_bert_folder, tmp_path
):
    more, among = {**more}, more.get("among", False)
    more.pop("among", None)
    file = tmp_path / "train.csv"
    frame = pandas.read_csv(sentences(file, count))
    frame.assign(several=frame["label"].map(str) + ";x").to_csv(file, index=False)
    more |= {"label_delimiter": ";"} if "label_column_name" in more else {"label_column_name": "label"}
    given = dict(model_name_or_path=tiny_bert_folder, train_file=str(file), text_column_name="text", **more)
    config = Config.from_sources({}, {**given, "output_dir": str(tmp_path / "out")})
    found = choose(prepare(config), is_one_of_several=among)
    assert (found.chosen.keys.get("refit", Choice(None, "")).value is True) == averages
    assert (found.config.values["refit"] is True) == averages
    if averages:
        assert found.config.values["num_train_epochs"] == 12 and found.chosen.keys["num_train_epochs"].why.endswith(
            "each"
        )


@pytest.mark.parametrize(
    ("more", "count", "strategy"),
    [
        ({}, 28, "two-phase"),  # 11 of each class are trained on
        ({"refit": False}, 28, "linear-probe"),  # one training would undo the head
        ({"max_steps": 10}, 28, "linear-probe"),
        ({"effort": "best"}, 28, "two-phase"),
        ({}, 20, "linear-probe"),
    ],
)
def test_fewer_per_class_are_fine_tuned_on_where_trainings_are_averaged(
    more, count, strategy, tiny_bert_folder, tmp_path
):
    given = dict(model_name_or_path=tiny_bert_folder, train_file=sentences(tmp_path / "train.csv", count), **more)
    values = choose(prepare(Config.from_sources({}, {**given, "output_dir": str(tmp_path / "out")}))).config.values
    assert values["strategy"] == strategy and (values["refit"] is True) == (strategy == "two-phase")


@pytest.mark.parametrize(
    ("more", "averages"),
    [({}, True), ({"strategy": "gradual"}, True), ({"refit": False}, False), ({"max_hours": 1.0}, False)],
)
def test_effort_best_averages_where_there_are_few(more, averages, tiny_bert_folder, tmp_path):
    given = {**SOLVED, "probe_solver": "sgd", "strategy": "full", **more}
    given |= dict(model_name_or_path=tiny_bert_folder, train_file=sentences(tmp_path / "train.csv"), effort="best")
    keys = choose(prepare(Config.from_sources({}, {**given, "output_dir": str(tmp_path / "out")}))).chosen.keys
    assert ("refit" in keys and keys["refit"].value is True) == averages
    assert (
        "load_best_model_at_end" in keys and keys["num_train_epochs"].why.startswith("effort: best")
        if not averages
        else ("load_best_model_at_end" not in keys and "num_train_epochs" not in keys)
    )
