"""Keys: one way in for YAML, command line and Python; every problem at once, each with its remedy."""

from __future__ import annotations

import pytest
import yaml

from hf_transfer import UserError
from hf_transfer.config.values import coerce, load_yaml, read_config_file
from hf_transfer.keys import keys, parse_command_line
from hf_transfer.settings import Config

NEEDED = {"model_name_or_path": "bundled:minilm-l6", "dataset_name": "bundled:rotten-tomatoes", "output_dir": "out"}


def config(file=None, **given) -> Config:
    return Config.from_sources(file or {}, {**NEEDED, **given})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("5E-5", 5e-5),
        ("1.", 1.0),
        (".5", 0.5),
        ("-2e-1", -0.2),
        ("3", 3),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("1e", "1e"),
        ("12e03", 12000.0),
        ("null", None),
        ("{head: 1e-3}", {"head": 1e-3}),
    ],
)
def test_yaml_values(text, value):
    assert load_yaml(text) == value and type(load_yaml(text)) is type(value)


def test_1e_3_in_a_file_is_a_number(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("learning_rate: 1e-3\nlayer_learning_rates: {head: 2e-3}\neval_strategy: no\n")
    made = config(read_config_file(str(path)))
    assert made.training.learning_rate == 1e-3
    assert made.training.layer_learning_rates == {"head": 2e-3}
    assert made.training.eval_strategy.value == "no"


def test_the_command_line_comes_before_the_file_and_the_file_before_defaults():
    given, problems = parse_command_line(
        [
            "--learning_rate",
            "3e-4",
            "--fp16",
            "false",
            "--stages",
            "[{epochs: 1, train: head}, {epochs: 2, train: all, learning_rate: 1e-4}]",
        ]
    )
    made = Config.from_sources({**NEEDED, "learning_rate": 1e-2, "weight_decay": 0.1}, given, problems)
    assert (made.training.learning_rate, made.training.weight_decay, made.training.adam_beta1) == (3e-4, 0.1, 0.9)
    assert made.training.stages[1] == {"epochs": 2, "train": "all", "learning_rate": 1e-4}
    assert made.training.num_train_epochs == 3.0


@pytest.mark.parametrize(
    ("name", "raw", "value"),
    [
        ("fp16", True, True),
        ("fp16", "yes", True),
        ("fp16", "off", False),
        ("num_train_epochs", "3", 3.0),
        ("seed", "7", 7),
        ("seed", 7.0, 7),
        ("logging_steps", "0.05", 0.05),
        ("text_column_name", "[a, b]", ["a", "b"]),
        ("text_column_name", "text", "text"),
        ("freeze", "stem", ["stem"]),
        ("freeze", "[stem, blocks.0-7]", ["stem", "blocks.0-7"]),
        ("freeze", "stem,blocks.0-7", ["stem", "blocks.0-7"]),
        ("freeze", "stem, layer.*", ["stem", "layer.*"]),
        ("freeze", r"layer\.[0-9]{1,2}", [r"layer\.[0-9]{1,2}"]),
        ("lora_target_modules", "query,value", ["query", "value"]),
        ("text_column_name", "premise,hypothesis", ["premise", "hypothesis"]),
        ("text_column_name", "what, in your own words", "what, in your own words"),
        ("text_column_name", '["a,b"]', ["a,b"]),
        ("label_vector_names", "1,2", ["1", "2"]),
        ("pixel_range", "0,255", [0, 255]),
        ("head_dropout", "0.5,2e-1", [0.5, 0.2]),
        ("output_dir", "a,b", "a,b"),
        ("layer_learning_rates", "{head: 1e-3}", {"head": 1e-3}),
        ("strategy", "null", None),
        ("warmup_steps", "0.1", 0.1),
        ("output_dir", 2024, "2024"),
        ("lr_scheduler_type", "cosine", "cosine"),
        ("deepspeed", "zero.json", "zero.json"),
    ],
)
def test_values_become_their_keys_type(name, raw, value):
    made = coerce(raw, keys()[name])
    assert made == value and type(made) is type(value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"learning_rte": 1e-3}, "learning_rte is not a key. Did you mean 'learning_rate'?"),
        ({"learn": 1e-3}, "learn is not a key."),
        (
            {"strategy": "gradul"},
            "'gradul' is not one of auto, linear-probe, partial, two-phase, gradual, full, lora, scratch. "
            "Did you mean 'gradual'?",
        ),
        ({"lr_scheduler_type": "cosin"}, "Did you mean 'cosine'?"),
        ({"optim": "adamw"}, "optim: 'adamw' is not one of"),
        ({"task": "text-clasification"}, "Did you mean 'text-classification'?"),
        ({"problem_type": "regresion"}, "Did you mean 'regression'?"),
        ({"learning_rate": "fast"}, "learning_rate: 'fast' is not a number."),
        ({"seed": 1.5}, "seed: 1.5 is not a whole number."),
        ({"fp16": "maybe"}, "fp16: 'maybe' is not true or false."),
        ({"stages": 3}, "stages: 3 is not a list."),
        ({"layer_learning_rates": "head"}, "layer_learning_rates: 'head' is not a mapping."),
        ({"num_train_epochs": 0}, "num_train_epochs: expected a positive number, got 0."),
        ({"learning_rate": -1e-3}, "learning_rate: expected a number at least 0, got -0.001."),
        ({"train_val_split": 1.5}, "train_val_split: expected a number above 0 and below 1, got 1.5"),
        ({"train_file": "x.csv"}, "dataset_name and train_file contradict each other"),
        ({"fp16": True, "bf16": True}, "fp16 and bf16 contradict each other"),
        ({"save_only_model": True, "on_nonfinite": "rollback"}, "on_nonfinite: rollback returns to the optimizer"),
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 9},
            "warmup_steps: 9 has no effect with lr_scheduler_type: con",
        ),
        ({"strategy": "full", "stages": [{"epochs": 1, "train": "all"}]}, "contradict each other"),
        ({"lerning_rate": 1, "layer_lr_decay": 2.0}, "layer_lr_decay: 2.0 is over 1"),
        ({"num_train_epochs": 5, "stages": [{"epochs": 1, "train": "all"}]}, "num_train_epochs: 5 contradicts stages"),
        ({"layer_lr_decay": 0.9, "layer_lr_multiplier": 1.1}, "Keep one"),
        ({"head_epochs": 2, "strategy": "gradual"}, "head_epochs: 2.0 has no effect with strategy: gradual"),
        ({"hub_token": "hf_x"}, "set HF_TOKEN"),
        ({"output_dir": None, "resume_from_checkpoint": "auto"}, "output_dir is missing"),
    ],
)
def test_wrong_keys_are_explained(given, said):
    with pytest.raises(UserError) as error:
        config(**given)
    assert said in str(error.value)


def test_a_run_that_is_given_no_folder_gets_the_next_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (tmp_path / "my reviews.v2.csv").write_text("text,label\n")
    (tmp_path / "photos.2024").mkdir()
    cases = {
        ("bundled:minilm-l6", "my reviews.v2.csv"): "my-reviews.v2-minilm-l6-1",
        ("timm/resnet50.a1_in1k", "./photos.2024/"): "photos.2024-resnet50.a1_in1k-1",
        ("google-bert/bert-base-uncased", "stanfordnlp/imdb"): "imdb-bert-base-uncased-1",
        ("x", "."): f"{tmp_path.name}-x-1",
    }
    for (model, data), folder in cases.items():
        assert (
            config(model_name_or_path=model, dataset_name=data, output_dir=None).training.output_dir == f"runs/{folder}"
        )
    (tmp_path / "runs" / "my-reviews.v2-minilm-l6-1").mkdir(parents=True)
    again = config(model_name_or_path="bundled:minilm-l6", dataset_name="my reviews.v2.csv", output_dir=None)
    assert again.values["output_dir"] == "runs/my-reviews.v2-minilm-l6-2"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several processes"):
        config(output_dir=None)


@pytest.mark.parametrize("words", [["a,b"], ["a,", "b"], ["a", "b"], ["[a, b]"]])
def test_a_list_is_typed_with_commas_or_spaces(words):
    values, problems = parse_command_line(["--freeze", *words])
    assert (coerce(values["freeze"], keys()["freeze"]), problems) == (["a", "b"], [])


def test_all_problems_are_in_one_message():
    argv = [
        "data.csv",
        "out",
        "stray",
        "--model_name_or_path",
        "x",
        "--strateg",
        "full",
        "--lerning_rate=3",
        "--seed",
        "a",
    ]
    with pytest.raises(UserError) as error:
        Config.from_sources({"wieght_decay": 1, "trust_remote_code": True}, *parse_command_line(argv))
    text = str(error.value)
    for part in (
        "6 problems found:",
        "--strateg is not a key. Did you mean --strategy?",
        "--lerning_rate is not a key. Did you mean --learning_rate?",
        "seed: 'a' is not a whole number.",
        "'stray' is one word too many",
        "wieght_decay is not a key. Did you mean 'weight_decay'?",
        "trust_remote_code cannot be set in a file",
    ):
        assert part in text, (part, text)


def test_abbreviations_are_not_taken():
    _, problems = parse_command_line(["--learning", "1"])
    assert problems and "--learning is not a key" in problems[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read"), ("a: [", "is not YAML"), ("- 1", "is not a mapping"), ("", "is not a mapping")],
)
def test_wrong_files_are_explained(content, said, tmp_path):
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=said):
        read_config_file(str(path))


def test_a_probe_has_a_heads_learning_rate_unless_told():
    assert config(strategy="linear-probe").training.learning_rate == 1e-3
    assert config(strategy="linear-probe", learning_rate=5e-5).training.learning_rate == 5e-5
    assert config().training.learning_rate == 5e-5


def test_scratch_means_random_weights():
    assert config(strategy="scratch").model.from_scratch and not config(strategy="full").model.from_scratch
    with pytest.raises(UserError, match="from_scratch: false contradicts"):
        config(strategy="scratch", from_scratch=False)


def test_run_yaml_repeats_the_configuration():
    made = config(
        strategy="gradual",
        layer_learning_rates={r"bn\d": 0},
        stages=None,
        seed=3,
        eval_strategy="steps",
        lr_scheduler_type="cosine",
    )
    again = Config.from_sources(load_yaml(made.to_yaml()), {"output_dir": "again"})
    assert {**made.values, "output_dir": "again"} == again.values
    assert set(yaml.safe_load(made.to_yaml())) == set(keys()) - {
        "trust_remote_code",
        "allow_pickle",
        "resume_from_checkpoint",
        "overwrite_output_dir",
    }


def test_run_yaml_begins_with_what_was_given():
    made = config(strategy="gradual", seed=3, head_epochs=1, num_train_epochs=3)
    made.values |= {
        "task": "text-classification",
        "calibrate": False,
        "text_column_name": ["a", "b"],
        "warmup_steps": 0.1,
    }
    why = {"calibrate": "only 9 examples: # too\nfew", "warmup_steps": "", "text_column_name": "found"}
    text = made.to_yaml(why)
    assert yaml.safe_load(text)["calibrate"] is False and yaml.safe_load(text)["text_column_name"] == ["a", "b"]
    given, chosen, rest = (part.splitlines()[1:] for part in text.split("\n\n")[1:])
    assert {line.partition(":")[0] for line in given} == made.given
    assert "calibrate: false  # only 9 examples: # too few" in chosen and "warmup_steps: 0.1" in chosen
    at = chosen.index("text_column_name:")
    assert chosen[at - 1] == "# found" and chosen[at + 1] == "- a" and "task: text-classification" in chosen
    assert "adam_beta1: 0.9" in rest
    again = Config.from_sources(load_yaml(text), {"output_dir": "again"})
    assert again.values == {**made.values, "output_dir": "again"}
    given, *_ = again.to_yaml().split("\n\n")[1:]
    assert "seed: 3" in given and "adam_beta1" not in given  # of a repeated run, what differs from the defaults


def test_what_only_the_command_line_may_say_stands_in_a_comment():
    text = config(trust_remote_code=True).to_yaml()
    assert "trust_remote_code" not in yaml.safe_load(text)
    assert "--trust_remote_code" in text.splitlines()[1]


def test_every_key_has_a_help_text_and_a_topic():
    """Ours say units; TrainingArguments' come from its docstring, under its headings."""
    assert all(k.help and k.topic != "training" for k in keys().values())
    assert (
        keys()["learning_rate"].help.startswith("peak learning rate")
        and keys()["learning_rate"].topic == "learning rate"
    )
    assert keys()["adam_beta1"].topic == "optimizer" and "exponential decay rate" in keys()["adam_beta1"].help
    assert {"strategy", "layer_lr_decay", "learning_rate", "dataset_name", "model_name_or_path"} <= set(keys())
