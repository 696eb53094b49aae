"""Which target examples get a label, when it stops, and how they come into a batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import default_data_collator

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.augment import EXAMPLE, Chance, Mixed
from hf_transfer.data.labels import IGNORED, SINGLE_LABEL, Labels
from hf_transfer.data.pairs import DOMAIN, Pairs, PairsCollator
from hf_transfer.data.pseudo_labels import LabeledTargets, label
from tests.helpers import images, pad, ragged_texts


def logits_of(rows):
    """Of (class, probability) pairs, with three classes."""
    p = np.full((len(rows), 3), 0.0)
    for row, (answer, sure) in zip(p, rows, strict=True):
        row[:] = (1 - sure) / 2
        row[answer] = sure
    return np.log(p)


ROWS = [(0, 0.9), (0, 0.6), (0, 0.8), (0, 0.7), (1, 0.5), (1, 0.45), (2, 0.99), (0, 0.8)]


def labeled(threshold, done=0.5, rows=ROWS, source=(1, 1, 1)):
    labels, found = label(logits_of(rows), threshold, done, source, number=1, epoch=1)
    return [number for number, one in enumerate(labels) if one != IGNORED], labels, found


def test_a_probability_labels_what_is_at_least_so_sure():
    numbers, labels, found = labeled(0.795)
    assert numbers == [0, 2, 6, 7] and labels[[0, 2, 6, 7]].tolist() == [0, 0, 2, 0]
    assert found.labeled == [3, 0, 1] and found.answered == [5, 2, 1] and found.threshold[1] is None
    assert found.threshold[0] == pytest.approx(0.8) and found.threshold[2] == pytest.approx(0.99)
    assert labeled(0.999)[0] == []


def test_a_quantile_labels_the_surest_of_all_and_of_equal_ones_the_first():
    assert labeled("quantile", 0.375)[0] == [0, 2, 6]
    assert labeled("quantile", 0.5)[0] == [0, 2, 6, 7]


def test_per_class_labels_the_same_fraction_of_each_class():
    numbers, _, found = labeled("per-class", 0.5)
    assert numbers == [0, 2, 4, 6, 7] and found.labeled == [3, 1, 1]


def test_it_collapses_when_the_answers_fall_into_few_classes():
    _, _, found = labeled(0.9, source=(10, 10, 10))
    shares = np.array([5, 2, 1]) / 8
    assert found.entropy == pytest.approx(-(shares * np.log(shares)).sum())
    assert found.source_entropy == pytest.approx(math.log(3)) and not found.collapsed
    skewed = [(0, 0.9)] * 19 + [(1, 0.9)]
    assert labeled(0.9, rows=skewed, source=(10, 10, 10))[2].collapsed
    assert not labeled(0.9, rows=skewed, source=(19, 1, 0))[2].collapsed  # the source is as skewed
    assert labeled(0.9, rows=[(0, 0.9)] * 9, source=(10, 10, 10))[2].to_dict()["collapsed"] is True


# ---- as training examples ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, (torch.tensor([9.0, 3, 5, 5, 8, 2]), torch.arange(9.0) + 1)])
def test_a_source_example_comes_with_a_labeled_one_of_its_class(lengths):
    classes = [0, 1, 0, 2, 1, 0]
    targets = LabeledTargets(list(range(9)), classes, 0, lengths)
    assert targets.of(range(6)) == [None] * 6 and targets.counts == [3, 2, 1]
    known = torch.tensor([0, 0, IGNORED, 1, IGNORED, 0, 1, 1, 0])
    targets.set_labels(known)
    drawn = []
    for epoch in range(12):
        targets.chance.epoch = epoch
        partners = targets.of(range(6))
        assert partners[3] is None
        assert all(known[p] == c for p, c in zip(partners, classes, strict=True) if p is not None)
        drawn += [p for p in partners if p is not None]
    counts = np.bincount(drawn, minlength=9)
    assert counts[[0, 1, 5, 8]].tolist() == [9] * 4  # 36 draws of class 0 among 4 examples
    assert counts[[3, 6, 7]].tolist() == [8] * 3 and not counts[[2, 4]].any()


def test_and_with_one_of_like_length_among_them():
    """As many labeled examples of a class as the source has: the shortest with the shortest, up to the jitter."""
    generator = torch.Generator().manual_seed(0)
    sources, lengths = (torch.randint(3, 60, (200,), generator=generator).double() for _ in range(2))
    classes = torch.arange(200) % 2
    targets = LabeledTargets(list(range(200)), classes.tolist(), 0, (sources, lengths))
    targets.set_labels(classes)
    for epoch in range(2):
        targets.chance.epoch = epoch
        partners = torch.tensor(targets.of(range(200)))
        assert (classes[partners] == classes).all() and len(partners.unique()) == 200
        for own in (classes == 0, classes == 1):
            ranks = [values.argsort().argsort() for values in (sources[own], lengths[partners][own])]
            assert int((ranks[0] - ranks[1]).abs().max()) < 12


def test_a_partner_depends_on_seed_labels_epoch_and_number_alone():
    known = torch.arange(40) % 2
    one, other = (LabeledTargets(list(range(40)), [0, 1] * 10, seed=0) for _ in range(2))
    other.set_labels(1 - known)
    other.of(range(20))
    for targets in (one, other):
        targets.set_labels(known)
        targets.chance.epoch = 3
    assert one.of([8, 3]) == [other.of([number])[0] for number in (8, 3)]
    third = LabeledTargets(list(range(40)), [0, 1] * 10, seed=1)
    third.set_labels(known)
    third.chance.epoch = 3
    assert third.of(range(20)) != one.of(range(20))


def test_a_batch_has_labels_of_both_and_only_what_has_one():
    source, target = ragged_texts(6), ragged_texts(5, seed=3).remove_columns("labels")
    targets = LabeledTargets(target, source["labels"], seed=0)
    pairs, collate = Pairs(source, targets), PairsCollator(pad, labeled=True)
    plain = collate([pairs[i] for i in range(4)])
    assert plain[DOMAIN].tolist() == [0] * 4 and plain["labels"].tolist() == source["labels"][:4]
    targets.set_labels(torch.tensor([0, IGNORED, IGNORED, IGNORED, IGNORED]))
    batch = collate([pairs[i] for i in range(6)])
    of_class = list(source["labels"]).count(0)
    assert batch[DOMAIN].tolist() == [0] * 6 + [1] * of_class
    assert batch["labels"].tolist() == [*source["labels"], *([0] * of_class)]
    last = batch["input_ids"][-1][batch["attention_mask"][-1].bool()].tolist()
    assert last == target["input_ids"][0]


def test_next_to_mixed_labels_they_are_weights_of_the_classes():
    source = images(4).with_format("torch")
    target = images(3, seed=4).add_column(EXAMPLE, range(3)).with_format("torch")
    targets = LabeledTargets(target, source["labels"][:].tolist(), seed=0)
    targets.set_labels(torch.tensor([0, 1, 0]))
    labels = Labels(SINGLE_LABEL, ("a", "b"))
    mixed = Mixed(default_data_collator, DataArguments(mixup_alpha=0.4), labels, Chance(0))
    rows = [{**source[i], EXAMPLE: i} for i in range(4)]
    pairs = targets.beside(range(4), rows)
    batch = PairsCollator(mixed, labeled=True)(pairs)
    assert batch["labels"].shape == (8, 2)
    given = [int(partner["labels"]) for _, partner in pairs]
    assert batch["labels"][4:].tolist() == torch.eye(2)[given].tolist()
