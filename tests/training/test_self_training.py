"""Self-training on a target: when it is labeled, what the loss reads, exact resumption, and what is refused."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from hf_transfer import TransferTrainer, UserError
from hf_transfer.data.labels import IGNORED
from hf_transfer.data.pairs import DOMAIN
from hf_transfer.errors import Interrupted, UserErrors
from hf_transfer.training import self_training
from hf_transfer.training.answers import answers
from tests.helpers import (
    arguments,
    copy_state,
    images,
    knowing_bert,
    separable_texts,
    soft_texts,
    texts,
    tiny_bert,
    tiny_timm_resnet,
    with_statistics,
)

KEYS = dict(
    strategy="full",
    domain_adaptation="pseudo-label",
    pseudo_label_threshold=0.01,
    num_train_epochs=3,
    lr_scheduler_type="constant",
    per_device_eval_batch_size=5,
    learning_rate=3e-3,
)


def trainer_of(tmp_path, model=None, source=None, target=None, **keys):
    source = separable_texts(20) if source is None else source
    target = separable_texts(13, seed=9).remove_columns("labels") if target is None else target
    args = arguments(tmp_path, **{**KEYS, **keys})
    model = knowing_bert() if model is None else model
    return TransferTrainer(model, args, train_dataset=source, eval_dataset=texts(8), target_dataset=target)


def differences(one, other):
    return max(float((one[n].double() - other[n].double()).abs().max()) for n in one)


class Look(TrainerCallback):
    """The weights before each epoch, and the labels in it."""

    def __init__(self, trainer):
        self.trainer, self.weights, self.labels = trainer, [], []

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.weights.append(copy_state(self.trainer.model))

    def on_epoch_end(self, args, state, control, **kwargs):
        self.labels.append(self.trainer.targets.labels.tolist())


@pytest.mark.parametrize(
    ("epochs", "asked", "starts"),
    [(2, None, (1,)), (3, None, (1, 2)), (8, None, (2, 4, 6)), (10, 4, (2, 4, 6, 8)), (5, 1, (2,))],
)
def test_the_epochs_are_divided_into_one_part_more_than_rounds(epochs, asked, starts, tmp_path):
    trainer = trainer_of(tmp_path, num_train_epochs=epochs, pseudo_label_rounds=asked)
    trainer.resolve_plan()
    assert trainer.self_training.starts == starts


def test_the_first_part_is_the_source_alone_and_then_the_models_own_answers_are_trained_on(tmp_path):
    """Bit for bit: the random numbers and the mode of the model are as without the rounds."""
    model = knowing_bert(dropout=0.2)
    trainer = trainer_of(tmp_path / "a", model, pseudo_label_rounds=1, num_train_epochs=2)
    look = Look(trainer)
    trainer.add_callback(look)
    trainer.train()
    plain = TransferTrainer(
        knowing_bert(dropout=0.2),
        arguments(
            tmp_path / "b", strategy="full", num_train_epochs=2, lr_scheduler_type="constant", learning_rate=3e-3
        ),
        train_dataset=separable_texts(20),
    )
    seen = Look(plain)
    seen.on_epoch_end = lambda *args, **kwargs: None
    plain.add_callback(seen)
    plain.train()
    assert differences(look.weights[1], seen.weights[1]) == 0
    assert differences(copy_state(trainer.model), copy_state(plain.model)) > 1e-4
    model.load_state_dict(look.weights[1], strict=False)  # and non-persistent buffers
    expected = answers(trainer, separable_texts(13, seed=9))
    assert look.labels == [[IGNORED] * 13, expected.argmax(1).tolist()]
    (done,) = trainer.self_training.rounds
    assert (done.number, done.epoch, sum(done.labeled)) == (1, 1, 13)
    logged = [log for log in trainer.state.log_history if "pseudo_labels/round" in log]
    assert [log["pseudo_labels/labeled"] for log in logged] == [13]


def test_answers_are_those_of_an_evaluation_and_leave_no_trace(tmp_path):
    model = with_statistics(tiny_timm_resnet())
    trainer = trainer_of(tmp_path, model, images(12), images(7, seed=5))
    model.train()
    before, state = torch.get_rng_state(), copy_state(model)
    found = answers(trainer, images(7, seed=5))
    assert torch.equal(torch.get_rng_state(), before) and differences(state, copy_state(model)) == 0 and model.training
    assert np.allclose(found, trainer.predict(images(7, seed=5)).predictions, atol=1e-6)


def test_a_labeled_example_counts_like_one_of_the_source(tmp_path):
    """A step on pairs is a step on the same examples in one batch, with the labels that they were given."""
    keys = dict(optim="sgd", learning_rate=0.1, max_grad_norm=0.0, per_device_train_batch_size=8, max_steps=1)
    target, ends = texts(8, seed=9), []
    trainer = trainer_of(tmp_path / "a", tiny_bert().double(), texts(8), target, pseudo_label_rounds=1, **keys | {
        "max_steps": 2, "gradient_accumulation_steps": 1})  # fmt: skip
    given = torch.tensor([0, 1, IGNORED, 1, 0, 1, IGNORED, 0])
    batches = []

    class Give(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                ends.append(copy_state(trainer.model))

    trainer.self_training._label = lambda epoch: trainer.targets.set_labels(given)
    compute = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, *a, **k: (batches.append(inputs), compute(model, inputs, *a, **k))[1]
    trainer.add_callback(Give())
    trainer.train()
    batch = batches[1]
    rows = int(batch[DOMAIN].sum())
    assert rows and len(batch["labels"]) == 8 + rows
    plain = tiny_bert().double()
    plain.load_state_dict(ends[0], strict=False)
    own = {name: value for name, value in batch.items() if name not in ("labels", DOMAIN)}
    logits = plain.train()(**own).logits
    loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
    loss.backward()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter -= 0.1 * parameter.grad
    assert differences(copy_state(plain), copy_state(trainer.model)) < 1e-12


def test_collapsed_answers_end_it_and_the_source_alone_is_trained_on(tmp_path):
    model = knowing_bert()
    with torch.no_grad():
        model.classifier.bias[1] = 50.0
    trainer = trainer_of(tmp_path, model, learning_rate=1e-6, num_train_epochs=4)
    look = Look(trainer)
    trainer.add_callback(look)
    trainer.train()
    (done,) = trainer.self_training.rounds
    assert done.collapsed and done.answered == [0, 13] and trainer.self_training.has_stopped
    assert look.labels == [[IGNORED] * 13] * 4


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy": "gradual"},
        pytest.param({"strategy": "lora"}, marks=pytest.mark.slow),
        {"class_weights": {"LABEL_1": 3.0}, "label_smoothing_factor": 0.1},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        pytest.param({"ema_decay": 0.9, "bf16": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_it_goes_with(keys, tmp_path):
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=2, **keys)
    trainer.train()
    assert [one.number for one in trainer.self_training.rounds] == [1, 2]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("step", [4, 7, pytest.param(3, marks=pytest.mark.slow)])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(step, tmp_path):
    """Interrupted in the first part, at the end of an epoch before a round, and in the middle of the next one."""
    keys = dict(strategy="gradual", save_on_signal=True, save_strategy="steps", save_steps=1000)

    def trainer(name):
        return trainer_of(tmp_path / name, knowing_bert(dropout=0.2), pseudo_label_threshold="per-class", **keys)

    whole = trainer("whole")
    whole.train()
    broken = trainer("broken")
    broken.add_callback(Stop(step))
    with pytest.raises(Interrupted):
        broken.train()
    resumed = trainer("broken")
    resumed.train(resume_from_checkpoint="auto")
    assert differences(copy_state(whole.model), copy_state(resumed.model)) == 0
    assert resumed.self_training.rounds == whole.self_training.rounds
    assert not whole.self_training.has_stopped and any(one != IGNORED for one in whole.targets.labels)
    assert resumed.targets.labels.tolist() == whole.targets.labels.tolist()
    assert resumed.state.global_step == whole.state.global_step == 15


def test_a_checkpoint_without_its_labels_is_refused(tmp_path):
    keys = dict(save_strategy="epoch", num_train_epochs=2)
    trainer_of(tmp_path, **keys).train()
    folder = sorted(tmp_path.glob("checkpoint-*"))[0]
    trainer = trainer_of(tmp_path, **keys)
    trainer.self_training.restore(folder)
    (folder / self_training.FILE).unlink()
    with pytest.raises(UserError, match="no pseudo-labels of this target"):
        trainer.self_training.restore(folder)


# ---- refused -------------------------------------------------------------------------------------------------------


def test_too_few_epochs_are_told_before_training(tmp_path):
    with pytest.raises(
        UserError, match=r"pseudo_label_rounds: 3 rounds of labeling .* need 4 epochs, and the run has 3"
    ):
        trainer_of(tmp_path, pseudo_label_rounds=3).resolve_plan()
    with pytest.raises(UserError, match=r"one round of labeling .* need 2 epochs, and the run has 1"):
        trainer_of(tmp_path, num_train_epochs=1).resolve_plan()


def test_labels_that_are_not_one_class_each(tmp_path):
    model = tiny_bert()
    model.config.problem_type = "single_label_classification"
    with pytest.raises(UserError, match="pseudo-label needs one class per example"):
        trainer_of(tmp_path, model, soft_texts(12))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"pseudo_label_threshold": "class"}, "'class' is not one of per-class, quantile"),
        ({"pseudo_label_threshold": 1.5}, "pseudo_label_threshold: expected a number above 0 and below 1"),
        ({"pseudo_label_rounds": 0}, "pseudo_label_rounds: expected a number at least 1"),
        ({"domain_adaptation_weight": 0.5}, "domain_adaptation_weight: 0.5 has no effect with .*pseudo-label"),
        ({"domain_adaptation_layer": "layer.0"}, "domain_adaptation_layer: 'layer.0' has no effect"),
        ({"domain_adaptation": "mmd"}, "pseudo_label_threshold: 0.01 has no effect with domain_adaptation: mmd"),
        ({"domain_adaptation": "none"}, "pseudo_label_threshold: 0.01 has no effect without domain_adaptation"),
        ({"max_hours": 1.0}, "max_hours and max_usd change"),
    ],
)
def test_keys_that_contradict_each_other(keys, said, tmp_path):
    with pytest.raises(UserErrors, match=said):
        arguments(tmp_path, **{**KEYS, **keys})


def test_a_trainer_does_not_choose_among_methods(tmp_path):
    keys = dict(domain_adaptation="auto", pseudo_label_threshold=None)
    with pytest.raises(UserError, match="auto trains several models, and a trainer has one"):
        trainer_of(tmp_path, **keys)
