"""What a run sets when nothing was said, and which layer cross-validation chooses."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from hf_transfer.analysis.baselines import PIXELS, Distance
from hf_transfer.analysis.few_labels import FEW, MANY, Choice, Chosen, Seen, pooling
from hf_transfer.analysis.pooling_choice import Candidate, PoolingChoice, choose_pooling, held_out_losses
from hf_transfer.analysis.rules import DECAY, RULES, choose, rule_for
from hf_transfer.features.convex_head import MULTI, REGRESSION, SINGLE
from hf_transfer.features.cross_validation import divisions

SEEN = Seen(192, 64, False, True, "", False, None, None)
FAR = Distance(0.76, 0.84, PIXELS, 0.1, -0.08, 0.07, 0.1)
NEAR = Distance(0.45, 0.15, PIXELS, 0.1, 0.30, 0.06, 0.1)


def values(seen):
    return {name: choice.value for name, choice in choose(seen).items()}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"strategy": "two-phase", "head_init": "probe", "head_epochs": 0.0, "num_train_epochs": 5.0}),
        ({"examples": 48, "per_class": 16}, {"num_train_epochs": 20.0, "learning_rate": 1e-4}),
        ({"examples": 16, "per_class": 14}, {"num_train_epochs": 40.0}),  # 60 would be needed
        ({"examples": FEW}, {"num_train_epochs": 4.0}),
        ({"has_batchnorm": True}, {"learning_rate": 1e-3, "head_learning_rate": 1e-3, "num_train_epochs": 9.0}),
        ({"has_batchnorm": True, "examples": FEW + 1}, {"head_init": "probe", "num_train_epochs": 4.0}),
        ({"has_batchnorm": True, "examples": FEW}, {"num_train_epochs": 8.0}),
        ({"rate": 2e-5}, {"learning_rate": 1e-4, "head_learning_rate": 2e-5}),  # the given one wins where it is applied
        ({"batch_size": 64}, {"num_train_epochs": 20.0}),
        ({"per_class": 13.9}, {"strategy": "linear-probe", "probe_solver": "lbfgs"}),
        ({"per_class": 10, "averages": True}, {"strategy": "two-phase", "head_init": "probe"}),
        ({"per_class": 9.9, "averages": True}, {"strategy": "linear-probe", "probe_solver": "lbfgs"}),
        ({"per_class": 10, "has_batchnorm": True}, {"strategy": "two-phase"}),
        ({"per_class": 9.9, "has_batchnorm": True}, {"strategy": "linear-probe", "probe_solver": "lbfgs"}),
        ({"per_class": 8, "has_batchnorm": True, "domain": NEAR}, {"strategy": "linear-probe"}),
        ({"per_class": 8, "has_batchnorm": True, "domain": FAR}, {"strategy": "two-phase", "head_init": "probe"}),
        ({"per_class": 8, "domain": FAR}, {"strategy": "linear-probe"}),  # measured with BatchNorm alone
        ({"per_class": None}, {"strategy": "two-phase"}),
        ({"is_new_head": False}, {"strategy": "full", "num_train_epochs": 5.0}),
    ],
)
def test_few_examples(changes, expected):
    assert values(replace(SEEN, **changes)).items() >= expected.items()


@pytest.mark.parametrize(
    ("changes", "strategy"),
    [
        ({"examples": FEW + 1}, "two-phase"),
        ({"examples": MANY}, "two-phase"),
        ({"examples": MANY + 1, "is_random": True}, "two-phase"),
        ({"examples": MANY + 1, "begins": "head_epochs: 1"}, "two-phase"),
        ({"examples": MANY + 1, "has_rates": True}, "full"),
        ({"examples": None}, "two-phase"),
        ({"unsolvable": "mixup"}, "two-phase"),
        ({"is_adapted": True}, "full"),
    ],
)
def test_elsewhere_the_strategy_alone_is_chosen(changes, strategy):
    assert values(replace(SEEN, **changes)) == {"strategy": strategy}


@pytest.mark.parametrize("has_batchnorm", [False, True])
def test_many_examples_train_everything_with_lower_rates_below(has_batchnorm):
    found = choose(replace(SEEN, examples=MANY + 1, has_batchnorm=has_batchnorm))
    assert {name: choice.value for name, choice in found.items()} == {"strategy": "full", "layer_lr_decay": DECAY}
    assert all("rule of thumb" in choice.why for choice in found.values())


def test_every_rule_applies_somewhere_says_why_and_what_that_rests_on():
    cases = [
        {"no_room": "too large"},
        {"examples": None},
        {"is_adapted": True},
        {"examples": MANY + 1},
        {"examples": FEW + 1},
        {"is_new_head": False},
        {"unsolvable": "mixup"},
        {"per_class": 3, "has_batchnorm": True, "domain": FAR},
        {"per_class": 3},
        {},
    ]
    found = [rule_for(replace(SEEN, **changes)) for changes in cases]
    assert [rule.name for rule in found] == [rule.name for rule in RULES]
    for rule in found:
        assert rule.because and rule.basis and "; overrule it with --strategy" in str(rule)
    assert str(found[0]).endswith("overrule it with --strategy or --adapter")


@pytest.mark.parametrize("examples", [None, 192, FEW + 1, MANY + 1])
def test_lora_where_memory_is_short(examples):
    short = replace(SEEN, examples=examples, no_room="training all layers takes 5 GB, and 3 GB are free")
    found = choose(short)
    assert {name: choice.value for name, choice in found.items()} == {
        "strategy": "full",
        "adapter": "lora",
        "learning_rate": 5e-4,
    }
    assert found["adapter"].why == short.no_room
    assert "learning_rate" not in choose(replace(short, rate=1e-3)), "a given one is kept"
    assert rule_for(replace(short, is_adapted=True)).name == "adapter"
    assert rule_for(replace(short, begins="head_epochs: 1")).name != "short of memory"


def test_a_head_alone_needs_no_lora():
    assert choose(replace(SEEN, per_class=3, no_room="too large"))["strategy"].value == "linear-probe"


def test_the_reason_to_train_more_than_the_head_names_both_accuracies():
    why = choose(replace(SEEN, per_class=8, has_batchnorm=True, domain=FAR))["strategy"].why
    assert "frozen features (0.76 in cross-validation) are not clearly better than raw pixels (0.84)" in why


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({}, True),
        ({"per_class": 12}, False),
        ({"has_batchnorm": False}, False),
        ({"is_new_head": False}, False),
        ({"is_adapted": True}, False),
        ({"begins": "head_epochs: 1"}, False),
        ({"unsolvable": "mixup"}, False),
        ({"is_random": True}, False),
        ({"examples": None}, False),
    ],
)
def test_the_domain_is_measured_where_it_decides_something(changes, asked):
    assert replace(SEEN, **{"per_class": 8, "has_batchnorm": True, **changes}).asks_domain is asked


def test_what_takes_long_is_saved_each_epoch():
    assert "save_strategy" in values(SEEN)
    assert "save_strategy" not in values(replace(SEEN, has_batchnorm=True, examples=FEW + 1))


def a_choice(gain, error):
    best, own = Candidate("layer.3", "mean", 0.5, 1.0), Candidate("layer.5", "cls", 0.5 + gain, 1.0)
    return PoolingChoice(best, own, gain, error, (best,))


def test_another_layer_is_read_unless_its_loss_is_clearly_higher():
    assert pooling(a_choice(0.2, 0.1), "")["pooling"].value == "mean"
    assert pooling(a_choice(0.2, 0.1), "")["pooling_layer"].value == "layer.3"
    assert pooling(a_choice(-0.3, 0.2), "")["pooling"].value == "mean", "within two standard errors"
    assert (
        "which the head reads: not clearly lower (standard error 0.200)"
        in pooling(a_choice(-0.3, 0.2), "")["pooling"].why
    )
    assert pooling(a_choice(-0.5, 0.2), "")["pooling"].value is None
    assert pooling(replace(a_choice(0.1, 0.2), margin=1.0), "")["pooling"].value is None
    assert pooling(None, "an adapter")["pooling"] == Choice(None, "an adapter")


def test_what_is_printed_names_every_choice_with_its_reason():
    chosen = Chosen({"strategy": Choice("full", "a reason"), "pooling": Choice(None, "")}, {"num_train_epochs": 3.0})
    assert chosen.lines() == [
        "Chosen from the data and the model (a key that is given wins):",
        "  strategy: full (a reason)",
        "  num_train_epochs: 3 (given)",
    ]
    assert Chosen({"pooling": Choice(None, "")}).lines() == []


# ---- cross-validation ------------------------------------------------------------------------------------------------


def blobs(count, width, shift, seed=0):
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 2
    return torch.randn(count, width, generator=rng) + shift * (2 * y[:, None] - 1), y


def features(**matrices):
    return SimpleNamespace(matrix=lambda group, pooling: matrices[f"{group}_{pooling}"])


def test_the_informative_layer_is_chosen_and_beats_the_own_one():
    good, y = blobs(60, 4, 0.8)
    noise = blobs(60, 4, 0.0, seed=1)[0]
    data = features(a_mean=noise, b_mean=good, c_mean=0.2 * good + noise, c_cls=noise)
    found = choose_pooling(data, y, SINGLE, 2, ("c", "cls"), [("c", "mean"), ("b", "mean"), ("a", "mean")], seed=0)
    assert [one.group for one in found.candidates] == ["b", "c", "a"]
    assert (found.best.group, found.own.pooling, found.pays) == ("b", "cls", True)
    assert found.gain == pytest.approx(found.own.loss - found.best.loss)
    same = features(a_mean=noise, c_cls=noise)
    assert not choose_pooling(same, y, SINGLE, 2, ("c", "cls"), [("a", "mean")], seed=0).pays


def test_the_held_out_loss_is_that_of_a_logistic_regression():
    """scikit-learn as the oracle: C = 1 / (n * strength), on features scaled by all examples."""
    x, y = blobs(40, 3, 0.5)
    draws = divisions(SINGLE, y, 1, 0)
    losses, l2 = held_out_losses(SINGLE, x, y, 2, draws)
    scaler = StandardScaler().fit(x)
    for fold in range(5):
        rows, held = draws[0] != fold, draws[0] == fold
        model = LogisticRegression(C=1 / (rows.sum() * l2 / 2), tol=1e-8).fit(scaler.transform(x[rows]), y[rows])
        expected = -torch.tensor(model.predict_log_proba(scaler.transform(x[held])))[range(held.sum()), y[held]]
        torch.testing.assert_close(losses[held], expected, rtol=2e-3, atol=2e-3)


def test_the_mean_of_weighted_losses_is_that_of_repeated_examples():
    x, y = blobs(40, 3, 0.5)
    losses, l2 = held_out_losses(SINGLE, x, y, 2, divisions(SINGLE, y, 1, 0), torch.tensor([1.0, 3.0]))
    rows = torch.cat([torch.arange(40), *(y.nonzero()[:, 0],) * 2])
    repeated = divisions(SINGLE, y, 1, 0)[0][rows]  # copies share a fold
    expected, strength = held_out_losses(SINGLE, x[rows], y[rows], 2, [repeated])
    assert l2 == strength
    # Standardized features are not the same, so that the penalty is not quite either.
    assert float(losses.mean()) == pytest.approx(float(expected.mean()), rel=0.02)
    unweighted, _ = held_out_losses(SINGLE, x, y, 2, divisions(SINGLE, y, 1, 0))
    assert float(unweighted.mean()) != pytest.approx(float(expected.mean()), rel=0.02)


@pytest.mark.parametrize("kind", [MULTI, REGRESSION])
def test_other_kinds_of_labels(kind):
    good, y = blobs(40, 4, 0.8)
    noise = blobs(40, 4, 0.0, seed=1)[0]
    labels = torch.stack([y, 1 - y], 1) if kind == MULTI else good[:, :1] * 2 + 1
    data = features(a_mean=noise, b_mean=good, b_cls=noise)
    found = choose_pooling(data, labels, kind, labels.shape[1], ("b", "cls"), [("a", "mean"), ("b", "mean")], seed=0)
    assert found.best.group == "b" and found.pays


def test_a_class_with_one_example_and_constant_features_stop_nothing():
    x, y = blobs(60, 4, 1.5)
    y[0] = 2
    data = features(a_mean=torch.ones(60, 4), b_mean=x, b_cls=x)
    found = choose_pooling(data, y, SINGLE, 3, ("b", "cls"), [("a", "mean"), ("b", "mean")], seed=0)
    assert found.best.group == "b"


@pytest.mark.parametrize(
    ("changes", "expected", "left_out"),
    [
        ({"per_class": 5, "not_alone": "augmentation"}, {"strategy": "linear-probe", "probe_solver": "sgd"}, ()),
        ({"per_class": 5, "begins": "head_epochs: 2"}, {"strategy": "two-phase", "num_train_epochs": 5.0}, ()),
        ({"is_new_head": False, "begins": "head_epochs: 2"}, {"strategy": "two-phase"}, ("head_init",)),
        ({"is_adapted": True, "begins": "head_epochs: 2"}, {"strategy": "two-phase"}, ()),
        ({"has_steps": True}, {"learning_rate": 1e-4}, ("num_train_epochs",)),
    ],
)
def test_what_was_given_keeps_its_meaning(changes, expected, left_out):
    found = values(replace(SEEN, **changes))
    assert found.items() >= expected.items() and not set(left_out) & set(found)
