"""What a run chooses beside keys that were given: no key is dropped, and what was chosen could have been given."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import ModernBertConfig, ModernBertForSequenceClassification, ModernBertModel

from hf_transfer import UserError, fine_tune
from hf_transfer.runs.preview import plan_only
from hf_transfer.settings import Config
from tests.helpers import tiny_bert
from tests.runs.helpers import sentences
from tests.runs.test_preflight import words_tokenizer

QUIET = dict(use_cpu=True, log_level="error", report_to="none", preflight=False, output_dir="o")
TINY = dict(hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2, vocab_size=40)
MODERN = dict(TINY, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Few examples, and enough; a BERT without a head, one with; ModernBERT that reads the mean, with and without."""
    folder = tmp_path_factory.mktemp("given")
    modern = ModernBertConfig(**MODERN, classifier_pooling="mean", num_labels=2)
    modern.id2label, modern.label2id = {0: "x", 1: "y"}, {"x": 0, "y": 1}
    headed = tiny_bert(layers=3)
    headed.config.id2label, headed.config.label2id = {0: "x", 1: "y"}, {"x": 0, "y": 1}
    models = {
        "bert": tiny_bert(layers=3).base_model,
        "headed": headed,
        "modern": ModernBertModel(modern),
        "modern_headed": ModernBertForSequenceClassification(modern),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        words_tokenizer().save_pretrained(folder / name)
    return {name: str(folder / name) for name in models} | {
        "few": sentences(folder / "few.csv", 16),
        "enough": sentences(folder / "enough.csv", 44),
    }


def prepared(files, model, data, **keys):
    given = dict(model_name_or_path=files[model], train_file=files[data], **{**QUIET, **keys})
    chosen = plan_only(Config.from_sources({}, given), talks=False).chosen
    values = {name: choice["value"] for name, choice in chosen.items()}
    Config.from_sources({**given, **{n: v for n, v in values.items() if v is not None}}, {})  # can be repeated
    return chosen, values


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, ("linear-probe", "lbfgs", None)),
        ({"token_masking": 0.1}, ("linear-probe", "sgd", 1e-3)),
        ({"label_smoothing_factor": 0.1}, ("linear-probe", "sgd", 1e-3)),
        ({"balanced_sampling": True}, ("linear-probe", "sgd", 1e-3)),
        ({"focal_gamma": 2.0, "effort": "quick"}, ("linear-probe", "sgd", 1e-3)),
        ({"probe_solver": "sgd"}, ("linear-probe", None, 1e-3)),
        ({"probe_solver": "sgd", "learning_rate": 2e-3}, ("linear-probe", None, None)),
        ({"head_epochs": 2.0}, ("two-phase", None, 1e-4)),
        ({"head_init": "probe", "effort": "quick"}, ("two-phase", None, 1e-4)),
    ],
)
def test_few_examples_per_class(files, keys, expected):
    _, values = prepared(files, "bert", "few", pooling="cls", **keys)
    assert (values["strategy"], values.get("probe_solver"), values.get("learning_rate")) == expected


@pytest.mark.parametrize(
    ("model", "data", "keys", "averages"),
    [
        ("bert", "few", {}, True),
        ("bert", "few", {"pooling": "auto", "max_steps": 5}, True),
        ("bert", "few", {"effort": "normal"}, False),
        ("bert", "few", {"pooling_layer": "layer.1"}, False),
        ("bert", "few", {"pooling": "mean"}, False),  # asks for one layer
        ("bert", "enough", {}, False),  # everything trains
        ("modern", "few", {}, False),  # two layers read what is pooled
    ],
)
def test_best_averages_layers_where_only_the_head_is_fitted(files, model, data, keys, averages):
    chosen, found = prepared(files, model, data, **{"effort": "best", **keys})
    assert (found.get("pooling_layer") == "average") == averages
    if averages:
        assert found["pooling"] == "mean" and chosen["pooling_layer"]["why"].startswith("effort: best")


@pytest.mark.parametrize("schedule", ["one_cycle", "slanted_triangular", "constant"])
def test_a_schedule_of_its_own_warm_up(files, schedule):
    assert "warmup_steps" not in prepared(files, "bert", "enough", pooling="cls", lr_scheduler_type=schedule)[1]


@pytest.mark.parametrize(
    ("keys", "warms_up"),
    [
        ({"strategy": "two-phase"}, True),
        ({"strategy": "gradual"}, True),
        ({"strategy": "auto"}, True),
        ({"strategy": "two-phase", "head_init": "random"}, False),
        ({"strategy": "two-phase", "warmup_steps": 0.0}, False),
        ({"strategy": "two-phase", "warmup_steps": 3.0}, False),
        ({"strategy": "two-phase", "unfreeze_warmup_steps": 1}, False),
        ({"strategy": "two-phase", "lr_scheduler_type": "one_cycle"}, False),
        (
            {
                "strategy": "two-phase",
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"num_decay_steps": 4, "num_stable_steps": 11},
            },
            False,
        ),
    ],
)
def test_fine_tuning_from_a_solved_head_warms_up_whoever_chose_it(files, keys, warms_up):
    chosen, found = prepared(files, "bert", "enough", pooling="cls", **{"head_init": "probe", **keys})
    assert found.get("warmup_steps") == (0.1 if warms_up else None)
    if warms_up:
        assert "a head that is solved for" in chosen["warmup_steps"]["why"]


def test_steps_of_accumulated_batches_and_a_given_number(files):
    """35 of 44 examples train: 3 steps per epoch, or 1 of 64."""
    _, values = prepared(files, "bert", "enough", pooling="cls", gradient_accumulation_steps=4)
    assert (values["num_train_epochs"], values["refit"]) == (35, True)
    _, values = prepared(files, "bert", "enough", pooling="cls", gradient_accumulation_steps=4, refit=False)
    assert values["num_train_epochs"] == 40 and "refit" not in values
    assert "num_train_epochs" not in prepared(files, "bert", "enough", pooling="cls", max_steps=5)[1]


@pytest.mark.parametrize(
    ("model", "keys", "sentence"),
    [
        ("headed", {"pooling": "mean"}, "the checkpoint's head is kept"),
        ("modern_headed", {"pooling": "cls"}, "the checkpoint's head was trained on it"),
        ("modern", {"pooling": "mean", "pooling_layer": "embeddings"}, "Use last, auto, or one of layers.0, layers.1"),
        ("modern", {"pooling": "auto", "pooling_layer": "embeddings"}, "Use last, auto, or one of layers.0, layers.1"),
    ],
)
def test_a_pooling_that_cannot_be_had(files, model, keys, sentence):
    with pytest.raises(UserError, match=sentence):
        prepared(files, model, "enough", **keys)


@pytest.mark.parametrize("pooling", ["cls", "auto"])
def test_an_adapter_keeps_the_standard_head_when_that_is_said(files, pooling):
    chosen, values = prepared(files, "bert", "enough", adapter="lora", pooling=pooling)
    assert values.get("pooling") is None and ("pooling" in chosen) == (pooling == "auto")


@pytest.mark.parametrize("pooling_layer", ["auto", "joined"])
def test_a_cut_and_the_comparison_mean_the_same_layer_of_joined_ones(files, tmp_path, pooling_layer):
    """layer.0 and layer.1 are one group, at whose end two layers are kept."""
    rules = [[r"embeddings", "stem"], [r"encoder\.layer\.[01]\.", 1], [r"encoder\.layer\.2\.|pooler", 2], [".", "head"]]
    keys = dict(QUIET, output_dir=str(tmp_path / "out"), save_strategy="no", layer_rules=rules, max_steps=1)
    keys |= dict(strategy="full", pooling="mean")
    config = Config.from_sources({}, dict(model_name_or_path=files["bert"], train_file=files["enough"], **keys))
    names = [name for name, _ in plan_only(config, talks=False).plan.groups]
    keys["pooling_layer"] = names[1] if pooling_layer == "joined" else "auto"
    result = fine_tune(files["bert"], train_file=files["enough"], **keys)
    kept = {names[0]: 0, names[1]: 2, names[2]: 3}
    wanted = names[1] if pooling_layer == "joined" else result.results["pooling_candidates"][0]["group"]
    assert result.results["pooling"]["kept"] == kept[wanted]


@pytest.mark.parametrize("keys", [{"strategy": "scratch"}, {"strategy": "full", "from_scratch": True}])
def test_random_weights_have_no_head_to_keep(files, keys):
    prepared(files, "headed", "enough", pooling="mean", pooling_layer="last", **keys)


def test_cls_of_a_new_head_that_would_read_the_mean(files, tmp_path):
    keys = dict(QUIET, output_dir=str(tmp_path / "out"), save_strategy="no", max_steps=1, strategy="full")
    result = fine_tune(files["modern"], train_file=files["enough"], pooling="cls", **keys)
    assert result.model.config.classifier_pooling == "cls"


def test_other_labels_on_a_model_that_was_pooled_before_compare_with_the_mean(files, tmp_path):
    keys = dict(QUIET, save_strategy="no", max_steps=1, strategy="full")
    first = fine_tune(files["bert"], train_file=files["enough"], pooling="mean", pooling_layer="layer.1",
                      **{**keys, "output_dir": str(tmp_path / "one")})  # fmt: skip
    other = tmp_path / "other.csv"
    other.write_text(Path(files["enough"]).read_text().replace(",x", ",u").replace(",y", ",v"))
    again = plan_only(
        Config.from_sources({}, dict(QUIET, model_name_or_path=str(first.output_dir), train_file=str(other))), False
    )
    assert "mean of layer.1, which the head reads" in again.chosen["pooling"]["why"]


def test_features_that_cannot_be_had_end_no_run_that_did_not_ask_for_them(files, monkeypatch):
    from hf_transfer.runs import choosing_pooled

    def refuses(*_, **__):
        raise UserError("a text contains [CLS] itself.", "Remove it.")

    monkeypatch.setattr(choosing_pooled, "frozen_pass", refuses)
    chosen, values = prepared(files, "bert", "enough")
    assert values["pooling"] is None and "a text contains [CLS] itself" in chosen["pooling"]["why"]
    with pytest.raises(UserError, match="contains"):
        prepared(files, "bert", "enough", pooling="mean", pooling_layer="auto", strategy="full")


def test_auto_written_out_is_resumed(files, tmp_path):
    keys = dict(QUIET, output_dir=str(tmp_path / "out"), save_strategy="epoch", per_device_train_batch_size=16)
    keys |= dict(strategy="auto", pooling="mean", pooling_layer="auto", num_train_epochs=1)
    fine_tune(files["bert"], train_file=files["enough"], **keys)
    (tmp_path / "out" / "results.json").unlink()
    again = fine_tune(files["bert"], train_file=files["enough"], resume_from_checkpoint="auto", **keys)
    assert again.results["auto"]["strategy"]["why"] == "as when the run began"
