"""Penalties: what is added to the loss, by the micro-batch's share of the accumulated batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hf_transfer import TransferTrainer
from hf_transfer.objectives.objective import MicroBatch, Objective, Penalty
from tests.helpers import arguments


class Scorer(nn.Module):
    """Two logits from three features, in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(3, 4, dtype=torch.float64)
        self.head = nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, x, labels=None):
        logits = self.head(self.body(x))
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def examples(count=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, dtype=torch.float64, generator=generator)
    return [{"x": one, "labels": i % 2} for i, one in enumerate(x)]


def l2(module, model, batch, outputs):
    return sum(p.square().sum() for p in model.parameters()) / 2


def mean_logit(module, model, batch, outputs):
    return outputs["logits"].square().mean()


def distance(module, model, batch, outputs):
    """To a teacher, which holds no trainable parameter."""
    with torch.no_grad():
        target = module(batch["x"])["logits"]
    return (outputs["logits"] - target).square().mean()


RULES = {"layer_rules": [["^body", "stem"], ["^head", "head"]]}


def trained(folder, penalties, count=8, model=None, **keys):
    model = Scorer() if model is None else model
    args = arguments(
        folder,
        **{
            "optim": "sgd",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            **RULES,
            **keys,
        },
    )
    trainer = TransferTrainer(model, args, train_dataset=examples(count), eval_dataset=examples(count))
    trainer.objective.penalties += penalties
    trainer.train()
    return trainer


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


ONE_STEP = {"per_device_train_batch_size": 8, "max_steps": 1}


@pytest.mark.parametrize("keys", [{}, {"strategy": "full"}], ids=["no plan", "plan"])
def test_one_step_of_an_l2_penalty_is_the_closed_form(keys, tmp_path):
    """SGD: w - rate (gradient + strength w)."""
    begin = torch.cat([p.detach().flatten() for p in Scorer().parameters()])
    plain = weights(trained(tmp_path / "plain", [], **ONE_STEP, **keys))
    penalized = weights(trained(tmp_path / "l2", [Penalty("l2", lambda step: 0.5, None, l2)], **ONE_STEP, **keys))
    assert torch.allclose(penalized, plain - 0.1 * 0.5 * begin, rtol=0, atol=1e-15)
    assert not torch.equal(penalized, plain)


@pytest.mark.parametrize("keys", [{}, {"class_weights": {"LABEL_1": 3.0}}], ids=["plain", "class weights"])
@pytest.mark.parametrize("function", [l2, mean_logit, distance])
@pytest.mark.parametrize("count", [8, 7], ids=["even", "a short last micro-batch"])
def test_accumulated_micro_batches_equal_one_batch(function, count, keys, tmp_path):
    """By the number of examples: with class weights the loss has other shares than the penalties."""
    found = []
    for size, accumulation in ((8, 1), (4, 2), (2, 4)):
        model = Scorer()
        if keys:
            model.config = Config()
        teacher = copy.deepcopy(Scorer()).requires_grad_(False)
        teacher.head.weight.mul_(2)
        penalty = Penalty("penalty", lambda step: 0.5 + step, teacher, function)
        trainer = trained(
            tmp_path / str(size),
            [penalty],
            count,
            model,
            strategy="full",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=2,
            **keys,
        )
        assert trainer.state.global_step == 2
        found.append(weights(trainer))
    assert torch.allclose(found[0], found[1], rtol=0, atol=1e-14)
    assert torch.allclose(found[0], found[2], rtol=0, atol=1e-14)


class Config:
    problem_type = None
    id2label = {0: "LABEL_0", 1: "LABEL_1"}  # noqa: RUF012

    def to_dict(self):
        return {}

    def to_json_string(self):
        return "{}"


def test_the_weight_follows_the_optimizer_step(tmp_path):
    steps = []

    def weight(step):
        steps.append(step)
        return 0.0

    penalty = Penalty("zero", weight, None, l2)
    keys = {"strategy": "full", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
    trainer = trained(tmp_path / "zero", [penalty], **keys)
    assert steps == [0, 0, 1, 1, 2, 2]
    assert torch.equal(weights(trainer), weights(trained(tmp_path / "none", [], **keys)))


def test_an_evaluation_has_no_penalty(tmp_path):
    trainer = trained(tmp_path, [Penalty("l2", lambda step: 100.0, None, l2)], strategy="full", **ONE_STEP)
    measured = trainer.evaluate()["eval_loss"]
    model = trainer.model.eval()
    batch = {"x": torch.stack([e["x"] for e in examples()]), "labels": torch.tensor([0, 1] * 4)}
    assert measured == pytest.approx(model(**batch)["loss"].item(), rel=1e-6)


def test_several_penalties_add_up_and_a_lone_micro_batch_counts_whole():
    model, objective = Scorer(), Objective()
    objective.penalties += [Penalty("a", lambda step: 2.0, None, l2), Penalty("b", lambda step: 3.0, None, l2)]
    batch = MicroBatch({"x": torch.zeros(2, 3)}, None, 1)
    loss = objective.add_penalties(torch.tensor(1.0, dtype=torch.float64), model, batch, None, 0)
    assert loss.item() == pytest.approx(1 + 5 * l2(None, model, None, None).item(), abs=1e-14)


def test_parameters_of_a_penalty_need_a_learning_rate():
    with pytest.raises(ValueError, match="no optimizer group"):
        Penalty("critic", lambda step: 1.0, nn.Linear(2, 1), l2)
    with pytest.raises(ValueError, match="nothing in its module trains"):
        Penalty("critic", lambda step: 1.0, None, l2, learning_rate=0.1)


def test_the_average_over_processes_is_the_penalty_of_the_whole_batch():
    model, objective = Scorer(), Objective(penalties=[Penalty("p", lambda step: 0.5, None, mean_logit)])
    x, zero = torch.stack([e["x"] for e in examples()]), torch.zeros((), dtype=torch.float64)
    parts = [{"x": x[:3]}, {"x": x[3:]}]
    objective.count([{"x": x}], torch.device("cpu"), None)
    values = [objective.add_penalties(zero, model, MicroBatch(p, 8, 2), model(**p), 0) for p in parts]
    whole = objective.add_penalties(zero, model, MicroBatch({"x": x}, None, 1), model(x), 0)
    assert sum(values).item() / 2 == pytest.approx(whole.item(), abs=1e-15)
