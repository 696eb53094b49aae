"""The mean over the tokens of any layer, read by a standard model: exact, and the same when loaded by transformers."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hf_transfer import UserError, layer_groups
from hf_transfer.models.pooling_architectures import ARCHITECTURES, REFUSED
from hf_transfer.models.pooling_layer import set_standardizing, with_mean_pooling
from hf_transfer.training.linear_probe import find_head
from tests.architectures import HUGGING_FACE

BERT, MODERN = "BertForSequenceClassification", "ModernBertForSequenceClassification"
CASES = list(ARCHITECTURES)
ADDED = [name for name, a in ARCHITECTURES.items() if a.block is not None]


def build(name: str, **keys: Any) -> Any:
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**(HUGGING_FACE[name] | {"num_labels": 3} | keys))).eval()
    # Initialized LayerNorms and biases are trivial and weights are small, which would hide mistakes.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[4, 9, 17, 33, 5, 28, 6], [8, 21, 40, 7, 3, 3, 3]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def read(model: Any, inputs: dict[str, torch.Tensor], path: str) -> torch.Tensor:
    """The input of a module in a forward pass."""
    seen = {}
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    model(**inputs)
    hook.remove()
    return seen["x"]


@torch.no_grad()
def hidden_states(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return model.base_model(**inputs, output_hidden_states=True).hidden_states


def mean_and_first(states: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([s[m == 1].mean(0) for s, m in zip(states, mask, strict=True)]), states[:, 0]


def eps_of(name: str) -> float:
    return {"DebertaForSequenceClassification": 1e-7, "DebertaV2ForSequenceClassification": 1e-7}.get(name, 1e-12)


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("name", ADDED)
def test_the_head_reads_the_mean_of_the_layer(name: str, keep: int):
    model, inputs = build(name), batch()
    mean, first = mean_and_first(hidden_states(model, inputs)[keep], inputs["attention_mask"])
    change = with_mean_pooling(model, keep)
    state = read(model, inputs, ARCHITECTURES[name].dense)
    state = state[:, 0] if state.ndim == 3 else state
    norm = nn.LayerNorm(mean.shape[-1], eps=eps_of(name), elementwise_affine=False)
    assert (state - norm(norm(30 * mean + first))).abs().max() < 1e-5
    assert change.max_error < 1e-5
    assert (change.kept, change.dropped) == (keep, 3 - keep)
    assert len(model.base_model.get_submodule(ARCHITECTURES[name].layers)) == keep + 1 == model.config.num_hidden_layers


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_modernbert_reads_the_mean_of_the_layer(keep: int):
    model, inputs = build(MODERN), batch()
    outputs: list[torch.Tensor] = []
    hook = model.model.layers[keep - 1].register_forward_hook(lambda m, args, out: outputs.append(out))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    mean, _ = mean_and_first(model.model.final_norm(outputs[0]), inputs["attention_mask"])
    change = with_mean_pooling(model, keep)
    assert (read(model, inputs, "head.dense") - mean).abs().max() < 1e-5
    assert change.added is None
    assert model.config.classifier_pooling == "mean"
    assert len(model.config.layer_types) == keep == model.config.num_hidden_layers


@pytest.mark.parametrize("name", [n for n in ADDED if n != "DebertaV2ForSequenceClassification"])
def test_no_layer_is_the_mean_of_the_embeddings(name: str):
    model, inputs = build(name), batch()
    mean, first = mean_and_first(hidden_states(model, inputs)[0], inputs["attention_mask"])
    with_mean_pooling(model, 0)
    state = read(model, inputs, ARCHITECTURES[name].dense)
    state = state[:, 0] if state.ndim == 3 else state
    norm = nn.LayerNorm(mean.shape[-1], eps=eps_of(name), elementwise_affine=False)
    assert (state - norm(norm(30 * mean + first))).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "attention"),
    [(n, "eager") for n in CASES] + [(n, "sdpa") for n in CASES if getattr(transformers, n)._supports_sdpa],
)
def test_plain_transformers_loads_the_same_model(name: str, attention: str, tmp_path):
    model, inputs = build(name), batch()
    with_mean_pooling(model, 2)
    with torch.no_grad():
        expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    auto = transformers.AutoModelForSequenceClassification
    loaded, info = auto.from_pretrained(tmp_path, attn_implementation=attention, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert loaded.config._attn_implementation == attention
    with torch.no_grad():
        assert (loaded.eval()(**inputs).logits - expected).abs().max() < 1e-5
    assert [g.name for g in layer_groups(loaded)] == [g.name for g in layer_groups(model)]


@pytest.mark.parametrize("name", CASES)
def test_padding_does_not_matter(name: str):
    model, inputs = build(name), batch()
    with_mean_pooling(model, 2)
    alone = {key: value[1:, :4] for key, value in inputs.items()}
    with torch.no_grad():
        assert (model(**inputs).logits[1] - model(**alone).logits[0]).abs().max() < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_the_added_layer_is_part_of_the_head(name: str):
    model = build(name)
    with_mean_pooling(model, 2)
    groups, added = layer_groups(model), ARCHITECTURES[name].block is not None
    prefix = ARCHITECTURES[name].layers.rpartition(".")[2]
    assert [g.name for g in groups] == ["embeddings", f"{prefix}.0", f"{prefix}.1", "head"]
    head = set(groups[-1].parameters)
    path = f"{model.base_model_prefix}.{ARCHITECTURES[name].layers}.2."
    assert {n for n, _ in model.named_parameters() if n.startswith(path) or ".pooler." in n} <= head
    assert any(n.startswith(path) for n in head) == added
    assert sum(len(g.parameters) for g in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("name", CASES)
def test_the_last_layer_reads_the_standardized_state(name: str):
    model = build(name)
    with_mean_pooling(model, 2)
    architecture = ARCHITECTURES[name]
    width = model.get_submodule(architecture.dense).in_features
    mean, sd = torch.randn(width), torch.rand(width) * 3 + 0.01
    last = set_standardizing(model, mean, sd)
    assert last is model.get_submodule(architecture.last)
    z = torch.randn(500, width)
    outputs = head_features(model, architecture, mean + sd * z)
    if architecture.norm is not None:  # a LayerNorm between them standardizes each example
        z = nn.functional.layer_norm(z, (width,))
    for one, other in zip(outputs.T, z.T, strict=True):
        assert torch.corrcoef(torch.stack([one, other]))[0, 1] > 0.98


@torch.no_grad()
def head_features(model: Any, architecture: Any, states: torch.Tensor) -> torch.Tensor:
    """The input of the last layer for states of the first token, through the model's own head."""
    hook = model.get_submodule(architecture.dense).register_forward_pre_hook(lambda _, args: (states,))
    one = {"input_ids": torch.tensor([[4, 9]]).repeat(len(states), 1)}
    features = read(model, one, architecture.last)
    hook.remove()
    return features


@pytest.mark.parametrize("name", CASES)
def test_the_solver_for_heads_finds_the_same_layer(name: str):
    model = build(name)
    with_mean_pooling(model, 1)
    names = [n for n, _ in model.named_parameters()]
    groups, args = layer_groups(model), SimpleNamespace(probe_solver="lbfgs")
    trainer: Any = SimpleNamespace(model=model, layer_groups=groups, trainable=names, args=args)
    width = model.get_submodule(ARCHITECTURES[name].dense).in_features
    assert find_head(trainer) is set_standardizing(model, torch.zeros(width), torch.ones(width))


def test_the_added_layer_trains():
    model, inputs = build(BERT), batch()
    with_mean_pooling(model, 1)
    model(**inputs, labels=torch.tensor([0, 2])).loss.backward()
    layer = model.bert.encoder.layer[1]
    for part in (layer.attention.self.query, layer.attention.self.value, layer.output.dense):
        assert part.weight.grad.abs().sum() > 0
    # keys and the feed-forward input get gradients once the zeros in front of them have moved
    for part in (layer.attention.self.key, layer.intermediate.dense):
        assert part.weight.abs().sum() > 0


def test_what_was_changed_is_data():
    model = build(BERT)
    change = with_mean_pooling(model, 1)
    assert change.added == "bert.encoder.layer.1"
    assert json.loads(json.dumps(change.to_dict())) == {
        "pooling": "mean",
        "architecture": BERT,
        "kept": 1,
        "dropped": 2,
        "added": "bert.encoder.layer.1",
        "max_error": change.max_error,
    }


def test_a_changed_model_can_be_changed_again():
    once, twice = build(BERT), build(BERT)
    with_mean_pooling(once, 1)
    with_mean_pooling(twice, 2)
    assert with_mean_pooling(twice, 1).dropped == 1
    with torch.no_grad():
        assert (once(**batch()).logits - twice(**batch()).logits).abs().max() < 1e-6
    with pytest.raises(UserError, match=r"it has 1 layer\."):
        with_mean_pooling(twice, 2)


def test_the_change_draws_nothing_and_keeps_the_mode():
    model = build(BERT).train()
    state = torch.get_rng_state()
    with_mean_pooling(model, 3)
    assert torch.equal(state, torch.get_rng_state())
    assert all(m.training for m in model.modules())


def test_deberta_without_shared_keys_or_with_talking_heads():
    v2 = build("DebertaV2ForSequenceClassification", share_att_key=False, conv_kernel_size=0)
    assert with_mean_pooling(v2, 0).max_error < 1e-5
    assert with_mean_pooling(build("DebertaForSequenceClassification", talking_head=True), 1).max_error < 1e-5


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str):
    with pytest.raises(UserError, match=r"mean of a layer: (all its depths|its position bias|its layers)"):
        with_mean_pooling(build(name), 1)


def test_refused_models():
    with pytest.raises(UserError, match="no such change is known for its class"):
        with_mean_pooling(build("GPT2ForSequenceClassification"), 1)
    with pytest.raises(UserError, match="configured as a decoder"):
        with_mean_pooling(build(BERT, is_decoder=True), 1)
    with pytest.raises(UserError, match="off by"):
        model = build(BERT)
        model.bert.encoder.layer[1].attention.self.register_forward_hook(lambda m, args, out: (out[0] * 2, out[1]))
        with_mean_pooling(model, 1)


@pytest.mark.parametrize(
    ("name", "keep", "message"),
    [
        (BERT, 4, "it has 3 layers. Use a number from 0 to 3, where 0 is the mean of the embeddings"),
        (BERT, -1, "it has 3 layers"),
        (MODERN, 0, "without layers it has no backbone. Use a number from 1 to 3"),
        ("DebertaV2ForSequenceClassification", 0, "its convolution follows the first layer"),
    ],
)
def test_layers_out_of_range(name: str, keep: int, message: str):
    model = build(name)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        with_mean_pooling(model, keep)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_constant_elements_have_no_influence_and_wrong_shapes_are_refused():
    model = build(BERT)
    with_mean_pooling(model, 1)
    sd = torch.ones(8)
    sd[3] = 0
    set_standardizing(model, torch.ones(8), sd)
    assert model.bert.pooler.dense.weight[3].abs().sum() == 0 == model.bert.pooler.dense.bias[3]
    for mean, wrong in ((torch.ones(7), sd), (torch.ones(8), -sd), (torch.full((8,), torch.nan), sd)):
        with pytest.raises(ValueError, match="finite"):
            set_standardizing(model, mean, wrong)


def test_an_unknown_activation_is_refused():
    model = build(MODERN, classifier_activation="mish")
    with pytest.raises(UserError, match="no nearly linear range is known for the head's activation 'mish'"):
        set_standardizing(model, torch.zeros(8), torch.ones(8))
