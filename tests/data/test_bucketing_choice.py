"""`length_bucketing: auto`: what it decides of which data, that a run says and keeps it, and goes on with it."""

from __future__ import annotations

import json
import re

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import HfArgumentParser

from hf_transfer import TransferArguments, TransferTrainer, UserError, fine_tune
from hf_transfer.data.bucketing_choice import choose, choose_for, measure
from hf_transfer.hub.card_sections import _hyperparameters
from hf_transfer.keys import keys, parse_command_line, to_commented_yaml
from hf_transfer.settings import Config
from tests.helpers import arguments, copy_state, images, pad, ragged_texts, texts, tiny_bert, tiny_vit

KEYS = {"train_sampling_strategy": "random", "balanced_sampling": False, "length_column_name": "length"}


def lengths_between(shortest, longest, count=1000):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(shortest, longest + 1, (count,), generator=generator).double()


# ---- the decision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "size", "said"),
    [
        (lengths_between(5, 60), 8, ""),
        (lengths_between(5, 60), 32, ""),
        (lengths_between(90, 100), 32, "only 5.[0-9]% of the tokens of random batches are padding"),
        (torch.full((1000,), 128.0), 32, "0.0% of the tokens of random batches"),
        (lengths_between(5, 60), 1, "0.0% of the tokens"),
        (lengths_between(5, 60, 40), 32, "40 examples in batches of 32 are too few"),
        (lengths_between(5, 60, 0), 32, "0.0% of the tokens"),
        (torch.tensor([1.0] * 990 + [400.0] * 10), 8, ""),
    ],
)
def test_what_is_decided_of_which_lengths(lengths, size, said):
    choice = choose(lengths, size)
    assert choice.on == (not said) and choice == choose(lengths, size)
    if said:
        assert re.search(said, choice.line())
    else:
        assert choice.line() == "" and choice.bucketed <= choice.random / 2 >= 0.05


def test_each_process_pads_its_own_part():
    """With 8 processes, random parts of 4 are padded less than batches of 32."""
    lengths = lengths_between(5, 60, 4000)
    assert measure(lengths, 32, 8)[0] == pytest.approx(measure(lengths, 4)[0], abs=0.02)
    assert measure(lengths, 32, 8)[0] < measure(lengths, 32)[0] - 0.1


def test_of_many_examples_a_sample_says_the_same():
    lengths = lengths_between(5, 60, 120_000)
    whole = 1 - lengths.mean() / lengths[torch.randperm(120_000)].view(-1, 32).amax(1).mean()
    assert measure(lengths, 32)[0] == pytest.approx(whole.item(), abs=0.005)


@pytest.mark.parametrize(
    ("data", "keys", "main_input", "said"),
    [
        (ragged_texts(64), {}, "input_ids", None),
        ([ragged_texts(64)[i] for i in range(64)], {}, "input_ids", None),
        (ragged_texts(64).with_transform(lambda rows: {}), {}, "input_ids", None),
        (ragged_texts(64).rename_column("input_ids", "input_values"), {}, "input_values", None),
        (images(64), {}, "pixel_values", ""),
        (images(64).to_iterable_dataset(), {}, "pixel_values", ""),
        (ragged_texts(64).to_iterable_dataset(), {}, "input_ids", "a stream"),
        (ragged_texts(64), {"balanced_sampling": True}, "input_ids", "off: balanced_sampling decides the order"),
        (ragged_texts(64), {"train_sampling_strategy": "sequential"}, "input_ids", "train_sampling_strategy: sequen"),
        (Dataset.from_dict({"text": ["a"] * 64}), {}, "input_ids", "would have to be read"),
        (torch.utils.data.TensorDataset(torch.ones(64, 3)), {}, "input_ids", "would have to be read"),
        (ragged_texts(4).add_column("length", ["a"] * 4), {}, "input_ids", "cannot determine the lengths"),
        ([{"labels": 1}], {}, "input_ids", "example 0 has no input_ids"),
    ],
)
def test_what_is_decided_of_which_data(data, keys, main_input, said):
    """None: it is on; empty: off, and nothing is said of it."""
    choice = choose_for(data, KEYS | keys, main_input, 8, 1)
    assert choice.on == (said is None)
    assert (said or "") in choice.line() and bool(choice.line()) == bool(said)


# ---- the key ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "is_read"),
    [("auto", "auto"), ("true", True), ("false", False), (True, True), (False, False), ("True", True), ("off", False)],
)
def test_the_key_is_a_word_or_a_truth_value(given, is_read, tmp_path):
    base = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}
    config = Config.from_sources({"length_bucketing": given}, base)
    assert config.values["length_bucketing"] is is_read or config.values["length_bucketing"] == is_read
    assert config.training.length_bucketing == is_read
    if given != "off":  # a word of YAML and the command line
        assert TransferArguments(str(tmp_path), use_cpu=True, length_bucketing=given).length_bucketing == is_read


def test_who_decides_what_by_default(tmp_path):
    assert TransferArguments(str(tmp_path), use_cpu=True).length_bucketing is False
    assert keys()["length_bucketing"].default == "auto"
    assert "length_bucketing: auto" in to_commented_yaml({})
    assert parse_command_line(["--length_bucketing"]) == ({"length_bucketing": True}, [])
    for wrong in ("maybe", 3):
        with pytest.raises(UserError, match=r"length_bucketing: .*not (one of auto, true, false|true or false)"):
            Config.from_sources({"length_bucketing": wrong}, {"model_name_or_path": "m", "dataset_name": "d"})
    with pytest.raises(UserError, match=r"'atuo' is not one of auto, true, false\. Did you mean 'auto'"):
        TransferArguments(str(tmp_path), use_cpu=True, length_bucketing="atuo")
    argv = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--length_bucketing", "true"]
    assert HfArgumentParser(TransferArguments).parse_args_into_dataclasses(argv)[0].length_bucketing is True


def test_auto_gives_way_where_true_is_refused(tmp_path):
    TransferArguments(str(tmp_path), use_cpu=True, length_bucketing="auto", balanced_sampling=True)
    values = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", "streaming": True}
    Config.from_sources({}, {**values, "max_steps": 1, "max_eval_samples": 1})
    trainer = TransferTrainer(tiny_vit(), arguments(tmp_path, length_bucketing="auto"), train_dataset=images(8))
    assert not trainer.bucketing.on and trainer.train().global_step


def test_the_card_shows_it_where_it_is_on():
    assert dict(_hyperparameters({"length_bucketing": True})) == {"length_bucketing": "true"}
    assert dict(_hyperparameters({"length_bucketing": False})) == {}


# ---- runs ------------------------------------------------------------------------------------------------------------


def trained(folder, resumed=None, data=None, **keys):
    args = arguments(
        folder, **{"strategy": "full", "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 8, **keys}
    )
    model = tiny_bert(layers=1, dropout=0.2)
    trainer = TransferTrainer(model, args, train_dataset=data or ragged_texts(43), data_collator=pad)
    trainer.train(resume_from_checkpoint=resumed)
    return trainer


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(copy_state(one).values(), copy_state(other).values(), strict=True))


def test_auto_trains_as_what_it_decided(tmp_path):
    auto, on = trained(tmp_path / "auto", length_bucketing="auto"), trained(tmp_path / "on", length_bucketing=True)
    assert auto.bucketing.on and same(auto.model, on.model)
    facts = json.loads((tmp_path / "auto/checkpoint-8/transfer_state.json").read_text())["facts"]
    assert facts["keys"]["length_bucketing"] is True and facts["of_one_length"] == 4
    even = {"data": texts(43)}
    auto, off = trained(tmp_path / "off", length_bucketing="auto", **even), trained(tmp_path / "none", **even)
    assert not auto.bucketing.on and same(auto.model, off.model)


@pytest.mark.parametrize("decided", [True, False])
def test_a_resumed_run_does_not_decide_again(decided, tmp_path, monkeypatch):
    """Another version might draw the line elsewhere: the run goes on as it began, bit for bit."""
    monkeypatch.setattr("hf_transfer.data.bucketing_choice.MUCH", 0.1 if decided else 0.9)
    whole = trained(tmp_path, length_bucketing="auto")
    assert whole.bucketing.on == decided
    monkeypatch.setattr("hf_transfer.data.bucketing_choice.MUCH", 0.9 if decided else 0.1)
    for value in ("auto", decided):
        again = trained(tmp_path, resumed=str(tmp_path / "checkpoint-8"), length_bucketing=value)
        assert again.bucketing.on == decided and again.resumed_at == 8 and same(again.model, whole.model)
    with pytest.raises(UserError, match=f"length_bucketing: {decided} then, {not decided} now"):
        trained(tmp_path, resumed=str(tmp_path / "checkpoint-8"), length_bucketing=not decided)


def test_a_run_writes_what_it_decided(tiny_bert_folder, tmp_path, capsys, monkeypatch):
    rows = [f"{'good film ' * (1 + i % 6)},{'ab'[i % 2]}" for i in range(96)]
    (tmp_path / "train.csv").write_text("text,label\n" + "\n".join(rows))
    keys = {"strategy": "full", "save_strategy": "steps", "save_steps": 8, "per_device_train_batch_size": 4}
    keys |= {"preflight": False, "train_file": str(tmp_path / "train.csv"), "output_dir": str(tmp_path / "out")}
    result = fine_tune(tiny_bert_folder, num_train_epochs=1, **keys)
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("length_bucketing"))
    ours, random = (float(word.lstrip("(").rstrip("%")) for word in said.split() if word.endswith("%"))
    assert ours < 10 < random < 60
    kept = yaml.safe_load((tmp_path / "out/run.yaml").read_text())
    assert kept["length_bucketing"] is True and Config.from_sources(kept, {}).training.length_bucketing is True
    found = result.results["length_bucketing"]
    assert found["on"] and found["padding"] < found["padding_in_random_batches"] / 2
    # The run is interrupted, and goes on with another version that would decide otherwise.
    (tmp_path / "out/results.json").unlink()
    monkeypatch.setattr("hf_transfer.data.bucketing_choice.MUCH", 0.9)
    again = fine_tune(tiny_bert_folder, num_train_epochs=1, resume_from_checkpoint="auto", **keys)
    assert yaml.safe_load((tmp_path / "out/run.yaml").read_text())["length_bucketing"] is True
    assert again.trainer.resumed_at and again.results["length_bucketing"]["on"]
