"""The average of the weights: exact, evaluated, saved, resumed, and refused where it cannot be kept."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, TrainerCallback

from hf_transfer import TransferTrainer, UserError
from hf_transfer.training.cache_stage import OffReason
from hf_transfer.training.ema import FILE, decay_at
from tests.helpers import arguments, changed, copy_state, images, texts, tiny_bert, tiny_timm_resnet

EPOCHS = {"eval_strategy": "epoch", "save_strategy": "epoch"}


class Weights(TrainerCallback):
    """The weights before the first step and after each."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append(copy_state(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(copy_state(model))


def trainer_of(tmp_path, model=None, data=None, callbacks=None, **keys):
    args = arguments(tmp_path, **{"strategy": "full", "ema_decay": 0.6, **keys})
    model, data = tiny_bert() if model is None else model, texts(16) if data is None else data
    return TransferTrainer(model, args, train_dataset=data, eval_dataset=data, callbacks=callbacks)


def average_of(seen, decay):
    """By the formula, in float64."""
    average = {n: t.double() for n, t in seen[0].items()}
    for t, weights in enumerate(seen[1:], 1):
        d = min(decay, (1 + t) / (10 + t))
        average = {n: d * average[n] + (1 - d) * weights[n].double() for n in average}
    return average


def test_the_decay_rises_to_its_value():
    assert [decay_at(t, 0.9) for t in (1, 2, 80, 82)] == [2 / 11, 3 / 12, 0.9, 0.9]
    assert decay_at(10**6, 0.999) == 0.999


def test_the_model_of_a_run_is_the_average_of_its_weights(tmp_path):
    weights = Weights()
    trainer = trainer_of(tmp_path, callbacks=[weights])
    trainer.train()
    expected = average_of(weights.seen, 0.6)
    assert len(weights.seen) == 9
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=0, atol=1e-6)
    last = weights.seen[-1]["classifier.weight"]
    assert not torch.allclose(trainer.model.classifier.weight, last, atol=1e-4)


def test_training_itself_is_as_without_an_average(tmp_path):
    with_average, without = Weights(), Weights()
    trainer_of(tmp_path / "a", callbacks=[with_average], **EPOCHS).train()
    trainer_of(tmp_path / "b", callbacks=[without], ema_decay=None, **EPOCHS).train()
    assert all(not changed(a, b) for a, b in zip(with_average.seen, without.seen, strict=True))


def test_the_average_is_evaluated_and_saved_and_the_weights_stand_next_to_it(tmp_path):
    weights = Weights()
    trainer = trainer_of(tmp_path, callbacks=[weights], **EPOCHS)
    trainer.train()
    evaluated = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    for step, loss in ((4, evaluated[0]), (8, evaluated[1])):
        saved = BertForSequenceClassification.from_pretrained(tmp_path / f"checkpoint-{step}")
        torch.testing.assert_close(
            saved.classifier.weight.double(),
            average_of(weights.seen[: step + 1], 0.6)["classifier.weight"],
            rtol=0,
            atol=1e-6,
        )
        again = TransferTrainer(saved, arguments(tmp_path / "again"), eval_dataset=texts(16)).evaluate()
        assert again["eval_loss"] == loss
        kept = load_file(tmp_path / f"checkpoint-{step}" / FILE)
        assert not changed(kept, weights.seen[step])


@pytest.mark.parametrize("keys", [{"strategy": "full"}, {"strategy": "gradual", "num_train_epochs": 4}])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, keys):
    keys = {**EPOCHS, **keys}
    trainer = trainer_of(tmp_path, **keys)
    trainer.train()
    again = trainer_of(tmp_path, **keys)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert not changed(copy_state(trainer.model), copy_state(again.model))
    losses = [[log["eval_loss"] for log in t.state.log_history if "eval_loss" in log] for t in (trainer, again)]
    assert losses[0] == losses[1]


def test_the_best_weights_are_the_average_of_the_best_evaluation(tmp_path):
    scripted = iter([0.9, 0.5, 0.1])
    keys = {**EPOCHS, "load_best_model_at_end": True, "metric_for_best_model": "accuracy", "num_train_epochs": 3}
    args = arguments(tmp_path, strategy="full", ema_decay=0.6, **keys)
    trainer = TransferTrainer(
        tiny_bert(),
        args,
        train_dataset=texts(16),
        eval_dataset=texts(16),
        compute_metrics=lambda _: {"accuracy": next(scripted)},
    )
    trainer.train()
    best = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert not changed(best, copy_state(trainer.model))


def test_a_plateau_restores_the_average_that_was_best(tmp_path):
    values, weights = iter([0.9, 0.5, 0.4, 0.3, 0.3, 0.3, 0.3, 0.3]), Weights()
    keys = {"strategy": "gradual", "unfreeze_trigger": "plateau", "unfreeze_patience": 1, "num_train_epochs": 4}
    args = arguments(tmp_path, ema_decay=0.6, metric_for_best_model="accuracy", eval_strategy="epoch", **keys)
    trainer = TransferTrainer(
        tiny_bert(),
        args,
        train_dataset=texts(16),
        eval_dataset=texts(16),
        compute_metrics=lambda _: {"accuracy": next(values)},
        callbacks=[weights],
    )
    began = {}
    follow = trainer.ema.follow
    trainer.ema.follow = lambda names: (follow(names), names and not began and began.update(copy_state(trainer.model)))
    trainer.train()
    assert trainer.plan.stages[1].start == 8
    expected = average_of(weights.seen[:5], 0.6)["classifier.weight"]
    torch.testing.assert_close(began["classifier.weight"].double(), expected, rtol=0, atol=1e-6)


def test_an_adapter_averages_what_it_trains(tmp_path):
    weights = Weights()
    trainer = trainer_of(tmp_path, callbacks=[weights], adapter="lora", **EPOCHS)
    before = copy_state(trainer.model)
    trainer.train()
    kept = load_file(tmp_path / "checkpoint-4" / FILE)
    assert set(kept) == {n for n in before if ".lora_" in n or ".modules_to_save." in n}
    assert changed(before, copy_state(trainer.model)) <= set(kept)
    expected = average_of(weights.seen, 0.6)
    for name, tensor in copy_state(trainer.model).items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=1e-6)
    again = trainer_of(tmp_path, adapter="lora", **EPOCHS)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert not changed(copy_state(trainer.model), copy_state(again.model))


def test_statistics_of_batchnorm_are_averaged_too(tmp_path):
    weights = Weights()
    model = tiny_timm_resnet()
    trainer = trainer_of(tmp_path, model, images(16), [weights], batchnorm="train", per_device_train_batch_size=8)
    trainer.train()
    expected, buffers = average_of(weights.seen, 0.6), dict(trainer.model.named_buffers())
    name = next(n for n in buffers if n.endswith("running_var"))
    torch.testing.assert_close(buffers[name].double(), expected[name], rtol=0, atol=1e-6)
    assert not torch.equal(buffers[name], weights.seen[-1][name])
    counted = name.replace("running_var", "num_batches_tracked")
    assert int(buffers[counted]) == 4


def test_what_never_trains_is_not_kept_twice(tmp_path):
    trainer = trainer_of(tmp_path, strategy="linear-probe", **EPOCHS)
    before = copy_state(trainer.model)
    trainer.train()
    assert set(load_file(tmp_path / "checkpoint-4" / FILE)) == {"classifier.weight", "classifier.bias"}
    assert changed(before, copy_state(trainer.model)) == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("boundary_cache", ["off", "memory"])
def test_an_evaluation_of_replayed_features_is_that_of_the_average(tmp_path, boundary_cache):
    trainer = trainer_of(tmp_path, strategy="linear-probe", boundary_cache=boundary_cache, eval_strategy="epoch")
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert losses[-1] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-6)


def test_layers_that_are_frozen_again_are_not_replayed(tmp_path):
    stages = [{"epochs": 1, "train": "all"}, {"epochs": 1, "train": "head"}]
    trainer = trainer_of(tmp_path, strategy=None, stages=stages, boundary_cache="memory")
    trainer.resolve_plan()
    trainer.boundary.decide()
    assert {entry.off.reason for entry in trainer.boundary.entries} == {OffReason.AVERAGED}


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"ema_decay": 1.0}, "below 1"),
        ({"ema_decay": 0.0}, "got 0"),
        ({"strategy": "linear-probe", "probe_solver": "lbfgs"}, "solves for the head without any"),
        ({"adapter": "adalora"}, "removes ranks"),
        ({"fsdp": True}, "FSDP shards"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "DeepSpeed shards"),
    ],
)
def test_an_average_that_cannot_be_kept_is_refused(tmp_path, keys, sentence):
    with pytest.raises(UserError, match=sentence):
        trainer_of(tmp_path, **keys)


def test_half_precision_is_refused(tmp_path):
    with pytest.raises(UserError, match="rounds away the small steps"):
        trainer_of(tmp_path, tiny_bert().bfloat16())


def test_a_run_is_not_resumed_with_another_decay(tmp_path):
    trainer_of(tmp_path, **EPOCHS).train()
    with pytest.raises(UserError, match="ema_decay"):
        trainer_of(tmp_path, ema_decay=0.7, **EPOCHS).train(resume_from_checkpoint=True)
