"""Domain adaptation in a trainer: what is paired, what the loss reads, exact resumption, and what is refused."""

from __future__ import annotations

import math
import os
import runpy
import signal
from pathlib import Path

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, default_data_collator

from hf_transfer import TransferTrainer, UserError
from hf_transfer.data.pairs import DOMAIN, Pairs, PairsCollator, Partners, Targets
from hf_transfer.errors import Interrupted, UserErrors
from hf_transfer.features.convex_head import SINGLE, Problem
from hf_transfer.objectives.adaptation import frozen, methods
from hf_transfer.objectives.adaptation.coral import coral
from hf_transfer.objectives.adaptation.mmd import mmd
from hf_transfer.training import adapting, probe_features
from tests.helpers import (
    arguments,
    copy_state,
    images,
    pad,
    ragged_texts,
    soft_texts,
    texts,
    tiny_bert,
    tiny_timm_resnet,
    tiny_vit,
    with_statistics,
)

KEYS = dict(strategy="full", domain_adaptation="dann", domain_adaptation_schedule="constant", num_train_epochs=2)


def trainer_of(tmp_path, model=None, source=None, target=None, collate=None, **keys):
    source = texts(20) if source is None else source
    target = texts(14, seed=9).remove_columns("labels") if target is None else target
    keys = {"per_device_train_batch_size": 4, **KEYS, **keys}
    if keys["domain_adaptation"] == "none":
        target, keys["domain_adaptation_schedule"] = None, "ramp"
    args = arguments(tmp_path, **keys)
    model = tiny_bert() if model is None else model
    return TransferTrainer(
        model, args, train_dataset=source, eval_dataset=texts(8), target_dataset=target, data_collator=collate
    )


def differences(one, other):
    return max(float((one[n].double() - other[n].double()).abs().max()) for n in one)


# ---- pairs ---------------------------------------------------------------------------------------------------------


def lengths_of_both(sources, targets):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(3, 60, (count,), generator=generator).double() for count in (sources, targets))


@pytest.mark.parametrize("targets", [3, 10, 64])
@pytest.mark.parametrize("by_length", [False, True])
def test_every_target_example_is_drawn_equally_often(targets, by_length):
    partners, drawn = Partners(10, targets, 0, lengths_of_both(10, targets) if by_length else None), []
    for epoch in range(6 * targets):
        partners.chance.epoch = epoch
        drawn += partners.of(range(10))
    assert torch.bincount(torch.tensor(drawn), minlength=targets).unique().tolist() == [60]
    assert drawn[:targets] != drawn[targets : 2 * targets]


@pytest.mark.parametrize("lengths", [None, lengths_of_both(10, 7)])
def test_a_partner_depends_on_seed_epoch_and_number_alone(lengths):
    one, other = Partners(10, 7, 0, lengths), Partners(10, 7, 0, lengths)
    one.of(range(10))
    one.chance.epoch = other.chance.epoch = 3
    assert one.of([8, 2]) == [other.of([number])[0] for number in (8, 2)]
    assert Partners(10, 7, seed=1).of(range(10)) != Partners(10, 7, seed=0).of(range(10))


def test_texts_come_with_texts_of_like_length():
    """Of two sets of equally many, the shortest with the shortest and so on, up to the jitter, and not always alike."""
    sources, targets = lengths_of_both(400, 400)
    partners, drawn = Partners(400, 400, 0, (sources, targets)), []
    for epoch in range(2):
        partners.chance.epoch = epoch
        drawn.append(partners.of(range(400)))
        ranks = [values.argsort().argsort() for values in (sources, targets[drawn[-1]])]
        assert int((ranks[0] - ranks[1]).abs().max()) < 30
    assert drawn[0] != drawn[1]


def test_batches_of_both_domains_are_padded_little(tmp_path, monkeypatch):
    """Beside a target whose texts come in any order, as where their lengths are not known."""
    source, target, padded = ragged_texts(64), ragged_texts(64, seed=3).remove_columns("labels"), []
    for known in (True, False):
        if not known:
            monkeypatch.setattr(adapting, "_lengths", lambda *_: None)
        trainer = trainer_of(tmp_path, source=source, target=target, length_bucketing=True, collate=pad)
        masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
        padded.append(1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks))
    assert padded[0] < 0.1 < 0.25 < padded[1]


def test_a_batch_has_the_source_first_padded_like_the_target():
    source, target = ragged_texts(6), ragged_texts(5, seed=3).remove_columns("labels")
    pairs = Pairs(source, Targets(target, Partners(6, 5, seed=0)))
    batch = PairsCollator(pad)([pairs[i] for i in range(4)])
    assert batch[DOMAIN].tolist() == [0] * 4 + [1] * 4 and batch["labels"].tolist() == source["labels"][:4]
    numbers = pairs.targets.partners.of(range(4))
    texts_in = [
        row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert texts_in == [*source["input_ids"][:4], *(target["input_ids"][i] for i in numbers)]


def test_labels_of_the_target_are_never_read(tmp_path):
    """Neither their values nor their kind."""
    ends = []
    for labels in (None, [0] * 14, ["unknown"] * 14):
        target = texts(14, seed=9).remove_columns("labels")
        target = target if labels is None else target.add_column("labels", labels)
        trainer = trainer_of(tmp_path, target=target, num_train_epochs=1)
        trainer.train()
        ends.append(copy_state(trainer.model))
    assert differences(ends[0], ends[1]) == differences(ends[0], ends[2]) == 0


# ---- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mmd", "coral", "dann"])
@pytest.mark.parametrize("kind", ["text", "image", "soft"])
def test_at_weight_0_the_model_trains_as_on_the_source_alone(method, kind, tmp_path):
    """So the loss reads source rows only, each with its weight, in a short last batch and under accumulation too."""
    model, source, target = {
        "text": (tiny_bert, texts(18), None),
        "image": (tiny_vit, images(18), images(5, seed=4)),
        "soft": (tiny_bert, soft_texts(18), None),
    }[kind]
    ends = []
    for adapts in (False, True):
        net = model().double()
        net.config.problem_type = "single_label_classification"
        keys = (
            dict(domain_adaptation_weight=0.0, domain_adaptation=method) if adapts else dict(domain_adaptation="none")
        )
        if not adapts:
            keys["domain_adaptation_schedule"] = "ramp"
        keys |= dict(gradient_accumulation_steps=2, optim="sgd", learning_rate=0.1, max_grad_norm=0.0)
        args = arguments(tmp_path, **{"per_device_train_batch_size": 4, **KEYS, **keys})
        own = {"target_dataset": texts(14, seed=9) if target is None else target} if adapts else {}
        trainer = TransferTrainer(net, args, train_dataset=source, **own)
        trainer.train()
        ends.append(copy_state(trainer.model))
    assert differences(*ends) < 1e-12


@pytest.mark.parametrize("method", ["mmd", "coral", "dann"])
def test_with_a_weight_it_trains_otherwise_and_the_saved_model_knows_nothing_of_it(method, tmp_path):
    plain = trainer_of(tmp_path, domain_adaptation=method, domain_adaptation_weight=0.0)
    aligned = trainer_of(tmp_path, domain_adaptation=method, domain_adaptation_weight=1.0)
    for trainer in (plain, aligned):
        trainer.train()
    assert differences(copy_state(plain.model), copy_state(aligned.model)) > 1e-7
    assert set(copy_state(aligned.model)) == set(copy_state(tiny_bert()))


def test_an_evaluation_sees_no_target_and_no_penalty(tmp_path):
    trainer = trainer_of(tmp_path)
    plain = trainer_of(tmp_path, domain_adaptation="none")
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert trainer.predict(texts(8)).predictions.shape == (8, 2)


def test_accumulated_micro_batches_equal_one_batch_for_dann(tmp_path):
    """Its term is a mean over examples. MMD and CORAL are of a micro-batch."""
    ends = []
    for size, accumulation in ((8, 1), (4, 2), (2, 4)):
        model = tiny_bert().double()
        keys = dict(optim="sgd", learning_rate=0.1, max_grad_norm=0.0, gradient_accumulation_steps=accumulation)
        trainer = trainer_of(tmp_path, model, per_device_train_batch_size=size, **keys)
        critic = trainer.objective.penalties[0].module
        trainer.train()
        ends.append(copy_state(model) | {f"critic.{n}": p.detach().clone() for n, p in critic.named_parameters()})
    assert differences(ends[0], ends[1]) < 1e-12 and differences(ends[0], ends[2]) < 1e-12


def test_the_gradient_below_is_reversed_and_grows_with_the_ramp(tmp_path):
    trainer = trainer_of(tmp_path, domain_adaptation_schedule="ramp", domain_adaptation_weight=2.0)
    trainer.num_steps = 10
    weight = trainer.objective.penalties[0].weight
    assert [weight(0), weight(5), weight(10)] == pytest.approx([2 * math.tanh(5 * p) for p in (0.0, 0.5, 1.0)])


class Reader(torch.nn.Module):
    """Two classes from six numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = torch.nn.Linear(6, 16), torch.nn.Linear(16, 2)

    def forward(self, x, labels=None):
        logits = self.head(self.body(x).relu())
        loss = {} if labels is None else {"loss": torch.nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def points(count, is_target, generator):
    """Number 0 says the class in both domains; number 2 says it in the source, and is high in the whole target."""
    labels = torch.randint(0, 2, (count,), generator=generator)
    x = torch.randn(count, 6, generator=generator)
    sides = 2 * labels - 1
    x[:, 0] += 2 * sides
    x[:, 2] = 0.3 * x[:, 2] + (3.0 if is_target else sides)
    return [{"x": one, "labels": int(label)} for one, label in zip(x, labels, strict=True)]


@pytest.mark.slow
def test_it_unlearns_what_holds_in_the_source_alone(tmp_path):
    generator, found = torch.Generator().manual_seed(0), {}
    source, target, test = (points(512, is_target, generator) for is_target in (False, True, True))
    for method in ("none", "dann", "mmd"):
        keys = dict(strategy="full", learning_rate=5e-3, num_train_epochs=20, per_device_train_batch_size=64)
        keys |= dict(domain_adaptation=method, layer_rules=[["^body", "stem"], ["^head", "head"]])
        own = {} if method == "none" else {"target_dataset": target}
        trainer = TransferTrainer(Reader(), arguments(tmp_path, **keys), train_dataset=source, **own)
        trainer.train()
        answers = trainer.predict(test).predictions.argmax(1).tolist()
        found[method] = sum(a == e["labels"] for a, e in zip(answers, test, strict=True)) / len(test)
    assert found["none"] < 0.65 and found["dann"] > 0.8 and found["mmd"] > 0.8


# ---- frozen features -----------------------------------------------------------------------------------------------

FROZEN = dict(strategy="linear-probe", probe_solver="lbfgs", domain_adaptation_schedule="ramp")


@pytest.mark.parametrize("method", ["coral", "linear-ot"])
@pytest.mark.parametrize("labeled", [0, 6])
def test_a_head_is_solved_for_on_the_aligned_source_and_the_backbone_stays(method, labeled, tmp_path):
    """And on the labeled examples of the target as they are, which cross-validation does not see."""
    source, target = texts(30), texts(24, seed=9).add_column("label", ["?"] * 24)
    trainer = trainer_of(tmp_path, source=source, target=target, domain_adaptation=method, **FROZEN)
    trainer.labeled_targets = labeled
    before = copy_state(trainer.model)
    layer = trainer.model.classifier
    x, y = probe_features.features(trainer, layer, source)
    other = probe_features.unlabeled_features(trainer, layer, target)
    trainer.train()
    own = x[: 30 - labeled]
    aligned = torch.cat([frozen.align(method, own, other)(own), x[30 - labeled :]])
    head = Problem(SINGLE, aligned, y, 2).exact(trainer.solution.l2)
    assert torch.allclose(layer.weight.double(), head.weight, atol=1e-6)
    assert torch.allclose(layer.bias.double(), head.bias, atol=1e-6)
    after = copy_state(trainer.model)
    assert {n for n in before if not before[n].equal(after[n])} == {"classifier.weight", "classifier.bias"}
    assert f"{method} maps the frozen features of the source" in adapting.note(trainer)
    plain = trainer_of(tmp_path, source=source, **{**FROZEN, "domain_adaptation": "none"})
    plain.train()
    assert not torch.allclose(plain.model.classifier.weight, layer.weight, atol=1e-3)


def test_alignment_helps_where_the_target_is_a_scaled_and_shifted_source(tmp_path):
    """And a head on the source as it is does not: exact features, without a backbone."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 4, generator=generator) * torch.tensor([1.0, 3.0, 0.5, 1.0])
    y = (x[:, 0] + x[:, 2] > 0).long()
    other = x.flip(0) * torch.tensor([4.0, 1.0, 2.0, 1.0]) + torch.tensor([9.0, 0.0, -5.0, 2.0])
    right = {}
    for name, own in (("plain", x), ("aligned", frozen.align("linear-ot", x, other)(x))):
        answers = Problem(SINGLE, own, y, 2).exact(1e-3).logits(other).argmax(1)
        right[name] = float((answers == y.flip(0)).double().mean())
    assert right["aligned"] > 0.97 and right["plain"] < 0.75


# ---- labels of the target ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mmd", "coral", "dann"])
def test_labeled_examples_of_the_target_have_labels_in_the_loss_and_count_as_target(method, tmp_path):
    trainer = trainer_of(tmp_path, source=texts(20), domain_adaptation=method)
    trainer.labeled_targets = 5
    seen = []
    for batch in trainer.get_train_dataloader():
        rows = len(batch["labels"])
        assert len(batch["input_ids"]) == 2 * rows and batch[DOMAIN][rows:].all()
        seen += batch[DOMAIN][:rows].tolist()
    assert sum(seen) == 5 and len(seen) == 20
    trainer.train()


def each_normalized(rows):
    """Each row with mean 0 and variance 1, but for the 1e-5 by which a layer normalization divides."""
    centered = rows - rows.mean(1, keepdim=True)
    return centered / (centered.square().mean(1, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize(
    ("method", "distance"), [("mmd", lambda a, b: mmd(each_normalized(a), each_normalized(b))), ("coral", coral)]
)
def test_the_distance_is_that_of_the_rows_of_each_domain(method, distance):
    """Labeled rows of the target stand between those of the source."""
    rows, domain = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 0, 1, 1, 1, 1])
    penalty = methods.penalty_of(method, methods.Settings(Taken(rows), lambda step: 1.0, 0.1, 0))
    value = penalty.function(None, None, {DOMAIN: domain}, None)
    torch.testing.assert_close(value, distance(rows[[0, 2, 3]], rows[[1, 4, 5, 6, 7]]))


def test_mmd_does_not_see_how_large_the_features_of_a_domain_are():
    rows, domain = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1] * 6)
    sizes = (1 + 9 * domain)[:, None]  # the target's are ten times larger
    found = [
        methods.penalty_of("mmd", methods.Settings(Taken(x), lambda step: 1.0, 0.1, 0)).function(
            None, None, {DOMAIN: domain}, None
        )
        for x in (rows, rows * sizes)
    ]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
    assert mmd(rows[::2], rows[1::2] * 10) > 0.1 + mmd(rows[::2], rows[1::2])


class Taken:
    """Features that are known."""

    def __init__(self, vectors):
        self.vectors = vectors

    def take(self):
        return self.vectors

    def watching(self, model, batch):
        raise AssertionError


# ---- the discriminator ---------------------------------------------------------------------------------------------


def test_the_discriminator_is_an_optimizer_group_with_its_own_rate_from_step_0(tmp_path):
    trainer = trainer_of(tmp_path, strategy="gradual", discriminator_learning_rate=0.02, learning_rate=1e-3)
    trainer.resolve_plan()
    groups = trainer.create_optimizer().param_groups
    own = [group for group in groups if group["layers"] == ["dann"]]
    assert [group["lr"] for group in own] == [0.02, 0.02] and [len(group["params"]) for group in own] == [2, 2]
    assert own[0]["rates"] == (0.02,) * len(trainer.plan.stages)
    before = [p.detach().clone() for p in trainer.objective.named_parameters().values()]
    trainer.optimizer = None
    trainer.train()
    assert all(
        not torch.equal(a, b) for a, b in zip(before, trainer.objective.named_parameters().values(), strict=True)
    )
    logs = [log for log in trainer.state.log_history if "learning_rate/dann" in log]
    assert logs and max(log["learning_rate"] for log in logs) < 0.02  # it is no layer of the model


def test_gradients_of_the_discriminator_do_not_pile_up(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.append([p.grad.clone() for p in trainer.objective.named_parameters().values()])

    trainer = trainer_of(tmp_path, learning_rate=1e-12, discriminator_learning_rate=1e-12, num_train_epochs=1)
    trainer.add_callback(Look())
    trainer.train()
    sizes = [sum(float(g.norm()) for g in grads) for grads in seen]
    assert len(sizes) == 5 and max(sizes) < 3 * min(sizes)


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("method", "step"),
    [("dann", 5), *(pytest.param(*one, marks=SLOW) for one in (("dann", 2), ("dann", 7), ("mmd", 2), ("mmd", 5)))],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(method, step, tmp_path):
    """Also in the middle of an epoch, with dropout, staged unfreezing and accumulation."""
    keys = dict(
        strategy="gradual",
        domain_adaptation=method,
        domain_adaptation_schedule="ramp",
        num_train_epochs=3,
        gradient_accumulation_steps=2,
        save_on_signal=True,
        save_strategy="steps",
        save_steps=1000,
    )

    def trainer(name):
        return trainer_of(tmp_path / name, tiny_bert(dropout=0.2), **keys)

    def end(trainer):
        own = trainer.objective.named_parameters()
        return copy_state(trainer.model) | {n: p.detach().clone() for n, p in own.items()}

    whole = trainer("whole")
    whole.train()
    broken = trainer("broken")
    broken.add_callback(Stop(step))
    with pytest.raises(Interrupted):
        broken.train()
    resumed = trainer("broken")
    resumed.train(resume_from_checkpoint="auto")
    assert differences(end(whole), end(resumed)) == 0
    assert resumed.state.global_step == whole.state.global_step == 9
    with pytest.raises(UserError, match="the target examples differ"):
        trainer_of(tmp_path / "broken", target=texts(14, seed=8), **keys).train(resume_from_checkpoint="auto")


def test_a_checkpoint_without_its_discriminator_is_refused(tmp_path):
    keys = dict(save_strategy="epoch", num_train_epochs=1)
    trainer_of(tmp_path, **keys).train()
    (folder,) = tmp_path.glob("checkpoint-*")
    from hf_transfer.training import penalty_state

    (folder / penalty_state.FILE).unlink()
    trainer = trainer_of(tmp_path, **keys)
    with pytest.raises(UserError, match="penalties have parameters"):
        penalty_state.restore(trainer.objective, folder)


# ---- what it goes with ---------------------------------------------------------------------------------------------


def wider_resnet():
    """Random weights of 0.02 make the features of all images equal up to rounding, which nothing can align."""
    net = tiny_timm_resnet()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return net


@pytest.mark.parametrize("method", ["mmd", "coral", "dann"])
@pytest.mark.parametrize(
    ("model", "layer"), [(tiny_bert, "layer.0"), (tiny_vit, "layers.0"), (wider_resnet, "layer2.0")]
)
def test_a_layer_in_the_middle_can_be_aligned(method, model, layer, tmp_path):
    """The penalty's gradient ends there: nothing above it moves otherwise than without the penalty."""
    ends = []
    is_text = model is tiny_bert
    source, target = (texts(16), texts(9, seed=5)) if is_text else (images(16), images(9, seed=5))
    for weight in (0.0, 1e4):
        net = with_statistics(model())
        keys = dict(
            domain_adaptation=method, domain_adaptation_weight=weight, domain_adaptation_layer=layer, max_steps=1
        )
        keys |= dict(optim="sgd", learning_rate=0.1, max_grad_norm=0.0, batchnorm="frozen")
        trainer = trainer_of(tmp_path, net, source, target, **keys)
        trainer.train()
        names = [group.name for group in trainer.layer_groups]
        ends.append(
            {g.name: {n: net.get_parameter(n).detach().clone() for n in g.parameters} for g in trainer.layer_groups}
        )
    moved = {name for name in names if differences(ends[0][name], ends[1][name])}
    assert moved and moved <= set(names[: names.index(layer) + 1])


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy": "gradual"},
        {"strategy": "lora"},
        {"adapter": "bottleneck"},
        {"head_init": "probe", "strategy": "two-phase", "head_epochs": 0.0},
        {"length_bucketing": True},
        {"bf16": True},
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
        pytest.param({"contrastive_epochs": 1.0, "strategy": "two-phase", "head_epochs": 0.0}, marks=pytest.mark.slow),
        {"on_nonfinite": "skip"},
        {"boundary_cache": "auto", "strategy": "two-phase"},
        {"class_weights": {"LABEL_1": 3.0}},
        {"label_smoothing_factor": 0.1},
        {"distillation_alpha": 0.5},
        {"l2_sp_alpha": 0.1, "ema_decay": 0.9},
    ],
    ids=lambda keys: " ".join(map(str, keys)),
)
def test_it_goes_with(keys, tmp_path):
    trainer = trainer_of(tmp_path, source=ragged_texts(20), target=ragged_texts(9, seed=2), collate=pad, **keys)
    trainer.train()
    assert trainer.state.global_step == 10 and "eval_loss" in trainer.evaluate()


def test_features_and_penalty_are_in_fp32_under_bf16(tmp_path, monkeypatch):
    from hf_transfer.objectives.adaptation import methods

    seen = []
    whole = methods.confusion
    monkeypatch.setattr(methods, "confusion", lambda *a: seen.append((a[1].dtype, whole(*a).dtype)) or whole(*a))
    trainer_of(tmp_path, bf16=True, max_steps=1).train()
    assert set(seen) == {(torch.float32, torch.float32)}


def test_a_head_that_trains_alone_first_is_named_where_nothing_changes(tmp_path):
    trainer = trainer_of(tmp_path, strategy="two-phase", head_epochs=1.0)
    assert "Domain adaptation: dann on what the head reads, weight 1; " in adapting.note(trainer)
    assert "In head nothing below it trains" in adapting.note(trainer)
    assert "nothing below" not in adapting.note(trainer_of(tmp_path))


def test_batches_after_a_skipped_step_are_paired_alike(tmp_path):
    """Workers and none draw the same."""
    ends = []
    for workers in (0, 2):
        trainer = trainer_of(tmp_path, dataloader_num_workers=workers)
        trainer.train()
        ends.append(copy_state(trainer.model))
    assert differences(*ends) == 0


def test_the_recipe_trains_a_network_of_its_own(tmp_path):
    main = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "dann_mnist.py"))["main"]
    few = ["--examples", "60", "--num_train_epochs", "1", "--use_cpu", "true", "--log_level", "error"]
    for method in ("dann", "none"):
        assert 0 <= main([*few, "--domain_adaptation", method, "--output_dir", str(tmp_path)]) <= 1


# ---- refused -------------------------------------------------------------------------------------------------------


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("keys", "target", "said"),
    [
        ({}, texts(0), "the target has no examples"),
        ({}, Endless(), "the target is a stream"),
        ({}, texts(5).rename_column("input_ids", "ids"), "target's examples have no input_ids"),
        ({"domain_adaptation_layer": "layer.7"}, texts(5), r"no layer group 'layer.7'.*layer.1"),
        ({"domain_adaptation_layer": "head"}, texts(5), "no layer group 'head' below the head"),
        (
            {"strategy": None, "stages": [{"epochs": 1, "train": "head"}]},
            texts(5),
            "plan trains nothing below the head",
        ),
        (
            {"strategy": "partial", "unfrozen_groups": 1, "domain_adaptation_layer": "layer.0"},
            texts(5),
            "plan trains nothing in or below layer.0.*align a higher layer",
        ),
    ],
)
def test_what_does_not_fit_is_refused(keys, target, said, tmp_path):
    with pytest.raises(UserError, match=said):
        trainer_of(tmp_path, target=target, **keys)


def test_a_trainer_without_target_or_with_a_loss_of_its_own_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no target examples"):
        TransferTrainer(tiny_bert(), arguments(tmp_path, **KEYS), train_dataset=texts(8))
    with pytest.raises(UserError, match="no method that reads them"):
        TransferTrainer(
            tiny_bert(), arguments(tmp_path, strategy="full"), train_dataset=texts(8), target_dataset=texts(5)
        )

    class Own(TransferTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(UserError, match="a loss of its own"):
        Own(tiny_bert(), arguments(tmp_path, **KEYS), train_dataset=texts(8), target_dataset=texts(5))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"domain_adaptation": "dan"}, "domain_adaptation: 'dan' is not one of none, auto, mmd, coral, dann"),
        ({"domain_adaptation_weight": -1.0}, "domain_adaptation_weight: expected a number at least 0"),
        ({"domain_adaptation_schedule": "up"}, "domain_adaptation_schedule: 'up' is not one of ramp, constant"),
        ({"domain_adaptation": "none"}, "domain_adaptation_schedule: 'constant' has no effect without"),
        ({"domain_adaptation": "mmd", "discriminator_learning_rate": 0.1}, "no effect with domain_adaptation: mmd"),
        ({"strategy": None}, "dann needs a plan"),
        ({"strategy": "linear-probe"}, "strategy: linear-probe freezes them"),
        ({**FROZEN}, "dann changes the features, and probe_solver: lbfgs freezes them.*coral or linear-ot"),
        ({**FROZEN, "domain_adaptation": "coral", "domain_adaptation_weight": 0.5}, "no effect with probe_solver"),
        ({"domain_adaptation": "linear-ot"}, "linear-ot aligns frozen features; set strategy: linear-probe"),
        ({"balanced_sampling": True}, "class_weights: auto"),
        ({"boundary_cache": "memory"}, "boundary cache does not hold"),
        ({"torch_compile": True}, "leave torch_compile out"),
        ({"replay_dataset_name": "old.csv"}, "replay_dataset_name puts others between them"),
    ],
)
def test_keys_that_contradict_each_other(keys, said, tmp_path):
    with pytest.raises(UserErrors, match=said):
        arguments(tmp_path, **{**KEYS, **keys})


def test_without_the_keys_nothing_is_different(tmp_path):
    """Not even the loader."""
    trainer = TransferTrainer(tiny_bert(), arguments(tmp_path, strategy="full"), train_dataset=texts(8))
    assert trainer.targets is None and not trainer.objective.penalties
    assert DOMAIN not in next(iter(trainer.get_train_dataloader()))
    assert default_data_collator([{"labels": 1}])["labels"].tolist() == [1]
