"""What the frozen bottom gives, recorded example by example, replayed at every boundary of every kind of model."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

from hf_transfer import layer_groups
from hf_transfer.features import replay
from hf_transfer.features.batches import count_of, length_of, positions_of
from hf_transfer.features.cut import Cut, Refused
from hf_transfer.features.trace import find_cut
from hf_transfer.layers.frozen import frozen_modules
from hf_transfer.layers.groups import LayerGroup
from tests import architectures
from tests.helpers import tiny_bert, tiny_vit

CPU = torch.device("cpu")
LENGTHS = (9, 5, 12, 3)
TEXTS = ("Bert", "Roberta", "DistilBert", "DebertaV2", "ModernBert")
LEFT = ("ModernBert", "Llama")  # positions are relative, and the head looks for the text
MORE_TEXTS = ("Electra", "MPNet", "XLMRoberta", "Albert", "Deberta")
IMAGES = ("ViT", "Dinov2", "Swin", "ConvNext", "ResNet", "EfficientNet")
MORE_IMAGES = ("ConvNextV2", "Beit", "Swinv2", "MobileNetV2", "RegNet")
TIMM = ("test_vit", "test_resnet", "test_efficientnet", "test_convnext")
MORE_TIMM = ("swin_tiny_patch4_window7_224", "densenet121", "resnet10t")
# Frozen, and computed in a replay too: the same for every example.
COMPUTED = {
    "DebertaV2": {
        "deberta.encoder.rel_embeddings.weight",
        "deberta.encoder.LayerNorm.weight",
        "deberta.encoder.LayerNorm.bias",
    },
    "Deberta": {"deberta.encoder.rel_embeddings.weight"},
    "test_vit": {"cls_token", "pos_embed"},  # added to nothing
    "MPNet": {"mpnet.encoder.relative_attention_bias.weight"},
}


def alive(model):
    """Weights that let what differs between examples through to the logits, buffers that are no identity."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(0, 1.4 / math.sqrt(p[0].numel()) if "embeddings" not in name else 0.5)
            else:  # also what begins at 0, so that a block is no identity
                p.uniform_(-0.1, 0.1) if name.endswith("bias") else p.uniform_(0.5, 1.5)
        for name, b in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                b.uniform_(0.5, 1.5)
    return model


def a_model(kind, name):
    torch.manual_seed(0)
    if kind == "timm":
        return alive(timm.create_model(name, num_classes=4))
    model = architectures.hugging_face(f"{name}For{'Sequence' if kind == 'text' else 'Image'}Classification")
    model.config.use_cache = False  # as Trainer has it
    return alive(model)


def ragged(count=4, seed=0, length=12, left=False, pad=0):
    g, lengths = torch.Generator().manual_seed(seed), LENGTHS[:count]
    ids, mask = torch.full((count, length), pad), torch.zeros(count, length, dtype=torch.long)
    for i, n in enumerate(lengths):
        own = slice(length - n, None) if left else slice(0, n)
        ids[i, own] = torch.randint(3, 40, (n,), generator=g)
        mask[i, own] = 1
    return {"input_ids": ids, "attention_mask": mask}


def pictures(kind, model, count=4, seed=0):
    size = (
        model.pretrained_cfg["input_size"]
        if kind == "timm"
        else architectures.inputs_of(model)["pixel_values"][0].shape
    )
    size = (3, 32, 32) if kind == "timm" and not hasattr(model, "patch_embed") and size[1] > 160 else tuple(size)
    value = torch.randn(count, *size, generator=torch.Generator().manual_seed(seed))
    value = value * torch.arange(1.0, count + 1)[:, None, None, None] + value[:, :1, :1, :1]
    return {"x" if kind == "timm" else "pixel_values": value}


def as_in(model, batch):
    dtype = next(model.parameters()).dtype
    return {n: v.to(dtype) if v.is_floating_point() else v for n, v in batch.items()}


def thaw(model, groups, boundary):
    named = dict(model.named_parameters())
    for i, group in enumerate(groups):
        for name in group.parameters:
            named[name].requires_grad_(i >= boundary)


def one_by_one(model, cut, batch, padding=1e3):
    """Recorded each in a batch of its own, without padding; padded as the batch is, by what nobody may look at."""
    mask, count, length = positions_of(batch), count_of(batch), length_of(batch)
    model.eval()
    alone = []
    for i in range(count):
        one = {n: v[i : i + 1] for n, v in batch.items()}
        one = one if mask is None else {n: v[:, mask[i]] for n, v in one.items()}
        alone.append(replay.record(model, [cut], one)[0])
    rows = {}
    for name, (_, _, leaf) in cut.stored.items():
        if not leaf.ragged:
            rows[name] = torch.cat([found[name] for found in alone])
            assert rows[name].shape == (count, *leaf.shape)
            continue
        rows[name] = torch.empty((count, length, *leaf.shape), dtype=leaf.dtype)
        rows[name].fill_(padding)
        for i, found in enumerate(alone):
            rows[name][i, mask[i]] = found[name][0]
    return rows


def step(model, groups, batch):
    """(logits, gradients) as in training: what trains in train mode, its dropout drawn from one seed."""
    model.train()
    for module in frozen_modules(model, groups):
        module.training = False
    torch.manual_seed(1)
    with torch.random.fork_rng([]):
        out = model(**batch)
    logits = out if torch.is_tensor(out) else out.logits
    loss = (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum()
    trains = [p for p in model.parameters() if p.requires_grad]
    return logits.detach(), torch.autograd.grad(loss, trains, allow_unused=True)


def state(model):
    """Everything of a model that a replay might leave changed."""
    kept = {}
    for name, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if k not in ("training", "_parameters", "_buffers", "_modules")}
        kept[name] = {k: dict(v) if k.endswith("_hooks") else v for k, v in own.items()} | {"class": type(module)}
    flags = {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()}
    return kept, flags, {n: v.clone() for n, v in model.state_dict().items()}, torch.get_rng_state()


def is_same(one, other):
    return (
        one[0] == other[0]
        and one[1] == other[1]
        and one[2].keys() == other[2].keys()
        and all(torch.equal(v, other[2][n]) for n, v in one[2].items())
        and torch.equal(one[3], other[3])
    )


def has_live_batchnorm(model):
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats for m in model.modules())


def check_everywhere(kind, name, left=False):
    """At each boundary; returns the sizes of what one example takes.

    In float64 where there is BatchNorm: over a few examples in train mode it magnifies what is rounded by any factor.
    Likewise of texts padded on the left, where a decoder's gradients differ by 1.6e-5 with the kernels of some CPUs;
    rotary positions and norms are computed in float32 all the same.
    """
    model = a_model(kind, name)
    if left and name == "ModernBert":
        model.config.classifier_pooling = "mean"
    # Its convolution looks one position past the text, at what its embeddings make 0 there.
    padding = 0.0 if name == "DebertaV2" else 1e3
    precise = has_live_batchnorm(model)
    tolerance = 1e-9 if precise else 1e-5
    model = model.double() if precise or left else model
    groups, sizes = layer_groups(model), []
    if kind == "text":
        pad = model.config.pad_token_id or 0
        probe = ragged(3, seed=5, pad=pad, left=left)
        batches = [ragged(pad=pad, left=left), ragged(length=14, pad=pad, left=left)]
    else:
        probe, batches = pictures(kind, model, 2, seed=5), [pictures(kind, model)]
    probe, batches = as_in(model, probe), [as_in(model, batch) for batch in batches]
    for boundary in range(1, len(groups)):
        thaw(model, groups, boundary)
        torch.manual_seed(3)
        before = state(model)
        cut = find_cut(model, groups, probe)
        assert is_same(before, state(model)), "finding the cut left a trace"
        sizes.append(cut.nbytes(12))
        below = {n for group in groups[:boundary] for n in group.parameters}
        for batch in batches:
            count, length = count_of(batch), length_of(batch)
            rows = one_by_one(model, cut, batch, padding)
            assert is_same(before, state(model)), "recording left a trace"
            buffers = [(b, b.clone()) for b in model.buffers()]
            logits, gradients = step(model, groups, batch)
            for buffer, value in buffers:
                buffer.copy_(value)
            with replay.replaying(model, cut, rows, count, length, CPU):
                found, found_gradients = step(model, groups, batch)
            for buffer, value in buffers:
                buffer.copy_(value)
            torch.manual_seed(3)
            assert is_same(before, state(model)), "replaying left a trace"
            where = f"{name} at {groups[boundary].name}, of {cut.where}"
            assert (logits - logits[:1]).abs().max() > 1e-3 * logits.abs().max(), "examples do not differ"
            assert (found - logits).abs().max() <= tolerance * logits.abs().max(), where
            assert [g is None for g in gradients] == [g is None for g in found_gradients], where
            pairs = [(a, b) for a, b in zip(gradients, found_gradients, strict=True) if a is not None]
            total = sum(float(a.double().square().sum()) for a, _ in pairs) ** 0.5
            assert total > 1e-3, "nothing arrives"
            for a, b in pairs:
                assert (a - b).norm() <= tolerance * max(float(a.norm()), 0.03 * total), (
                    where
                )  # some are 0 but for rounding
        model.eval()
        with replay.replaying(model, cut, rows, count, length, CPU):
            used = set(architectures.first_uses(model, lambda batch=batch: model(**batch)))
        assert used & below <= COMPUTED.get(name, set()), where
        assert used - below, where
    return sizes


def slow(names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", [*TEXTS, *slow(MORE_TEXTS)])
def test_texts(name):
    """Recorded singly; padded to the longest, and further."""
    *between, head = check_everywhere("text", name)
    assert between[0] == 12 * 8 * 4, "a vector for each position, once"
    assert head == 8 * 4, "of the head's input the first token"


@pytest.mark.parametrize("name", LEFT)
def test_texts_that_are_padded_on_the_left(name):
    check_everywhere("text", name, left=True)


@pytest.mark.parametrize("name", [*IMAGES, *slow(MORE_IMAGES)])
def test_pictures(name):
    *_, head = check_everywhere("image", name)
    if name == "ViT":
        assert head == 8 * 4, "of 17 positions the class token"
    elif name == "Dinov2":
        assert head == 17 * 8 * 4, "class token and mean of the others"


@pytest.mark.parametrize("name", [*TIMM, *slow(MORE_TIMM)])
def test_timm(name):
    *_, head = check_everywhere("timm", name)
    if name == "test_resnet":
        assert head == 96 * 8, "pooled, in float64"


# ---- what is no place to cut ---------------------------------------------------------------------------------------


class Toy(nn.Module):
    """A frozen body, and a head that trains; `use` says how one meets the other."""

    def __init__(self, body, use=None, **more):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = body, nn.Linear(4, 2)
        for name, module in more.items():
            self.add_module(name, module)
        self.use = use or (lambda model, found: model.head(found))

    def forward(self, x):
        return self.use(self, self.body(x))


def groups_of(model):
    named = dict(model.named_parameters())

    def group(name, names):
        return LayerGroup(name, names, tuple(named[n].numel() for n in names), (True,) * len(names))

    return tuple(
        group(kind, tuple(n for n in named if n.startswith("head") == (kind == "head"))) for kind in ("stem", "head")
    )


def cut_of(model, batch=None):
    groups = groups_of(model)
    thaw(model, groups, 1)
    return find_cut(model, groups, batch or {"x": torch.randn(2, 3)})


class Body(nn.Module):
    def __init__(self, give):
        super().__init__()
        self.linear, self.give = nn.Linear(3, 4), give

    def forward(self, x):
        return self.give(self.linear(x), x)


def twice_for_more(model, found):
    return model.head(model.norm(found) if len(found) < 3 else model.norm(model.norm(found)))


def test_nothing_to_skip():
    model = tiny_bert(layers=1)
    groups = layer_groups(model)
    with pytest.raises(Refused, match=r"^embeddings, the input layer, trains$"):
        find_cut(model, groups, ragged())
    model.requires_grad_(False)
    with pytest.raises(Refused, match="nothing trains"):
        find_cut(model, groups, ragged())


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: Toy(Body(lambda h, x: (h, h @ h.T)), lambda m, f: m.head(f[0]) * f[1].sum(1, True)), "pair of exam"),
        (lambda: Toy(nn.Linear(3, 4), twice_for_more, norm=nn.LayerNorm(4)), "the batch decides"),
        (
            lambda: Toy(Body(lambda h, x: h if len(h) < 3 else (h,)), lambda m, f: m.head(f[0])),
            "structure of the output of body",
        ),
        (lambda: Toy(Body(lambda h, x: h[: (len(h) + 1) // 2])), "is not linear in"),
        (lambda: Toy(nn.Linear(3, 4), lambda m, f: m.head(torch.ones(2, 4))), "does not depend on what is frozen"),
        (lambda: Toy(nn.Linear(3, 4), lambda m, f: f.detach()), "not depend on anything that trains"),
    ],
    ids=["pairs", "calls", "form", "size", "unused", "no head"],
)
def test_refused(model, said):
    with pytest.raises(Refused, match=said):
        cut_of(model())


class Positions(nn.Module):
    """(texts, positions, 4) and something for each pair of positions, of each text or of all."""

    def __init__(self, of_each):
        super().__init__()
        self.table, self.of_each = nn.Embedding(50, 4), of_each

    def forward(self, ids):
        h = self.table(ids)
        return h, h @ h.transpose(1, 2) if self.of_each else self.table.weight[: ids.shape[1], :1] @ h[0, :, :1].T * 0


class Pairs(nn.Module):
    def __init__(self, of_each):
        super().__init__()
        self.body, self.head = Positions(of_each), nn.Linear(4, 2)

    def forward(self, input_ids, attention_mask):
        h, pairs = self.body(input_ids)
        return self.head((pairs.softmax(-1) @ h)[:, 0])


@pytest.mark.parametrize(
    ("of_each", "said"), [(True, "pair of positions of an example"), (False, "a tensor per position next to")]
)
def test_pairs_of_positions(of_each, said):
    with pytest.raises(Refused, match=said):
        cut_of(Pairs(of_each), ragged(2))


def test_what_is_random_is_computed_anew():
    """A dropout before the head belongs to what trains, one between frozen modules is off."""
    model = Toy(nn.Linear(3, 4), lambda m, f: m.head(m.live(f)), live=nn.Dropout(0.5))
    cut = cut_of(model)
    assert [name for name, _ in cut.calls] == ["body"]
    batch = {"x": torch.randn(16, 3)}
    model.eval()
    (rows,) = replay.record(model, [cut], batch)
    outputs = []
    for replayed in (False, True):
        model.train()
        torch.manual_seed(0)
        if replayed:
            with replay.replaying(model, cut, rows, 16, 0, CPU):
                outputs.append(model(**batch))
        else:
            outputs.append(model(**batch))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], model.eval()(**batch))
    model = Toy(nn.Linear(3, 4), lambda m, f: m.head(m.live(f)), live=nn.GELU())
    assert [name for name, _ in cut_of(model).calls] == ["body"], "it takes no less room than what it reads"


def test_a_module_without_parameters_that_counts_is_called():
    """A BatchNorm without weights, beside what trains, keeps its statistics."""
    model = Toy(nn.Linear(3, 4), lambda m, f: m.head(m.norm(f)), norm=nn.BatchNorm1d(4, affine=False))
    cut = cut_of(model)
    assert [name for name, _ in cut.calls] == ["body"]
    assert int(model.norm.num_batches_tracked) == 0


def test_what_nobody_reads_can_be_written_to():
    """An output that what trains does not depend on is a zero without memory, or one with it."""

    def use(model, found):
        found[1].add_(1)
        return model.head(found[0])

    model = Toy(Body(lambda h, x: (h, x * 2)), use)
    cut = cut_of(model)
    ((_, _, leaf),) = cut.stored.values()
    assert leaf.shape == (4,) and cut.nbytes(0) == 16
    batch = {"x": torch.randn(5, 3)}
    (rows,) = replay.record(model, [cut], batch)
    with pytest.raises(RuntimeError, match="single memory"), replay.replaying(model, cut, rows, 5, 0, CPU):
        model(**batch)
    allocating = Cut(cut.calls, cut.reads, allocates=True)
    with replay.replaying(model, allocating, rows, 5, 0, CPU):
        found = model(**batch)
    assert torch.equal(found, model(**batch))


def test_inputs_that_what_trains_reads_by_itself_are_told():
    """A picture that is looked at again above the boundary cannot be left out."""
    model = Toy(nn.Linear(3, 4))
    assert cut_of(model).reads == frozenset()
    model.forward = lambda x: model.head(model.body(x) + x.sum(1, True))
    assert cut_of(model).reads == {"x"}


def test_a_value_that_is_the_same_for_every_batch_is_kept_once():
    model = Toy(Body(lambda h, x: (h, h.new_full((4,), 3.0) * model.scale)), lambda m, f: m.head(f[0] * f[1]))
    model.scale = torch.ones(1)
    cut = cut_of(model)
    ((_, call),) = cut.calls.items()
    assert [leaf.stored for leaf in call.leaves] == [True, False]
    assert call.leaves[1].constant.tolist() == [3.0] * 4


# ---- recording for several boundaries at once ----------------------------------------------------------------------


def test_one_pass_records_all_boundaries_and_goes_no_further_than_it_must():
    """Modules inside others are recorded as parts of them; nothing above the last one is called."""
    model = alive(tiny_vit(layers=3)).eval()
    groups, cuts = layer_groups(model), []
    for boundary in range(1, len(groups)):
        thaw(model, groups, boundary)
        cuts.append(find_cut(model, groups, pictures("image", model, 2)))
    batch, calls = pictures("image", model), []
    hooks = [m.register_forward_pre_hook(lambda m, a, n=n: calls.append(n)) for n, m in model.named_modules()]
    together = replay.record(model, cuts, batch)
    assert [n for n in calls if n.rpartition(".")[0] == "vit.layers"] == [f"vit.layers.{i}" for i in range(3)]
    assert "classifier" not in calls
    calls.clear()
    replay.record(model, cuts[:2], batch)
    assert "vit.layers.0" in calls and "vit.layers.1" not in calls
    for hook in hooks:
        hook.remove()
    for cut, found in zip(cuts, together, strict=True):
        (alone,) = replay.record(model, [cut], batch)
        assert found.keys() == alone.keys() and all(torch.equal(found[n], alone[n]) for n in found)


def test_what_was_not_called_is_said():
    model = Toy(nn.Linear(3, 4))
    cut = cut_of(model)
    model.forward = lambda x: model.head(x.new_zeros(len(x), 4))
    with pytest.raises(Refused, match="body was not called for a batch"):
        replay.record(model, [cut], {"x": torch.randn(2, 3)})


def test_an_error_in_a_replay_leaves_the_model_as_it_was():
    model = alive(tiny_vit())
    groups = layer_groups(model)
    thaw(model, groups, 2)
    cut = find_cut(model, groups, pictures("image", model, 2))
    own = model.vit.embeddings.forward
    model.vit.embeddings.forward = own  # a forward of the instance's own stays, too
    batch = pictures("image", model)
    before = state(model)
    (rows,) = replay.record(model, [cut], batch)
    with pytest.raises(ZeroDivisionError), replay.replaying(model, cut, rows, 4, 0, CPU):
        assert not is_same(before, state(model))
        raise ZeroDivisionError
    assert is_same(before, state(model)) and vars(model.vit.embeddings)["forward"] is own
