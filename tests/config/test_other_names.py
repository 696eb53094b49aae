"""Names that other programs have for our keys and verbs get a hint with our name."""

from __future__ import annotations

import re

import pytest

import hf_transfer
from hf_transfer import UserError
from hf_transfer.cli.program import main
from hf_transfer.cli.verbs import VERBS
from hf_transfer.config.arguments.other_names import _NOTES, _SYNONYMS, NOTES, SECRETS, SYNONYMS, VERBS_ELSEWHERE
from hf_transfer.config.arguments.views import Views
from hf_transfer.config.command_line import unknown
from hf_transfer.config.fields import keys_of
from hf_transfer.keys import keys
from hf_transfer.settings import Config

# What the notes say that looks like a key and is none.
NO_KEYS = {"min_lr", "multi_label_classification", "one_cycle", "cosine_with_min_lr"}


def test_every_target_is_a_key_of_ours_and_no_name_is():
    everything = {**keys(), **keys_of(Views, "views")}
    assert set(SYNONYMS.values()) <= set(everything)
    words = [w for names in (*_SYNONYMS.values(), *(names for names, _ in _NOTES)) for w in names.split()]
    assert len(words) == len(set(words)), sorted({w for w in words if words.count(w) > 1})
    assert not {*words, *SECRETS} & set(everything)
    for note in NOTES.values():
        named = set(re.findall(r"\b([a-z0-9]+(?:_[a-z0-9]+)+)\b", note)) | set(re.findall(r"\b([a-z_]+): ", note))
        unexpected = named - set(keys()) - NO_KEYS - {"out", "early", "steps", "time"}
        assert not unexpected, (unexpected, note)
    assert set(VERBS_ELSEWHERE.values()) <= set(VERBS) and not set(VERBS_ELSEWHERE) & set(VERBS)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("epochs", "Did you mean --num_train_epochs?"),
        ("data", "Did you mean --dataset_name?"),
        ("target", "Did you mean --label_column_name?"),
        ("lr", "Did you mean --learning_rate?"),
        ("batch-size", "Did you mean --per_device_train_batch_size?"),
        ("weight-decay", "Did you mean --weight_decay?"),
        ("imgsz", "Did you mean --image_size?"),
        ("layer_decay", "Did you mean --layer_lr_decay?"),
        ("evaluation_strategy", "Did you mean --eval_strategy?"),
        ("epochs_head", "Did you mean --head_epochs?"),
        ("validation_dir", "Did you mean --validation_file?"),
        ("warmup_ratio", "warmup_steps: 0.1"),
        ("do_train", "leave it out"),
        ("freeze_backbone", "strategy: linear-probe"),
        ("patience", "early_stopping_patience: 3"),
        ("weigth_decay", "Did you mean --weight_decay?"),
        ("xyzzy", "--xyzzy is not a key."),
    ],
)
def test_a_name_from_elsewhere(name, said):
    assert said in unknown(name, keys(), "--")


def test_other_commands_are_not_sent_to_keys_that_they_lack():
    views = keys_of(Views, "views")
    assert unknown("epochs", views, "--") == "--epochs is not a key."
    assert unknown("patience", views, "--") == "--patience is not a key."
    assert "HF_TOKEN" in unknown("token", views, "--")


def test_in_yaml_and_in_python():
    with pytest.raises(UserError, match="Did you mean 'num_train_epochs'"):
        Config.from_sources({"epochs": 3}, {})
    with pytest.raises(UserError, match="Did you mean 'model_name_or_path'"):
        hf_transfer.fine_tune(model="bundled:minilm-l6", dataset_name="x.csv", lr=1e-3)


@pytest.mark.parametrize(("typed", "ours"), [("fit", "train"), ("val", "evaluate"), ("Fit", "train")])
def test_verbs(typed, ours, capsys):
    assert main([typed]) == 2
    assert f"Did you mean {ours!r}?" in capsys.readouterr().err
