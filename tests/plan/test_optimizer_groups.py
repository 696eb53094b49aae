"""Optimizer groups: the rate and decay of every parameter, and no more groups than needed."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from hf_transfer import TransferTrainer, layer_groups, make_plan
from hf_transfer.config.arguments.plan import PlanArguments
from hf_transfer.config.arguments.schedule import LR_SCHEDULER_TYPES
from hf_transfer.plan.optimizer_groups import lr_factors, parameter_groups
from hf_transfer.training.schedules import SCHEDULES as OURS
from hf_transfer.training.schedules import make_schedule
from tests.helpers import arguments, images, texts, tiny_bert, tiny_timm_resnet, tiny_timm_vit


def optimizer_of(model, tmp_path, data=None, **keys):
    trainer = TransferTrainer(model, arguments(tmp_path, **keys), train_dataset=data or texts())
    optimizer = trainer.create_optimizer()
    names = {id(p): n for n, p in model.named_parameters()}
    return trainer, optimizer, {names[id(p)]: g for g in optimizer.param_groups for p in g["params"]}


def test_rate_of_every_parameter(tmp_path):
    model = tiny_bert(layers=3)
    _, _, group = optimizer_of(model, tmp_path, layer_lr_decay=0.5, learning_rate=1e-3, head_learning_rate=1e-2)
    expected = {
        "bert.embeddings.": 1.25e-4,
        "bert.encoder.layer.0.": 2.5e-4,
        "bert.encoder.layer.1.": 5e-4,
        "bert.encoder.layer.2.": 1e-3,
        "bert.pooler.": 1e-3,
        "classifier.": 1e-2,
    }
    assert set(group) == {n for n, _ in model.named_parameters()}
    for name, g in group.items():
        assert g["lr"] == pytest.approx(next(v for k, v in expected.items() if name.startswith(k)), rel=1e-12), name


@pytest.mark.parametrize(("make", "data"), [(tiny_bert, texts), (tiny_timm_resnet, images), (tiny_timm_vit, images)])
def test_biases_norms_and_what_the_model_lists_are_not_decayed(make, data, tmp_path):
    model = make()
    _, _, group = optimizer_of(model, tmp_path, data(), strategy="full", weight_decay=0.1)
    for name, parameter in model.named_parameters():
        listed = name.endswith(("pos_embed", "cls_token"))  # timm ViT's no_weight_decay()
        assert group[name]["weight_decay"] == (0.0 if parameter.ndim <= 1 or listed else 0.1), name


def test_a_group_that_is_frozen_at_first_starts_from_its_own_rate(tmp_path):
    """Schedulers multiply `lr`, so that 0 would stay 0."""
    model = tiny_bert(layers=3)
    groups = layer_groups(model)

    class Keys(PlanArguments):
        num_train_epochs = 4.0

    plan = make_plan(Keys(strategy="gradual", learning_rate=1e-3, stage_lr_decay=0.1), groups)
    made = parameter_groups(model, groups, plan, weight_decay=0.0)
    assert any(not group["rates"][0] for group in made)
    assert [group["lr"] for group in made] == [next(rate for rate in group["rates"] if rate) for group in made]


def test_groups_are_merged(tmp_path):
    """No more groups than distinct (rates over the stages, decay)."""
    _, optimizer, _ = optimizer_of(tiny_bert(layers=6), tmp_path, strategy="full", weight_decay=0.1)
    assert len(optimizer.param_groups) == 2
    trainer, optimizer, _ = optimizer_of(
        tiny_bert(layers=6), tmp_path, strategy="gradual", num_train_epochs=9, weight_decay=0.1, layer_lr_decay=0.9
    )
    distinct = {(g["rates"], g["weight_decay"]) for g in optimizer.param_groups}
    assert len(optimizer.param_groups) == len(distinct) == 2 * len(trainer.layer_groups)
    assert [g["layers"] for g in optimizer.param_groups][::2] == [[g.name] for g in trainer.layer_groups]


def test_what_never_trains_is_in_no_group(tmp_path):
    _, _, group = optimizer_of(tiny_bert(), tmp_path, strategy="partial", unfrozen_groups=1)
    assert not any(n.startswith(("bert.embeddings", "bert.encoder.layer.0")) for n in group)
    model = tiny_bert()
    model.bert.embeddings.requires_grad_(False)  # the caller's own freeze stays
    _, _, group = optimizer_of(model, tmp_path, strategy="full")
    assert not any(n.startswith("bert.embeddings") for n in group)
    assert any(n.startswith("bert.encoder.layer.0") for n in group)


SCHEDULES = {
    **dict.fromkeys(["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"]),
    "cosine_with_restarts": {"num_cycles": 2},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_decay_steps": 6},
    "one_cycle": {"pct_start": 0.4},
    "cosine_warm_restarts": {"T_0": 3, "T_mult": 2},
    "slanted_triangular": {"cut_frac": 0.2},
}


def test_every_schedule_is_tried():
    """All of transformers' but the two that follow a metric."""
    assert set(SCHEDULES) | {"reduce_lr_on_plateau", "greedy"} == set(LR_SCHEDULER_TYPES)


def oracle_of(kind, total, optimizer):
    """The run's schedule from torch and transformers themselves; ours are compared with torch's in test_schedules."""
    kwargs = SCHEDULES[kind]
    if kind in OURS:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, make_schedule(kind, kwargs, total, 0, 1e-3))
    return get_scheduler(
        kind, optimizer, num_warmup_steps=4, num_training_steps=total, scheduler_specific_kwargs=kwargs
    )


@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_group_follows_the_closed_form(kind, tmp_path):
    """rate * schedule(t) * min(1, (t - t_thaw) / warm-up) at every step, with transformers' own schedule as oracle."""
    keys = dict(
        strategy="gradual",
        num_train_epochs=4,
        layer_lr_decay=0.5,
        head_learning_rate=1e-2,
        learning_rate=1e-3,
        unfreeze_warmup_steps=3,
        stage_lr_decay=0.5,
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=SCHEDULES[kind],
        warmup_steps=0 if kind in (*OURS, "constant") else 4,
    )
    trainer, optimizer, _ = optimizer_of(tiny_bert(layers=2), tmp_path, **keys)
    total = 20  # 20 examples, batch 4, 4 epochs
    trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    scheduler = trainer.create_scheduler(total, optimizer)
    oracle_optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    oracle = oracle_of(kind, total, oracle_optimizer)
    base = {"embeddings": 2.5e-4, "layer.0": 5e-4, "layer.1": 1e-3, "head": 1e-2}
    thaw = {"head": 0, "layer.1": 5, "layer.0": 10, "embeddings": 15}
    for step in range(total):
        for group in optimizer.param_groups:
            layer = group["layers"][0]
            frozen = step < thaw[layer]
            expected = (
                0.0
                if frozen
                else (
                    base[layer]
                    * 0.5 ** (step // 5)
                    * oracle.get_last_lr()[0]
                    / 1e-3
                    * min(1.0, (step - thaw[layer]) / 3)
                )
            )
            assert group["lr"] == pytest.approx(expected, rel=1e-12, abs=1e-18), (step, layer)
        optimizer.step(), scheduler.step(), oracle_optimizer.step(), oracle.step()


def test_factors_are_plain_functions(tmp_path):
    """LambdaLR puts the attributes of callable objects into the checkpoint; a closure has none."""
    trainer, optimizer, _ = optimizer_of(tiny_bert(), tmp_path, strategy="gradual")
    plan = trainer.plan.resolve(5)
    assert type(lr_factors(lambda: plan, optimizer.param_groups[0], lambda step: 1.0)).__name__ == "function"


def test_vectors_that_only_broadcast_are_not_decayed():
    """ConvNeXt V2's response normalisation is (1, 1, 1, C); a head of one output is a matrix all the same."""
    from tests import architectures as arch

    model = arch.hugging_face("ConvNextV2ForImageClassification")
    groups = layer_groups(model)

    class Keys(PlanArguments):
        peak_learning_rate, num_train_epochs = 1e-3, 1.0

    made = parameter_groups(model, groups, make_plan(Keys(strategy="full"), groups), 0.1)
    decayed = {id(p) for group in made if group["weight_decay"] for p in group["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in decayed}
    assert names and not any("grn" in n or "bias" in n or "norm" in n for n in names) and "classifier.weight" in names
