"""Bytes of parameters, gradients and optimizer states against those of a real run."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from peft import get_peft_model_state_dict
from transformers import TrainerCallback

from hf_transfer import TransferTrainer
from hf_transfer.adapters.attach import saved_parameters
from hf_transfer.analysis.budget import Activations, Trained, memory_of, state_bytes, without_kernels
from tests.helpers import arguments, texts, tiny_bert


class Counts(TrainerCallback):
    """Bytes that there are in each stage: {stage: (gradients, optimizer states)}."""

    def __init__(self, trainer):
        self.trainer, self.gradients, self.seen = trainer, 0, {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        self.gradients = sum(g.numel() * g.element_size() for g in gradients)

    def on_optimizer_step(self, args, state, control, **kwargs):
        kept = self.trainer.optimizer.state.values()
        tensors = [value for entry in kept for value in entry.values() if torch.is_tensor(value)]
        states = sum(t.numel() * t.element_size() for t in tensors)
        self.seen[self.trainer.unfreezing.stage] = (self.gradients, states)


OPTIMIZERS = [
    ("adamw_torch_fused", {}),
    ("adamw_torch", {}),
    ("sgd", {}),
    ("sgd", {"optim_args": "momentum=0.9"}),
    ("adafactor", {}),
    ("adagrad", {}),
    ("rmsprop", {}),
]


@pytest.mark.parametrize(("optim", "keys"), OPTIMIZERS, ids=[f"{name}{'-keys' * bool(k)}" for name, k in OPTIMIZERS])
def test_gradients_and_states_equal_those_of_a_run(optim, keys, tmp_path):
    check_run(tmp_path, optim=optim, strategy="gradual", unfreeze_interval=1, num_train_epochs=3, **keys)


@pytest.mark.parametrize("adapter", ["lora", "ia3"])
def test_with_an_adapter(adapter, tmp_path):
    """What is saved with it is counted apart."""
    trainer, memory = check_run(tmp_path, strategy="full", adapter=adapter, num_train_epochs=1)
    saved = get_peft_model_state_dict(trainer.model).values()
    assert memory[0].adapter == sum(t.numel() * t.element_size() for t in saved) > 0
    assert memory[0].gradients == memory[0].adapter < memory[0].parameters


def check_run(folder, **keys):
    """Budget and run agree in every stage."""
    trainer = TransferTrainer(tiny_bert(), arguments(folder, **keys), train_dataset=texts(8))
    trainer.resolve_plan()
    cls, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    stages = [Trained(stage.name, trainer.unfreezing.trains(stage)) for stage in trainer.plan.stages]
    adapter = saved_parameters(trainer.model) if keys.get("adapter") else ()
    make = partial(cls, **without_kernels(options))
    memory = memory_of(trainer.model, stages, make, batch=4, adapter=adapter)
    counts = Counts(trainer)
    trainer.add_callback(counts)
    trainer.train()
    assert counts.seen == {i: (stage.gradients, stage.optimizer) for i, stage in enumerate(memory)}
    assert len(memory) == len(trainer.plan.stages)
    model = trainer.model
    assert {m.parameters for m in memory} == {sum(p.numel() * p.element_size() for p in model.parameters())}
    assert {m.buffers for m in memory} == {sum(b.numel() * b.element_size() for b in model.buffers())}
    return trainer, memory


def test_dtypes_and_the_meta_device():
    """A model in bfloat16 has gradients and moments in bfloat16, and none of it has to exist."""
    with torch.device("meta"):
        model = torch.nn.Linear(10, 3).to(torch.bfloat16)
    (memory,) = memory_of(model, [Trained("all", {"weight", "bias"})], torch.optim.AdamW, batch=2)
    assert (memory.parameters, memory.gradients, memory.optimizer) == (66, 66, 2 * 66 + 2 * 4)


def test_an_optimizer_that_needs_data_is_not_known():
    class Looks(torch.optim.SGD):
        def step(self, closure=None):
            return self.param_groups[0]["params"][0].grad.sum().item()

    model = torch.nn.Linear(2, 2)
    assert state_bytes(model.parameters(), partial(Looks, lr=0.1)) is None
    (memory,) = memory_of(model, [Trained("all", {"weight"})], partial(Looks, lr=0.1), batch=1)
    assert memory.optimizer is None and memory.total() == memory.parameters + memory.gradients


def test_activations_grow_with_the_batch():
    stage = Trained("all", {"weight"}, Activations(fixed=7, per_example=100))
    (memory,) = memory_of(torch.nn.Linear(2, 2), [stage], partial(torch.optim.SGD, lr=0.1), batch=3)
    assert memory.to_dict()["activations_bytes"] == 307
    assert memory.total(1) == 24 + 16 + 107
