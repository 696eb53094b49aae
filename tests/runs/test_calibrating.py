"""`calibrate`: the saved model gives logits / T everywhere, its accuracy stays, and what cannot be done is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset

from hf_transfer import Predictor, TransferArguments, TransferTrainer, fine_tune
from hf_transfer.cli import predict
from hf_transfer.errors import UserError, WorkFailed
from hf_transfer.inference.predictor import merge
from hf_transfer.keys import keys
from hf_transfer.runs import calibrating
from hf_transfer.runs.calibrating import Choice, choose
from hf_transfer.settings import Config
from tests.helpers import arguments, images, texts, tiny_bert, tiny_vit
from tests.runs.helpers import plain_logits

WORDS = ["red film", "good day", "the man", "no way", "all in"]
KEYS = dict(
    train_val_split=0.5,
    num_train_epochs=1,
    strategy="full",
    learning_rate=1e-2,
    save_strategy="no",
    eval_strategy="no",
    data_facts=False,
    preflight=False,
    log_level="error",
    use_cpu=True,
)


def rows(count: int = 100, several: bool = False, wrong: int = 7) -> Dataset:
    """Labels that follow from the words, but for each seventh, or whichever is `wrong`."""
    labels: list[Any] = [("no", "yes")[(i % 5 < 2) ^ (i % wrong == 0)] for i in range(count)]
    if several:
        labels = [[*(["no"] if i % 5 < 2 else []), *(["yes"] if i % 7 else [])] for i in range(count)]
    return Dataset.from_dict({"text": [f"{WORDS[i % 5]} {i}" for i in range(count)], "label": labels})


def data(count: int = 100, several: bool = False) -> dict[str, Dataset]:
    every = rows(count + 30, several)
    return {"train": every.select(range(count)), "test": every.select(range(count, count + 30))}


@pytest.fixture(scope="module")
def both(tiny_bert_folder, tmp_path_factory):
    """The same run with and without it."""
    folder = tmp_path_factory.mktemp("runs")
    files = {}
    for name, wrong in (("train", 1000), ("validation", 3), ("test", 3)):  # which makes the model overconfident
        files[f"{name}_file"] = str(folder / f"{name}.csv")
        rows(100 if name == "train" else 50, wrong=wrong).to_csv(files[f"{name}_file"])
    longer = {k: v for k, v in KEYS.items() if k != "train_val_split"} | {"num_train_epochs": 6, "drop_leaks": False}
    return [
        fine_tune(tiny_bert_folder, **files, output_dir=str(folder / str(value)), calibrate=value, **longer)
        for value in ("auto", False)
    ]


def test_saved_logits_are_divided_and_predictions_stay(both):
    auto, off = both
    fit = auto.results["calibration"]
    assert fit["split"] == "validation" and fit["examples"] == 50 and fit["temperature"] != 1
    assert auto.results["calibrate"] == {"value": True, "why": ""}
    torch.testing.assert_close(
        plain_logits(auto.output_dir, WORDS),
        plain_logits(off.output_dir, WORDS) / fit["temperature"],
        rtol=1e-5,
        atol=1e-6,
    )
    assert [a["label"] for a in auto.predict(WORDS)] == [a["label"] for a in off.predict(WORDS)]
    for name in ("accuracy", "f1_macro", "mcc"):
        assert auto.metrics[name] == off.metrics[name]
        assert auto.results["validation_metrics"][name] == off.results["validation_metrics"][name]
    assert off.results["calibration"] is None and off.results["calibrate"]["value"] is False


def test_the_results_are_of_the_calibrated_model(both):
    auto, off = both
    fit = auto.results["calibration"]
    assert auto.results["validation_metrics"]["ece"] == pytest.approx(fit["ece_after"], abs=1e-5)
    assert off.results["validation_metrics"]["ece"] == pytest.approx(fit["ece_before"], abs=1e-5)
    again = Predictor.load(auto.output_dir)
    validation = again.evaluate(split="validation")["metrics"]
    assert validation["loss"] == pytest.approx(fit["nll_after"], abs=1e-5)  # not smoothed, as T's likelihood
    assert fit["nll_after"] < fit["nll_before"] and fit["temperature"] > 1.2
    assert again.evaluate()["metrics"]["ece"] == pytest.approx(auto.metrics["ece"])
    assert auto.metrics["ece"] != pytest.approx(off.metrics["ece"], rel=1e-2)
    assert json.loads((auto.output_dir / "results.json").read_text())["calibration"] == fit


def test_run_file_card_and_folder(both):
    auto, off = both
    assert yaml.safe_load((auto.output_dir / "run.yaml").read_text())["calibrate"] is True
    card = (auto.output_dir / "README.md").read_text()
    assert f"Calibration: temperature {auto.results['calibration']['temperature']:.3g}, fitted on 50" in card
    assert "Calibration:" not in (off.output_dir / "README.md").read_text()
    assert not [p.name for p in auto.output_dir.iterdir() if p.name.startswith(".")]


def test_sets_of_a_run(both):
    auto, _ = both
    again = Predictor.load(auto.output_dir).abstaining(0.8)
    for answer, plain in zip(again.predict(WORDS), auto.predict(WORDS), strict=True):
        expected = [n for n, p in plain["scores"].items() if 1 - p <= again.limit]
        assert sorted(answer["set"]) == sorted(expected) and answer["scores"] == pytest.approx(plain["scores"])
        assert answer["abstains"] == (len(expected) != 1)
        assert answer["label"] == (None if answer["abstains"] else plain["label"])
        assert list(answer)[:5] == ["input", "label", "score", "set", "abstains"]
    assert auto.predict(WORDS, coverage=0.8) == again.predict(WORDS)
    assert "set" not in auto.predict(WORDS)[0]
    record = json.loads((auto.output_dir / "config.json").read_text())["conformal"]
    assert record["examples"] == 50 and len(record["scores"]) == 50
    with pytest.raises(UserError, match=r"coverage: 0.99 needs at least 99 validation examples, and the run had 50"):
        auto.predictor.abstaining(0.99)
    for wrong in (lambda: again.looking(stride=2), lambda: auto.predict(WORDS, coverage=0.8, stride=2)):
        with pytest.raises(UserError, match=r"abstain: .*Leave out tta and stride"):
            wrong()


def test_the_command_line_abstains(both, capsys):
    folder = str(both[0].output_dir)
    assert predict.run([folder, *WORDS, "--abstain", "--coverage", "0.8"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = both[0].predict(WORDS, coverage=0.8)
    assert [a["set"] for a in answers] == [e["set"] for e in expected]
    assert [(a["label"], a["score"] is None) for a in answers] == [(e["label"], e["abstains"]) for e in expected]
    predict.run([folder, WORDS[0], "--abstain"])
    assert json.loads(capsys.readouterr().out)["set"] == both[0].predict(WORDS[0], coverage=0.9)[0]["set"]
    for wrong, said in (
        (["--coverage", "0.8"], "coverage: it has no effect without --abstain"),
        (["--abstain", "--coverage", "1"], "coverage: expected a number above 0 and below 1, got 1"),
        (["--abstain", "0.9"], "abstain: '0.9' stands among the inputs.* --abstain --coverage 0.9"),
    ):
        with pytest.raises(UserError, match=said):
            predict.run([folder, *WORDS, *wrong])


def test_a_model_of_others_has_no_sets(tiny_bert_folder):
    with pytest.raises(UserError, match=r"abstain: the model's config.json holds no scores"):
        Predictor.load(tiny_bert_folder).abstaining()


def test_an_adapter_saves_the_divided_layer_and_merges(tiny_bert_folder, tmp_path):
    options = {
        **KEYS,
        "save_strategy": "epoch",
        "adapter": "lora",
        "num_train_epochs": 1,
        "label_smoothing_factor": 0.0,
    }
    run = fine_tune(tiny_bert_folder, data(), output_dir=str(tmp_path / "run"), calibrate=True, **options)
    (checkpoint,) = run.output_dir.glob("checkpoint-*")  # which is not calibrated
    expected = plain_logits(checkpoint, WORDS, tiny_bert_folder) / run.results["calibration"]["temperature"]
    torch.testing.assert_close(plain_logits(run.output_dir, WORDS, tiny_bert_folder), expected, rtol=1e-5, atol=1e-6)
    merge(run.output_dir, tmp_path / "merged")
    torch.testing.assert_close(plain_logits(tmp_path / "merged", WORDS), expected, rtol=1e-4, atol=1e-5)
    assert Predictor.load(tmp_path / "merged").abstaining(0.8).limit == run.predictor.abstaining(0.8).limit
    saved = json.loads((run.output_dir / "config.json").read_text())
    assert saved["architectures"] == ["BertForSequenceClassification"] and saved["conformal"]["examples"] == 50


def test_several_labels_then_thresholds_and_no_sets(tiny_bert_folder, tmp_path):
    options = {**KEYS, "save_strategy": "epoch"}
    run = fine_tune(tiny_bert_folder, data(several=True), output_dir=str(tmp_path), **options)
    fit = run.results["calibration"]
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    expected = plain_logits(checkpoint, WORDS) / fit["temperature"]
    torch.testing.assert_close(plain_logits(tmp_path, WORDS), expected, rtol=1e-5, atol=1e-6)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert set(saved["label_thresholds"]) == {"no", "yes"} and "conformal" not in saved
    assert fit["nll_after"] <= fit["nll_before"]
    with pytest.raises(UserError, match=r"abstain: sets of labels are for classes of which one is right"):
        run.predictor.abstaining()


def test_training_further_forgets_what_the_first_run_measured(both, tmp_path):
    auto, _ = both
    further = fine_tune(
        str(auto.output_dir), data(60), output_dir=str(tmp_path / "b"), **{**KEYS, "train_val_split": 0.25}
    )
    assert further.results["calibrate"]["why"] == "there are 15 validation examples, fewer than 20"
    assert further.results["calibration"] is None
    record = json.loads((tmp_path / "b" / "config.json").read_text())["conformal"]
    assert record["examples"] == 15  # of its own


def test_a_diverged_model_is_not_calibrated(both, monkeypatch):
    auto, _ = both
    nan = WorkFailed("Calibration: the model's validation logits contain NaN or infinite values.")
    monkeypatch.setattr(calibrating, "fit_temperature", lambda *_: (_ for _ in ()).throw(nan))
    before = {n: p.clone() for n, p in auto.model.named_parameters()}
    with pytest.raises(WorkFailed, match="NaN or infinite"):
        calibrating.calibrate(auto.trainer, auto.trainer.eval_dataset, auto.output_dir)
    assert all(torch.equal(p, before[n]) for n, p in auto.model.named_parameters())


def test_a_run_that_could_not_be_calibrated_is_not_repeated_as_one_that_must(tiny_bert_folder, tmp_path, monkeypatch):
    nan = WorkFailed("Calibration: the model's validation logits contain NaN or infinite values.")
    monkeypatch.setattr(calibrating, "fit_temperature", lambda *_: (_ for _ in ()).throw(nan))
    rows().to_csv(tmp_path / "train.csv")
    out = tmp_path / "out"
    result = fine_tune(tiny_bert_folder, train_file=str(tmp_path / "train.csv"), output_dir=str(out), **KEYS)
    assert result.results["calibrate"]["value"] is False and result.results["calibration"] is None
    assert yaml.safe_load((out / "run.yaml").read_text())["calibrate"] is False


# ---- what cannot be calibrated -----------------------------------------------------------------------------------


class Squashed(type(tiny_bert())):
    """Whose logits are not its last linear layer's output."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 3 * torch.tanh(output.logits)
        return output


def trainer_of(folder, model, held_out=None, **keys) -> TransferTrainer:
    held_out = texts(60) if held_out is None else held_out
    return TransferTrainer(model, arguments(folder, **keys), train_dataset=texts(8), eval_dataset=held_out)


def squashed() -> Squashed:
    model = tiny_bert()
    model.__class__ = Squashed
    return model


def tied():
    model = tiny_bert()
    model.bert.pooler.dense.weight = model.classifier.weight = torch.nn.Parameter(torch.randn(8, 8))
    return model


def no_linear_end():
    model = tiny_bert()
    model.classifier = torch.nn.Sequential(torch.nn.Linear(8, 2), torch.nn.LayerNorm(2))
    return model


@pytest.mark.parametrize(
    ("make", "options", "why"),
    [
        (squashed, {}, "its last layer, classifier, is not all that its logits depend on"),
        (tied, {}, "its last layer, classifier, shares its weights with another layer"),
        (no_linear_end, {}, r"its head must end with one linear layer, .* classifier.1 \(LayerNorm\)"),
        (tiny_bert, {"strategy": "full", "freeze": ["head"]}, "its last layer, classifier, is frozen"),
    ],
)
def test_a_model_that_cannot_be_calibrated(tmp_path, make, options, why):
    trainer = trainer_of(tmp_path, make(), calibrate=True, **options)
    with pytest.raises(UserError, match=rf"calibrate: the model cannot be calibrated: {why}\."):
        choose(trainer, "single_label_classification")
    trainer.args.calibrate = "auto"
    choice = choose(trainer, "single_label_classification")
    assert not choice.value and choice.line() == f"calibrate: off: {choice.why}"
    trainer.args.calibrate = False
    assert choose(trainer, "single_label_classification") == Choice(False)


def test_few_examples_regression_and_a_model_that_can(tmp_path):
    for wanted, count, value in (("auto", 19, False), ("auto", 20, True), (True, 3, True)):
        trainer = trainer_of(tmp_path, tiny_bert(), texts(count), calibrate=wanted)
        before = {n: p.clone() for n, p in trainer.model.named_parameters()}
        state = torch.get_rng_state()
        assert choose(trainer, "single_label_classification").value is value
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())
    with pytest.raises(UserError, match=r"calibrate: .*a regression has no probabilities"):
        choose(trainer, "regression")
    args = arguments(tmp_path, calibrate="auto")
    vit = TransferTrainer(tiny_vit(), args, train_dataset=images(8), eval_dataset=images(40))
    assert choose(vit, "single_label_classification").value


def test_the_run_refuses_before_it_trains(tiny_bert_folder, tmp_path):
    values = rows(100).map(lambda row, i: {"label": i / 7}, with_indices=True, remove_columns=["label"])
    with pytest.raises(UserError, match=r"calibrate: .*a regression has no probabilities"):
        fine_tune(tiny_bert_folder, values, output_dir=str(tmp_path / "out"), calibrate=True, **KEYS)
    assert not (tmp_path / "out").exists()


def test_the_key(tmp_path):
    assert keys()["calibrate"].default == "auto"
    assert TransferArguments(str(tmp_path), use_cpu=True).calibrate is False
    base = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": str(tmp_path)}
    for given, value in (("auto", "auto"), ("true", True), (False, False)):
        assert Config.from_sources({"calibrate": given}, base).training.calibrate == value
    with pytest.raises(UserError, match="calibrate: "):
        Config.from_sources({"calibrate": "yes please"}, base)
