"""`batchnorm`: what keeps the checkpoint's statistics, what `auto` decides, and that a run says and keeps it."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
import timm.layers
import torch
import torchvision
import yaml
from datasets import Dataset
from PIL import Image
from torch import nn
from transformers import PrinterCallback, ResNetConfig, ResNetForImageClassification, ViTImageProcessor
from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

from hf_transfer import TransferArguments, TransferTrainer, UserError, fine_tune
from hf_transfer.config.arguments.plan import PlanArguments, is_wanted
from hf_transfer.hub.card_sections import _hyperparameters
from hf_transfer.keys import keys
from hf_transfer.layers.frozen import frozen_modules, pretrained_statistics, running_statistics
from hf_transfer.layers.groups import layer_groups
from hf_transfer.settings import Config
from tests.helpers import (
    CHECKPOINTING,
    PIXELS,
    arguments,
    changed,
    copy_state,
    images,
    tiny_timm_resnet,
    tiny_timm_vit,
    tiny_vit,
    with_statistics,
)

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def tiny_resnet(labels=2):
    """transformers' ResNet."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    return with_statistics(ResNetForImageClassification(ResNetConfig(num_labels=labels, **sizes)))


MODELS = {"timm": lambda: with_statistics(tiny_timm_resnet()), "transformers": tiny_resnet}


def trained(folder, model=None, data=None, resumed=None, **keys):
    args = arguments(folder, **{"strategy": "full", "optim": "sgd", "learning_rate": 0.05, **keys})
    data = images(8) if data is None else data
    evaluated = data if "eval_strategy" in keys else None
    trainer = TransferTrainer(model or tiny_resnet(), args, train_dataset=data, eval_dataset=evaluated)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resumed)
    return trainer


def statistics(model):
    return {name: value for name, value in copy_state(model).items() if name.endswith(STATISTICS)}


def same(one, other):
    return not changed(copy_state(one), copy_state(other))


# ---- which layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "counts"),
    [
        (nn.BatchNorm1d(3), True),
        (nn.BatchNorm2d(3, affine=False), True),
        (nn.BatchNorm3d(3, momentum=None), True),
        (nn.SyncBatchNorm(3), True),
        (timm.layers.BatchNormAct2d(3), True),
        (timm.layers.SyncBatchNormAct(3), True),
        (timm.layers.EvoNorm2dB0(3), True),
        (nn.InstanceNorm2d(3, track_running_stats=True), True),
        (nn.BatchNorm2d(3, track_running_stats=False), False),
        (nn.InstanceNorm2d(3), False),
        (nn.GroupNorm(1, 3), False),
        (nn.LayerNorm(3), False),
        (timm.layers.FrozenBatchNormAct2d(3), False),
        (torchvision.ops.FrozenBatchNorm2d(3), False),
        (DetrFrozenBatchNorm2d(3), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_which_layers_update_statistics(layer, counts):
    model = nn.ModuleDict({"norm": layer})
    assert list(running_statistics(model)) == (["norm"] if counts else [])
    assert pretrained_statistics(model) == frozenset(), "those of a new layer are no checkpoint's"
    for buffer in layer.buffers():
        buffer.add_(1)
    assert pretrained_statistics(model) == frozenset(running_statistics(model))


def test_only_the_layer_itself_is_kept():
    """timm's BatchNorm holds a DropBlock, which stays in train mode."""
    norm = timm.layers.BatchNormAct2d(2, drop_layer=nn.Dropout)
    model = nn.Sequential(nn.Conv2d(2, 2, 1), norm, nn.Conv2d(2, 2, 1))
    groups = layer_groups(model, [("^0", 0), ("^1", 1), ("^2", "head")])
    assert frozen_modules(model, groups) == []
    assert frozen_modules(model, groups, ["1"]) == [norm] and isinstance(norm.drop, nn.Dropout)


# ---- frozen ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "plan"),
    [
        ("transformers", {"strategy": "full", "gradient_accumulation_steps": 2, "weight_decay": 0.1}),
        ("timm", {"strategy": "two-phase", "num_train_epochs": 3, "eval_strategy": "epoch"}),
        ("timm", {"strategy": "full", CHECKPOINTING: True}),
    ],
    ids=["accumulation", "stages", "checkpointing"],
)
def test_frozen_keeps_every_statistic(model, plan, tmp_path):
    """Bit for bit, while weights and biases of the same layers train; `train` moves all of them."""
    for value in ("frozen", "train"):
        net = MODELS[model]()
        before, names = copy_state(net), set(running_statistics(net))
        trained(tmp_path / value, net, batchnorm=value, **plan)
        moved = changed(before, copy_state(net))
        assert {n for n in moved if n.endswith(STATISTICS)} == (set() if value == "frozen" else set(statistics(net)))
        affine = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
        assert len(moved & affine) > len(affine) / 2


def test_frozen_normalizes_by_the_checkpoint(tmp_path):
    """The first loss is the model's in eval mode; and one example is enough for a batch."""
    model = tiny_resnet()
    batch = images(1).with_format("torch")[:]
    with torch.no_grad():
        expected = model.eval()(**batch).loss.item()
    trainer = trained(tmp_path, model, images(1), batchnorm="frozen", num_train_epochs=1)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-6)


def test_a_new_layer_has_nothing_to_keep(tmp_path):
    """A head that the checkpoint did not hold."""
    model = tiny_resnet()
    model.classifier = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 2))
    before = copy_state(model)
    trainer = trained(tmp_path, model, batchnorm="frozen")
    moved = {n for n in changed(before, copy_state(model)) if n.endswith(STATISTICS)}
    assert moved == {f"classifier.1.{kind}" for kind in STATISTICS}
    trainer.train()  # it has some now, and is trained as before
    assert "classifier.1.running_mean" in changed(before, copy_state(model))
    assert "classifier.1" not in trainer.unfreezing.kept_statistics


class Between(nn.Module):
    """A BatchNorm without weights between what is frozen and what trains, and a pooling after it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8, affine=False)
        self.pool, self.classifier = nn.AdaptiveAvgPool1d(4), nn.Linear(4, 2)

    def forward(self, x, labels=None):
        logits = self.classifier(self.pool(self.norm(self.body(x))))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


BETWEEN = {"strategy": "linear-probe", "layer_rules": [["^body", 0], ["^classifier", "head"]]}


@pytest.mark.parametrize(
    ("make", "keys"),
    [(tiny_resnet, {"strategy": "partial", "unfrozen_groups": 1}), (lambda: with_statistics(Between()), BETWEEN)],
    ids=["in what trains", "between"],
)
def test_the_boundary_cache_replays_what_is_in_eval_mode(make, keys, tmp_path):
    """With a BatchNorm that keeps its statistics nothing below what trains depends on the batch."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"x": x.tolist(), "labels": [0, 1] * 4}) if keys is BETWEEN else images(8)
    keys = {"batchnorm": "frozen", "boundary_cache_dir": str(tmp_path / "kept"), "remove_unused_columns": False, **keys}
    plain, found = (trained(tmp_path / c, make(), data, boundary_cache=c, **keys) for c in ("off", "memory"))
    assert found.boundary.entries[0].steps == found.state.global_step
    for name, value in copy_state(plain.model).items():
        torch.testing.assert_close(copy_state(found.model)[name], value, rtol=1e-5, atol=1e-6)
    if make is not tiny_resnet:
        assert {key[0] for key, _, _ in found.boundary.entries[0].cut.stored.values()} == {"pool"}
        live = trained(tmp_path / "live", make(), data, boundary_cache="memory", **{**keys, "batchnorm": "train"})
        assert live.boundary.entries[0].off and not live.boundary.entries[0].steps


# ---- auto ------------------------------------------------------------------------------------------------------------


def examples(count):
    return [{"pixel_values": torch.zeros(3, PIXELS, PIXELS), "labels": 0}] * count


@pytest.mark.parametrize(
    ("count", "size", "keys", "value", "why"),
    [
        (200, 32, {}, "frozen", "200 training examples"),
        (999, 32, {"strategy": "two-phase"}, "frozen", "999 training examples"),
        (1000, 15, {}, "frozen", "batches of 15"),
        (1000, 8, {"gradient_accumulation_steps": 4}, "frozen", "batches of 8"),
        (1000, 16, {}, "train", "1,000 training examples in batches of 16"),
        (200, 32, {"strategy": "linear-probe"}, "train", ""),  # no BatchNorm trains
        (200, 32, {"strategy": "lora", "lora_target_modules": ["convolution"]}, "train", ""),
        (200, 32, {"layer_learning_rates": {"normalization": 0}}, "train", ""),
        (200, 32, {"strategy": None}, "train", ""),  # no plan
    ],
)
def test_what_is_decided(count, size, keys, value, why, tmp_path):
    keys = {"strategy": "full", "per_device_train_batch_size": size, **keys}
    trainer = TransferTrainer(
        tiny_resnet(), arguments(tmp_path, batchnorm="auto", **keys), train_dataset=examples(count)
    )
    choice = trainer.choices["batchnorm"]
    assert (choice.value, choice.why) == (value, why)
    assert choice.line() == (f"batchnorm: {value}: {why}" if why else "")
    assert bool(trainer.plan is not None and trainer.unfreezing.kept_statistics) == (value == "frozen")


@pytest.mark.parametrize(
    ("make", "why"),
    [(tiny_timm_resnet, "random weights have no statistics to keep"), (tiny_vit, ""), (tiny_timm_vit, "")],
)
def test_without_statistics_there_is_nothing_to_decide(make, why, tmp_path):
    args = arguments(tmp_path, batchnorm="auto", strategy="full")
    choice = TransferTrainer(make(), args, train_dataset=images(8)).choices["batchnorm"]
    assert (choice.value, choice.why) == ("train", why)


def test_a_stream_is_decided_by_its_batches(tmp_path):
    for size, value in ((8, "frozen"), (16, "train")):
        args = arguments(tmp_path, batchnorm="auto", strategy="full", max_steps=2, per_device_train_batch_size=size)
        data = images(4).to_iterable_dataset()
        choice = TransferTrainer(tiny_resnet(), args, train_dataset=data).choices["batchnorm"]
        assert choice.value == value and f"batches of {size}" in choice.line()


def test_layers_that_share_their_batch_count_all_processes(tmp_path, monkeypatch):
    for convert, value in ((lambda m: m, "frozen"), (nn.SyncBatchNorm.convert_sync_batchnorm, "train")):
        args = arguments(tmp_path, batchnorm="auto", strategy="full", per_device_train_batch_size=8)
        trainer = TransferTrainer(convert(tiny_resnet()), args, train_dataset=examples(1000))
        monkeypatch.setattr(TransferArguments, "world_size", 2)
        assert trainer.choices["batchnorm"].value == value
        monkeypatch.undo()


# ---- the key ---------------------------------------------------------------------------------------------------------


def test_where_frozen_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"batchnorm: frozen keeps .* strategy: scratch, which trains from random"):
        TransferArguments(str(tmp_path), use_cpu=True, strategy="scratch", batchnorm="frozen")
    base = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", "batchnorm": "frozen"}
    for given in ({"strategy": "scratch"}, {"from_scratch": True}):
        with pytest.raises(UserError, match=r"batchnorm: frozen keeps the checkpoint's") as error:
            Config.from_sources(given, base)
        assert len(error.value.problems) == 1
    with pytest.raises(UserError, match=r"batchnorm: frozen keeps .* none to keep: .* Set batchnorm: train\."):
        TransferTrainer(tiny_timm_resnet(), arguments(tmp_path, batchnorm="frozen"), train_dataset=images(8))
    with pytest.raises(
        UserError, match=r"batchnorm: 'frozn' is not one of auto, frozen, train\. Did you mean 'frozen'"
    ):
        TransferArguments(str(tmp_path), use_cpu=True, batchnorm="frozn")


def test_frozen_without_batchnorm_is_a_note(tmp_path):
    trainer = TransferTrainer(tiny_vit(), arguments(tmp_path, batchnorm="frozen"), train_dataset=images(8))
    assert trainer.choices["batchnorm"].line() == "batchnorm: frozen: no effect, because the model has no BatchNorm"


def test_who_decides_what_by_default():
    assert PlanArguments().batchnorm == "train" and keys()["batchnorm"].default == "auto"
    wanted = {value: is_wanted(PlanArguments(batchnorm=value)) for value in ("auto", "train", "frozen")}
    assert wanted == {"auto": False, "train": False, "frozen": True}
    assert is_wanted(PlanArguments(batchnorm="auto", strategy="full"))
    shown = {value: dict(_hyperparameters({"batchnorm": value})) for value in ("frozen", "train")}
    assert shown == {"frozen": {"batchnorm": "frozen"}, "train": {}}


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decided", ["frozen", "train"])
def test_a_resumed_run_goes_on_as_it_began(decided, tmp_path, monkeypatch):
    """Bit for bit, though this version would decide otherwise."""
    few = {"frozen": 1000, "train": 0}
    monkeypatch.setattr("hf_transfer.training.batchnorm.SMALL_BATCH", 0)
    monkeypatch.setattr("hf_transfer.training.batchnorm.FEW_EXAMPLES", few[decided])
    steps = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-3}
    whole = trained(tmp_path, batchnorm="auto", **steps)
    checkpoint, other = tmp_path / "checkpoint-2", "train" if decided == "frozen" else "frozen"
    state = json.loads((checkpoint / "transfer_state.json").read_text())
    assert whole.choices["batchnorm"].value == state["facts"]["keys"]["batchnorm"] == decided
    monkeypatch.setattr("hf_transfer.training.batchnorm.FEW_EXAMPLES", few[other])
    for value in ("auto", decided):
        again = trained(tmp_path, resumed=str(checkpoint), batchnorm=value, **steps)
        assert again.resumed_at == 2 and same(again.model, whole.model)
    with pytest.raises(UserError, match=f"batchnorm: '{decided}' then, '{other}' now"):
        trained(tmp_path, resumed=str(checkpoint), batchnorm=other, **steps)


def test_a_checkpoint_without_the_key_was_trained_with_live_statistics(tmp_path):
    trainer = TransferTrainer(
        tiny_resnet(), arguments(tmp_path, batchnorm="auto", strategy="full"), train_dataset=images(8)
    )
    assert trainer.choices["batchnorm"].value == "frozen"
    (tmp_path / "transfer_state.json").write_text(json.dumps({"facts": {"keys": {"strategy": "full"}}}))
    trainer.choices.recall(tmp_path)
    assert trainer.choices["batchnorm"].line() == "batchnorm: train: as when the run began"


def test_a_run_says_and_writes_what_it_decided(tmp_path, capsys, monkeypatch):
    tiny_resnet().save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": PIXELS, "width": PIXELS}).save_pretrained(tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 255, (24, PIXELS, PIXELS, 3)).astype(np.uint8)
    rows = {"image": [Image.fromarray(one) for one in pixels], "label": ["a", "b"] * 12}
    keys = {"strategy": "full", "num_train_epochs": 2, "preflight": False, "data_facts": False, "use_cpu": True}
    keys |= {"output_dir": str(tmp_path / "out"), "report_to": "none"}
    data = Dataset.from_dict(rows, datasets.Features(image=datasets.Image(), label=datasets.Value("string")))
    before = statistics(tiny_resnet())
    result = fine_tune(str(tmp_path / "model"), data, **keys)
    count = result.results["num_train_examples"]
    assert f"batchnorm: frozen: {count} training examples" in capsys.readouterr().out.splitlines()
    assert result.results["batchnorm"] == {"value": "frozen", "why": f"{count} training examples"}
    assert yaml.safe_load((tmp_path / "out/run.yaml").read_text())["batchnorm"] == "frozen"
    assert "| `batchnorm` | frozen |" in (tmp_path / "out/README.md").read_text()
    assert not changed(before, statistics(result.model))
    # The run is interrupted, and goes on with another version that would decide otherwise.
    (tmp_path / "out/results.json").unlink()
    for name in ("SMALL_BATCH", "FEW_EXAMPLES"):
        monkeypatch.setattr(f"hf_transfer.training.batchnorm.{name}", 0)
    again = fine_tune(str(tmp_path / "model"), data, resume_from_checkpoint="auto", **keys)
    assert "batchnorm: frozen: as when the run began" in capsys.readouterr().out.splitlines()
    assert again.trainer.resumed_at and not changed(before, statistics(again.model))
    assert yaml.safe_load((tmp_path / "out/run.yaml").read_text())["batchnorm"] == "frozen"
