"""What the trainer promises, in one process: each promise with the numbers."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from hf_transfer import TransferArguments, TransferTrainer, UserError
from tests.helpers import (
    arguments,
    changed,
    copy_state,
    images,
    texts,
    tiny_bert,
    tiny_timm_resnet,
    tiny_timm_vit,
    tiny_vit,
)

MODELS = {
    "bert": (tiny_bert, texts),
    "vit": (tiny_vit, images),
    "timm-resnet": (tiny_timm_resnet, images),
    "timm-vit": (tiny_timm_vit, images),
}


# ---- a drop-in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["bert", "timm-resnet"])
def test_with_no_transfer_key_it_is_trainer_bit_for_bit(case, tmp_path):
    """Losses, gradient norms, weights, BatchNorm statistics, with dropout live and accumulation with a short end."""
    make, data = MODELS[case]
    runs = []
    for trainer_class, arguments_class in ((Trainer, TrainingArguments), (TransferTrainer, TransferArguments)):
        model = make(dropout=0.2) if case == "bert" else make()
        args = arguments_class(
            str(tmp_path),
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            weight_decay=0.1,
            report_to="none",
            dataloader_pin_memory=False,
        )
        trainer = trainer_class(model=model, args=args, train_dataset=data(), eval_dataset=data(seed=1))
        trainer.train()
        evaluation = trainer.evaluate()["eval_loss"]
        losses = [
            {k: h[k] for k in ("loss", "grad_norm", "learning_rate", "step")}
            for h in trainer.state.log_history
            if "loss" in h
        ]
        runs.append((losses, evaluation, copy_state(model)))
    (losses, evaluation, state), (our_losses, our_evaluation, our_state) = runs
    assert len(losses) == 8 and our_losses == losses
    assert our_evaluation == evaluation
    assert not changed(state, our_state)
    assert changed(state, copy_state(make()))  # and it did train


# ---- frozen is frozen ----------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Snapshots at every step: state of the model, what requires a gradient, optimizer state, modes in the forward."""

    def __init__(self, model):
        self.states, self.trains, self.optimizer, self.modes = [copy_state(model)], [], [], []
        self.model, self.names = model, {id(p): n for n, p in model.named_parameters()}
        model.register_forward_hook(lambda m, *_: self._note_modes() if m.training else None)

    def _note_modes(self):
        self.modes.append({n: m.training for n, m in self.model.named_modules()})

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trains.append({n for n, p in self.model.named_parameters() if p.requires_grad})
        assert {n for n, p in self.model.named_parameters() if p.grad is not None} <= self.trains[-1]

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.states.append(copy_state(self.model))
        self.optimizer.append({self.names[id(p)] for p in optimizer.state})


def run(case, tmp_path, dropout=None, **keys):
    make, data = MODELS[case]
    model = make() if dropout is None else make(dropout=dropout)
    trainer = TransferTrainer(model, arguments(tmp_path, **keys), train_dataset=data())
    watch = Watch(model)
    trainer.add_callback(watch)
    trainer.train()
    return trainer, watch


PLANS = {
    "linear-probe": {"strategy": "linear-probe"},
    "partial": {"strategy": "partial", "unfrozen_groups": 1},
    "two-phase": {"strategy": "two-phase"},
    "gradual": {"strategy": "gradual", "num_train_epochs": 4},
    "refreeze": {"stages": [{"epochs": 1, "train": "all"}, {"epochs": 1, "train": "head"}, {"epochs": 1, "train": 2}]},
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", MODELS)
def test_what_should_move_moves_and_what_is_frozen_does_not_by_one_bit(case, plan, tmp_path):
    trainer, watch = run(case, tmp_path, weight_decay=0.1, max_grad_norm=0.5, **PLANS[plan])
    assert len(watch.trains) == trainer.state.max_steps > 0
    group_of = {n: g.name for g in trainer.layer_groups for n in g.parameters}
    records = trainer.stage_records
    assert [r.name for r in records] == [s.name for s in trainer.plan.stages]
    for index, (record, stage) in enumerate(zip(records, trainer.plan.stages, strict=True)):
        assert record.start == stage.start and record.steps == 5 * stage.epochs
        steps = range(record.start, record.start + record.steps)
        expected = {n for n, g in group_of.items() if g in stage.trainable}
        for step in steps:
            assert watch.trains[step] == expected, (index, step)
            assert watch.optimizer[step] <= expected
        moved = changed(watch.states[record.start], watch.states[record.start + record.steps])
        parameters = moved & set(group_of)
        assert parameters <= expected
        # A key's bias shifts every attention score alike: its gradient is exactly zero.
        still = {n for n in expected - parameters if not n.endswith(("key.bias", "k_proj.bias"))}
        unused = {n for n in still if n.endswith(("position_embeddings.weight", "token_type_embeddings.weight"))}
        assert still - unused == set(), still
        buffers = moved - set(group_of)
        running = {n for n in watch.states[0] if n.endswith(("running_mean", "running_var", "num_batches_tracked"))}
        owners = {n for n in running if any(p.rsplit(".", 1)[0] == n.rsplit(".", 1)[0] for p in expected)}
        assert buffers == owners


@pytest.mark.parametrize(
    ("case", "dropouts"),
    [
        ("bert", {"dropout": True, "bert.embeddings.dropout": False, "bert.encoder.layer.0.output.dropout": False}),
        ("vit", {"vit.embeddings.dropout": False}),
    ],
)
def test_dropout_is_off_in_what_is_frozen_and_on_elsewhere(case, dropouts, tmp_path):
    _, watch = run(case, tmp_path, dropout=0.5, strategy="two-phase", gradient_accumulation_steps=2)
    head, everything = watch.modes[0], watch.modes[-1]
    assert all(mode == watch.modes[0] for mode in watch.modes[:5])  # at every micro-step, whatever model.train() did
    for name, live in dropouts.items():
        assert head[name] is live, name
    assert all(everything.values())


def test_a_frozen_run_is_deterministic_where_a_live_one_is_not(tmp_path):
    """The features below the head are the same in every forward pass although dropout is 0.5."""
    model = tiny_bert(dropout=0.5)
    seen = []
    model.bert.register_forward_hook(lambda m, i, o: seen.append(o.pooler_output.detach().clone()))
    one = texts(4)
    TransferTrainer(model, arguments(tmp_path, strategy="linear-probe", num_train_epochs=4), train_dataset=one).train()
    assert len(seen) == 4 and all(torch.equal(a.sort(0)[0], seen[0].sort(0)[0]) for a in seen)


def test_a_pattern_of_rate_zero_freezes_batchnorm(tmp_path):
    _trainer, watch = run("timm-resnet", tmp_path, strategy="full", layer_learning_rates={r"bn\d": 0.0})
    moved = changed(watch.states[0], watch.states[-1])
    assert len(moved) > 10 and not any(".bn" in n for n in moved)
    assert any(n.endswith("downsample.2.running_mean") for n in moved)  # a BatchNorm that the pattern does not name
    assert all("bn" not in n for n in watch.trains[0])


def test_a_freeze_made_after_construction_stays(tmp_path):
    model = tiny_bert()
    trainer = TransferTrainer(model, arguments(tmp_path, strategy="two-phase"), train_dataset=texts())
    model.bert.embeddings.requires_grad_(False)
    before = copy_state(model)
    trainer.train()
    moved = changed(before, copy_state(model))
    assert moved and not any(n.startswith("bert.embeddings.") for n in moved)


def test_arguments_changed_before_training_count(tmp_path):
    """As a hyperparameter search changes them."""
    trainer = TransferTrainer(
        tiny_bert(), arguments(tmp_path, strategy="full", lr_scheduler_type="constant"), train_dataset=texts()
    )
    trainer.args.learning_rate = 0.125
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate/head"] == 0.125


def test_max_steps_sets_the_length_of_the_plan(tmp_path):
    trainer = TransferTrainer(
        tiny_bert(), arguments(tmp_path, strategy="gradual", max_steps=25, num_train_epochs=1), train_dataset=texts()
    )
    trainer.train()
    assert trainer.plan.never_thawed == () and [r.steps for r in trainer.stage_records] == [5, 5, 5, 10]


def test_transformers_own_parser_takes_the_keys(tmp_path):
    """A script that reads its arguments with `HfArgumentParser` stays as it is."""
    (args,) = HfArgumentParser((TransferArguments,)).parse_args_into_dataclasses(
        [
            "--output_dir",
            str(tmp_path),
            "--strategy",
            "gradual",
            "--layer_lr_decay",
            "0.8",
            "--use_cpu",
            "true",
            "--unfreeze_until",
            "layer.1",
            "--groups_per_unfreeze",
            "2",
        ]
    )
    assert (args.strategy, args.layer_lr_decay, args.groups_per_unfreeze) == ("gradual", 0.8, 2)


def test_training_twice_starts_the_schedule_anew(tmp_path):
    trainer = TransferTrainer(tiny_bert(), arguments(tmp_path, strategy="two-phase"), train_dataset=texts())
    logs = []
    for _ in range(2):
        trainer.train()
        logs.append([{k: v for k, v in h.items() if "learning_rate" in k} for h in trainer.state.log_history])
    assert logs[0] == logs[1] and max(logs[0][0].values()) == 0.2


def test_after_training_nothing_stays_frozen(tmp_path):
    """A second trainer on the same model starts from the caller's own freeze, not from the last stage's."""
    model = tiny_bert()
    model.bert.embeddings.requires_grad_(False)
    TransferTrainer(model, arguments(tmp_path, strategy="linear-probe"), train_dataset=texts()).train()
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith("bert.embeddings.")}


# ---- the printed plan is the executed plan -------------------------------------------------------------------------


def test_every_groups_rate_is_logged_at_every_step(tmp_path):
    trainer, _ = run(
        "bert",
        tmp_path,
        strategy="gradual",
        num_train_epochs=3,
        layer_lr_decay=0.5,
        head_learning_rate=0.1,
        unfreeze_warmup_steps=3,
    )
    logs = [h for h in trainer.state.log_history if "loss" in h]
    assert [h["step"] for h in logs] == list(range(1, 16))
    for log in logs:
        step = log["step"] - 1  # the rates of the step that was just taken
        assert log["stage"] == trainer.plan.at(step) == step // 5
        for group in trainer.layer_groups:
            key = f"learning_rate/{group.name}"
            if group.name in trainer.plan.never_thawed:
                assert key not in log
            else:
                assert log[key] == pytest.approx(
                    trainer.plan.rate(step, trainer.plan.trajectory(group.name)) * (1 - step / 15), abs=1e-15
                )


def test_no_logged_loss_mixes_two_stages(tmp_path):
    trainer, _ = run("bert", tmp_path, strategy="gradual", num_train_epochs=3, logging_steps=4)
    logs = [(h["step"], h["stage"]) for h in trainer.state.log_history if "loss" in h]
    assert logs == [(4, 0), (5, 0), (8, 1), (10, 1), (12, 2), (15, 2)]
    assert [r.loss is not None for r in trainer.stage_records] == [True] * 3


def test_the_clip_norm_counts_only_what_trains(tmp_path):
    norms = []

    class Norm(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            grads = [p.grad for n, p in model.named_parameters() if n.startswith("classifier.")]
            norms.append(torch.cat([g.flatten() for g in grads]).norm().item())

    trainer = TransferTrainer(
        tiny_bert(),
        arguments(tmp_path, strategy="linear-probe", max_grad_norm=1e-3),
        train_dataset=texts(),
        callbacks=[Norm()],
    )
    trainer.train()
    logged = [h["grad_norm"] for h in trainer.state.log_history if "grad_norm" in h]
    assert norms == pytest.approx([1e-3] * 10, rel=1e-3)  # clipped
    assert all(g > 1e-2 for g in logged)  # before clipping


# ---- accumulation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "more"), [("bert", {}), ("vit", {}), ("timm-vit", {}), ("bert", {"adapter": "lora", "lora_alpha": 64})]
)
def test_an_accumulated_batch_is_the_large_batch(case, more, tmp_path):
    """10 examples as 4 + 4 + 2 against 10 at once: losses, norms and weights, through an unfreeze, in float64."""
    make, data = MODELS[case]
    runs = []
    for batch, accumulate in ((10, 1), (4, 3)):
        model = make().double()
        rows = data(10)
        args = arguments(
            tmp_path,
            strategy="two-phase",
            num_train_epochs=4,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            optim="sgd",
            learning_rate=0.1,
            head_learning_rate=0.5,
            **more,
        )

        def collate(examples):
            batch = {k: torch.tensor([e[k] for e in examples]) for k in examples[0]}
            return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}

        trainer = TransferTrainer(model, args, train_dataset=rows, data_collator=collate)
        trainer.train()
        runs.append(
            ([(h["loss"], h["grad_norm"]) for h in trainer.state.log_history if "loss" in h], copy_state(model))
        )
    (large, large_state), (accumulated, state) = runs
    assert len(large) == 4
    for (loss, norm), (our_loss, our_norm) in zip(large, accumulated, strict=True):
        assert our_loss == pytest.approx(loss, rel=1e-6)  # Trainer logs in single precision
        assert our_norm == pytest.approx(norm, rel=1e-6)
    assert max((state[k] - large_state[k]).abs().max().item() for k in state if state[k].is_floating_point()) < 1e-10


def test_plain_trainers_accumulated_loss_is_not_the_large_batchs(tmp_path):
    """Why `compute_loss` is overridden: BERT takes loss keywords and ignores them, so Trainer never divides."""
    losses = []
    for batch, accumulate in ((10, 1), (4, 3)):
        args = arguments(
            tmp_path, num_train_epochs=1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate
        )
        trainer = Trainer(tiny_bert(), args, train_dataset=texts(10))
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] > 2 * losses[0]


def test_a_subclass_with_its_own_loss_keeps_trainers_scaling(tmp_path):
    class Own(TransferTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            return (2 * outputs.loss, outputs) if return_outputs else 2 * outputs.loss

    model = tiny_bert(dropout=0.5)
    modes = []
    model.bert.register_forward_hook(lambda m, i, o: modes.append(m.training))
    trainer = Own(model, arguments(tmp_path, strategy="linear-probe", num_train_epochs=1), train_dataset=texts())
    trainer.train()
    assert modes == [False] * 5  # frozen parts are in eval all the same
    assert trainer.state.log_history[0]["loss"] == pytest.approx(2 * 0.693, abs=0.2)


def test_a_loss_function_of_the_callers_own_gets_the_count(tmp_path):
    """As Trainer documents it: the sum over the batch, divided by the number of items of the accumulated batch."""
    counts = []

    def loss(outputs, labels, num_items_in_batch=None):
        counts.append(num_items_in_batch)
        return torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    trainer = TransferTrainer(
        tiny_bert(),
        arguments(tmp_path, strategy="full", gradient_accumulation_steps=2, num_train_epochs=1),
        train_dataset=texts(),
        compute_loss_func=loss,
    )
    trainer.train()
    assert [int(c) for c in counts] == [8, 8, 8, 8, 4]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.69, abs=0.1)


def test_a_regressions_value_of_minus_100_is_a_value(tmp_path):
    rows = texts(8).remove_columns("labels").add_column("labels", [-100.0] * 4 + [-99.0] * 4)
    model = tiny_bert(labels=1)
    trainer = TransferTrainer(model, arguments(tmp_path, strategy="full", num_train_epochs=1), train_dataset=rows)
    trainer.train()
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    assert losses == pytest.approx([9900] * 2, rel=0.05) and all(torch.isfinite(p).all() for p in model.parameters())


# ---- resuming, precision, other ways in ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "more"),
    [*((stop, {}) for stop in (3, 5, 7, 12)), (7, {"adapter": "lora", "lora_plus_ratio": 4}), (5, {"adapter": "dora"})],
)
def test_a_resumed_run_equals_an_uninterrupted_one(stop, more, tmp_path):
    """Before, at and behind an unfreeze: the stage is recomputed from the step, the weights are bit-identical."""
    keys = dict(strategy="gradual", num_train_epochs=3, layer_lr_decay=0.5, save_strategy="steps", save_steps=stop)
    keys |= more
    whole = TransferTrainer(tiny_bert(dropout=0.1), arguments(tmp_path / "a", **keys), train_dataset=texts())
    whole.train()
    again = TransferTrainer(tiny_bert(dropout=0.1), arguments(tmp_path / "b", **keys), train_dataset=texts())
    again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
    assert not changed(copy_state(whole.model), copy_state(again.model))
    assert [h for h in again.state.log_history if "loss" in h] == [h for h in whole.state.log_history if "loss" in h]
    ours, theirs = ([(r.name, r.start, r.steps, r.loss) for r in t.stage_records] for t in (again, whole))
    assert ours == theirs and len(ours) == 3


@pytest.mark.parametrize(
    "other",
    [
        {"stage_lr_decay": 0.1},
        {"learning_rate": 1e-4},
        {"strategy": "two-phase"},
        {"layer_lr_decay": 0.9},
        {"weight_decay": 0.1},
    ],
)
def test_a_checkpoint_of_another_plan_is_refused(other, tmp_path):
    keys = dict(strategy="gradual", num_train_epochs=3, layer_lr_decay=0.5, save_strategy="steps", save_steps=7)
    TransferTrainer(tiny_bert(), arguments(tmp_path / "a", **keys), train_dataset=texts()).train()
    trainer = TransferTrainer(tiny_bert(), arguments(tmp_path / "b", **{**keys, **other}), train_dataset=texts())
    with pytest.raises(UserError, match="was made under another plan"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-7"))


def test_mixed_precision_goes_through_accelerate(tmp_path):
    dtypes = []
    model = tiny_bert()
    model.classifier.register_forward_hook(lambda m, i, o: dtypes.append(o.dtype))
    trainer = TransferTrainer(model, arguments(tmp_path, strategy="two-phase", bf16=True), train_dataset=texts())
    before = copy_state(model)
    trainer.train()
    assert set(dtypes) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert "bert.embeddings.word_embeddings.weight" in changed(before, copy_state(model))


def test_max_steps_ends_a_plan_early(tmp_path):
    trainer, _watch = run("bert", tmp_path, strategy="two-phase", max_steps=7)
    assert [(r.name, r.steps) for r in trainer.stage_records] == [("head", 5), ("all groups", 2)]


def test_a_stream_needs_a_plan_of_one_stage(tmp_path):
    stream = texts().to_iterable_dataset()
    args = arguments(tmp_path, strategy="gradual", max_steps=4)
    with pytest.raises(UserError, match="has no length"):
        TransferTrainer(tiny_bert(), args, train_dataset=stream).train()
    trainer = TransferTrainer(
        tiny_bert(), arguments(tmp_path, strategy="full", max_steps=4, layer_lr_decay=0.5), train_dataset=stream
    )
    trainer.train()
    assert trainer.stage_records[0].steps == 4


def test_the_arguments_survive_a_round_trip(tmp_path):
    args = arguments(tmp_path, strategy="gradual", layer_learning_rates={"head": 1e-3})
    plain = json.loads(args.to_json_string())
    assert plain["strategy"] == "gradual" and plain["layer_learning_rates"] == {"head": 1e-3}
    assert TrainingArguments(str(tmp_path)).learning_rate == TransferArguments(str(tmp_path)).learning_rate


def test_stages_set_the_length_of_the_run(tmp_path):
    args = arguments(tmp_path, stages=[{"epochs": 1, "train": "head"}, {"epochs": 1.5, "train": "all"}])
    assert args.num_train_epochs == 2.5


@pytest.mark.parametrize(
    ("keys", "extra", "said"),
    [
        ({"strategy": "partial", "unfrozen_groups": 30}, {}, "Cannot unfreeze 30 groups"),
        (
            {"strategy": "two-phase", "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
            {},
            "cannot follow a plan",
        ),
        ({"strategy": "full"}, {"optimizers": True}, "cannot be given"),
    ],
)
def test_what_cannot_be_carried_out_is_refused(keys, extra, said, tmp_path):
    model = tiny_bert()
    if extra:
        extra = {"optimizers": (torch.optim.SGD(model.parameters(), lr=0.1), None)}
    with pytest.raises(UserError, match=said):
        TransferTrainer(
            model, arguments(tmp_path, **keys), train_dataset=texts(), eval_dataset=texts(), **extra
        ).train()


def test_wrong_keys_are_all_reported_at_once(tmp_path):
    with pytest.raises(ValueError) as error:
        TransferArguments(str(tmp_path), strategy="gradul", layer_lr_decay=3.0)
    assert "2 problems" in str(error.value) and "'gradual'" in str(error.value) and "over 1" in str(error.value)
