"""Losses against torch's own, and as parts of a batch: exact numbers."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as f

from hf_transfer import TransferTrainer, UserError
from hf_transfer.config.arguments.loss import check
from hf_transfer.objectives.losses import BalancedSampler, Loss, make_loss
from tests.helpers import arguments, copy_state, images, soft_texts, texts, tiny_bert, tiny_vit

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
g = torch.Generator().manual_seed(0)
LOGITS = torch.randn(7, 3, generator=g, dtype=torch.float64)
HARD = torch.tensor([0, 1, 2, 2, 1, 0, 2])
SOFT = torch.softmax(torch.randn(7, 3, generator=g, dtype=torch.float64), -1)
SEVERAL = torch.randint(0, 2, (7, 3), generator=g).double()
WEIGHTS = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)


def mean(loss, logits, labels):
    return (loss.total(logits, labels) / loss.weight(labels)).item()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_hard_and_soft_labels_are_torchs_cross_entropy(weights, smoothing):
    loss = Loss(SINGLE, weights, smoothing=smoothing)
    labels = torch.cat([HARD, torch.tensor([-100])])
    logits = torch.cat([LOGITS, LOGITS[:1]])
    if not (weights is not None and smoothing):  # torch smooths with the weights of the other classes, as we do
        assert mean(loss, logits, labels) == pytest.approx(f.cross_entropy(logits, labels, weights).item()) or smoothing
    expected = f.cross_entropy(LOGITS, HARD, weights, label_smoothing=smoothing).item()
    assert mean(loss, LOGITS, HARD) == pytest.approx(expected, rel=1e-12)
    one_hot = f.one_hot(HARD, 3).double()
    assert mean(loss, LOGITS, one_hot) == pytest.approx(expected, rel=1e-12)
    if weights is None:
        soft = f.cross_entropy(LOGITS, SOFT, label_smoothing=smoothing).item()
        assert mean(loss, LOGITS, SOFT) == pytest.approx(soft, rel=1e-12)


def test_several_labels_and_values_are_torchs():
    expected = f.binary_cross_entropy_with_logits(LOGITS, SEVERAL, pos_weight=WEIGHTS).item()
    assert mean(Loss(MULTI, WEIGHTS), LOGITS, SEVERAL) == pytest.approx(expected, rel=1e-12)
    values = LOGITS[:, :1]
    assert mean(Loss(REGRESSION), values, SOFT[:, 0]) == pytest.approx(f.mse_loss(values[:, 0], SOFT[:, 0]).item())


def test_focal_loss_by_hand():
    p = torch.softmax(LOGITS, -1)[range(7), HARD]
    assert mean(Loss(SINGLE, gamma=2.0), LOGITS, HARD) == pytest.approx((-((1 - p) ** 2) * p.log()).mean().item())
    q = torch.where(SEVERAL > 0.5, LOGITS.sigmoid(), 1 - LOGITS.sigmoid())
    assert mean(Loss(MULTI, gamma=2.0), LOGITS, SEVERAL) == pytest.approx((-((1 - q) ** 2) * q.log()).mean().item())


@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        (Loss(SINGLE, WEIGHTS, 1.5, 0.1), HARD),
        (Loss(SINGLE, WEIGHTS), SOFT),
        (Loss(MULTI, WEIGHTS, 1.0, 0.1), SEVERAL),
    ],
)
def test_parts_add_up_to_the_whole(loss, labels):
    totals = [loss.total(LOGITS[a:b], labels[a:b]) for a, b in ((0, 3), (3, 6), (6, 7))]
    weights = [loss.weight(labels[a:b]) for a, b in ((0, 3), (3, 6), (6, 7))]
    assert (sum(totals) / sum(weights)).item() == pytest.approx(mean(loss, LOGITS, labels), rel=1e-12)


# ---- through the trainer -------------------------------------------------------------------------------------------


def trained(folder, data, micro, **keys):
    model = tiny_bert().double()
    model.config.problem_type = SINGLE
    args = arguments(
        folder,
        strategy="full",
        optim="sgd",
        learning_rate=0.5,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=8 // micro,
        gradient_accumulation_steps=micro,
        num_train_epochs=1,
        **keys,
    )
    trainer = TransferTrainer(model.eval(), args, train_dataset=data, eval_dataset=data)
    trainer.train()
    return copy_state(trainer.model), [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        (texts(14), {"class_weights": {"LABEL_0": 0.25, "LABEL_1": 4.0}}),
        (texts(14), {"class_weights": "auto", "focal_gamma": 2.0, "label_smoothing_factor": 0.1}),
        (soft_texts(14), {}),
        (soft_texts(14), {"class_weights": {"LABEL_1": 3.0}}),
    ],
)
def test_a_short_last_group_of_micro_batches_is_the_large_batch(data, keys, tmp_path):
    """14 examples in batches of 8: the second is short, and cut in micro-batches of 2, also by the last one."""
    whole, losses = trained(tmp_path, data, 1, **keys)
    for micro in (2, 4):
        parts, logged = trained(tmp_path, data, micro, **keys)
        assert max((whole[k] - parts[k]).abs().max().item() for k in whole if whole[k].is_floating_point()) < 1e-9
        assert logged == pytest.approx(losses, rel=1e-5)


def test_the_logged_loss_is_the_weighted_mean(tmp_path):
    data, weights = texts(8), torch.tensor([0.25, 4.0]).double()
    _, logged = trained(tmp_path, data, 1, class_weights={"LABEL_0": 0.25, "LABEL_1": 4.0})
    model = tiny_bert().double().eval()
    with torch.no_grad():
        logits = model(torch.tensor(data["input_ids"][:])).logits
    assert logged[0] == pytest.approx(
        f.cross_entropy(logits, torch.tensor(data["labels"][:]), weights).item(), rel=1e-5
    )


def test_evaluations_between_steps_change_nothing(tmp_path):
    """The weight of a batch is taken before the model is put back in training mode."""
    keys = {"class_weights": {"LABEL_0": 0.25, "LABEL_1": 4.0}}
    quiet, losses = trained(tmp_path, texts(16), 2, **keys)
    seen, logged = trained(tmp_path, texts(16), 2, **keys, eval_strategy="steps", eval_steps=1)
    assert logged == losses and all(torch.equal(quiet[k], seen[k]) for k in quiet)


def test_evaluations_are_not_weighted(tmp_path):
    keys = dict(strategy="full", class_weights={"LABEL_0": 0.25, "LABEL_1": 4.0}, learning_rate=1e-12)
    plain, weighted = (
        TransferTrainer(
            tiny_bert(), arguments(tmp_path, num_train_epochs=1, **k), train_dataset=texts(8), eval_dataset=texts(8)
        )
        for k in (keys | {"class_weights": "none"}, keys)
    )
    for trainer in (plain, weighted):
        trainer.train()
    assert weighted.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


def test_without_weights_the_models_own_loss_is_used(tmp_path):
    for model, data in ((tiny_bert(), texts(8)), (tiny_vit(), images(8))):
        trainer = TransferTrainer(model, arguments(tmp_path, strategy="full"), train_dataset=data)
        assert not trainer.objective.loss.applies(torch.tensor([0, 1])) and not trainer.objective.loss.applies(None)


def test_auto_weights_are_inverse_to_the_counts():
    class Config:
        problem_type, id2label = SINGLE, {0: "a", 1: "b", 2: "never"}

    args = arguments("x", class_weights="auto")
    made = make_loss(args, Config, Dataset.from_dict({"labels": [0, 0, 0, 1]}))
    assert made.weights.tolist() == [4 / 6, 2.0, 1.0]
    Config.problem_type = MULTI
    made = make_loss(args, Config, Dataset.from_dict({"labels": [[1.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]]}))
    assert made.weights.tolist() == [1 / 3, 3.0, 4.0]


def test_wrong_weights_are_explained():
    class Config:
        problem_type, id2label = SINGLE, {0: "cat", 1: "dog"}

    data = Dataset.from_dict({"labels": [0, 1]})
    with pytest.raises(UserError, match=r"unknown class 'cta'\. The classes are cat, dog\. Did you mean 'cat'\?"):
        make_loss(arguments("x", class_weights={"cta": 2.0}), Config, data)
    with pytest.raises(UserError, match="column `labels`"):
        make_loss(arguments("x", class_weights="auto"), Config, data.rename_column("labels", "y"))
    Config.problem_type = REGRESSION
    for keys in ({"class_weights": "auto"}, {"label_smoothing_factor": 0.1}):
        with pytest.raises(UserError, match="regression"):
            make_loss(arguments("x", **keys), Config, data)
    with pytest.raises(UserError) as told:
        arguments("x", class_weights="atuo", focal_gamma=-1.0)
    assert "Did you mean 'auto'?" in str(told.value) and "got -1" in str(told.value)
    assert check(arguments("x", class_weights={"a": 0})) == []


def test_balanced_draws(tmp_path):
    labels = [0] * 900 + [1] * 100
    sampler = BalancedSampler(labels, 3)
    first = list(sampler)
    assert first == list(sampler) and len(first) == 1000
    assert 0.45 < sum(labels[i] for i in first) / 1000 < 0.55
    sampler.set_epoch(1)
    assert list(sampler) != first
    trainer = TransferTrainer(tiny_bert(), arguments(tmp_path, balanced_sampling=True), train_dataset=texts(8))
    assert isinstance(trainer._get_train_sampler(), BalancedSampler)


KEYS_OF_THE_LOSS = (
    {"label_smoothing_factor": 0.1},
    {"class_weights": {"LABEL_0": 3.0}},
    {"focal_gamma": 2.0},
    {"label_smoothing_factor": 0.1, "class_weights": {"LABEL_0": 3.0}, "focal_gamma": 2.0},
)


@pytest.mark.parametrize("keys", KEYS_OF_THE_LOSS)
@pytest.mark.parametrize("several", [False, True])
def test_evaluations_measure_the_plain_loss(tmp_path, keys, several):
    """As `evaluate` does for the saved model. transformers' smoothing is in evaluations too, and of one label only."""
    data, model, plain = texts(8), tiny_bert(), f.cross_entropy
    if several:
        data = data.remove_columns("labels").add_column("labels", [[float(i % 2), 1.0] for i in range(8)])
        model.config.problem_type, plain = MULTI, f.binary_cross_entropy_with_logits
    args = arguments(tmp_path, strategy="full", num_train_epochs=1, **keys)
    trainer = TransferTrainer(model, args, train_dataset=data, eval_dataset=data)
    trainer.train()
    found = trainer.evaluate()["eval_loss"]
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor(data["input_ids"][:])).logits
    assert found == pytest.approx(plain(logits, torch.tensor(data["labels"][:])).item(), rel=1e-5)


def test_smoothing_alone_is_trained_with_as_in_trainer(tmp_path):
    losses = []
    for name, keys in (("plan", {"strategy": "full"}), ("plain", {})):
        args = arguments(tmp_path / name, label_smoothing_factor=0.1, max_steps=3, logging_steps=1, seed=3, **keys)
        trainer = TransferTrainer(tiny_bert(), args, train_dataset=texts(12))
        assert (trainer.label_smoother is None) == bool(keys)
        trainer.train()
        losses.append([one["loss"] for one in trainer.state.log_history if "loss" in one])
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


def test_where_nobody_says_what_labels_are_the_models_own_loss_is_used(tmp_path):
    """Labels of floats may be several labels: only a model that says "single label" gets shares."""
    trainer = TransferTrainer(tiny_bert(), arguments(tmp_path, strategy="full"), train_dataset=soft_texts(8))
    assert trainer.model.config.problem_type is None and not trainer.objective.loss.applies(torch.rand(4, 2))
    args = arguments(tmp_path, strategy="full", class_weights={"LABEL_1": 2.0})
    weighted = TransferTrainer(tiny_bert(), args, train_dataset=soft_texts(8))
    with pytest.raises(UserError, match="single_label_classification for soft labels"):
        weighted.train()


def test_with_no_key_set_the_loss_is_trainers(tmp_path):
    plain = torch.nn.Linear(2, 2)  # no configuration at all
    for model in (plain, tiny_bert()):
        assert TransferTrainer(model, arguments(tmp_path), train_dataset=texts(8)).objective.is_default


def test_weights_with_a_loss_of_ones_own_are_refused(tmp_path):
    class Own(TransferTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(UserError, match="a loss of its own"):
        Own(tiny_bert(), arguments(tmp_path, class_weights="auto"), train_dataset=texts(8))
