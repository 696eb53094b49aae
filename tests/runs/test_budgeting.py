"""The budget of a run that is planned: dry steps leave no trace, and activations are those of a real batch."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from hf_transfer.analysis.prices import read_prices
from hf_transfer.layers.side_effects import untouched
from hf_transfer.runs.budgeting import budget_of
from hf_transfer.runs.dry_run import _AsOnGpu, _forward, dry_steps, spread
from hf_transfer.runs.preflight_examples import examples_of
from hf_transfer.runs.preflight_stages import batch_sizes_and_steps
from hf_transfer.runs.prepare import make_trainer, prepare, prepare_splits
from hf_transfer.runs.preview import plan_only
from hf_transfer.settings import Config
from tests.helpers import CHECKPOINTING, changed, copy_state
from tests.runs.test_preflight import QUIET, pictures, resnet, table, tiny_bert, with_tokens, words_tokenizer

__all__ = ["resnet"]  # a fixture


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return with_tokens(tmp_path_factory.mktemp("models") / "bert", words_tokenizer(), tiny_bert(dropout=0.1, layers=3))


def configured(model, data, folder, **keys):
    where = "dataset_name" if "." not in data.rpartition("/")[2] else "train_file"
    values = {**QUIET, "model_name_or_path": model, where: data, "output_dir": str(folder / "out"), **keys}
    return Config.from_sources({}, values)


def made(model, data, folder, **keys):
    """(prepared, trainer, splits) as `plan` makes them."""
    prepared = prepare(configured(model, data, folder, **keys))
    splits = prepare_splits(prepared)
    trainer = make_trainer(prepared, splits["train"], splits["validation"])
    trainer.boundary.decide()
    trainer.resolve_plan()
    return prepared, trainer, splits


def drawn():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_budget_leaves_no_trace(kind, bert, resnet, tmp_path):
    """Dropout, BatchNorm and augmentation draw numbers and write statistics."""
    if kind == "text":
        parts = made(bert, table(tmp_path / "a.csv"), tmp_path, strategy="two-phase", num_train_epochs=2)
    else:
        data = pictures(tmp_path / "d", 9)
        parts = made(resnet, data, tmp_path, strategy="two-phase", num_train_epochs=2, augmentation="basic")
    prepared, trainer, splits = parts
    state, numbers = copy_state(trainer.model), drawn()
    needed = {name: p.requires_grad for name, p in trainer.model.named_parameters()}
    modes = [module.training for module in trainer.model.modules()]
    budget = budget_of(prepared, trainer, splits, read_prices())
    assert budget.memory[1].activations.per_example > 0 and budget.work.operations > 0 and not budget.notes
    assert not changed(state, copy_state(trainer.model)) and drawn() == numbers
    assert {name: p.requires_grad for name, p in trainer.model.named_parameters()} == needed
    assert [module.training for module in trainer.model.modules()] == modes
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize("keys", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_activations_are_those_of_a_larger_batch(keys, bert, tmp_path):
    """Under autocast rounded weights are saved, once for all examples."""
    plan = dict(strategy="gradual", unfreeze_interval=1, num_train_epochs=4, per_device_train_batch_size=6)
    prepared, trainer, splits = made(bert, table(tmp_path / "a.csv"), tmp_path, **plan, **keys)
    train = examples_of(prepared, trainer, splits)["train"]
    with untouched(trainer.model):
        _, steps = batch_sizes_and_steps(trainer)
        dry = dry_steps(trainer, train, steps)
        for step, found in zip(steps, dry, strict=True):
            with step.training(), _AsOnGpu():
                _, saved = _forward(trainer, train.batch(train.longest(1) * 6))
            assert found.activations.of_batch(6) == saved
            assert found.parameters == step.parameters
    sizes = [found.activations.of_batch(6) for found in dry]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] / 10, "frozen layers save nothing"
    assert (dry[-1].activations.fixed > 100) == bool(keys)
    assert len({found.forward for found in dry}) == 1 and dry[0].backward < dry[-1].backward


def test_aspread_reaches_everything_once():
    assert list(spread([10, 11, 12, 13, 14])) == [10, 14, 12, 11, 13]
    for count in range(12):
        assert sorted(spread(list(range(count)))) == list(range(count))


def test_attention_with_dropout_saves_no_matrix_of_weights():
    """As on a GPU, where the memory is needed: dropout forces the CPU to another kernel."""
    q, k, v = (torch.randn(1, 2, 64, 8, requires_grad=True) for _ in range(3))
    saved = []
    with _AsOnGpu(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        torch.nn.functional.scaled_dot_product_attention(q, k, v, None, 0.5)
        torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    assert max(saved) == 2 * 64 * 8


def test_after_a_while_stages_are_bounded(bert, tmp_path, monkeypatch):
    """By the widest, which is always tried."""
    plan = dict(strategy="gradual", unfreeze_interval=1, num_train_epochs=3)
    prepared, trainer, splits = made(bert, table(tmp_path / "a.csv"), tmp_path, **plan)
    exact = budget_of(prepared, trainer, splits, read_prices())
    monkeypatch.setattr("hf_transfer.runs.dry_run.LIMIT", 0.0)
    bounded = budget_of(prepared, trainer, splits, read_prices())
    assert {m.activations for m in bounded.memory} == {exact.memory[-1].activations}
    assert [m.gradients for m in bounded.memory] == [m.gradients for m in exact.memory]
    assert bounded.work.operations > exact.work.operations
    assert not exact.notes and "of 'head', 'top 1 group' are those of a stage with more layers" in bounded.notes[0]


def test_operations_of_a_run(bert, tmp_path):
    """Of a whole run of one stage: three forward passes per example and epoch, scaled to the tokens there are."""
    prepared, trainer, splits = made(bert, table(tmp_path / "a.csv", ["a fine film"] * 10 + ["dull film indeed"] * 10),
                                     tmp_path, num_train_epochs=3)  # fmt: skip
    budget = budget_of(prepared, trainer, splits, read_prices())
    train = examples_of(prepared, trainer, splits)["train"]
    with untouched(trainer.model):
        (dry,) = dry_steps(trainer, train, batch_sizes_and_steps(trainer)[1])
    assert budget.work.operations == 3 * len(train) * (dry.forward + dry.backward)
    assert 1.8 * dry.forward < dry.backward < 2.5 * dry.forward, "attention is computed again"


def test_the_boundary_cache_is_counted(bert, tmp_path):
    """It takes room, and leaves out the frozen part of the forward pass in all epochs but one."""
    keys = dict(strategy="linear-probe", num_train_epochs=10, boundary_cache_budget=0.1)
    without, kept = (
        budget_of(*made(bert, table(tmp_path / "a.csv"), tmp_path, boundary_cache=way, **keys), read_prices())
        for way in ("off", "memory")
    )
    assert without.memory[0].boundary_cache == 0 < kept.memory[0].boundary_cache
    assert kept.work.operations < without.work.operations / 5


def test_what_is_not_known_is_said(bert, tmp_path):
    data = table(tmp_path / "a.csv")
    solved = budget_of(*made(bert, data, tmp_path, strategy="linear-probe", probe_solver="lbfgs"), read_prices())
    assert (solved.memory[0].gradients, solved.memory[0].optimizer, solved.work.operations) == (0, 0, None)
    assert "solved for" in solved.notes[0]
    again = budget_of(*made(bert, data, tmp_path, **{CHECKPOINTING: True}), read_prices())
    assert again.memory[0].activations is None and "checkpointing" in again.notes[0]
    assert any(line.startswith("GPUs, if activations fit as well, an estimate: ") for line in again.lines())
    waits = dict(strategy="gradual", unfreeze_trigger="plateau", num_train_epochs=4, eval_strategy="epoch")
    plateau = budget_of(*made(bert, data, tmp_path, **waits), read_prices())
    assert plateau.work.operations is None and plateau.memory[-1].activations and "plateaus" in plateau.notes[0]


def test_a_stream_counts_by_its_steps(bert, tmp_path):
    """It has no length."""
    keys = dict(streaming=True, max_eval_samples=4, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    parts = made(bert, table(tmp_path / "a.csv", ["a fine film"] * 40), tmp_path, max_steps=5, **keys)
    budget = budget_of(*parts, read_prices())
    train = examples_of(*parts)["train"]
    with untouched(parts[1].model):
        (dry,) = dry_steps(parts[1], train, batch_sizes_and_steps(parts[1])[1])
    assert budget.work.operations == 5 * 8 * (dry.forward + dry.backward) and budget.accumulation == 2


def test_without_data_sizes_are_exact(bert, tmp_path):
    values = QUIET | dict(
        model_name_or_path=bert, output_dir=str(tmp_path / "o"), strategy="two-phase", num_train_epochs=2
    )
    planned = plan_only(Config.from_sources({}, values, needs=("model",)), talks=False).to_dict()
    head, everything = planned["budget"]["stages"]
    total = planned["total_parameters"]
    assert (everything["parameters_bytes"], everything["gradients_bytes"]) == (4 * total, 4 * total)
    assert head["gradients_bytes"] == 4 * planned["stages"][0]["trainable_parameters"]
    assert everything["activations_bytes"] is None and planned["budget"]["operations"] is None


def test_a_budget_says_what_other_weights_it_does_not_count(bert, tmp_path):
    data, keys = table(tmp_path / "a.csv"), {"strategy": "full", "num_train_epochs": 1}
    one, two = {"ema_decay": 0.9}, {"ema_decay": 0.9, "l2_sp_alpha": 0.1}
    for more, said in ((one, "ema_decay keeps are"), (two, "ema_decay and l2_sp_alpha keep are")):
        budget = budget_of(*made(bert, data, tmp_path, **keys, **more), read_prices())
        assert budget.notes == [f"the copies of weights that {said} not counted"]
