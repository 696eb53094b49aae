"""Pooled outputs of layer groups: exact values, by content, once, and without a trace in the model."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from torch import nn

from hf_transfer import UserError, layer_groups
from hf_transfer.errors import WorkFailed
from hf_transfer.features import FeatureStore, FrozenFeatures, frozen_features
from hf_transfer.features.layouts import sides
from tests import warm
from tests.architectures import hugging_face
from tests.helpers import (
    PIXELS,
    VOCABULARY,
    copy_state,
    images,
    pad,
    ragged_texts,
    tiny_bert,
    tiny_timm_resnet,
    tiny_vit,
)

POOLINGS = ("cls", "mean", "max")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def with_class_token(size: int = 9, seed: int = 0) -> Dataset:
    """Texts that begin with token 3 and end with token 2."""
    rows = [[3, *(5 + i % 30 for i in row[1:]), 2] for row in ragged_texts(size, seed=seed)["input_ids"]]
    return Dataset.from_dict({"input_ids": rows, "labels": [i % 2 for i in range(size)]})


def stack(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([example[name] for example in examples]) for name in examples[0]}


def of(model: Any, dataset: Any, collate: Any = pad, **keys: Any) -> FrozenFeatures:
    return frozen_features(model, layer_groups(model), dataset, collate=collate, **{"batch_size": 4, **keys})


def check(found: FrozenFeatures, i: int, group: str, rows: torch.Tensor, patches: torch.Tensor | None = None) -> None:
    """The features of example i are those of its hidden state, (positions, width)."""
    kept = rows if patches is None else patches
    expected = {"cls": rows[0], "mean": kept.mean(0), "max": kept.amax(0)}
    for pooling in found.poolings:
        torch.testing.assert_close(found.matrix(group, pooling)[i], expected[pooling], **CLOSE)


# ---- texts -----------------------------------------------------------------------------------------------------------

TEXT = {
    "BertForSequenceClassification": POOLINGS,
    "DistilBertForSequenceClassification": POOLINGS,
    "RobertaForSequenceClassification": POOLINGS,
    "DebertaV2ForSequenceClassification": POOLINGS,
    "ModernBertForSequenceClassification": POOLINGS,
    "MPNetForSequenceClassification": POOLINGS,
    "GPT2ForSequenceClassification": ("mean", "max"),
    "LlamaForSequenceClassification": ("mean", "max"),
}


@pytest.mark.parametrize("name", TEXT)
def test_texts_are_pooled_exactly_whatever_their_batch(name):
    model, data = hugging_face(name), with_class_token()
    found = of(model, data)
    assert found.poolings == TEXT[name] and not found.refused and found.computed == len(data) == len(found)
    assert found.groups == tuple(group.name for group in layer_groups(model))
    assert found.labels.tolist() == data["labels"][:]
    for i in range(len(data)):
        ids = torch.tensor([data[i]["input_ids"]])
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        assert len(states) == len(found.groups) - 1
        for group, state in zip(found.groups, states, strict=False):
            if not (name.startswith("DebertaV2") and group == "layer.0"):  # theirs is after the convolution of layer.1
                check(found, i, group, state[0])
    assert torch.equal(found.matrix("last", "mean"), found.matrix(found.groups[-2], "mean"))


def test_encoders_and_decoders():
    """The features of the encoder are those of an encoder alone; the decoder's begin where they should."""
    torch.manual_seed(0)
    keys = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": VOCABULARY}
    config = transformers.T5Config(**keys, decoder_start_token_id=0, eos_token_id=2)
    tagger, data = transformers.T5ForTokenClassification(config).eval(), with_class_token(6)
    with torch.no_grad():
        for parameter in tagger.parameters():
            parameter.normal_(std=0.3)
    data = data.map(lambda row: {"input_ids": row["input_ids"][1:]}, load_from_cache_file=False)
    found = of(tagger, data)
    assert found.poolings == ("mean", "max") and "reads all positions" in found.refused["head"]
    both = transformers.T5ForSequenceClassification(config).eval()
    both.transformer.encoder.load_state_dict(tagger.transformer.encoder.state_dict())
    of_both = of(both, data)
    assert [name.rpartition(".")[0] for name in of_both.groups[1:-1]] == [
        *["transformer.encoder.block"] * 2,
        *["transformer.decoder.block"] * 2,
    ]
    for i in range(len(data)):
        ids = torch.tensor([data[i]["input_ids"]])
        with torch.no_grad():
            states = tagger.transformer(input_ids=ids, output_hidden_states=True).hidden_states
            output = both(input_ids=ids, output_hidden_states=True)
        for group, state in zip(found.groups, states, strict=True):
            check(found, i, group, state[0])
        for group, state in zip(of_both.groups[3:], output.decoder_hidden_states[1:], strict=False):
            check(of_both, i, group, state[0])
        torch.testing.assert_close(of_both.matrix("head")[i], output.decoder_hidden_states[-1][0, -1], **CLOSE)
    assert torch.equal(of_both.matrix("embeddings", "mean"), found.matrix("embeddings", "mean"))


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("BertForSequenceClassification", lambda m, i: m.bert(i).pooler_output[0]),
        ("RobertaForSequenceClassification", lambda m, i: m.roberta(i).last_hidden_state[0, 0]),
        ("GPT2ForSequenceClassification", lambda m, i: m.transformer(i).last_hidden_state[0, -1]),
        ("DistilBertForSequenceClassification", lambda m, i: m.distilbert(i).last_hidden_state[0, 0]),
    ],
)
def test_the_input_of_the_head(name, read):
    model, data = hugging_face(name), with_class_token()
    if name.startswith("GPT2"):
        model.config.pad_token_id = 0
    found = of(model, data, layers=["head"])
    assert found.groups == ("head",) and found.poolings == () and found.width("head") == 8
    for i in range(len(data)):
        with torch.no_grad():
            expected = read(model, torch.tensor([data[i]["input_ids"]]))
        torch.testing.assert_close(found.matrix("head")[i], expected, **CLOSE)


def test_padding_that_matters_is_refused():
    bare = [{"input_ids": row["input_ids"], "labels": 0} for row in with_class_token(6)]

    def pads_left(examples):
        longest = max(len(e["input_ids"]) for e in examples)
        ids = torch.tensor([[*[0] * (longest - len(e["input_ids"])), *e["input_ids"]] for e in examples])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    def no_mask(examples):
        return {"input_ids": pad(examples)["input_ids"]}

    gpt2 = hugging_face("GPT2ForSequenceClassification")
    for model, collate in ((tiny_bert(), no_mask), (gpt2, pads_left)):
        with pytest.raises(UserError, match="features of a text depend on the padding"):
            of(model, bare, collate, layers=["last"])
        with pytest.raises(UserError, match="embeddings: its features of a text depend on the padding"):
            of(model, bare, collate).matrix("embeddings", "mean")
    found = of(tiny_bert(), bare, no_mask, batch_size=1)
    torch.testing.assert_close(found.matrix("last", "mean"), of(tiny_bert(), bare).matrix("last", "mean"), **CLOSE)
    xlnet = of(hugging_face("XLNetForSequenceClassification"), bare, layers=None)  # its head reads the last position
    assert (
        xlnet.groups == ("embeddings", "layer.0", "layer.1", "layer.2") and "pad on the right" in xlnet.refused["head"]
    )
    left = of(hugging_face("LlamaForSequenceClassification"), bare, pads_left, layers=["last"])  # relative positions
    right = of(hugging_face("LlamaForSequenceClassification"), bare, layers=["last"])
    torch.testing.assert_close(left.matrix("last", "max"), right.matrix("last", "max"), **CLOSE)


# ---- images ----------------------------------------------------------------------------------------------------------

# {class: (poolings, positions that are no patches)}; hidden states are (examples, positions, width) or channels first.
IMAGE = {
    "ViTForImageClassification": (POOLINGS, 1),
    "Dinov2ForImageClassification": (POOLINGS, 1),
    "Dinov2WithRegistersForImageClassification": (POOLINGS, 5),
    "BeitForImageClassification": (POOLINGS, 1),
    "IJepaForImageClassification": (("mean", "max"), 0),
    "SwinForImageClassification": (("mean", "max"), 0),
    "ConvNextForImageClassification": (("mean", "max"), 0),
    "ResNetForImageClassification": (("mean", "max"), 0),
    "EfficientNetForImageClassification": (("mean", "max"), 0),
}
STAGES = {  # {group: index of its hidden state}, for models that return one per stage
    "SwinForImageClassification": {"stem": 0},  # the others are those after the downsampling of the next group
    "ConvNextForImageClassification": {"stem": 0, "stages.0.layers.0": 1, "stages.1.layers.1": 2},
    "ResNetForImageClassification": {"stem": 0, "stages.0.layers.0": 1, "stages.1.layers.1": 2},
}
NORMED = {  # the base model, whose final norm belongs to the last block
    "ViTForImageClassification": "vit",
    "Dinov2ForImageClassification": "dinov2",
    "Dinov2WithRegistersForImageClassification": "dinov2_with_registers",
    "IJepaForImageClassification": "ijepa",
    "SwinForImageClassification": "swin",
    "EfficientNetForImageClassification": "efficientnet",
}


@pytest.mark.parametrize("name", IMAGE)
def test_images_are_pooled_over_their_patches(name):
    model, data = hugging_face(name), images(5)
    poolings, others = IMAGE[name]
    found = of(model, data, stack, batch_size=2)
    assert found.poolings == poolings and not found.refused
    pixels = torch.tensor(data["pixel_values"][:])
    stages = STAGES.get(name, {group: n for n, group in enumerate(found.groups[:-1])})
    with torch.no_grad():
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
        expected = {group: states[n] for group, n in stages.items()}
        if name in NORMED:
            expected[found.groups[-2]] = getattr(model, NORMED[name])(pixel_values=pixels).last_hidden_state
    for group, state in expected.items():
        rows = state if state.dim() == 3 else state.flatten(2).transpose(1, 2)
        for i in range(len(data)):
            check(found, i, group, rows[i], rows[i, others:])


@pytest.mark.parametrize(
    ("architecture", "keys", "axis", "others"),
    [
        ("vit_tiny_patch16_224", {"embed_dim": 12, "num_heads": 2}, 2, 1),
        ("vit_tiny_patch16_224", {"embed_dim": 4, "num_heads": 2, "class_token": False, "global_pool": "avg"}, 2, 0),
        ("vit_small_patch14_reg4_dinov2", {"embed_dim": 12, "num_heads": 2, "patch_size": 8}, 2, 5),
        ("vit_base_patch16_reg4_gap_256", {"embed_dim": 12, "num_heads": 2}, 2, 4),
        ("beit_base_patch16_224", {"embed_dim": 12, "num_heads": 2}, 2, 1),
        # As wide as the image is high in patches, so that sizes alone do not tell the axes apart.
        (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4},
            3,
            0,
        ),
        ("test_convnext", {"dims": (8, 12, 16, 20), "depths": (1, 1, 1, 1)}, 1, 0),
        ("resnet10t", {"channels": (8, 16, 24, 32), "stem_width": 4}, 1, 0),
        ("test_efficientnet", {}, 1, 0),
    ],
)
def test_timm_models_with_channels_anywhere(architecture, keys, axis, others):
    torch.manual_seed(0)
    sizes = {"img_size": PIXELS, "depth": 2} if "vit" in architecture or "beit" in architecture else {}
    sizes |= {"img_size": PIXELS} if "swin" in architecture else {}
    model = transformers.TimmWrapperForImageClassification(
        transformers.TimmWrapperConfig(architecture=architecture, num_labels=2, model_args={**sizes, **keys})
    ).eval()
    data = images(3)
    found = of(model, data, stack)
    has_class_token = others in (1, 5)
    assert found.poolings == (POOLINGS if has_class_token else ("mean", "max")) and not found.refused
    blocks = [name for name in found.groups if name[-1].isdigit()][:-1]  # a final norm follows the last one
    seen: dict[str, torch.Tensor] = {}
    handles = [
        model.timm_model.get_submodule(name).register_forward_hook(lambda *a, name=name: seen.update({name: a[2]}))
        for name in blocks
    ]
    with torch.no_grad():
        model(pixel_values=torch.tensor(data["pixel_values"][:]))
    for handle in handles:
        handle.remove()
    assert len(blocks) >= 1
    for name in blocks:
        rows = seen[name].movedim(axis, -1).flatten(1, -2)
        assert found.width(name) == rows.shape[-1]
        for i in range(len(data)):
            check(found, i, name, rows[i], rows[i, others:])


def test_a_plain_timm_model_and_rectangular_images():
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    pixels = torch.randn(3, 3, 32, 64)
    data = [{"pixel_values": image, "labels": i} for i, image in enumerate(pixels)]
    found = of(model, data, lambda rows: {n: torch.stack([torch.as_tensor(r[n]) for r in rows]) for n in rows[0]})
    with torch.no_grad():
        expected = model.forward_features(pixels)
    torch.testing.assert_close(found.matrix("last", "mean"), expected.mean((2, 3)), **CLOSE)
    torch.testing.assert_close(found.matrix("head"), expected.mean((2, 3)), **CLOSE)
    assert found.labels.tolist() == [0, 1, 2]


class Cube(nn.Module):
    """Nothing shows which axis holds the channels: as many as the image is high and wide, and no layer says."""

    def __init__(self, size: int = 8):
        super().__init__()
        self.blocks = nn.ModuleList(Bias(size) for _ in range(2))
        self.head = nn.Linear(size**3, 2)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            pixel_values = block(pixel_values)
        return self.head(pixel_values.flatten(1))


class Bias(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(size, size, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bias


def test_where_the_channels_cannot_be_told_they_are_not_guessed():
    model = Cube()
    groups = layer_groups(model, [(r"blocks\.(\d+)", None), ("^head", "head")])
    data = [{"pixel_values": torch.randn(8, 8, 8)} for _ in range(3)]
    found = frozen_features(
        model, groups, data, collate=lambda rows: {"pixel_values": torch.stack([r["pixel_values"] for r in rows])}
    )
    assert found.groups == ("head",) and found.width("head") == 512 and found.labels is None
    with pytest.raises(UserError, match=r"no features of blocks\.0: nothing shows which axis"):
        found.matrix(groups[0].name, "mean")


@pytest.mark.parametrize(("positions", "rows"), [(16, 4), (17, None), (1, 1), (2, None), (50, None), (64, 8)])
def test_grids_of_patches(positions, rows):
    assert sides(positions, 32, 32) == (None if rows is None else (rows, rows))
    assert sides(2 * positions, 32, 64) == (None if rows is None else (rows, 2 * rows))


# ---- frozen ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_bert, tiny_vit, tiny_timm_resnet])
def test_the_model_is_left_as_it_was(make):
    model = make()
    model.train()
    modules = list(model.modules())
    modules[3].training = False
    frozen = [
        n for i, (n, p) in enumerate(model.named_parameters()) if i % 2 and not p.requires_grad_(False).requires_grad
    ]
    model.get_parameter(next(n for n, p in model.named_parameters() if p.requires_grad)).grad = None
    before = copy_state(model), [m.training for m in modules], [sorted(vars(m)) for m in modules]
    draws = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    of(model, images(6) if make is not tiny_bert else ragged_texts(6), stack if make is not tiny_bert else pad)
    assert [m.training for m in modules] == before[1] and [sorted(vars(m)) for m in modules] == before[2]
    assert all(torch.equal(value, before[0][name]) for name, value in copy_state(model).items())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == frozen
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), draws[0]) and random.getstate() == draws[1]
    assert np.random.get_state()[1].tolist() == draws[2]


def test_autocast_is_off_unless_asked_for():
    model, data = tiny_bert(), ragged_texts(6)
    plain = of(model, data)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(of(model, data).matrix("last", "mean"), plain.matrix("last", "mean"))
    rounded = of(model, data, autocast=torch.bfloat16).matrix("last", "mean")
    assert rounded.dtype == torch.float32 and 0 < float((rounded - plain.matrix("last", "mean")).abs().max()) < 0.1


# ---- by content ------------------------------------------------------------------------------------------------------


class Counting:
    """Counts the examples that go through the layers of a model in real batches, apart from the trials."""

    def __init__(self, model: Any, least: int = 0):
        self.rows = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        self.rows += len(next(iter(kwargs.values())))


def trials(model: Any, data: Any, store: FeatureStore, counting: Counting) -> int:
    """Examples that a call without anything to compute runs through the model."""
    of(model, data, store=store)
    before = counting.rows
    assert of(model, data, store=store).computed == 0
    return counting.rows - before


def test_a_changed_example_misses_alone(tmp_path):
    for store in (FeatureStore(), FeatureStore(tmp_path / "features")):
        model, data = tiny_bert(layers=1), ragged_texts(120)
        counting = Counting(model)
        tried = trials(model, data, store, counting)
        rows = data["input_ids"][:]
        rows[97] = [*rows[97][:-1], (rows[97][-1] + 1) % 39 + 1]
        changed = Dataset.from_dict({"input_ids": rows, "labels": [1 - i for i in data["labels"]]})
        before = counting.rows
        found = of(model, changed, store=store)
        assert found.computed == 1 and counting.rows - before == tried + 1
        assert found.labels.tolist() == changed["labels"][:]
        fresh = of(model, changed)
        for group, pooling in (("embeddings", "max"), ("layer.0", "mean"), ("head", None)):
            torch.testing.assert_close(found.matrix(group, pooling), fresh.matrix(group, pooling), **CLOSE)
        order = torch.randperm(120, generator=torch.Generator().manual_seed(0)).tolist()
        shuffled = of(model, changed.select(order), store=store)
        assert shuffled.computed == 0 and torch.equal(shuffled.matrix("head"), found.matrix("head")[order])


def test_only_what_depends_on_a_change_is_computed_again():
    model, data, store = tiny_bert(layers=3), ragged_texts(12), FeatureStore()
    groups = layer_groups(model)
    counting = Counting(model)
    trials(model, data, store, counting)
    with torch.no_grad():
        model.classifier.weight += 1
    assert of(model, data, store=store).computed == 0
    with torch.no_grad():
        model.bert.encoder.layer[2].output.dense.weight += 1
    lower = [group.name for group in groups[:3]]
    assert of(model, data, store=store, layers=lower).computed == 0
    assert of(model, data, store=store, poolings=["mean"]).computed == 12
    assert of(model, data, store=store, layers=["last"], poolings=["mean"]).computed == 0
    assert of(model, data, store=store, layers=["last"], poolings=["max"]).computed == 12
    assert of(model, data, store=store, layers=lower, autocast=torch.bfloat16).computed == 12
    other = data.map(lambda row: {"attention_mask": [1] * len(row["input_ids"])}, load_from_cache_file=False)
    assert of(model, other, lambda rows: pad(rows)).computed == 12  # no store, no digest of the lambda
    assert of(model, data.add_column("note", ["x"] * 12), store=store, layers=lower).computed == 0


def test_equal_examples_are_computed_once():
    data = ragged_texts(5).select([0, 1, 1, 4, 1, 0])
    found = of(tiny_bert(), data, store=FeatureStore())
    assert found.computed == 3 and torch.equal(found.matrix("head")[1], found.matrix("head")[4])


def record(folder: Path, out: Path, seconds: float = 0.0, counter: Path | None = None) -> None:
    """Features of 100 texts, a batch of 4 in so many seconds."""
    model = tiny_bert()
    if counter is not None:

        def wait(*_: Any) -> None:
            with counter.open("a") as file:
                file.write("x")
            time.sleep(seconds)

        model.bert.encoder.layer[1].register_forward_hook(wait)
    found = of(model, ragged_texts(100), store=FeatureStore(folder))
    torch.save([found.computed, found.matrix("layer.1", "mean"), found.matrix("head")], out)


def test_a_killed_pass_goes_on_where_it_ended(tmp_path):
    """Between processes; a pass that was killed keeps its complete examples, and fills the same rows."""
    folder, out, counter = tmp_path / "features", tmp_path / "out.pt", tmp_path / "counter"
    counter.touch()
    process = warm.Fork(lambda: record(folder, out, 0.02, counter))
    while counter.stat().st_size < 17 and process.poll() is None:  # the trials are among them
        time.sleep(0.01)
    process.send(signal.SIGKILL)
    assert process.wait().returncode == -signal.SIGKILL and not out.exists()
    segments = sorted(path.name for path in folder.iterdir())
    again = warm.fork(lambda: record(folder, out))
    assert again.returncode == 0, again.stderr
    computed, mean, head = torch.load(out)
    assert 0 < computed < 100 and sorted(path.name for path in folder.iterdir()) == segments
    found = of(tiny_bert(), ragged_texts(100), store=FeatureStore(folder))
    assert found.computed == 0 and torch.equal(found.matrix("head"), head)
    fresh = of(tiny_bert(), ragged_texts(100))
    torch.testing.assert_close(fresh.matrix("layer.1", "mean"), mean, **CLOSE)
    torch.testing.assert_close(fresh.matrix("head"), head, **CLOSE)


def test_budgets(tmp_path):
    data = ragged_texts(70)
    for store in (FeatureStore(budget=1e-6), FeatureStore(tmp_path, budget=1e-6)):
        with pytest.raises(UserError, match="There is no room for the features"):
            of(tiny_bert(), data, store=store)
    small = FeatureStore(tmp_path, budget=2e-5)  # room for one model's columns
    assert of(tiny_bert(), data, store=small, layers=["head"]).computed == 70
    other = tiny_bert()
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight += 1
    for _ in range(4):
        with torch.no_grad():
            other.bert.embeddings.word_embeddings.weight += 1
        assert of(other, data, store=small, layers=["head"]).computed == 70
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= 2e4


# ---- ranks -----------------------------------------------------------------------------------------------------------


def as_rank(folder: Path) -> None:
    """Features of 30 texts: in memory, on disk, and from disk."""
    torch.distributed.init_process_group("gloo")
    model = tiny_bert()
    data, counting, answers = [dict(row) for row in ragged_texts(30)], Counting(model), []
    for store in (None, FeatureStore(folder / "features"), FeatureStore(folder / "features")):
        before = counting.rows
        found = of(model, data, store=store)
        answers.append((found.computed, counting.rows - before, found.matrix("layer.1", "max"), found.labels))
    torch.save(answers, folder / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()


def test_two_ranks_share_the_pass(tmp_path):
    assert warm.ranks(2, lambda: as_rank(tmp_path), tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()
    answers = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    one, tried = of(tiny_bert(), ragged_texts(30)), answers[0][2][1]
    for n, computed in enumerate((30, 30, 0)):
        assert sum(answers[rank][n][1] - tried for rank in (0, 1)) == computed
        for rank in (0, 1):
            count, _, features, labels = answers[rank][n]
            assert count == computed and labels.tolist() == one.labels.tolist()
            torch.testing.assert_close(features, one.matrix("layer.1", "max"), **CLOSE)


# ---- refusals --------------------------------------------------------------------------------------------------------


class Collate:
    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return pad(examples)


def test_what_cannot_be_computed_is_refused():
    model, data = tiny_bert(), ragged_texts(6)
    words = Dataset.from_dict({"text": ["a", "b"], "labels": [0, 1]})
    for wrong, message in (
        (data.to_iterable_dataset(), "is a stream"),
        (data.select([]), "no examples"),
        (words, "no column 'input_ids', which BertForSequenceClassification reads. Its columns are text, labels"),
        ([{"words": torch.ones(3)}], "no column 'input_ids'"),
    ):
        with pytest.raises(UserError, match=message):
            of(model, wrong, pad if isinstance(wrong, Dataset) else lambda rows: {"a": rows, "b": 1})
    for keys, message in (
        ({"layers": ["layr.1"]}, "layers: unknown layer group 'layr.1'.*Did you mean 'layer.1'"),
        ({"poolings": ["median"]}, "unknown pooling 'median'"),
        ({"store": FeatureStore(), "collate": Collate().__call__}, "A change of the collator would go unnoticed"),
    ):
        with pytest.raises(UserError, match=message):
            of(model, data, **keys)
    with pytest.raises(UserError, match="poolings: embeddings has no class token for 'cls'"):
        of(hugging_face("LlamaForSequenceClassification"), data, poolings=["cls"])
    found = of(model, data, poolings=["mean"], layers=["layer.0", "head"])
    for arguments, message in (
        (("layer.1", "mean"), "no features of 'layer.1'"),
        (("layer.0", "max"), "layer.0 has no features pooled by 'max'"),
        (("head", "mean"), "the input of the head is one vector"),
    ):
        with pytest.raises(UserError, match=message):
            found.matrix(*arguments)


def test_examples_drawn_at_random_and_broken_ones():
    class Noisy(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, i: int) -> dict[str, Any]:
            return {"pixel_values": torch.randn(3, PIXELS, PIXELS)}

    with pytest.raises(UserError, match="drawn at random"):
        of(tiny_vit(), Noisy(), transformers.default_data_collator)
    rows = [{"pixel_values": torch.zeros(3, PIXELS, PIXELS), "labels": 0} for _ in range(4)]
    rows[2] = {"pixel_values": torch.full((3, PIXELS, PIXELS), float("nan")), "labels": 0}
    store = FeatureStore()
    with pytest.raises(WorkFailed, match="NaN or infinite for 1 examples, the first of them number 2"):
        of(tiny_vit(), rows, transformers.default_data_collator, store=store)
    rows[2] = {"pixel_values": torch.ones(3, PIXELS, PIXELS), "labels": 0}
    assert of(tiny_vit(), rows, transformers.default_data_collator, store=store).computed == 1
