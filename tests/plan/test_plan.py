"""The Plan is pure data; its rates are the published formulas, worked out by hand here."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from hf_transfer import UserError, layer_groups
from hf_transfer.config.arguments.plan import PlanArguments, is_wanted
from hf_transfer.plan.checks import check
from hf_transfer.plan.make import make_plan
from hf_transfer.plan.plan import Plan, matches
from tests.helpers import tiny_bert


@dataclass
class Keys(PlanArguments):
    learning_rate: float = 1e-3
    num_train_epochs: float = 4.0


@dataclass(frozen=True)
class G:
    name: str
    sizes: tuple = (8, 2)
    requires_grad: tuple = (True, True)

    @property
    def parameters(self):
        return (f"model.{self.name}.weight", f"model.{self.name}.bias")


GROUPS = [G("stem"), G("blocks.0"), G("blocks.1"), G("blocks.2"), G("head", (2, 1))]


def plan(**keys) -> Plan:
    return make_plan(Keys(**keys), GROUPS)


def summary(p: Plan):
    return [(s.name, s.epochs, s.trainable) for s in p.stages]


ALL = ("stem", "blocks.0", "blocks.1", "blocks.2", "head")


@pytest.mark.parametrize(
    ("keys", "stages"),
    [
        ({"strategy": "linear-probe"}, [("head", 4.0, ("head",))]),
        ({"strategy": "partial", "unfrozen_groups": 1}, [("top 1 group", 4.0, ALL[3:])]),
        ({"strategy": "full"}, [("all groups", 4.0, ALL)]),
        ({"strategy": "scratch"}, [("all groups", 4.0, ALL)]),
        ({"strategy": "two-phase"}, [("head", 1.0, ("head",)), ("all groups", 3.0, ALL)]),
        ({"strategy": "auto", "head_epochs": 1.5}, [("head", 1.5, ("head",)), ("all groups", 2.5, ALL)]),
        ({"strategy": "two-phase", "head_epochs": 0}, [("all groups", 4.0, ALL)]),
        (
            {"strategy": "gradual", "num_train_epochs": 6},
            [
                ("head", 1.0, ("head",)),
                ("top 1 group", 1.0, ALL[3:]),
                ("top 2 groups", 1.0, ALL[2:]),
                ("top 3 groups", 1.0, ALL[1:]),
                ("all groups", 2.0, ALL),
            ],
        ),
        (
            {"strategy": "gradual", "groups_per_unfreeze": 3, "unfreeze_interval": 0.5},
            [("head", 0.5, ("head",)), ("top 3 groups", 0.5, ALL[1:]), ("all groups", 3.0, ALL)],
        ),
        (
            {"strategy": "gradual", "unfreeze_until": "blocks.1"},
            [("head", 1.0, ("head",)), ("top 1 group", 1.0, ALL[3:]), ("top 2 groups", 2.0, ALL[2:])],
        ),
        (
            {"stages": [{"epochs": 1, "train": "head"}, {"epochs": 2, "train": 2}, {"epochs": 3, "train": "all"}]},
            [("head", 1.0, ("head",)), ("top 2 groups", 2.0, ALL[2:]), ("all groups", 3.0, ALL)],
        ),
        ({"stages": [{"epochs": 1, "train": ["head", "stem"], "name": "ends"}]}, [("ends", 1.0, ("stem", "head"))]),
        ({}, [("all groups", 4.0, ALL)]),
    ],
)
def test_strategies(keys, stages):
    assert summary(plan(**keys)) == stages


def test_epochs_that_end_early_are_said():
    p = plan(strategy="gradual", num_train_epochs=2.5)
    assert summary(p)[-1] == ("top 2 groups", 0.5, ALL[2:])
    assert p.never_thawed == ("stem", "blocks.0")
    assert "Never trained in these epochs: stem, blocks.0." in str(p)
    assert plan(strategy="gradual", num_train_epochs=6).never_thawed == ()


def rates(stage) -> dict[str, float]:
    return {g: stage.rate(g) for g in ALL}


def approx(*values):
    return pytest.approx(dict(zip(ALL, values, strict=True)), rel=1e-12)


def test_layer_lr_decay():
    """rate(i) = learning_rate * d^(n-1-i), n = 4: the top block has the full rate, and so has the head."""
    assert rates(plan(layer_lr_decay=0.5).stages[0]) == approx(1.25e-4, 2.5e-4, 5e-4, 1e-3, 1e-3)
    assert rates(plan(layer_lr_decay=0.5, head_learning_rate=7e-3).stages[0]) == approx(
        1.25e-4, 2.5e-4, 5e-4, 1e-3, 7e-3
    )


def test_layer_lr_multiplier():
    """rate(i) = learning_rate * m^i: group 0 has learning_rate, the head learning_rate * m^n."""
    assert rates(plan(layer_lr_multiplier=2).stages[0]) == approx(1e-3, 2e-3, 4e-3, 8e-3, 16e-3)
    assert rates(plan(layer_lr_multiplier=2, head_learning_rate=5e-3).stages[0]) == approx(1e-3, 2e-3, 4e-3, 8e-3, 5e-3)


def test_the_rates_of_every_parameter_of_a_model():
    """By hand on a BERT of two layers: groups embeddings, layer.0, layer.1 (with the pooler), head."""
    model = tiny_bert(layers=2)
    groups = layer_groups(model)
    stage = make_plan(Keys(layer_lr_decay=0.1, head_learning_rate=1.0), groups).stages[0]
    group_of = {n: g.name for g in groups for n in g.parameters}
    expected = {
        "bert.embeddings.": 1e-5,
        "bert.encoder.layer.0.": 1e-4,
        "bert.encoder.layer.1.": 1e-3,
        "bert.pooler.": 1e-3,
        "classifier.": 1.0,
    }
    for name, _ in model.named_parameters():
        rate = next(r for prefix, r in expected.items() if name.startswith(prefix))
        assert stage.rate(group_of[name], name) == pytest.approx(rate, rel=1e-12), name


def test_patterns_come_first_in_their_order():
    stage = plan(layer_learning_rates={"head": 5.0, "blocks.1": 4.0, "bias": 3.0, r"blocks\..": 2.0}).stages[0]
    assert stage.rate("head", "model.head.bias") == 5.0
    assert stage.rate("blocks.1", "model.blocks.1.bias") == 4.0
    assert stage.rate("blocks.2", "model.blocks.2.bias") == 3.0
    assert stage.rate("blocks.2", "model.blocks.2.weight") == 2.0
    assert stage.rate("stem", "model.stem.weight") == 1e-3


def test_patterns_match_whole_parts_of_names():
    assert matches("layer.1", "layer.1") and matches("layer.1", "x", "bert.encoder.layer.1.output.bias")
    assert not matches("layer.1", "layer.11") and not matches("layer.1", "x", "bert.encoder.layer.11.output.bias")
    assert matches("bias", "x", "a.bias") and matches(r"bn\d", "x", "blocks.0.bn1.weight")
    assert not matches("head", "x", "attention.overhead.weight")


def test_two_phase_gives_the_head_its_own_rate_unless_told():
    """The backbone 10 to 100 times slower than the head (LP-FT), by default; a key that speaks of rates replaces it."""
    head, everything = plan(strategy="two-phase").stages
    assert head.rate("head") == everything.rate("head") == pytest.approx(2e-2)
    assert everything.rate("stem") == everything.rate("blocks.2") == pytest.approx(1e-3)
    assert plan(strategy="two-phase", head_learning_rate=3e-3).stages[0].rate("head") == 3e-3
    assert plan(strategy="two-phase", layer_lr_decay=0.5).stages[1].rate("head") == 1e-3


def test_stage_lr_decay_multiplies_at_each_unfreeze():
    p = plan(strategy="gradual", stage_lr_decay=0.1, num_train_epochs=3, head_learning_rate=1e-2)
    assert [s.rate("head") for s in p.stages] == pytest.approx([1e-2, 1e-3, 1e-4])
    assert p.stages[2].rate("blocks.1") == pytest.approx(1e-5)


def test_a_stage_has_its_own_learning_rate():
    p = plan(
        stages=[
            {"epochs": 1, "train": "head"},
            {"epochs": 2, "train": "all", "learning_rate": 1e-4, "layer_lr_decay": 0.5},
        ]
    )
    assert p.stages[0].rate("head") == 1e-3
    assert rates(p.stages[1]) == approx(1.25e-5, 2.5e-5, 5e-5, 1e-4, 1e-4)


def test_a_group_at_rate_zero_does_not_train():
    p = plan(strategy="full", layer_learning_rates={"blocks.1": 0, "bias": 0})
    assert p.stages[0].trainable == ("stem", "blocks.0", "blocks.2", "head") and p.never_thawed == ("blocks.1",)
    assert p.stages[0].num_trainable == 8 + 8 + 8 + 2


def test_steps():
    p = plan(strategy="gradual", num_train_epochs=3, unfreeze_interval=0.5).resolve(7)
    assert [s.start for s in p.stages] == [0, 4, 7, 10, 14]
    assert [p.at(step) for step in (0, 3, 4, 6, 7, 9, 10, 13, 14, 1000)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_a_short_stage_has_a_step():
    p = plan(strategy="gradual", unfreeze_interval=0.01, num_train_epochs=3).resolve(5)
    assert [s.start for s in p.stages] == [0, 1, 2, 3, 4]


def test_something_else_than_the_epochs_sets_the_length():
    p = make_plan(Keys(strategy="gradual", num_train_epochs=2), GROUPS, num_train_epochs=8)
    assert p.never_thawed == () and p.num_train_epochs == 8
    assert make_plan(Keys(strategy="gradual"), GROUPS, num_train_epochs=1).never_thawed == ALL[:-1]


def test_null_in_a_stage_is_absent():
    written = [{"epochs": 1, "train": "all", "learning_rate": None, "name": None}]
    assert not check(Keys(stages=written))
    assert plan(stages=written) == plan(stages=[{"epochs": 1, "train": "all"}])


def test_warmup_after_each_thaw():
    """rate * min(1, (t - t_thaw) / unfreeze_warmup_steps), counted from each group's own thaw."""
    p = plan(strategy="gradual", num_train_epochs=3, unfreeze_warmup_steps=4).resolve(10)
    assert [p.rate(t, p.trajectory("head")) for t in (0, 1, 3, 4, 25)] == pytest.approx([0, 2.5e-4, 7.5e-4, 1e-3, 1e-3])
    assert [p.rate(t, p.trajectory("blocks.2")) for t in (9, 10, 11, 14, 20)] == pytest.approx(
        [0, 0, 2.5e-4, 1e-3, 1e-3]
    )
    assert [p.rate(t, p.trajectory("blocks.1")) for t in (19, 20, 22)] == pytest.approx([0, 0, 5e-4])


def test_a_plan_is_data():
    assert plan(strategy="gradual") == plan(strategy="gradual") and hash(plan(strategy="full")) == hash(
        plan(strategy="full")
    )
    assert plan(strategy="gradual") != plan(strategy="gradual", layer_lr_decay=0.9)
    assert plan(strategy="linear-probe").to_list() == [
        {"name": "head", "epochs": 4.0, "groups": ["head"], "trainable_parameters": 3, "learning_rates": {"head": 1e-3}}
    ]


def test_the_table_shows_every_stage():
    text = str(plan(strategy="gradual", layer_lr_decay=0.5))
    assert "1 head" in text and "2 top 1 group" in text and "3 (7.0%)" in text and "0.0005 … 0.001, 0.001" in text


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"strategy": "gradul"}, "'gradual'"),
        ({"strategy": "gradual", "stages": [{"epochs": 1, "train": "all"}]}, "contradict"),
        ({"layer_lr_decay": 0.5, "layer_lr_multiplier": 2.0}, "Keep one"),
        ({"layer_lr_decay": 1.5}, "over 1"),
        ({"layer_lr_decay": 0.0}, "layer_lr_decay: expected a positive number, got 0"),
        ({"layer_lr_decay": float("nan")}, "expected a positive number"),
        ({"head_learning_rate": -1.0}, "expected a positive number"),
        ({"unfrozen_groups": 3, "strategy": "gradual"}, "belongs to partial"),
        ({"head_epochs": 2.0, "strategy": "linear-probe"}, "no effect with strategy: linear-probe"),
        ({"groups_per_unfreeze": 0, "strategy": "gradual"}, "groups_per_unfreeze: expected a positive number, got 0"),
        ({"unfreeze_warmup_steps": -1}, "unfreeze_warmup_steps: expected a number at least 0, got -1"),
        ({"stages": []}, "empty"),
        ({"stages": ["head"]}, "not a mapping"),
        ({"stages": [{"epochs": 1}]}, "train is missing"),
        ({"stages": [{"train": "all"}]}, "epochs is missing"),
        ({"stages": [{"train": "all", "epochs": 1, "learning_rat": 1}]}, "'learning_rate'"),
        ({"stages": [{"train": "all", "epochs": -1}]}, "epochs: -1"),
        ({"stages": [{"train": None, "epochs": 1}]}, "train is missing"),
        ({"stages": [{"train": "all", "epochs": None}]}, "epochs is missing"),
        ({"stages": [{"train": 2.0, "epochs": 1}]}, "train: 2.0 is not"),
        ({"stages": [{"train": True, "epochs": 1}]}, "train: True is not"),
        ({"stages": [{"train": "all", "epochs": 1, "layer_lr_decay": 3}]}, "over 1"),
        ({"stages": [{"train": "all", "epochs": 1, "layer_lr_decay": 0.5, "layer_lr_multiplier": 2}]}, "contradict"),
        ({"layer_learning_rates": {"head": "fast"}}, "'fast'"),
        ({"layer_learning_rates": {"(": 1.0}}, "regular expression"),
    ],
)
def test_wrong_keys_are_explained(keys, said):
    problems = check(Keys(**keys))
    assert problems and said in " ".join(problems)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"strategy": "partial", "unfrozen_groups": 9}, "Cannot unfreeze 9 groups: the model has 4"),
        ({"strategy": "gradual", "unfreeze_until": "blocks.7"}, "Did you mean 'blocks."),
        ({"stages": [{"epochs": 1, "train": ["hed"]}]}, "Did you mean 'head'"),
        ({"layer_learning_rates": {"blocks.9": 1.0}}, "matches no group"),
        ({"strategy": "linear-probe", "layer_learning_rates": {"head": 0.0}}, "trains nothing"),
    ],
)
def test_wrong_names_are_explained(keys, said):
    assert not check(Keys(**keys))
    with pytest.raises(UserError) as error:
        plan(**keys)
    assert said in str(error.value)


def test_all_problems_are_reported_at_once():
    assert len(check(Keys(strategy="nope", layer_lr_decay=2.0, layer_lr_multiplier=-1.0, head_learning_rate=0.0))) == 5


def test_no_key_wants_no_plan():
    assert not is_wanted(Keys()) and not is_wanted(Keys(layer_rules=[["^x", 0]]))
    assert (
        is_wanted(Keys(layer_lr_decay=0.9)) and is_wanted(Keys(strategy="full")) and is_wanted(Keys(unfrozen_groups=3))
    )


def test_only_stages_that_run_are_in_a_resolved_plan():
    """Sums of epochs such as 0.1 are not exact, and a stage can begin behind the last step."""
    groups = layer_groups(tiny_bert(layers=10))
    keys = dict(strategy="gradual", unfreeze_interval=0.1)
    plan = make_plan(Keys(**keys), groups, num_train_epochs=0.8)
    assert len(plan.stages) == 8 and sum(s.epochs for s in plan.stages) == pytest.approx(0.8)
    short = make_plan(Keys(**{**keys, "unfreeze_interval": 0.05}), groups, num_train_epochs=0.5).resolve(4, 2)
    assert [s.start for s in short.stages] == [0, 1] and len(short.never_thawed) == 10
    assert sum(s.epochs for s in short.stages) == pytest.approx(0.5)


def test_a_plans_rates_are_the_highest_that_its_patterns_give():
    groups = layer_groups(tiny_bert(layers=2))
    rates = {"encoder.layer.0": 5e-3, r"layer\.\d": 0}
    (stage,) = make_plan(Keys(strategy="full", layer_learning_rates=rates), groups).to_list()
    assert stage["learning_rates"]["layer.0"] == 5e-3 and "layer.1" not in stage["learning_rates"]


def test_stages_that_only_thaw_what_is_frozen_are_no_unfreeze():
    groups = layer_groups(tiny_bert(layers=4))
    keys = dict(strategy="gradual", groups_per_unfreeze=2, stage_lr_decay=0.1, num_train_epochs=4.0)
    plan = make_plan(Keys(**keys, freeze=["layer.0-1", "embeddings"]), groups)
    assert [stage.rate("head") for stage in plan.stages] == pytest.approx([1e-3, 1e-4, 1e-4, 1e-4])
