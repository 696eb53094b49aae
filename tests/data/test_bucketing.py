"""Batches of one length: little padding, every example once, labels mixed as in random batches, exact resumption."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset

from hf_transfer import TransferArguments, TransferTrainer, UserError
from hf_transfer.data.bucketing import LengthSampler, describe, lengths_of, padding
from hf_transfer.data.bundled import load_dataset
from hf_transfer.models.bundled import plain_folder
from hf_transfer.settings import Config
from tests.helpers import arguments, changed, copy_state, images, pad, ragged_texts, texts, tiny_bert, tiny_vit


def drawn_lengths(size, seed=0):
    """Of a skewed distribution with a long tail, as texts have: median 20, from 3 to 512."""
    normal = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (20 * normal.mul(0.6).exp()).round().clamp(3, 512)


# ---- padding -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentences():
    """Tokens of each training sentence of Rotten Tomatoes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(plain_folder("bundled:minilm-l6"))
    found = tokenizer(load_dataset("bundled:rotten-tomatoes")["train"]["text"][:])["input_ids"]
    return torch.tensor([len(ids) for ids in found], dtype=torch.float64)


@pytest.mark.parametrize("batch", [8, 32, 64])
@pytest.mark.parametrize("processes", [1, 2])
def test_less_than_5_percent_are_padding(batch, processes, sentences):
    """Of sentences, and of long texts whose lengths are as IMDB's 25,000 (median 230, 95% under 750 tokens)."""
    reviews = (drawn_lengths(25_000) * 11.5).clamp(max=2500)
    for lengths, most in ((sentences, 0.03), (reviews, 0.05), (reviews.clamp(max=512), 0.03)):
        sampler = LengthSampler(lengths, batch * processes, 42, fills_last=processes > 1)
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            assert padding(lengths, sampler.order(), batch) < most
        assert padding(lengths, torch.randperm(len(lengths)), batch) > 0.3


def test_padding_is_what_it_says():
    lengths = torch.tensor([4.0, 2.0, 1.0, 3.0, 5.0])
    assert padding(lengths, torch.tensor([0, 1, 2, 3, 4]), 2) == pytest.approx(1 - 15 / (8 + 6 + 5))
    assert padding(lengths, torch.tensor([], dtype=torch.int64), 2) == 0
    assert describe(LengthSampler(torch.full((10,), 7.0), 4, 0), 1).endswith(
        "0.0% of tokens are padding (0.0% in random batches)"
    )


# ---- the order -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 8, 32, 300])
@pytest.mark.parametrize("drop_last", [False, True])
def test_every_example_once_in_another_order_each_epoch(size, drop_last):
    lengths, orders = drawn_lengths(250), []
    sampler = LengthSampler(lengths, size, 3, drop_last)
    for epoch in range(4):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(250)) and len(sampler) == 250
        assert orders[-1] == list(at_epoch(lengths, size, epoch, drop_last)), "the same for the same epoch"
    assert len({tuple(order) for order in orders}) == 4
    assert list(LengthSampler(lengths, size, 4, drop_last)) != orders[0]
    if size < 250:
        assert lengths.max() in lengths[orders[0][:size]], "the longest comes first"


def at_epoch(lengths, size, epoch, drop_last):
    sampler = LengthSampler(lengths, size, 3, drop_last)
    sampler.set_epoch(epoch)
    return sampler


def test_texts_of_equal_length_meet_others_each_epoch():
    lengths = torch.full((64,), 9.0)
    sampler, seen = LengthSampler(lengths, 8, 0), []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        seen.append({frozenset(order[i : i + 8]) for i in range(0, 64, 8)})
    assert not seen[0] & seen[1]


def test_a_batch_is_drawn_from_a_chunk_not_from_all():
    """Of 25,600 examples in batches of 32: 8 chunks, each sorted, so the longest of all meet in no batch."""
    lengths = torch.arange(25_600, dtype=torch.float64) + 1000
    batches = LengthSampler(lengths, 32, 0).order().view(-1, 32)
    top = (lengths[batches] >= lengths.quantile(0.999)).sum(1)
    assert 0 < top.max() < 16, "sorted at once, the 26 longest would fill a batch"
    assert (lengths[batches].amax(1) / lengths[batches].amin(1)).median() < 1.06


def test_the_short_batch_is_of_one_length_and_any_and_never_the_first_longest():
    lengths, means = drawn_lengths(203), []
    for seed in range(60):
        sampler = LengthSampler(lengths, 8, seed)
        order = sampler.order()
        assert lengths[order[:8]].max() == lengths.max()
        short = lengths[order[-3:]]
        assert short.max() - short.min() <= 2 or short.min() > lengths.quantile(0.8) or short.max() < 8
        means.append(short.mean().item())
    assert min(means) < lengths.quantile(0.1) and max(means) > lengths.quantile(0.9)


def test_what_is_dropped_is_drawn_from_all_lengths():
    """What the loader drops is the rest, which differs from epoch to epoch; each example as likely."""
    lengths = drawn_lengths(20)
    sampler, dropped = LengthSampler(lengths, 8, 0, drop_last=True), torch.zeros(20)
    for epoch in range(500):
        sampler.set_epoch(epoch)
        dropped[sampler.order()[16:]] += 1
    assert dropped.sum() == 2000 and dropped.min() > 65 and dropped.max() < 135  # 100 ± 9 each


def test_on_several_processes_the_short_batch_repeats_its_own():
    lengths = drawn_lengths(201)
    sampler = LengthSampler(lengths, 16, 0, fills_last=True)
    order = list(sampler)
    assert len(order) == len(sampler) == 208 and set(order) == set(range(201))
    assert len(set(order[-16:])) == 9 and len(set(order[:-16])) == 192
    alone = list(LengthSampler(lengths, 16, 0))
    assert order[:201] == alone, "the number of processes changes nothing"


@pytest.mark.parametrize("kind", ["words", "equal lengths", "few lengths"])
def test_labels_are_mixed_in_batches_as_in_random_ones(kind):
    """Sorted by label, which is independent of length: the counts of a label in a batch have the hypergeometric mean
    and variance. With a stable sort and no draw before it, most batches of few lengths would have one label."""
    examples, size, of_one = 2000, 20, 700
    ratios, means = [], []
    labels = (torch.arange(examples) < of_one).double()
    for seed in range(20):
        lengths = drawn_lengths(examples, seed)
        lengths = {"words": lengths, "equal lengths": lengths * 0 + 5, "few lengths": (lengths / 20).ceil()}[kind]
        sampler = LengthSampler(lengths, size, seed)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            counts = labels[sampler.order()].view(-1, size).sum(1)
            share = of_one / examples
            variance = size * share * (1 - share) * (examples - size) / (examples - 1)
            ratios.append(((counts - size * share) ** 2).mean().item() / variance)
            means.append(counts[:50].mean().item())
    assert sum(ratios) / 60 == pytest.approx(1, abs=0.08)  # 6000 batches: a standard deviation of 0.02
    assert sum(means) / 60 == pytest.approx(7, abs=0.25)  # nor does one label come first
    naive = labels[lengths.argsort(stable=True)].view(-1, size).sum(1)
    if kind != "words":
        assert (naive - 7).square().mean() / variance > 3, "the test would see it"


# ---- lengths -------------------------------------------------------------------------------------------------------


def test_where_lengths_come_from():
    data = ragged_texts(12)
    expected = [len(ids) for ids in data["input_ids"]]
    assert lengths_of(data, "length").tolist() == expected
    assert lengths_of(data.with_transform(lambda rows: {}), "length").tolist() == expected, "the items are not read"
    assert lengths_of(data.select([5, 2]), "length").tolist() == [expected[5], expected[2]]
    assert lengths_of(data.add_column("length", list(range(12))), "length").tolist() == list(range(12))
    assert lengths_of(data.rename_column("input_ids", "values"), "length", "values").tolist() == expected
    assert lengths_of([data[i] for i in range(12)], "length").tolist() == expected
    lazy = Dataset.from_dict({"text": ["a b", "a", "a b c"]})
    lazy = lazy.with_transform(lambda rows: {"input_ids": [t.split() for t in rows["text"]]})
    assert lengths_of(lazy, "length").tolist() == [2, 1, 3]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (images(4), "column 'pixel_values' has type"),
        ([{"pixel_values": torch.zeros(3, 4, 4)}], r"shape \(3, 4, 4\)"),
        ([{"labels": 1}], "no input_ids or pixel_values"),
        (ragged_texts(4).add_column("length", [1, None, 2, 3]), "the length of example 1 is nan"),
        (ragged_texts(4).add_column("length", ["a"] * 4), "column 'length'"),
        (Dataset.from_dict({"input_ids": [1, 2]}), "has type int32"),
        (ragged_texts(4).to_iterable_dataset(), "a stream"),
    ],
)
def test_data_without_lengths_is_refused(data, said):
    with pytest.raises(UserError, match=f"length_bucketing: .*{said}"):
        lengths_of(data, "length", "pixel_values")


# ---- training ------------------------------------------------------------------------------------------------------


def trained(folder, resumed=None, **keys):
    keys = {"length_bucketing": True, "strategy": "full", "num_train_epochs": 3, "save_strategy": "steps", **keys}
    args = arguments(folder, save_steps=8, **keys)
    trainer = TransferTrainer(tiny_bert(layers=1, dropout=0.2), args, train_dataset=ragged_texts(43), data_collator=pad)
    trainer.train(resume_from_checkpoint=resumed)
    return trainer


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    """Within the second epoch, with accumulation: 11 batches are 6 steps; and other batches are refused."""
    keys = {"gradient_accumulation_steps": 2}
    whole = copy_state(trained(tmp_path, **keys).model)
    place = tmp_path / "checkpoint-8"
    again = trained(tmp_path, resumed=str(place), **keys)
    assert again.resumed_at == 8 and not changed(whole, copy_state(again.model))
    assert json.loads((place / "transfer_state.json").read_text())["facts"]["of_one_length"] == 4
    with pytest.raises(UserError, match="length_bucketing: True then, False now"):
        trained(tmp_path, resumed=str(place), **keys, length_bucketing=False)
    with pytest.raises(UserError, match=r"batches of 4 \(over all processes\) then, of 8 now"):
        trained(tmp_path, resumed=str(place), per_device_train_batch_size=8)


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    from hf_transfer.training import run_identity, run_subject

    args, data = arguments(tmp_path), run_subject.data_facts(texts(4))
    now = run_identity.facts(args, None, [], {}, data, {})
    then = json.loads(json.dumps(now))
    del then["keys"]["length_bucketing"], then["of_one_length"]
    assert run_identity.compare(then, now, False) == []
    args.length_bucketing = True
    with pytest.raises(UserError, match="length_bucketing: False then, True now"):
        run_identity.compare(then, run_identity.facts(args, None, [], {}, data, {}), False)
    then = run_identity.facts(args, None, [], {}, data, {})
    assert run_identity.compare(then, then, False) == []
    with pytest.raises(UserError, match="length_bucketing draws another order"):
        run_identity.compare({k: v for k, v in then.items() if k != "length_order"}, then, False)


def test_what_contradicts_it_is_found_before_training(tmp_path):
    keys = {"length_bucketing": True, "balanced_sampling": True, "train_sampling_strategy": "group_by_length"}
    with pytest.raises(UserError) as told:
        TransferArguments(str(tmp_path), use_cpu=True, **keys)
    for other in ("train_sampling_strategy: group_by_length", "balanced_sampling"):
        assert f"length_bucketing and {other} contradict each other" in str(told.value)
    values = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", **keys, "streaming": True}
    with pytest.raises(UserError) as told:
        Config.from_sources({}, {**values, "max_steps": 1, "max_eval_samples": 1})
    assert "length_bucketing and balanced_sampling" in str(told.value)
    assert "streaming: length_bucketing needs all examples" in str(told.value)
    args = {"length_bucketing": True, "max_steps": 2}
    for data, model in ((images(8), tiny_vit()), (ragged_texts(8).to_iterable_dataset(), tiny_bert())):
        trainer = TransferTrainer(model, arguments(tmp_path, **args), train_dataset=data)
        with pytest.raises(UserError, match="length_bucketing: "):
            trainer.train()
