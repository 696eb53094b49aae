"""Training with the frozen part replayed: the same numbers, or off with the reason."""

from __future__ import annotations

import errno
import json
import mmap
import os
import signal
import types
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from hf_transfer import TransferTrainer, UserError, fine_tune
from hf_transfer.errors import UserErrors
from hf_transfer.features import replay, store_files
from hf_transfer.features import store as store_module
from hf_transfer.features.batches import count_of
from hf_transfer.features.store import Store
from hf_transfer.runs.collating import live_changes
from hf_transfer.runs.prepare import prepare
from hf_transfer.runs.preview import plan_only
from hf_transfer.settings import Config
from hf_transfer.training import recording
from hf_transfer.training.cache_decision import Decision
from hf_transfer.training.cache_stage import Off, OffReason
from tests.helpers import (
    arguments,
    changed,
    copy_state,
    images,
    pad,
    ragged_texts,
    tiny_bert,
    tiny_timm_resnet,
    tiny_timm_vit,
    tiny_vit,
    with_mlp,
)
from tests.warm import Fork

PLANS = {
    "linear-probe": dict(strategy="linear-probe", num_train_epochs=2),
    "partial": dict(strategy="partial", unfrozen_groups=1, num_train_epochs=2),
    "two-phase": dict(strategy="two-phase", num_train_epochs=2),
    "gradual": dict(strategy="gradual", num_train_epochs=4),
    "accumulation": dict(strategy="gradual", num_train_epochs=4, gradient_accumulation_steps=2),
    "class weights": dict(strategy="partial", unfrozen_groups=1, class_weights={"LABEL_0": 0.25, "LABEL_1": 4.0}),
    "one length": dict(strategy="gradual", num_train_epochs=4, length_bucketing=True),
}
MODELS = {
    "text": (lambda: tiny_bert(dropout=0.2), ragged_texts, pad),
    "image": (lambda: tiny_vit(dropout=0.2), images, None),
    "timm": (lambda: tiny_timm_vit(drop_rate=0.2), images, None),
    "BatchNorm": (tiny_timm_resnet, images, None),
    "MLP": (lambda: with_mlp(tiny_bert(dropout=0.2), norm="batch"), ragged_texts, pad),
}


def train(folder, cache="memory", kind="text", model=None, data=None, collator=None, callbacks=(), setup=None, **keys):
    """A finished run by SGD; its losses in `losses`."""
    made, dataset, collate = MODELS[kind]
    torch.manual_seed(0)
    model, data = (model or made)(), (data or dataset)()
    keys = {"optim": "sgd", "learning_rate": 0.05, "strategy": "linear-probe", **keys}
    folder.mkdir(exist_ok=True)
    args = arguments(folder / "out", boundary_cache=cache, **{"boundary_cache_dir": str(folder / "kept"), **keys})
    trainer = TransferTrainer(
        model, args, train_dataset=data, eval_dataset=data if "eval_strategy" in keys else None,
        data_collator=collator or collate, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    if setup is not None:
        setup(trainer)
    trainer.train(resume_from_checkpoint=keys.get("resume_from_checkpoint"))
    trainer.losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return trainer


def check(with_it, without, loss=1e-6, weights=1e-6):
    assert with_it.losses == pytest.approx(without.losses, rel=loss) and len(set(without.losses)) > 1
    ours, theirs = copy_state(with_it.model), copy_state(without.model)
    for name, value in theirs.items():
        if value.is_floating_point():
            assert (ours[name] - value).norm() <= weights * max(float(value.norm()), 1.0), name


def is_equal(one, other):
    return one.losses == other.losses and not changed(copy_state(one.model), copy_state(other.model))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Runs without, once each."""
    found = {}

    def run(kind, plan):
        if (kind, plan) not in found:
            found[kind, plan] = train(tmp_path_factory.mktemp("plain"), "off", kind, **PLANS[plan])
        return found[kind, plan]

    return run


CASES = [("text", plan) for plan in PLANS] + [("image", plan) for plan in ("linear-probe", "gradual")]
CASES += [("timm", "partial"), ("BatchNorm", "partial"), ("MLP", "linear-probe"), ("MLP", "two-phase")]


@pytest.mark.parametrize(("kind", "plan"), CASES)
def test_training_is_the_same(kind, plan, plain, tmp_path):
    """Dropout above the boundary is live, and draws the same; below it is off in both."""
    found = train(tmp_path, "memory", kind, **PLANS[plan])
    check(found, plain(kind, plan))
    *upper, last = found.boundary.entries
    assert all(not e.why and e.steps and e.kept == "memory" for e in upper)
    if found.args.gradient_accumulation_steps == 1:
        assert [e.steps for e in upper] == [r.steps for r in found.stage_records[:-1]], "every batch was replayed"
    assert all(e.error < 1e-5 for e in found.boundary.entries if not e.why)
    if "gradual" in (plan, PLANS[plan]["strategy"]) or plan == "two-phase":
        assert "the input layer, trains" in last.why and not last.steps
    else:
        assert last.steps and not last.why


@pytest.mark.parametrize(("kind", "plan"), [("text", "gradual"), ("image", "linear-probe")])
def test_on_disk(kind, plan, plain, recorded, tmp_path):
    """The same; a second run reads what the first recorded, and does not call the model for it."""
    found = train(tmp_path, "disk", kind, **PLANS[plan])
    check(found, plain(kind, plan))
    assert all(e.kept == "disk" for e in found.boundary.entries if not e.why)
    places = sorted(p.name for p in (tmp_path / "kept").iterdir())
    assert len(places) == sum(not e.why for e in found.boundary.entries)
    recorded.clear()
    again = train(tmp_path, "disk", kind, **PLANS[plan])
    assert is_equal(found, again)
    assert not recorded
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == places


@pytest.fixture
def recorded(monkeypatch):
    """Examples in each batch that is recorded for training; not of those that are tried when it is decided."""
    found, own = [], replay.record

    def record(model, cuts, batch):
        found.append(count_of(batch))
        return own(model, cuts, batch)

    monkeypatch.setattr(recording, "replay", types.SimpleNamespace(**{**vars(replay), "record": record}))
    return found


def test_one_pass_records_all_stages(recorded, tmp_path):
    """Gradual thawing of three groups: 20 examples in 3 batches, once, for three boundaries."""
    found = train(tmp_path, **PLANS["gradual"])
    assert recorded == [8, 8, 4]
    upper = found.boundary.entries[:-1]
    assert [e.cut.where for e in upper] == ["bert", "bert.encoder.layer.0", "bert.embeddings"]


def test_a_deeper_boundary_below_what_moved_is_recorded_later(recorded, tmp_path):
    """What the second stage trains lies below what the third begins with: each has a pass of its own."""
    stages = [
        {"epochs": 1, "train": ["head"]},
        {"epochs": 1, "train": ["layer.1"]},
        {"epochs": 1, "train": ["head"]},
    ]
    runs = [train(tmp_path / cache, cache, strategy=None, stages=stages) for cache in ("off", "memory")]
    check(*reversed(runs))
    assert all(e.steps == 5 and not e.why for e in runs[1].boundary.entries)
    assert len(recorded) == 3 + 3, "two passes of three batches"


def test_padding_on_the_left_moves_positions(tmp_path, capsys):
    """BERT counts positions from the padding on: what is recorded of a text would depend on its batch."""

    def left(examples):
        padded = pad(examples)
        texts = [e["input_ids"] for e in examples]
        ids = torch.tensor([[0] * (padded["input_ids"].shape[1] - len(text)) + text for text in texts])
        return padded | {"input_ids": ids, "attention_mask": (ids > 0).long()}

    found = train(tmp_path / "left", collator=left, **PLANS["partial"])
    (entry,) = found.boundary.entries
    assert "differ" in entry.why and entry.why in capsys.readouterr().err
    check(found, train(tmp_path / "off", "off", collator=left, **PLANS["partial"]), loss=0, weights=0)


def test_adapters(tmp_path):
    """LoRA in the upper layer is replayed from below it; in all, from the embeddings."""

    def adapted(layers):
        config = LoraConfig(
            task_type="SEQ_CLS", r=2, target_modules=["query", "value"], layers_to_transform=layers, lora_dropout=0.2,
            layers_pattern="layer" if layers else None,
        )  # fmt: skip
        return lambda: get_peft_model(tiny_bert(layers=3), config)

    for layers, where in (([2], ".encoder.layer.1"), (None, ".embeddings")):
        runs = [
            train(tmp_path / f"{where}{cache}", cache, model=adapted(layers), strategy="full", num_train_epochs=2)
            for cache in ("off", "memory")
        ]
        check(*reversed(runs))
        (entry,) = runs[1].boundary.entries
        assert entry.why == "" and entry.cut.where.endswith(where) and entry.steps == 10


@pytest.mark.parametrize(("dtype", "most"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_half_the_room(dtype, most, plain, tmp_path):
    found = train(tmp_path, boundary_cache_dtype=dtype, **PLANS["gradual"])
    whole = train(tmp_path / "whole", **PLANS["gradual"])
    check(found, plain("text", "gradual"), loss=1e-2, weights=1e-2)
    content = 20 * (8 + 8)  # what a text is told by, and labels
    for entry, exact in zip(found.boundary.entries[:-1], whole.boundary.entries[:-1], strict=True):
        assert 0 < entry.error < most and exact.error < 1e-6
        assert 2 * (entry.nbytes - content) == exact.nbytes - content
    assert any(f"in {dtype} the logits differ by up to" in line for line in found.boundary.lines())
    assert all(0 < e.to_dict()["largest_difference"] < most for e in found.boundary.entries[:-1])


# ---- what changes from epoch to epoch ------------------------------------------------------------------------------


class Changing(torch.utils.data.Dataset):
    """Texts of which one is another from some epoch on."""

    def __init__(self, data, after):
        self.data, self.after, self.reads = data, after, 0

    def __len__(self):
        return len(self.data)

    def __getitem__(self, number):
        item = dict(self.data[number])
        if number == 3:
            self.reads += 1
            if self.reads > self.after:
                item["input_ids"] = [token % 39 + 1 for token in item["input_ids"]]
        return item


def test_a_live_change_is_noticed(tmp_path, capsys):
    found = train(tmp_path, data=lambda: Seeded(images()), kind="image", num_train_epochs=2)
    assert found.boundary.entries[0].off == Off(OffReason.RANDOM_EXAMPLES)
    assert "live augmentation" in capsys.readouterr().err
    assert is_equal(found, train(tmp_path / "off", "off", data=lambda: Seeded(images()), kind="image"))


class Seeded(torch.utils.data.Dataset):
    """Pictures with noise that depends on how often torch's generator was asked, as that of a transform."""

    def __init__(self, data):
        self.data = data.with_format("torch")

    def __len__(self):
        return len(self.data)

    def __getitem__(self, number):
        item = self.data[number]
        return {**item, "pixel_values": item["pixel_values"] + torch.randn(3, 1, 1)}


def test_an_example_that_changes_during_a_run_is_noticed(tmp_path, capsys):
    """Its tokens are compared at each step: from there on every batch is computed."""

    def data(after):
        return lambda: Changing(ragged_texts(), after)

    keys = dict(PLANS["partial"], num_train_epochs=4)
    found = train(tmp_path, data=data(5), **keys)
    (entry,) = found.boundary.entries
    assert entry.off == Off(OffReason.EXAMPLE_CHANGED) and 0 < entry.steps < 20
    assert entry.why in capsys.readouterr().err
    epochs = 5 - (found.train_dataset.reads - 4)  # before training it was read, too
    assert 0 < epochs < 4 and entry.steps // 5 == epochs
    check(found, train(tmp_path / "off", "off", data=data(epochs), **keys))


@pytest.mark.parametrize("how", ["stream", "torch_compile", "no plan"])
def test_what_cannot_be_replayed(how, tmp_path, capsys):
    keys = {
        "stream": dict(data=lambda: ragged_texts().to_iterable_dataset(), max_steps=5),
        "torch_compile": dict(setup=lambda trainer: setattr(trainer.args, "torch_compile", True)),
        "no plan": dict(strategy=None),
    }[how]
    found = train(tmp_path, **keys)
    said = {"stream": "stream, whose examples cannot be recognized", "torch_compile": "torch_compile has compiled"}
    assert all(said[how] in entry.why for entry in found.boundary.entries) and found.losses
    assert (how == "no plan") == (not found.boundary.entries)
    assert how == "no plan" or said[how] in capsys.readouterr().err
    assert is_equal(found, train(tmp_path / "off", "off", **keys))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"boundary_cache": "ram"}, "boundary_cache: 'ram' is not one of auto, off, memory, disk"),
        ({"boundary_cache_dtype": "int8"}, "boundary_cache_dtype: 'int8' is not one of auto, float16, bfloat16"),
        ({"boundary_cache_budget": 0.0}, "boundary_cache_budget: expected a positive number, got 0"),
    ],
)
def test_keys(keys, said, tmp_path):
    with pytest.raises(UserErrors, match=said):
        arguments(tmp_path, **keys)


# ---- what would be wrong -------------------------------------------------------------------------------------------


class Detached(type(tiny_bert())):
    """Its head is scaled by what no gradient flows to."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        found = self.bert(input_ids, attention_mask=attention_mask)
        logits = self.classifier(found[1]) * (1 + found[0].detach().abs().mean((1, 2)))[:, None]
        return (
            {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
            if labels is not None
            else {"logits": logits}
        )


class Branching(type(tiny_bert())):
    """Which way it goes depends on a value that no gradient flows to."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        found = self.bert(input_ids, attention_mask=attention_mask)
        logits = self.classifier(found[1])
        logits = logits * 2 if float(found[0].detach().abs().sum()) > 0 else logits
        return (
            {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
            if labels is not None
            else {"logits": logits}
        )


@pytest.mark.parametrize("cls", [Detached, Branching])
def test_what_no_gradient_tells_is_caught_by_computing_both_ways(cls, tmp_path, capsys):
    def model():
        torch.manual_seed(0)
        return cls(tiny_bert(dropout=0.2).config)

    found = train(tmp_path, model=model, num_train_epochs=2)
    assert "with the cache the logits differ by" in found.boundary.entries[0].why
    assert is_equal(found, train(tmp_path / "off", "off", model=model, num_train_epochs=2))
    assert (
        "is off in stage 'head': the frozen part cannot be replayed exactly: with the cache the logits differ"
        in capsys.readouterr().err
    )


def test_a_wrong_replay_is_caught_at_the_first_batch(tmp_path, monkeypatch, capsys):
    """As if what is stored had been damaged: the batch is computed as it is, and so are all after it."""
    own = Store.get

    def noise(kept, rows, slot):
        found = own(kept, rows, slot)
        if slot.startswith("batch/"):
            return found
        return [torch.randn_like(x) for x in found] if isinstance(found, list) else torch.randn_like(found)

    def deterministic(kept, rows, slot):
        with torch.random.fork_rng([]):
            return noise(kept, rows, slot)

    monkeypatch.setattr(Store, "get", deterministic)
    found = train(tmp_path, **PLANS["gradual"])
    monkeypatch.undo()
    for entry in found.boundary.entries[:-1]:
        assert "with the cache the logits differ by" in entry.why and entry.steps == 0 and entry.store is None
    assert capsys.readouterr().err.count("with the cache the logits differ") == 3
    assert is_equal(found, train(tmp_path / "off", "off", **PLANS["gradual"]))


# ---- on disk -------------------------------------------------------------------------------------------------------


def test_whatever_changes_is_recorded_anew(recorded, tmp_path):
    """Weights, an example, its tokens, the boundary and what it is kept in are part of its name."""

    def count(**keys):
        recorded.clear()
        (entry,) = train(tmp_path, "disk", **{"num_train_epochs": 1, **keys}).boundary.entries
        assert not entry.why
        return len(recorded)

    def other_weights():
        model = tiny_bert(dropout=0.2)
        with torch.no_grad():
            model.bert.encoder.layer[0].output.dense.weight[0, 0] += 1e-6
        return model

    def other_example():
        data = ragged_texts()
        ids = data["input_ids"][:]
        ids[7][0] = ids[7][0] % 39 + 1
        return data.remove_columns("input_ids").add_column("input_ids", ids)

    assert count() == 3 and count() == 0
    assert count(learning_rate=0.1, seed=7) == 0, "the course of training does not matter"
    assert count(model=other_weights) == 3
    assert count(data=other_example) == 3
    assert count(data=lambda: ragged_texts().select(range(19))) == 3
    assert count(strategy="partial", unfrozen_groups=1) == 3
    assert count(boundary_cache_dtype="bfloat16") == 3
    assert count() == 0, "all of them are still there"


def test_a_head_that_differs_reads_the_same(recorded, tmp_path):
    """Only what lies below the boundary is in the name."""

    def other_head():
        model = tiny_bert(dropout=0.2)
        nn.init.normal_(model.classifier.weight)
        return model

    train(tmp_path, "disk", num_train_epochs=1)
    recorded.clear()
    train(tmp_path, "disk", num_train_epochs=1, model=other_head)
    assert not recorded


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_recording(recorded, tmp_path):
    """What was recorded stays; the next run records the rest, and is the same."""
    found = train(tmp_path / "whole", "disk", per_device_eval_batch_size=4, **PLANS["partial"])
    assert len(recorded) == 5
    if not (child := os.fork()):
        try:
            own, left = Store.mark, [3]

            def mark(kept, rows):
                own(kept, rows)
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

            Store.mark = mark
            train(tmp_path / "killed", "disk", per_device_eval_batch_size=4, **PLANS["partial"])
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    recorded.clear()
    resumed = train(tmp_path / "killed", "disk", per_device_eval_batch_size=4, **PLANS["partial"])
    assert recorded == [4, 4], "two of five"
    assert is_equal(found, resumed) and resumed.boundary.entries[0].steps == found.boundary.entries[0].steps


# ---- whether ------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_off(tmp_path, capsys):
    found = train(tmp_path, boundary_cache_budget=1e-6, **PLANS["gradual"])
    first, *others, _ = found.boundary.entries
    assert not first.why and first.nbytes == 20 * (8 * 4 + 8 + 8) <= 1000 and first.steps == 5
    said = "KB do not fit into 40 B of memory; see boundary_cache_budget and boundary_cache_dtype"
    assert all(said in e.why for e in others)
    assert all(e.store is None and not e.steps for e in others)
    found = train(tmp_path, "disk", boundary_cache_budget=5e-7)
    assert "960 B do not fit into 500 B of disk space" in found.boundary.entries[0].why and found.losses


@pytest.mark.parametrize("cache", ["memory", "disk", "auto"])
def test_a_budget_below_one_batch(cache, tmp_path):
    """It is refused, with what would do, where the cache was asked for; else it is off, with the reason."""
    said = "1e-08 GB is less than one batch: 4 examples take about 192 B, all examples 960 B"
    if cache != "auto":
        with pytest.raises(UserError) as error:
            train(tmp_path, cache, boundary_cache_budget=1e-8)
        assert error.value.message == f"boundary_cache_budget: {said}."
        assert error.value.fix == "Set it to at least 9.6e-07, or leave it out."
        assert not train(tmp_path / "more", cache, boundary_cache_budget=9.6e-7).boundary.entries[0].why
        return
    (entry,) = train(tmp_path, "auto", boundary_cache_budget=1e-8, num_train_epochs=4).boundary.entries
    assert entry.why == f"boundary_cache_budget: {said}" and entry.to_dict()["why"] == entry.why


class FullDisk(mmap.mmap):
    """Pages of a disk that is full after so many writes of all maps together."""

    left = 0

    def flush(self, *args):
        FullDisk.left -= 1
        if FullDisk.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().flush(*args)


@pytest.mark.parametrize("when", ["before", "while recording"])
def test_a_full_disk_is_no_end(when, tmp_path, monkeypatch, capsys):
    """One line, no file left of what is incomplete, and the run is the one without the cache."""
    keys = dict(PLANS["partial"])
    if when == "before":

        def full(path, size):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(store_files, "reserve", full)
    else:
        monkeypatch.setattr(store_files, "boot_id", lambda: "")  # so that each batch is written at once
        monkeypatch.setattr(FullDisk, "left", 3)
        monkeypatch.setattr(store_module, "mmap", types.SimpleNamespace(mmap=FullDisk))
    found = train(tmp_path / "full", "disk", **keys)
    monkeypatch.undo()
    (entry,) = found.boundary.entries
    assert entry.off.reason == OffReason.NOT_RECORDED and "No space left on device" in entry.why
    assert entry.to_dict() == {"kept": "off", "why": entry.why} and not entry.steps
    err = capsys.readouterr().err
    assert err.count("hf-transfer: boundary_cache is off in stage 'top 1 group': ") == err.count("No space left") == 1
    assert list((tmp_path / "full" / "kept").rglob("*")) == []
    assert is_equal(found, train(tmp_path / "off", "off", **keys))


def test_a_folder_that_may_not_be_used(tmp_path, capsys):
    (tmp_path / "kept").write_text("")
    found = train(tmp_path, "disk", num_train_epochs=1)
    assert "kept" in found.boundary.entries[0].why and found.losses


class RollsBack(TrainerCallback):
    """To a checkpoint of the stage before, in whose layers below the boundary others were trained."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.trainer.steps_per_epoch + 2:
            self.trainer.roll_back()


def test_a_rollback_to_an_earlier_stage_records_again(tmp_path):
    stages = [{"train": "all", "epochs": 1}, {"train": "head", "epochs": 2}]
    keys = dict(strategy=None, stages=stages, save_strategy="steps")
    steps = train(tmp_path / "count", "off", **keys, save_steps=100).steps_per_epoch
    runs = {}
    for cache in ("off", "memory"):
        back = RollsBack()
        setup = partial(setattr, back, "trainer")
        keys |= {"save_steps": steps - 1, "save_total_limit": None}
        runs[cache] = train(tmp_path / cache, cache, callbacks=[back], setup=setup, **keys)
        (tmp_path / cache / "out" / f"checkpoint-{steps - 1}" / "manifest.json").stat()
    check(runs["memory"], runs["off"])
    assert runs["memory"].boundary.entries[1].off is None


def test_a_value_that_the_dtype_cannot_hold_turns_the_cache_off(tmp_path, capsys):
    def model():
        made = tiny_bert()
        with torch.no_grad():
            made.bert.encoder.layer[0].output.LayerNorm.weight.mul_(1e6)
        return made

    with_it = train(tmp_path / "on", model=model, boundary_cache_dtype="float16", **PLANS["partial"])
    assert "boundary_cache_dtype: the largest float16 is" in with_it.boundary.entries[0].why
    assert is_equal(with_it, train(tmp_path / "off", "off", model=model, **PLANS["partial"]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_runs_on_one_store_at_once(tmp_path):
    """Whoever comes second goes without, or reads what the first has recorded; both are right."""
    keys = dict(PLANS["partial"], boundary_cache_dir=str(tmp_path / "kept"))
    without = train(tmp_path / "off", "off", **keys)

    def other(name):
        def go():
            found = train(tmp_path / name, "disk", **keys)
            check(found, without)
            print(f"why: {found.boundary.entries[0].why}")
            return 0

        return go

    both = [Fork(other(name)) for name in ("one", "two")]
    done = [process.wait() for process in both]
    assert [d.returncode for d in done] == [0, 0], [d.stderr[-500:] for d in done]
    why = {d.stdout.rpartition("why: ")[2].strip() for d in done}
    assert "" in why, "one of them has recorded"
    assert all(not w or "another run is" in w for w in why)
    (place,) = (tmp_path / "kept").iterdir()
    assert (place / "manifest.json").is_file()


def test_a_store_of_another_version_is_recorded_anew(recorded, tmp_path):
    """Whatever its values are, they are not read: its name tells the version, and so does its manifest."""
    first = train(tmp_path, "disk", num_train_epochs=1)
    (place,) = (tmp_path / "kept").iterdir()
    manifest = json.loads((place / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps(manifest | {"format": manifest["format"] + 1}))
    (place / "0.bin").write_bytes(b"\x7f" * (place / "0.bin").stat().st_size)
    recorded.clear()
    again = train(tmp_path, "disk", num_train_epochs=1)
    assert len(recorded) == 3 and is_equal(first, again) and not again.boundary.entries[0].why
    assert json.loads((place / "manifest.json").read_text()) == manifest


def test_auto_keeps_what_pays(tmp_path, monkeypatch):
    """By the times of a batch: seconds without 3, with 1, of recording 2, for one epoch and for three."""
    own = Decision._try

    def tried(cache, entry, batch):
        own(cache, entry, batch)
        entry.full, entry.top, entry.recording = 3.0, 1.0, 2.0

    monkeypatch.setattr(Decision, "_try", tried)
    (entry,) = train(tmp_path, "auto", num_train_epochs=1).boundary.entries
    assert (
        entry.why == "it would save only 0% of the operations, recording included, and auto needs 20%"
        and not entry.steps
    )
    (entry,) = train(tmp_path, "auto", num_train_epochs=3).boundary.entries
    assert not entry.why and entry.gain == pytest.approx(9 / 5) and entry.kept == "memory" and entry.steps == 15
    assert entry.line("auto") == "keeps the output of bert in memory, 960 B, about 1.8x faster"
    first = train(tmp_path, "memory", **PLANS["gradual"]).boundary.entries[0]
    assert first.line("auto").endswith("x faster over all stages that use it")
    first.gain = 0.7
    assert first.line("auto").endswith(", hardly faster by the times of a few examples")
    (entry,) = train(tmp_path, "memory", num_train_epochs=1).boundary.entries
    assert not entry.why and entry.steps == 5, "who asks for it gets it"


# ---- a run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["no", "epoch"])
def test_an_evaluation_of_the_training_set_itself(strategy, tmp_path):
    """One object for both: during training, and when it has ended."""
    data = ragged_texts()
    runs = [train(tmp_path / c, c, data=lambda: data, eval_strategy=strategy) for c in ("off", "memory")]
    check(*reversed(runs))
    evaluated = [run.evaluate()["eval_loss"] for run in runs]
    assert evaluated[1] == pytest.approx(evaluated[0], rel=1e-6)
    logged = [[log["eval_loss"] for log in run.state.log_history if "eval_loss" in log] for run in runs]
    assert len(logged[0]) > 0 and logged[1] == pytest.approx(logged[0], rel=1e-6)
    assert runs[1].boundary.entries[0].steps > 0


def test_evaluation_is_not_touched(tmp_path):
    """It computes everything, in the middle of a stage as at its end, and the next batch is replayed again."""
    keys = dict(PLANS["gradual"], eval_strategy="steps", eval_steps=2)
    runs = [train(tmp_path / cache, cache, **keys) for cache in ("off", "memory")]
    losses = [[log["eval_loss"] for log in r.state.log_history if "eval_loss" in log] for r in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 10
    check(*reversed(runs))
    assert [e.steps for e in runs[1].boundary.entries] == [5, 5, 5, 0]


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_resumed_in_the_middle_of_an_epoch(cache, tmp_path):
    keys = dict(PLANS["gradual"], save_strategy="steps", save_steps=7)
    whole = train(tmp_path / "whole", cache, **keys)
    resumed = train(
        tmp_path / "resumed", cache, **keys, resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-7")
    )
    assert resumed.resumed_at == 7
    assert not changed(copy_state(whole.model), copy_state(resumed.model))
    assert resumed.losses == whole.losses
    assert [e.steps for e in resumed.boundary.entries] == [0, 3, 5, 0]


def test_what_nobody_may_see_is_as_before(tmp_path):
    """The model after a run: no stand-in, no hook, modes and flags as without."""
    runs = [train(tmp_path / cache, cache, **PLANS["two-phase"]) for cache in ("off", "memory")]
    for one, other in zip(*(r.model.named_modules() for r in runs), strict=True):
        assert one[0] == other[0] and one[1].training == other[1].training
        assert "forward" not in vars(other[1]) and not other[1]._forward_pre_hooks
    for one, other in zip(*(r.model.parameters() for r in runs), strict=True):
        assert one.requires_grad == other.requires_grad
    assert all(e.store is None for e in runs[1].boundary.entries)


def write_texts(folder):
    rows = [f"{word} {i} film,{word}" for i, word in enumerate(["good", "bad"] * 8)]
    (folder / "t.csv").write_text("text,label\n" + "\n".join(rows))
    return str(folder / "t.csv")


def run(model, data, folder, **keys):
    keys = {"strategy": "linear-probe", "num_train_epochs": 2, "boundary_cache": "memory", **keys}
    return fine_tune(
        model, data, output_dir=str(folder), train_val_split=0.25, data_facts=False, save_strategy="no",
        per_device_train_batch_size=4, **keys,
    )  # fmt: skip


def test_what_a_run_says_and_notes(tiny_bert_folder, tmp_path, capsys):
    found = run(tiny_bert_folder, write_texts(tmp_path), tmp_path / "a", strategy="two-phase")
    said = capsys.readouterr().out
    assert "Boundary cache:\n  stage 1 (head): keeps the output of bert in memory" in said
    assert "stage 2 (all groups): off: embeddings, the input layer, trains" in said
    first, second = json.loads((tmp_path / "a" / "results.json").read_text())["stages"]
    cache = first["cache"]
    assert cache["kept"] == "memory" and cache["at"] == "bert"
    rows = 12 + len(found.trainer.eval_dataset)
    assert cache["bytes"] == rows * (8 * 4 + 8 + 8), "the pooled text, its label, and what it is told by"
    assert cache["record_seconds"] > 0 and cache["largest_difference"] < 1e-5
    assert cache["step_gain"] > 0 and cache["measured_gain"] > 0 and cache["expected_gain"] > 0
    assert second["cache"] == {"kept": "off", "why": "embeddings, the input layer, trains"}
    assert found.results["stages"][0]["cache"] == cache
    run(tiny_bert_folder, write_texts(tmp_path), tmp_path / "b", token_masking=0.3)
    (stage,) = json.loads((tmp_path / "b" / "results.json").read_text())["stages"]
    assert stage["cache"] == {"kept": "off", "why": "token_masking masks other tokens in each epoch"}


@pytest.mark.parametrize(
    ("keys", "at"),
    [
        ({"strategy": "linear-probe"}, "bert"),
        ({"strategy": "lora", "freeze": ["embeddings", "layer.0"]}, "base_model.model.bert.encoder.layer.0"),
    ],
)
def test_a_plan_says_and_returns_what_is_decided(keys, at, tiny_bert_folder, tmp_path, capsys):
    values = {"model_name_or_path": tiny_bert_folder, "dataset_name": write_texts(tmp_path), "num_train_epochs": 9}
    values |= {"train_val_split": 0.25, "data_facts": False, "preflight": False, "output_dir": str(tmp_path / "out")}
    planned = plan_only(Config.from_sources({}, {**values, "boundary_cache_dtype": "float16", **keys}))
    (cache,) = planned.boundary_cache
    assert cache["kept"] == "memory" and cache["at"] == at and cache["expected_gain"] > 0
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  stage 1 ("))
    assert f"keeps the output of {at} in memory, " in said and "faster" in said
    assert said.endswith(" of the largest") and "; in float16 the logits differ by up to " in said


def test_views_of_pictures(tiny_vit_folder, tmp_path, capsys):
    """Stored ones are those of a run without, whatever loads them; without any, and mixed, it is off."""
    keys = dict(image_size=32, max_train_samples=12, max_eval_samples=8, max_predict_samples=8, optim="sgd")
    keys |= dict(augmentation="basic", learning_rate=0.05, num_train_epochs=2)

    def digits(name, **more):
        return run(tiny_vit_folder, "bundled:digits", tmp_path / name, **keys, **more)

    def cache(found):
        return found.results["stages"][0]["cache"]

    views = [
        digits("off", augmented_views=2, boundary_cache="off"),
        digits("memory", augmented_views=2),
        digits("disk", augmented_views=2, boundary_cache="disk", boundary_cache_dir=str(tmp_path / "kept"),
               dataloader_num_workers=1),
    ]  # fmt: skip
    states = [copy_state(found.model) for found in views]
    for found, state in zip(views[1:], states[1:], strict=True):
        assert all((state[n] - v).abs().max() < 1e-5 for n, v in states[0].items())
        assert cache(found)["kept"] != "off"
    rows = 2 * views[1].results["num_train_examples"] + len(views[1].trainer.eval_dataset)
    assert cache(views[1])["bytes"] == rows * (8 * 4 + 8), "class tokens and labels: two of each training image"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "each epoch augments images anew; augmented_views: 4 keeps four views of each"),
        ({"mixup_alpha": 0.4}, "mixup and cutmix blend other images in each epoch"),
        ({"augmented_views": 2, "cutmix_alpha": 1.0}, "mixup and cutmix blend other images in each epoch"),
        ({"augmented_views": 2}, None),
    ],
)
def test_live_changes_of_pictures(keys, said, tiny_vit_folder, tmp_path):
    values = {"model_name_or_path": tiny_vit_folder, "dataset_name": "bundled:digits", "output_dir": str(tmp_path)}
    more = dict(max_train_samples=8, max_eval_samples=8, data_facts=False, augmentation="basic", strategy="partial")
    prepared = prepare(Config.from_sources({}, {**values, **more, **keys}))
    assert live_changes(prepared.config.data) == ([] if said is None else [said])


@pytest.mark.parametrize(
    "workers",
    [{}, pytest.param({"dataloader_num_workers": 1, "dataloader_persistent_workers": True}, marks=pytest.mark.slow)],
)
def test_pictures_are_read_once(workers, tmp_path):
    """And their tensors are made of nothing, once every batch is replayed; by workers that live on, too."""

    class Counting(torch.utils.data.Dataset):
        def __init__(self):
            self.data, self.count = images().with_format("torch"), torch.zeros(1, dtype=torch.int64).share_memory_()

        def __len__(self):
            return len(self.data)

        def __getitem__(self, number):
            self.count += 1
            return self.data[number]

    keys = dict(kind="image", data=Counting, strategy="partial", unfrozen_groups=1, num_train_epochs=3)
    without, found = (train(tmp_path / cache, cache, **keys, **workers) for cache in ("off", "memory"))
    check(found, without)
    assert int(without.train_dataset.count) == 60
    # Two looks at four, once all to record, and of the first epoch what was loaded before a batch was compared.
    assert 20 <= int(found.train_dataset.count) - 2 * 4 <= 20 + (16 if workers else 8)
