"""Means and interpolations of weights, exact on small tensors, and BatchNorm's statistics."""

from __future__ import annotations

import torch
from torch.optim.swa_utils import update_bn

from hf_transfer.models.averaging import Mean, interpolate, moved_statistics, recompute_statistics
from tests.helpers import images, tiny_timm_resnet


def state(*values, count=1):
    return {"w": torch.tensor(values), "count": torch.tensor(count)}


def test_a_mean_is_that_of_the_states_and_leaves_counts_alone():
    mean = Mean().including(state(1.0, 2.0)).including(state(3.0, 6.0, count=9)).including(state(5.0, 1.0))
    assert mean.state()["w"].tolist() == [3.0, 3.0]
    assert mean.state()["count"] == 1 and mean.state()["w"].dtype == torch.float32


def test_a_mean_of_one_is_that_one_and_a_tried_one_can_be_dropped():
    third = torch.tensor([1 / 3, 1e-7])
    one = Mean().including({"w": third})
    one.including({"w": third * 2})
    assert torch.equal(one.state()["w"], third)


def test_an_interpolation_ends_at_both_models_exactly_and_keeps_the_head():
    torch.manual_seed(0)
    start, end = ({n: torch.randn(3) for n in ("w", "head")} for _ in range(2))
    del start["head"]
    assert torch.equal(interpolate(start, end, 1.0)["w"], end["w"])
    at_start = interpolate({**start, "head": torch.zeros(3)}, end, 0.0, kept=["head"])
    assert torch.equal(at_start["w"], start["w"]) and torch.equal(at_start["head"], end["head"])
    half = interpolate(start, end, 0.25)
    torch.testing.assert_close(half["w"], 0.75 * start["w"] + 0.25 * end["w"])
    assert torch.equal(half["head"], end["head"])


def test_statistics_are_computed_anew_as_torch_does_it():
    pixels = torch.tensor(images(12)["pixel_values"])
    model, other = tiny_timm_resnet(), tiny_timm_resnet()
    layers = [n for n, m in model.named_modules() if "momentum" in vars(m)]
    momentum = model.get_submodule(layers[0]).momentum
    recompute_statistics(model, layers, ({"pixel_values": part} for part in pixels.split(4)))
    update_bn(list(pixels.split(4)), other)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, dict(other.named_buffers())[name])
    assert model.get_submodule(layers[0]).momentum == momentum and not model.training


def test_only_statistics_that_differ_are_named():
    model = tiny_timm_resnet()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    assert moved_statistics(model, [before, before]) == []
    name = next(n for n in before if n.endswith("running_mean"))
    after = {**before, name: before[name] + 1}
    assert moved_statistics(model, [before, after]) == [name.removesuffix(".running_mean")]
