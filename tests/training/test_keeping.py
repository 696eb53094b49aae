"""Against forgetting: L2-SP, EWC, distillation and replay, against closed forms on tiny models."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import TrainerCallback

from hf_transfer import TransferTrainer, UserError
from hf_transfer.data.replay import Replay, ReplaySampler
from hf_transfer.errors import WorkFailed
from hf_transfer.layers.identity import identity_of
from hf_transfer.objectives.distillation import logit_distillation
from hf_transfer.objectives.fisher import Fisher, estimate
from hf_transfer.objectives.replayed import answer
from hf_transfer.training import keeping
from tests.helpers import arguments, changed, copy_state, texts, tiny_bert, tiny_vit

SGD = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "weight_decay": 0.0,
    "strategy": "full",
}
HEAD = ("classifier.weight", "classifier.bias")


def trainer_of(folder, model=None, data=None, **keys):
    model = tiny_bert().double() if model is None else model
    args = arguments(folder, **{**SGD, **keys})
    return TransferTrainer(model, args, train_dataset=texts(16) if data is None else data)


def trained(folder, model=None, data=None, **keys):
    trainer = trainer_of(folder, model, data, **keys)
    trainer.train()
    return copy_state(trainer.model)


def close(one, other, tolerance=1e-12):
    return all(torch.allclose(one[n], other[n], rtol=0, atol=tolerance) for n in one)


def fisher_of(model, **about):
    """Of its own: each weight has another value."""
    generator = torch.Generator().manual_seed(3)
    values = {n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters()}
    return Fisher(values, identity_of(model)["tensors"], {"kind": "empirical", "examples": 1, **about})


# ---- L2-SP ---------------------------------------------------------------------------------------------------------


def test_l2_sp_follows_the_closed_form(tmp_path):
    """The same run in three steps of SGD, its gradient with alpha (w - w0) below the head and beta w in it."""
    alpha, beta = 0.7, 0.2
    begin, model = copy_state(tiny_bert().double()), tiny_bert().double()
    data = texts(4)
    batch = {k: torch.tensor(data[k]) for k in ("input_ids", "labels")}
    for _ in range(3):
        model.zero_grad()
        model(**batch).loss.backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= 0.1 * (p.grad + (beta * p if name in HEAD else alpha * (p - begin[name])))
    keys = {"max_steps": 3, "per_device_train_batch_size": 4}
    ours = trained(tmp_path, data=data, l2_sp_alpha=alpha, l2_sp_beta=beta, **keys)
    assert close(ours, copy_state(model))
    assert not close(ours, trained(tmp_path / "plain", data=data, **keys), 1e-4)


def test_the_terms_are_logged_and_exact(tmp_path):
    trainer = trainer_of(tmp_path, l2_sp_alpha=0.7, l2_sp_beta=0.2, max_steps=2)
    begin, seen = copy_state(trainer.model), []

    class See(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **_):
            now = copy_state(model)
            body = sum((now[n] - begin[n]).square().sum() for n, _ in model.named_parameters() if n not in HEAD)
            seen.append((0.35 * float(body), 0.1 * float(sum(now[n].square().sum() for n in HEAD))))

    trainer.add_callback(See())
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, (body, head) in zip(logs, seen, strict=True):
        assert entry["penalty/l2_sp_alpha"] == pytest.approx(body, rel=1e-6)
        assert entry["penalty/l2_sp_beta"] == pytest.approx(head, rel=1e-6)
    assert seen[1][0] > 0


def test_a_head_of_the_checkpoint_is_held_to_it(tmp_path):
    """Nothing is pulled to zero then: without a gradient of the loss, nothing moves."""
    trainer = trainer_of(tmp_path, l2_sp_alpha=1.0, max_steps=3)
    trainer.keeps_head = True
    trainer.compute_loss_func = None
    trainer.objective.loss = dataclasses.replace(trainer.objective.loss, always=True, weights=torch.zeros(2))
    begin = copy_state(trainer.model)
    trainer.train()
    assert changed(begin, copy_state(trainer.model)) == set()


@pytest.mark.parametrize("keys", [{"l2_sp_alpha": 0.5}, {"distillation_alpha": 0.5}, {"ewc_lambda": 5.0}], ids=str)
def test_accumulated_micro_batches_are_one_batch(keys, tmp_path):
    """Also a short last one: a term that depends on no example counts once per step."""
    if "ewc_lambda" in keys:
        fisher_of(tiny_bert().double()).save(tmp_path / "fisher.safetensors")
        keys = {**keys, "ewc_fisher_file": str(tmp_path / "fisher.safetensors")}
    whole, parts = (
        trained(tmp_path / str(size), data=texts(14), per_device_train_batch_size=size, **keys, **more)
        for size, more in ((8, {}), (2, {"gradient_accumulation_steps": 4}))
    )
    assert close(whole, parts)


def test_what_is_frozen_at_first_is_held_to_the_pretrained_weights_too(tmp_path):
    """Gradual unfreezing: a strong pull keeps every layer near its start, also those that thaw last."""
    begin = copy_state(tiny_bert().double())
    far, near = (
        trained(tmp_path / str(alpha), strategy="gradual", num_train_epochs=4, l2_sp_alpha=alpha)
        for alpha in (1e-9, 9.0)
    )
    moved = [n for n in changed(begin, far) if n not in HEAD]
    assert "bert.embeddings.word_embeddings.weight" in moved
    assert all((near[n] - begin[n]).norm() < 0.75 * (far[n] - begin[n]).norm() for n in moved)


@pytest.mark.parametrize(
    "keys", [{"l2_sp_alpha": 0.5}, {"distillation_alpha": 0.5}, {"ewc_lambda": 5.0}, {"replay": True}], ids=str
)
@pytest.mark.parametrize("strategy", [pytest.param("full", marks=pytest.mark.slow), "gradual"])
def test_a_resumed_run_is_the_uninterrupted_one(keys, strategy, tmp_path):
    """Bit for bit: w0 is that of the pretrained model, not of the checkpoint."""
    keys = dict(keys)
    if "ewc_lambda" in keys:
        fisher_of(tiny_bert(dropout=0.1)).save(tmp_path / "fisher.safetensors")
        keys["ewc_fisher_file"] = str(tmp_path / "fisher.safetensors")
    replays = keys.pop("replay", False)
    keys |= {
        "strategy": strategy,
        "num_train_epochs": 3,
        "save_strategy": "steps",
        "save_steps": 5,
        "optim": "adamw_torch",
    }

    def run(folder, checkpoint=None):
        trainer = trainer_of(folder, tiny_bert(dropout=0.1), **{**keys, "learning_rate": 1e-2})
        if replays:
            trainer.replay = Replay(texts(5, seed=9), 0.25)
        trainer.train(resume_from_checkpoint=checkpoint)
        return copy_state(trainer.model)

    whole = run(tmp_path / "run")
    resumed = run(tmp_path / "run", str(tmp_path / "run" / "checkpoint-5"))
    assert changed(whole, resumed) == set()


def test_mixed_precision_measures_distances_in_fp32(tmp_path):
    """In bf16 a step of 1e-3 of a weight of 1 would be lost."""
    trainer = trainer_of(tmp_path, tiny_bert(), l2_sp_alpha=1.0, l2_sp_beta=0.0, bf16=True, max_steps=1)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p += 1e-3
    batch = next(iter(trainer.get_train_dataloader()))
    with trainer.compute_loss_context_manager():
        trainer.model.train()
        trainer.compute_loss(trainer.model, dict(batch))
    size = sum(p.numel() for n, p in trainer.model.named_parameters() if n not in HEAD)
    assert float(trainer.objective.values["l2_sp_alpha"]) == pytest.approx(size * 1e-6 / 2, rel=1e-3)


# ---- EWC -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["empirical", "true"])
def test_the_fisher_information_is_that_of_logistic_regression(kind):
    """∂ log p(y | x) / ∂ W = (onehot(y) - p) xᵀ, for each example."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 4)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return {"logits": self.layer(x)}

    x, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 0, 1])
    model = Model()
    examples = [{"x": x[i : i + 1], "labels": y[i : i + 1]} for i in range(6)]
    found = estimate(model, examples, kind, "single_label_classification", seed=5)
    shares = layer(x).softmax(-1).detach()
    if kind == "true":
        generator = torch.Generator().manual_seed(5)
        y = torch.cat([torch.multinomial(one, 1, generator=generator) for one in shares])
    slopes = functional.one_hot(y, 4) - shares
    expected = (slopes[:, :, None] * x[:, None, :]).square().mean(0)
    assert torch.allclose(found["layer.weight"], expected, atol=1e-6)
    assert torch.allclose(found["layer.bias"], slopes.square().mean(0), atol=1e-6)


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_the_fisher_information_of_other_problems(kind):
    x, layer = torch.randn(5, 3), torch.nn.Linear(3, 2)
    y = torch.rand(5, 2).round()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return (self.layer(x),)

    examples = [{"x": x[i : i + 1], "labels": y[i : i + 1]} for i in range(5)]
    found = estimate(Model(), examples, "empirical", kind, seed=0)
    logits = layer(x).detach()
    slopes = y - (logits.sigmoid() if kind.startswith("multi") else logits)
    assert torch.allclose(found["layer.bias"], slopes.square().mean(0), atol=1e-6)


def test_estimating_leaves_the_model_and_the_random_numbers_alone():
    model, before = tiny_bert(dropout=0.5).train(), torch.random.get_rng_state()
    state = copy_state(model)
    examples = [{k: torch.tensor([texts(3)[i][k]]) for k in ("input_ids", "labels")} for i in range(3)]
    twice = [estimate(model, examples, "true", "single_label_classification", 0) for _ in range(2)]
    assert all(torch.equal(twice[0][n], twice[1][n]) for n in twice[0]), "dropout is off"
    assert model.training and changed(state, copy_state(model)) == set()
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_ewc_follows_the_closed_form(tmp_path):
    """Its gradient is lambda F (w - w0) below the head."""
    begin, model, data = copy_state(tiny_bert().double()), tiny_bert().double(), texts(4)
    fisher = fisher_of(model)
    fisher.save(tmp_path / "fisher.safetensors")
    batch = {k: torch.tensor(data[k]) for k in ("input_ids", "labels")}
    for _ in range(3):
        model.zero_grad()
        model(**batch).loss.backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                pull = 0 if name in HEAD else 3.0 * fisher.values[name].double() * (p - begin[name])
                p -= 0.1 * (p.grad + pull)
    keys = {"ewc_lambda": 3.0, "ewc_fisher_file": str(tmp_path / "fisher.safetensors"), "max_steps": 3}
    assert close(trained(tmp_path, data=data, **keys), copy_state(model))


def test_a_fisher_file_of_another_model_is_refused(tmp_path):
    other = tiny_bert()
    with torch.no_grad():
        other.bert.pooler.dense.bias[0] += 1
    fisher_of(other).save(tmp_path / "fisher.safetensors")
    keys = {"ewc_lambda": 1.0, "ewc_fisher_file": str(tmp_path / "fisher.safetensors")}
    with pytest.raises(UserError, match=r"another model: 1 of \d+ weights differ \(bert.pooler.dense.bias\)"):
        trainer_of(tmp_path, tiny_bert(), **keys)
    fisher_of(tiny_vit()).save(tmp_path / "fisher.safetensors")
    with pytest.raises(UserError, match="holds none of the model's weights"):
        trainer_of(tmp_path, tiny_bert(), **keys)


def test_a_head_of_its_own_makes_no_other_model(tmp_path):
    """A new task has a new head; the old one's Fisher information is left out."""
    fisher_of(tiny_bert(labels=5)).save(tmp_path / "fisher.safetensors")
    model = tiny_bert()
    with torch.no_grad():
        for (_, p), (_, q) in zip(model.named_parameters(), tiny_bert(labels=5).named_parameters(), strict=True):
            if p.shape == q.shape:
                p.copy_(q)
    trainer_of(
        tmp_path, model, ewc_lambda=1.0, ewc_fisher_file=str(tmp_path / "fisher.safetensors"), max_steps=1
    ).train()


@pytest.mark.parametrize("kind", ["none", "weights", "text"])
def test_a_file_that_holds_no_fisher_information_is_refused(kind, tmp_path):
    path = tmp_path / "fisher.safetensors"
    if kind == "weights":
        save_file({"a": torch.ones(2)}, path)
    elif kind == "text":
        path.write_text("hello")
    said = {"none": "no file", "weights": "holds no Fisher information", "text": "cannot be read"}[kind]
    with pytest.raises(UserError, match=f"ewc_fisher_file: .*{said}"):
        trainer_of(tmp_path, ewc_lambda=1.0, ewc_fisher_file=str(path))


# ---- distillation --------------------------------------------------------------------------------------------------


def test_distillation_of_features_is_the_mean_square(tmp_path):
    """One step of SGD from a model that has moved."""
    teacher, model, data = tiny_bert().double(), tiny_bert().double(), texts(4)
    trainer = trainer_of(tmp_path, model, data, distillation_alpha=0.6, max_steps=1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype))
    mine = copy.deepcopy(model)
    batch = {k: torch.tensor(data[k]) for k in ("input_ids", "labels")}
    distance = mine.bert(batch["input_ids"]).pooler_output - teacher.bert(batch["input_ids"]).pooler_output.detach()
    term = 0.6 * distance.square().mean()
    (mine(**batch).loss + term).backward()
    term = term.detach()
    with torch.no_grad():
        for p in mine.parameters():
            p -= 0 if p.grad is None else 0.1 * p.grad
    trainer.train()
    assert close(copy_state(trainer.model), copy_state(mine))
    assert float(trainer.objective.values["distillation_alpha"]) == pytest.approx(float(term), rel=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_of_logits_is_the_divergence_at_a_temperature(temperature, tmp_path):
    teacher, model, data = tiny_bert().double(), tiny_bert().double(), texts(4)
    with torch.no_grad():
        teacher.classifier.weight.mul_(5)
    keys = {"distillation_temperature": temperature} if temperature != 2 else {}
    trainer = trainer_of(
        tmp_path, model, data, distillation_alpha=0.6, teacher_model_name_or_path="it", max_steps=1, **keys
    )
    keeping.teach(trainer, teacher, "single_label_classification")
    mine, batch = copy.deepcopy(model), {k: torch.tensor(data[k]) for k in ("input_ids", "labels")}
    wanted = (teacher(**batch).logits / temperature).softmax(-1).detach()
    out = mine(**batch)
    own = (out.logits / temperature).log_softmax(-1)
    term = 0.6 * temperature**2 * (wanted * (wanted.log() - own)).sum(-1).mean()
    (out.loss + term).backward()
    with torch.no_grad():
        for p in mine.parameters():
            p -= 0 if p.grad is None else 0.1 * p.grad
    before = copy_state(teacher)
    trainer.train()
    assert close(copy_state(trainer.model), copy_state(mine))
    assert changed(before, copy_state(teacher)) == set() and not teacher.training
    assert set(trainer.model.state_dict()) == set(tiny_bert().state_dict()), "the teacher is not saved"


def test_the_teachers_outputs_are_ordered_as_the_runs_labels():
    """And with several labels the term is 0 for equal logits."""
    teacher, own = torch.nn.Linear(2, 3), torch.randn(4, 3)
    teacher.forward = lambda x: {"logits": own[:, [2, 0, 1]]}
    for kind in ("single_label_classification", "multi_label_classification", "regression"):
        penalty = logit_distillation(1.0, 2.0, teacher, kind, order=(1, 2, 0))
        value = penalty.function(penalty.module, teacher, {"x": torch.zeros(4)}, {"logits": own})
        assert float(value) == pytest.approx(0, abs=1e-6)
        plain = logit_distillation(1.0, 2.0, teacher, kind)
        assert float(plain.function(plain.module, teacher, {"x": torch.zeros(4)}, {"logits": own})) > 1e-3


def test_the_pretrained_model_is_the_teacher_under_an_adapter(tmp_path):
    """LoRA begins with the pretrained function: the first term is 0, a later one is not."""
    keys = {"adapter": "lora", "lora_r": 2, "distillation_alpha": 1.0, "optim": "adamw_torch", "learning_rate": 0.05}
    trainer = trainer_of(tmp_path, tiny_bert(), max_steps=3, **keys)
    trainer.train()
    terms = [entry["penalty/distillation_alpha"] for entry in trainer.state.log_history if "loss" in entry]
    assert terms[0] == pytest.approx(0, abs=1e-10) and terms[2] > 1e-8


# ---- replay --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9, 1 / 3])
@pytest.mark.parametrize("count", [1, 7, 64])
def test_replay_has_its_share_of_every_batch(count, fraction):
    sampler = ReplaySampler(count, 5, fraction, seed=3)
    order = list(sampler)
    assert len(order) == len(sampler) == count + sampler.replayed
    assert sorted(i for i in order if i < count) == list(range(count)), "each of the training set once"
    assert order[-1] < count, "and no more than that takes"
    flags = [i >= count for i in order]
    for size in (1, 4, 8, 10):
        for at in range(0, len(order) - size + 1):
            assert abs(sum(flags[at : at + size]) - size * fraction) < 1 + 1e-3 * size


def test_replay_draws_all_of_the_earlier_data_before_any_twice():
    sampler, drawn = ReplaySampler(10, 7, 0.5, seed=0), []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        drawn += [i for i in sampler if i >= 10]
    for turn in range(len(drawn) // 7):
        assert sorted(drawn[turn * 7 : turn * 7 + 7]) == list(range(10, 17))
    again = ReplaySampler(10, 7, 0.5, seed=0)
    again.set_epoch(4)
    assert [i for i in again if i >= 10] == drawn[-sampler.replayed :], "a function of seed and epoch"
    assert list(ReplaySampler(10, 7, 0.5, seed=1)) != list(ReplaySampler(10, 7, 0.5, seed=0))


def test_replayed_examples_are_trained_on(tmp_path):
    """Every batch has its share, with the inputs and labels of the earlier data."""
    trainer = trainer_of(tmp_path, data=texts(12), per_device_train_batch_size=4)
    earlier = texts(6, seed=5)
    trainer.replay = Replay(earlier, 0.25)
    rows = {tuple(row["input_ids"]): row["labels"] for row in earlier}
    batches = list(trainer.get_train_dataloader())
    seen = [[tuple(ids) in rows for ids in batch["input_ids"].tolist()] for batch in batches]
    assert [sum(one) for one in seen] == [1, 1, 1, 0]
    for batch in batches:
        for ids, label in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            assert rows.get(tuple(ids), label) == label
    assert trainer.resolve_plan() == 2 * len(batches)


def with_old_head(folder, **keys):
    """A trainer that replays six examples of three other classes, and the head that answers them."""
    torch.manual_seed(7)
    old = tiny_bert(labels=3).double().classifier
    trainer = trainer_of(folder, **{"data": texts(12), "per_device_train_batch_size": 4, **keys})
    head = {f"classifier.{n}": p.detach().clone() for n, p in old.named_parameters()}
    keeping.replay_with(trainer, head, "single_label_classification")
    rows = [{**row, "labels": i % 3} for i, row in enumerate(texts(6, seed=5))]
    trainer.replay = Replay(rows, 0.25, apart=True)
    return trainer, old


def test_replay_of_another_task_follows_the_closed_form(tmp_path):
    """Its head stays as it was; each replayed example counts as one of the training set."""
    trainer, old = with_old_head(tmp_path, max_steps=4)
    model, before = copy.deepcopy(trainer.model), copy_state(old)
    batches = list(trainer.get_train_dataloader())
    assert [len(b["labels"]) for b in batches] == [3, 3, 3, 3]
    assert [len(b["earlier"]["labels"]) if "earlier" in b else 0 for b in batches] == [1, 1, 1, 0]
    head = model.classifier
    for batch in batches:
        model.zero_grad()
        own = {n: v for n, v in batch.items() if n != "earlier"}
        loss = model(**own).loss
        if "earlier" in batch:
            model.classifier = old
            logits = model(input_ids=batch["earlier"]["input_ids"]).logits
            loss = loss + functional.cross_entropy(logits, batch["earlier"]["labels"], reduction="sum") / 3
            model.classifier = head
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    trainer.train()
    assert close(copy_state(trainer.model), copy_state(model))
    assert changed(before, copy_state(old)) == set()
    terms = [entry["penalty/replay_fraction"] for entry in trainer.state.log_history if "loss" in entry]
    assert terms[0] > 0 and terms[-1] == 0


def test_replay_of_another_task_is_the_same_in_micro_batches(tmp_path):
    whole, parts = (
        with_old_head(tmp_path / str(size), data=texts(18), per_device_train_batch_size=size, **more)[0]
        for size, more in ((8, {}), (2, {"gradient_accumulation_steps": 4}))
    )
    for trainer in (whole, parts):
        trainer.train()
    assert close(copy_state(whole.model), copy_state(parts.model))


def test_an_old_head_is_read_with_the_statistics_of_the_new_data():
    layers = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5), torch.nn.Linear(3, 2))
    layers.forward = lambda inputs: (torch.nn.Sequential.forward(layers, inputs),)
    before, head = copy_state(layers), {"2.weight": torch.eye(4, 3), "2.bias": torch.arange(4.0)}
    seen = [answer(layers, head, {"inputs": torch.ones(1, 3), "labels": None}) for _ in range(9)]
    assert changed(before, copy_state(layers)) == set() and layers[0].training
    assert seen[0].shape == (1, 4) and len({tuple(one[0].tolist()) for one in seen}) > 1, "dropout is on"


# ---- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"l2_sp_alpha": -1.0}, "l2_sp_alpha: expected a number at least 0"),
        ({"ewc_lambda": float("nan"), "ewc_fisher_file": "x"}, "ewc_lambda: expected a number at least 0"),
        ({"l2_sp_beta": 1.0}, "l2_sp_beta has no effect without l2_sp_alpha"),
        ({"ewc_lambda": 1.0}, "ewc_lambda needs the Fisher information"),
        ({"ewc_dataset_name": "x"}, "ewc_dataset_name has no effect without ewc_lambda"),
        ({"ewc_lambda": 1.0, "ewc_dataset_name": "x", "ewc_fisher_file": "y"}, "contradict each other"),
        ({"ewc_fisher": "true", "ewc_lambda": 1.0, "ewc_fisher_file": "y"}, "ewc_fisher has no effect"),
        ({"ewc_fisher": "exact"}, "ewc_fisher: 'exact' is not one of empirical, true"),
        ({"teacher_model_name_or_path": "x"}, "no effect without distillation_alpha"),
        ({"distillation_alpha": 1.0, "distillation_temperature": 3.0}, "no effect without teacher_model_name_or_path"),
        ({"replay_fraction": 0.5}, "replay_fraction has no effect without replay_dataset_name"),
        ({"replay_dataset_name": "x", "replay_fraction": 1.0}, "above 0 and below 1"),
        ({"replay_dataset_name": "x", "balanced_sampling": True}, "leave one of them out"),
        (
            {"replay_dataset_name": "x", "domain_adaptation": "coral"},
            "domain_adaptation draws .* leave one of them out",
        ),
        ({"l2_sp_alpha": 0.1, "probe_solver": "lbfgs", "strategy": "linear-probe"}, "probe_solver: lbfgs"),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys, said, tmp_path):
    with pytest.raises(UserError, match=said):
        trainer_of(tmp_path, **keys)


@pytest.mark.parametrize("key", ["l2_sp_alpha", "distillation_alpha"])
def test_a_frozen_backbone_has_nothing_to_hold(key, tmp_path):
    with pytest.raises(UserError, match=f"{key}: the plan trains nothing below the head"):
        trainer_of(tmp_path, strategy="linear-probe", **{key: 0.1})


def test_an_adapter_has_nothing_to_hold_unless_it_trains_weights_whole(tmp_path):
    with pytest.raises(UserError, match="l2_sp_alpha: with this adapter, all pretrained weights are frozen"):
        trainer_of(tmp_path, tiny_bert(), adapter="lora", l2_sp_alpha=0.1)
    trainer = trainer_of(tmp_path, tiny_bert(), adapter="ln_tuning", l2_sp_alpha=1.0, l2_sp_beta=0.0, max_steps=3)
    trainer.train()
    terms = [e["penalty/l2_sp_alpha"] for e in trainer.state.log_history if "loss" in e]
    assert terms[0] == 0 and terms[-1] > 0


@pytest.mark.parametrize(
    "keys",
    [
        {"ewc_lambda": 1.0, "ewc_dataset_name": "old.csv"},
        {"distillation_alpha": 1.0, "teacher_model_name_or_path": "old"},
        {"replay_dataset_name": "old.csv"},
    ],
    ids=str,
)
def test_a_trainer_alone_does_not_pass_over_what_a_run_reads(keys, tmp_path):
    trainer = trainer_of(tmp_path, **keys)
    with pytest.raises(UserError, match="nothing has read 'old"):
        trainer.train()


def test_a_weight_that_diverges_is_named(tmp_path):
    """SGD diverges where rate * alpha > 2."""
    with pytest.raises(WorkFailed, match=r"The loss includes l2_sp_alpha: lower it|Lower l2_sp_alpha"):
        trained(tmp_path, tiny_bert(), l2_sp_alpha=1e6, on_nonfinite="stop", num_train_epochs=20)


def test_the_boundary_cache_is_off_where_a_teacher_reads_the_inputs(tmp_path):
    trainer = trainer_of(
        tmp_path, tiny_bert(), strategy="gradual", num_train_epochs=4, boundary_cache="memory", distillation_alpha=0.5
    )
    trainer.boundary.decide()
    assert not any(trainer.boundary.decisions)
    assert "the teacher reads the inputs" in "\n".join(trainer.boundary.lines())


def test_a_loss_of_the_callers_own_is_not_changed_in_silence(tmp_path):
    class Own(TransferTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    with pytest.raises(UserError, match="l2_sp_alpha: it is added to the built-in loss"):
        Own(tiny_bert(), arguments(tmp_path, l2_sp_alpha=0.1), train_dataset=texts(4))
