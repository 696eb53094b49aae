"""Unfreezing in one process: what runs, what moves, at which rate, and when a plateau has come."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import Trainer, TrainerCallback

from hf_transfer import TransferArguments, TransferMixin, TransferTrainer, UserError
from tests.distributed.cases import CHECKPOINTING
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

# ---- activation checkpointing --------------------------------------------------------------------------------------


class Counts(TrainerCallback):
    """Forward and backward passes of each block in each optimizer step."""

    def __init__(self, blocks):
        self.steps, self.forward, self.backward = [], [0] * len(blocks), [0] * len(blocks)
        for i, block in enumerate(blocks):
            inside = next(
                m for m in block.modules() if isinstance(m, torch.nn.Linear)
            )  # a recomputation passes by hooks
            inside.register_forward_pre_hook(lambda *_, i=i: self._count(self.forward, i))  # of the block itself
            for parameter in block.parameters():  # one of them is enough: the hook of a frozen one never runs
                parameter.register_hook(lambda _, i=i: self._count(self.backward, i))
                break

    def _count(self, where, i):
        where[i] += 1

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append((list(self.forward), list(self.backward)))
        self.forward[:], self.backward[:] = [0] * len(self.forward), [0] * len(self.backward)


@pytest.mark.parametrize(
    ("make", "data", "blocks"),
    [
        (tiny_bert, texts, lambda m: m.bert.encoder.layer),
        (tiny_vit, images, lambda m: m.vit.layers if hasattr(m.vit, "layers") else m.vit.encoder.layer),
    ],
    ids=["text", "image"],
)
def test_checkpointed_frozen_layers_run_once_and_never_backward(make, data, blocks, tmp_path):
    """Through unfreezing: a frozen layer once forward; a trained one twice (it is recomputed) and backward.

    transformers lets the output of the embeddings require a gradient for checkpointing: without our
    `disable_input_require_grads` the frozen text layers run twice.
    """
    model = make(layers=3)
    counts = Counts(blocks(model))
    args = arguments(tmp_path, strategy="gradual", num_train_epochs=5, **{CHECKPOINTING: True})
    TransferTrainer(model, args, train_dataset=data(8), callbacks=[counts]).train()
    stages = [counts.steps[i] for i in range(0, 10, 2)]
    assert [forward for forward, _ in stages] == [[1, 1, 1], [1, 1, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
    assert [backward for _, backward in stages] == [[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]]
    assert counts.steps[::2] == counts.steps[1::2]


@pytest.mark.parametrize("make", [tiny_bert, tiny_timm_vit])
def test_checkpointing_changes_no_weight(make, tmp_path):
    data, states = texts if make is tiny_bert else images, []
    for checkpointing in (False, True):
        model = make()
        args = arguments(tmp_path, strategy="gradual", num_train_epochs=3, **{CHECKPOINTING: checkpointing})
        TransferTrainer(model, args, train_dataset=data(8)).train()
        states.append(copy_state(model))
    assert not changed(*states) and changed(states[0], copy_state(make()))


def test_the_reentrant_form_of_checkpointing_is_refused(tmp_path):
    args = arguments(
        tmp_path, strategy="full", **{CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}
    )
    with pytest.raises(UserError, match="use_reentrant"):
        TransferTrainer(tiny_bert(), args, train_dataset=texts())


@pytest.mark.parametrize("architecture", ["resnet10t", "tf_efficientnet_lite0"])
def test_a_head_alone_leaves_every_statistic_of_timm_models(architecture, tmp_path):
    """Under plain Trainer the running statistics drift, since it calls `model.train()` at each micro-step."""
    states = []
    for trainer_class, keys in ((TransferTrainer, {"strategy": "linear-probe"}), (Trainer, {})):
        model = tiny_timm_resnet() if architecture == "resnet10t" else _timm(architecture)
        if trainer_class is Trainer:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("classifier" in name or ".fc." in name)
        before = copy_state(model)
        trainer_class(model, arguments(tmp_path, **keys), train_dataset=images(8)).train()
        states.append({n for n in changed(before, copy_state(model)) if n in dict(model.named_buffers())})
    assert states[0] == set()
    assert any("running_mean" in n for n in states[1])


def _timm(architecture):
    import transformers

    torch.manual_seed(0)
    config = transformers.TimmWrapperConfig(architecture=architecture, num_labels=2)
    return transformers.TimmWrapperForImageClassification(config)


# ---- one clock -----------------------------------------------------------------------------------------------------


def test_skipped_steps_keep_one_clock(tmp_path, monkeypatch):
    """Steps 0, 3 and 4 are skipped, as a loss scaler does at an overflow: the rates of the others are those of their
    number. Trainer's scheduler counts taken steps only, so that what thaws would train at rate 0 for three steps."""
    args = arguments(tmp_path, strategy="gradual", num_train_epochs=3, learning_rate=1e-2, unfreeze_warmup_steps=2)
    rates = []
    for skipped in (set(), {0, 3, 4}):
        model = tiny_bert(layers=1)
        trainer = TransferTrainer(model, args, train_dataset=texts(16))
        ordinary = AcceleratedOptimizer.step

        def step(self, closure=None, *, ordinary=ordinary, skipped=skipped, trainer=trainer):
            self._is_overflow = trainer.state.global_step in skipped
            if not self._is_overflow:
                ordinary(self, closure)
                self._is_overflow = False

        monkeypatch.setattr(AcceleratedOptimizer, "step", step)
        monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda self: self._is_overflow))
        trainer.train()
        monkeypatch.undo()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        rates.append([{k: v for k, v in log.items() if k.startswith("learning_rate")} for log in logs])
    assert len(rates[0]) == 12 and rates[0] == rates[1]


# ---- plateaus ------------------------------------------------------------------------------------------------------


class Script:
    """A metric that is read from a list."""

    def __init__(self, values):
        self.values = list(values)

    def __call__(self, prediction):
        return {"quality": self.values.pop(0)}


class Snapshots(TrainerCallback):
    def __init__(self, model):
        self.model, self.at = model, {}

    def on_step_begin(self, args, state, control, **kwargs):
        self.at[state.global_step] = copy_state(self.model)


def plateau_run(tmp_path, values, epochs=8, layers=2, resume=None, **keys):
    model = tiny_bert(layers=layers)
    snapshots = Snapshots(model)
    args = arguments(
        tmp_path,
        **{
            "strategy": "gradual",
            "unfreeze_trigger": "plateau",
            "num_train_epochs": epochs,
            "eval_strategy": "epoch",
            "metric_for_best_model": "quality",
            "unfreeze_patience": 2,
            **keys,
        },
    )
    trainer = TransferTrainer(
        model, args, train_dataset=texts(8), eval_dataset=texts(8), compute_metrics=Script(values)
    )
    trainer.add_callback(snapshots)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, snapshots.at


VALUES = (0.3, 0.5, 0.5, 0.4, 0.6, 0.1, 0.2, 0.9)


def test_a_plateau_thaws_and_goes_back_to_the_best_weights(tmp_path):
    """Two steps an epoch: the head's best is after epoch 2, its plateau after 4; the next stage's 5 and 7."""
    trainer, states = plateau_run(tmp_path, VALUES)
    assert [stage.start for stage in trainer.plan.stages] == [0, 8, 14, None]
    assert [(r.name, r.steps, r.best_step) for r in trainer.stage_records] == [
        ("head", 8, 4),
        ("top 1 group", 6, 10),
        ("top 2 groups", 2, None),
    ]
    assert not changed(states[8], states[4]) and not changed(states[14], states[10])
    assert changed(states[8], states[7]) and changed(states[9], states[8]) > {"bert.encoder.layer.1.output.dense.bias"}
    stages = [log["stage"] for log in trainer.state.log_history if "eval_quality" in log]
    assert stages == [0, 0, 0, 0, 1, 1, 1, 2]


def test_a_plateau_without_restoring(tmp_path):
    _, states = plateau_run(tmp_path, VALUES, unfreeze_restore_best=False)
    assert {n.split(".")[0] for n in changed(states[8], states[7])} == {"classifier"}


def test_no_gain_is_counted_from_the_loss_by_default(tmp_path):
    trainer, _ = plateau_run(tmp_path, range(9), metric_for_best_model=None, learning_rate=1e-30, epochs=4)
    assert [stage.start for stage in trainer.plan.stages] == [0, 6, None, None]


def test_a_value_that_is_no_number_is_no_gain(tmp_path):
    trainer, _ = plateau_run(tmp_path, [0.3, float("nan"), float("nan"), 0.5, 0.6], epochs=5)
    assert [stage.start for stage in trainer.plan.stages] == [0, 6, None, None]


def test_a_stage_is_capped_by_the_epochs_left(tmp_path):
    trainer, _ = plateau_run(tmp_path, range(4), epochs=4)
    assert [record.steps for record in trainer.stage_records] == [8]


def test_the_rates_of_what_a_plateau_thaws_are_on_time(tmp_path):
    """At t_thaw the warm-up begins at 0, and the first step of the new stage has its own factor."""
    trainer, _ = plateau_run(
        tmp_path, VALUES, unfreeze_warmup_steps=2, stage_lr_decay=0.5, lr_scheduler_type="constant"
    )
    rates = {log["step"] - 1: log for log in trainer.state.log_history if "loss" in log}
    assert [rates[t]["learning_rate/layer.1"] for t in (7, 8, 9, 10)] == pytest.approx([0, 0, 2.5e-3, 5e-3])
    assert [rates[t]["learning_rate/head"] for t in (7, 8, 13, 14)] == pytest.approx([1e-2, 5e-3, 5e-3, 2.5e-3])


def test_a_plateau_needs_evaluations_and_a_metric_that_exists(tmp_path):
    with pytest.raises(UserError, match="eval_strategy"):
        plateau_run(tmp_path, VALUES, eval_strategy="no")
    with pytest.raises(UserError, match=r"no 'qualty'.*'quality'"):
        plateau_run(tmp_path, VALUES, metric_for_best_model="qualty")


def test_keys_that_a_trigger_does_not_read(tmp_path):
    with pytest.raises(UserError, match="unfreeze_interval"):
        arguments(tmp_path, strategy="gradual", unfreeze_trigger="plateau", unfreeze_interval=2.0)
    with pytest.raises(UserError, match="unfreeze_patience"):
        arguments(tmp_path, strategy="gradual", unfreeze_patience=3)
    with pytest.raises(UserError, match=r"plateua.*plateau"):
        arguments(tmp_path, strategy="gradual", unfreeze_trigger="plateua")


def test_a_plan_of_plateaus_prints_and_is_data(tmp_path):
    trainer = TransferTrainer(
        tiny_bert(),
        arguments(tmp_path, strategy="gradual", unfreeze_trigger="plateau", eval_strategy="epoch"),
        train_dataset=texts(),
        eval_dataset=texts(),
    )
    assert "until 1 evaluation without improvement" in str(trainer.plan) and "remaining" in str(trainer.plan)
    assert [stage["epochs"] for stage in json.loads(json.dumps(trainer.plan.to_list()))] == [None] * 4


# ---- a Trainer of one's own ----------------------------------------------------------------------------------------


class MyTrainer(Trainer):
    """Label smoothing by hand, and a count of calls."""

    calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.calls += 1
        labels = inputs["labels"]
        outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=0.1)
        return (loss, outputs) if return_outputs else loss


class MyTransferTrainer(TransferMixin, MyTrainer):
    pass


def test_the_mixin_gives_a_plan_to_a_trainer_with_its_own_loss(tmp_path):
    """The loss is the subclass's own, once a micro-batch; the stages are ours."""
    model = tiny_bert()
    start, snapshots = copy_state(model), Snapshots(model)
    args = arguments(tmp_path, strategy="gradual", num_train_epochs=4, gradient_accumulation_steps=2)
    trainer = MyTransferTrainer(model, args, train_dataset=texts(16), callbacks=[snapshots])
    trainer.train()
    assert trainer.calls == 16 and isinstance(trainer, MyTrainer)
    assert {n.split(".")[0] for n in changed(start, snapshots.at[2])} == {"classifier"}
    assert "bert.embeddings.word_embeddings.weight" in changed(start, copy_state(model))
    plain = tiny_bert()
    MyTrainer(plain, TransferArguments(**_plain(args)), train_dataset=texts(16)).train()
    same = tiny_bert()
    MyTransferTrainer(same, TransferArguments(**_plain(args)), train_dataset=texts(16)).train()
    assert not changed(copy_state(plain), copy_state(same))  # without a plan it is MyTrainer


def _plain(args):
    return {
        "output_dir": args.output_dir, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "max_steps": 3,
        "report_to": "none", "dataloader_pin_memory": False,
    }  # fmt: skip


# ---- compiled ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_at_most_one_recompile_per_stage(tmp_path):
    """Graphs that dynamo makes: a change of what trains costs one, each step after it none."""
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    begin = graphs["unique_graphs"]
    counts = {}

    class PerStage(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            counts.setdefault(trainer.unfreezing.stage, []).append(graphs["unique_graphs"] - begin)

    args = arguments(
        tmp_path, strategy="gradual", num_train_epochs=4, torch_compile=True, torch_compile_backend="eager"
    )
    model = tiny_bert(problem_type="single_label_classification")  # found out in the first step, which compiles again
    start = copy_state(model)
    trainer = TransferTrainer(model, args, train_dataset=texts(8), callbacks=[PerStage()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    assert [counts[stage] for stage in range(4)] == [[1, 1], [2, 2], [3, 3], [4, 4]]
    assert "bert.embeddings.word_embeddings.weight" in changed(start, copy_state(model))
    torch._dynamo.reset()


# ---- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["deepspeed", "fsdp"])
def test_a_backend_that_cannot_change_what_trains_is_refused(backend, tmp_path, monkeypatch):
    ordinary = Trainer.create_accelerator_and_postprocess

    def pretend(self):
        ordinary(self)
        setattr(self, f"is_{backend}_enabled", True)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", pretend)
    with pytest.raises(UserError, match=r"changes what trains.*FSDP 2"):
        TransferTrainer(tiny_bert(), arguments(tmp_path, strategy="gradual"), train_dataset=texts())


def test_what_is_frozen_again_has_no_optimizer_state(tmp_path):
    model = tiny_bert(layers=1)
    stages = [{"train": "all", "epochs": 1}, {"train": "head", "epochs": 1}]
    trainer = TransferTrainer(model, arguments(tmp_path, stages=stages), train_dataset=texts(16))
    trainer.train()
    names = {id(p): n for n, p in model.named_parameters()}
    with_state = {names[id(p)] for p in trainer.optimizer.state}
    assert with_state == {"classifier.weight", "classifier.bias"}
