"""`strategy: auto` on few examples: what is chosen, kept, repeated and resumed, and what is given wins."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from scipy.special import log_softmax, softmax
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_transfer import UserError, fine_tune
from hf_transfer.analysis import few_labels
from hf_transfer.errors import Interrupted
from hf_transfer.models.pooling_architectures import NEARLY_LINEAR
from hf_transfer.runs import announce, choosing_layers
from hf_transfer.runs.choosing import choose
from hf_transfer.runs.prepare import prepare
from hf_transfer.runs.preview import plan_only
from hf_transfer.settings import Config
from tests.runs.helpers import sentences, three_layers

QUIET = dict(use_cpu=True, log_level="error", report_to="none", save_strategy="no", preflight=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return sentences(tmp_path_factory.mktemp("data") / "train.csv")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return three_layers(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "auto"
    return fine_tune(model, train_file=data, output_dir=str(out), **QUIET)


def keys_of(out):
    return yaml.safe_load((out / "run.yaml").read_text())


def test_a_run_begins_with_the_best_head_on_the_mean_of_the_last_layer(finished):
    keys, results = keys_of(finished.output_dir), json.loads((finished.output_dir / "results.json").read_text())
    assert (keys["strategy"], keys["head_init"], keys["head_epochs"]) == ("two-phase", "probe", 0.0)
    assert keys["num_train_epochs"] == 12.0 and keys["per_device_train_batch_size"] == 16 and keys["refit"] is True
    assert results["refit"]["solution"]["trainings"] == 5
    assert (keys["pooling"], results["auto"]["pooling"]["value"]) == ("mean", "mean")
    assert [keys["pooling_layer"]] == [one["group"] for one in results["pooling_candidates"]] == ["layer.2"]
    assert (results["pooling"]["kept"], results["pooling"]["dropped"]) == (3, 0)
    assert results["strategy"] == "two-phase" and len(results["plan"]) == 1
    assert "cross-validation" in results["auto"]["pooling"]["why"]
    assert "auto" not in [keys[name] for name in ("strategy", "pooling", "pooling_layer")]
    assert "cross-validation" in (finished.output_dir / "README.md").read_text()


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        ({}, {"layer.2"}),
        ({"strategy": "full", "pooling": "auto"}, {"layer.2"}),
        ({"effort": "quick"}, {"layer.1", "layer.2"}),
        ({"pooling_layer": "auto", "pooling": "auto"}, {"layer.1", "layer.2"}),
        ({"strategy": "linear-probe", "pooling": "mean"}, {"layer.1", "layer.2"}),
        ({"strategy": "full", "pooling": "mean"}, set()),
    ],
)
def test_layers_are_compared_where_only_the_head_is_fitted_or_it_is_asked_for(model, data, keys, layers):
    given = {**QUIET, "model_name_or_path": model, "train_file": data, "output_dir": "o", **keys}
    chosen = choose(prepare(Config.from_sources({}, given))).chosen
    assert {one.group for one in chosen.candidates} == layers
    if keys == {"strategy": "full", "pooling": "mean"}:
        assert (chosen.change.kept, chosen.change.dropped) == (3, 0)


def test_what_the_head_reads_is_standardized_over_the_training_examples(model, data, monkeypatch):
    """By the features that the layers were compared with, as by a pass of the changed model; without a second pass."""
    keys = QUIET | dict(model_name_or_path=model, train_file=data, output_dir="none")
    prepared = choose(prepare(Config.from_sources({}, keys)))
    dense = prepared.loaded.model.base_model.pooler.dense
    passes = []
    monkeypatch.setattr(choosing_layers, "layer_inputs", lambda *_, **__: passes.append(1))
    read = choosing_layers._states
    again = choose(prepare(Config.from_sources({}, keys)))
    assert torch.equal(again.loaded.model.base_model.pooler.dense.weight, dense.weight) and not passes
    monkeypatch.undo()
    states = read(prepared)
    assert len(states) == len(prepared.data.train)
    standard = torch.nn.functional.linear(states, dense.weight, dense.bias)
    scale, shift = NEARLY_LINEAR["tanh"]
    assert standard.mean(0).sub(shift).abs().max() < 1e-4 * scale
    assert standard.std(0, correction=0).div(scale).sub(1).abs().max() < 1e-4


def test_what_was_saved_loads_with_transformers_alone(finished):
    texts = ["word 3 fine film", "word 7 indeed dull"]
    model = AutoModelForSequenceClassification.from_pretrained(finished.output_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(finished.output_dir)
    with torch.no_grad():
        logits = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits
    ours = finished.predict(texts)
    assert [model.config.id2label[int(i)] for i in logits.argmax(-1)] == [answer["label"] for answer in ours]
    torch.testing.assert_close(
        logits.softmax(-1).amax(-1), torch.tensor([answer["score"] for answer in ours]), rtol=1e-5, atol=1e-6
    )


def test_run_yaml_repeats_the_run_bit_for_bit_and_chooses_nothing(finished, tmp_path):
    file = keys_of(finished.output_dir) | {"output_dir": str(tmp_path / "again")}
    again = fine_tune(
        **{name: value for name, value in file.items() if value is not None or name.startswith("pooling")}
    )
    assert json.loads((tmp_path / "again" / "results.json").read_text())["auto"] == {}
    for name, value in finished.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_a_given_key_wins(model, data, tmp_path):
    given = dict(num_train_epochs=1, learning_rate=3e-5, pooling="cls")
    result = fine_tune(model, train_file=data, output_dir=str(tmp_path / "out"), **given, **QUIET)
    keys = keys_of(tmp_path / "out")
    assert (keys["num_train_epochs"], keys["learning_rate"], keys["head_learning_rate"]) == (1, 3e-5, 3e-5)
    assert result.model.config.num_hidden_layers == 3 and keys["pooling"] == "cls"
    assert keys["head_init"] == "probe", "what was not given is still chosen"
    explicit = Config.from_sources({}, dict(model_name_or_path=model, train_file=data, strategy="full", output_dir="o"))
    assert plan_only(explicit, talks=False).chosen.keys() == {"pooling", "pooling_layer"}


def test_the_warm_up_of_a_named_strategy_is_told_and_kept(model, data, tmp_path, monkeypatch, capsys):
    """Also the lack of one, by a run of an earlier version that goes on."""
    named = dict(strategy="two-phase", head_init="probe", head_epochs=0, max_steps=2, save_steps=1, pooling="cls")
    keys = {**QUIET, **named, "save_strategy": "steps", "log_level": "warning"}
    fine_tune(model, train_file=data, output_dir=str(tmp_path / "new"), **keys)
    assert "warmup_steps: 0.1 (a tenth of the steps: the first would undo a head" in capsys.readouterr().out
    written = (tmp_path / "new" / "run.yaml").read_text()
    assert "warmup_steps: 0.1 " in written and "the first would undo a head that is solved for" in written
    with monkeypatch.context() as earlier:
        earlier.setattr(few_labels, "warm_up", lambda is_solved: {})
        fine_tune(model, train_file=data, output_dir=str(tmp_path / "old"), **keys)
    shutil.rmtree(tmp_path / "old" / "checkpoint-2")
    (tmp_path / "old" / "results.json").unlink()
    fine_tune(model, train_file=data, output_dir=str(tmp_path / "old"), resume_from_checkpoint="auto", **keys)
    assert keys_of(tmp_path / "old")["warmup_steps"] == 0.0


def test_quick_solves_for_the_head_alone_and_is_repeated_bit_for_bit(model, data, tmp_path):
    result = fine_tune(model, train_file=data, output_dir=str(tmp_path / "out"), effort="quick", **QUIET)
    keys = keys_of(tmp_path / "out")
    assert (keys["strategy"], keys["probe_solver"], keys["label_issues"]) == ("linear-probe", "lbfgs", False)
    assert keys["effort"] == "normal" and keys["head_init"] == "random"
    assert result.results["auto"]["strategy"]["why"] == "effort: quick"
    assert result.results["kept"] == {"weights": "solution"} and result.results["label_issues"] is None
    file = keys | {"output_dir": str(tmp_path / "again")}
    again = fine_tune(**{n: v for n, v in file.items() if v is not None or n.startswith("pooling")})
    assert again.results["auto"] == {}
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_best_takes_twice_the_epochs_and_keeps_the_best_weights_resumed_too(model, data, tmp_path, capsys):
    keys = {k: v for k, v in QUIET.items() if k != "save_strategy"}
    keys |= dict(effort="best", strategy="auto", pooling="cls", per_device_train_batch_size=2, log_level="warning")
    keys |= dict(refit=False)  # else so few examples are trained on several times
    result = fine_tune(model, train_file=data, output_dir=str(tmp_path / "out"), **keys)
    said, written = capsys.readouterr().out, keys_of(tmp_path / "out")
    assert "num_train_epochs: 8 (effort: best, 2 times 4)" in said
    assert (written["load_best_model_at_end"], written["metric_for_best_model"]) == (True, "accuracy")
    assert result.results["kept"]["weights"] == "best" and written["effort"] == "normal"
    (tmp_path / "out" / "results.json").unlink()
    fine_tune(model, train_file=data, output_dir=str(tmp_path / "out"), resume_from_checkpoint="auto", **keys)
    assert "num_train_epochs: 8 (as when the run began)" in capsys.readouterr().out
    assert keys_of(tmp_path / "out") == written


def test_quick_that_cannot_be_falls_back_with_the_reason(model, data):
    given = dict(model_name_or_path=model, train_file=data, output_dir="o", effort="quick", head="mlp", **QUIET)
    chosen = plan_only(Config.from_sources({}, given), talks=False).chosen
    assert chosen["strategy"]["value"] == "two-phase" and chosen["label_issues"]["value"] is False
    assert "effort: quick does not wholly apply: the head cannot be solved for" in chosen["effort"]["why"]


def test_a_run_that_ends_early_says_so_and_keeps_its_best_weights(model, data, tmp_path, capsys):
    """Chosen although few examples would save no checkpoints; the run can be repeated."""
    keys = dict(early_stopping_patience=1, early_stopping_threshold=10.0, pooling="cls", log_level="warning")
    keys = {k: v for k, v in QUIET.items() if k != "save_strategy"} | keys
    result = fine_tune(model, train_file=data, output_dir=str(tmp_path / "out"), **keys)
    said, written = capsys.readouterr().out, keys_of(tmp_path / "out")
    assert "load_best_model_at_end: true (early_stopping_patience: the best weights are kept)" in said
    assert "Stopped early after epoch 2: validation loss no longer improved (early_stopping_patience: 1)" in said
    assert result.results["kept"]["stopped"] == {"step": 6, "epoch": 2.0, "patience": 1}
    assert (written["load_best_model_at_end"], written["save_strategy"]) == (True, "epoch")
    Config.from_sources(written | {"output_dir": str(tmp_path / "again")}, {})


def test_plan_says_what_would_be_chosen(model, data, capsys):
    config = Config.from_sources({}, dict(model_name_or_path=model, train_file=data, output_dir="o", **QUIET))
    assert plan_only(config, talks=False).to_dict()["chosen"]["head_init"]["value"] == "probe"


def test_pooling_can_be_asked_for_with_any_strategy(model, data, tmp_path):
    keys = dict(strategy="full", pooling="mean", pooling_layer="layer.0", max_steps=1)
    result = fine_tune(model, train_file=data, output_dir=str(tmp_path / "out"), **keys, **QUIET)
    assert result.model.config.num_hidden_layers == 2
    assert result.results["pooling"] == result.results["pooling"] | {"kept": 1, "dropped": 2}


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"pooling": "mean", "pooling_layer": "layer.9"}, "no layer group 'layer.9'"),
        ({"pooling_layer": "layer.1"}, None),
        ({"pooling": "cls", "pooling_layer": "layer.1"}, "only for pooling: mean, max or auto"),
        ({"pooling": "mean", "adapter": "lora"}, "an adapter is saved without the backbone"),
        ({"pooling": "median"}, "'median' is not one of"),
    ],
)
def test_keys_that_do_not_fit(model, data, tmp_path, keys, sentence):
    config = dict(model_name_or_path=model, train_file=data, output_dir=str(tmp_path / "out"), **QUIET)
    if sentence is None:
        plan_only(Config.from_sources({}, {**config, **keys}), talks=False)
        return
    with pytest.raises(UserError, match=sentence):
        plan_only(Config.from_sources({}, {**config, **keys}), talks=False)


def test_an_adapter_and_a_kept_head_keep_their_model(model, data, finished, tmp_path):
    lora = plan_only(
        Config.from_sources({}, dict(model_name_or_path=model, train_file=data, output_dir="o", adapter="lora")),
        talks=False,
    )
    assert lora.chosen["strategy"]["value"] == "full" and lora.chosen["pooling"]["value"] is None
    name = str(finished.output_dir)
    more = plan_only(Config.from_sources({}, dict(model_name_or_path=name, train_file=data, output_dir="o")), False)
    assert more.chosen["strategy"] == {"value": "full", "why": "the checkpoint's head is kept"}
    assert more.chosen["pooling"]["why"] == "the checkpoint's head is kept"


def test_a_resumed_run_goes_on_with_what_was_chosen(model, data, tmp_path, monkeypatch):
    """The same weights as without an interruption, and no second cross-validation."""
    keys = {**QUIET, "save_strategy": "epoch", "num_train_epochs": 3, "calibrate": True}
    whole = fine_tune(model, train_file=data, output_dir=str(tmp_path / "whole"), **keys)

    class Interrupting(announce.History):
        def on_epoch_end(self, args, state, control, **_):
            if state.global_step >= 6:
                raise Interrupted(15)

    with monkeypatch.context() as patch:
        patch.setattr(announce, "History", Interrupting)
        with pytest.raises(Interrupted):
            fine_tune(model, train_file=data, output_dir=str(tmp_path / "part"), **keys)
    monkeypatch.setattr(choosing_layers, "choose_pooling", None)
    resumed = fine_tune(
        model, train_file=data, output_dir=str(tmp_path / "part"), resume_from_checkpoint="auto", **keys
    )
    assert resumed.results["auto"]["strategy"]["why"] == "as when the run began"
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    timed = ("seconds", "feature_seconds")
    probes = [{k: v for k, v in one.results["probe"].items() if k not in timed} for one in (whole, resumed)]
    assert probes[0] == probes[1]  # though a resumed run does not solve for the head
    assert resumed.results["calibration"] == whole.results["calibration"]
    assert resumed.results["pooling_candidates"] == whole.results["pooling_candidates"] != []


def test_the_temperature_is_expected_to_make_the_model_as_uncertain_as_its_first_head(model, data, tmp_path):
    keys = {**QUIET, "num_train_epochs": 3, "calibrate": True}
    result = fine_tune(model, train_file=data, output_dir=str(tmp_path / "out"), **keys)
    fit = result.results["calibration"]
    logits = result.trainer.predict(result.trainer.eval_dataset).predictions * fit["temperature"] / fit["expected"]
    entropy = -(softmax(logits, -1) * log_softmax(logits, -1)).sum(-1).mean()
    assert entropy == pytest.approx(result.results["probe"]["score"], rel=1e-3)


def test_half_precision_is_checked_in_full_precision(model, data, tmp_path):
    """The model that trained casts in its forward pass, and the one that is loaded again does not."""
    result = fine_tune(
        model, train_file=data, output_dir=str(tmp_path / "out"), **QUIET | {"bf16": True, "preflight": True}
    )
    assert result.output_dir == tmp_path / "out" and yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["bf16"]
