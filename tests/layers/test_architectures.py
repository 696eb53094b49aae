"""Every architecture: all parameters placed, in the order of the forward pass, rates as timm's and ELECTRA's own."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import timm
import torch
import transformers

from hf_transfer import layer_groups
from hf_transfer.layers.architectures import ARCHITECTURE_RULES
from tests import architectures as arch
from tests.helpers import tiny_bert

DOCUMENT = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text()


# Groups that are used before an earlier one is done: no more than the reasons explain.
OVERLAPS = {
    "DebertaForSequenceClassification": 1,
    "cait_xxs24_224": 24,
    "convit_tiny": 10,
    "xcit_nano_12_p8_224": 12,
    "coat_tiny": 4,
    "volo_d1_224": 19,
    "levit_128s": 1,
    "repvit_m1": 1,
    "efficientvim_m1": 1,
}


def assert_covers(model, groups) -> None:
    placed = [name for group in groups for name in group.parameters]
    assert sorted(placed) == sorted(name for name, _ in model.named_parameters()), "each parameter in one group"
    assert len({g.name for g in groups}) == len(groups) and groups[-1].name == "head"
    assert groups[0].name in ("stem", "embeddings") and not any(g.name.startswith("group.") for g in groups)
    assert all(g.parameters for g in groups)


def assert_order(name, groups, uses) -> None:
    found = arch.overlaps(groups, uses)
    assert len(found) == OVERLAPS.get(name, 0), found
    # The hooks saw the model at work, and the head last.
    assert len(uses) > 0.8 * sum(len(g.parameters) for g in groups)
    last = max(uses, key=uses.get)
    assert last in groups[-1].parameters or name in arch.REASONS


@pytest.mark.parametrize("name", arch.HUGGING_FACE)
def test_hugging_face(name):
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model = arch.hugging_face(name)
    groups = layer_groups(model)
    assert_covers(model, groups)
    uses = arch.first_uses(model, lambda: model(**arch.inputs_of(model)))
    assert_order(name, groups, uses)
    assert len(groups) == arch.number_of_blocks(name) + 2, "a group per block, the stem and the head"
    assert f"| `{name}` | {arch._cells(groups)} |" in DOCUMENT, "run `make architectures`"
    # The head is what a data set with other labels replaces: with it alone changed, only logits differ.
    head = set(groups[-1].parameters)
    assert any(model.get_parameter(n).shape[0] == 4 for n in head), "its outputs are the labels"
    base = copy.deepcopy(model)
    with torch.no_grad():
        for n in head:
            model.get_parameter(n).add_(0.5)
        inputs = arch.inputs_of(model)
        assert not torch.equal(model(**inputs).logits, base(**inputs).logits)


@pytest.fixture(scope="module")
def of_timm(request):
    """(name, model): pytest puts the tests of a model one after the other, so that it is made once."""
    if not timm.is_model(request.param):
        pytest.skip(f"timm {timm.__version__} has no {request.param}")
    return request.param, arch.from_timm(request.param)


@pytest.mark.parametrize("of_timm", arch.TIMM, indirect=True)
def test_timm(of_timm):
    name, model = of_timm
    groups = layer_groups(model)
    assert_covers(model, groups)
    assert_order(name, groups, arch.first_uses(model, lambda: model(arch.timm_input(model))))
    assert f"`{name}` | {arch._cells(groups)} |" in DOCUMENT, "run `make architectures`"
    classifier = model.pretrained_cfg["classifier"]
    declared = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    assert all(any(n.startswith(f"{d}.") for d in declared) for n in groups[-1].parameters), "timm's own classifier"


@pytest.mark.parametrize("of_timm", [n for n in arch.TIMM if n not in arch.UNDECLARED_BY_TIMM], indirect=True)
def test_rates_are_timms_own(of_timm, decay=0.75):
    """`param_groups_layer_decay` gives its last block `decay` and the head 1; we give both 1 (see `as_ours`)."""
    _, model = of_timm
    theirs = arch.timm_scales(model, decay)
    ours = arch.our_scales(layer_groups(model), decay)
    assert ours == pytest.approx({n: arch.as_ours(s, decay) for n, s in theirs.items()}, rel=1e-12)
    assert len(set(ours.values())) > 3


def test_every_family_of_timm_is_here():
    """One variant of each module that holds models; a new family of a newer timm shows here."""
    families = {timm.models.model_entrypoint(n).__module__.rpartition(".")[2] for n in timm.list_models()}
    here = {timm.models.model_entrypoint(n).__module__.rpartition(".")[2] for n in arch.TIMM if timm.is_model(n)}
    if timm.__version__ == "1.0.31":
        assert families == here
    assert len(families & here) > 60


def test_rates_are_electras_but_for_two_steps():
    """Clark et al. 2020, in their code: lr · d^(layers + 2 − depth), embeddings at depth 0, layer i at i + 1.

    The top layer thus gets d², and no layer gets d: we count from the top layer instead, so that ours = theirs / d².
    """
    layers, d = 4, 0.8
    groups = layer_groups(tiny_bert(layers=layers))
    ours = arch.our_scales(groups, d)
    for depth, group in enumerate(groups[:-1]):
        for name in group.parameters:
            assert ours[name] == pytest.approx(d ** (layers + 2 - depth) / d**2)
    assert {ours[n] for n in groups[-1].parameters} == {1.0} == {d ** (layers + 2 - (layers + 2))}


def test_the_document_names_what_is_left_out():
    assert all(f"- {name}: {reason}." in DOCUMENT for name, reason in arch.LEFT_OUT.items())
    assert "WRONG" not in DOCUMENT and "differs" not in DOCUMENT
    assert set(arch.REASONS) <= {*arch.HUGGING_FACE, *arch.TIMM}


def test_every_rule_is_of_an_architecture_that_is_tested():
    here = [n for n in arch.HUGGING_FACE if hasattr(transformers, n)]  # an older transformers lacks some
    tested = {getattr(transformers, n).config_class.model_type for n in here}
    tested |= {type(arch.from_timm(n)).__name__ for n in arch.UNDECLARED_BY_TIMM}
    assert len(set(ARCHITECTURE_RULES) - tested) <= len(arch.HUGGING_FACE) - len(here)


@pytest.mark.parametrize(
    ("make", "targets", "head"),
    [
        (lambda: arch.hugging_face("BertForSequenceClassification"), ["query"], ["classifier"]),
        (lambda: arch.hugging_face("SwinForImageClassification"), ["q_proj"], ["classifier"]),
        (lambda: arch.hugging_face("ConvNextV2ForImageClassification"), ["pwconv1"], ["classifier"]),
        (lambda: arch.hugging_face("Qwen2ForSequenceClassification"), ["v_proj"], ["score"]),
        (lambda: timm.create_model("pit_ti_224", num_classes=4), ["qkv"], ["head"]),
        (lambda: timm.create_model("test_vit", num_classes=4), ["qkv"], ["head"]),
    ],
)
def test_adapters_are_in_their_hosts_groups(make, targets, head):
    """The same groups inside peft's wrapper, adapters with their hosts, the saved head last."""
    model = make()
    plain = layer_groups(model)
    found = [n for n, m in model.named_modules() if n.rpartition(".")[2] in targets]
    if not found:
        targets = [next(n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear))]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, modules_to_save=head))
    groups = layer_groups(wrapped)
    assert [g.name for g in groups] == [g.name for g in plain]
    adapters = [(g.name, n) for g in groups for n in g.parameters if "lora_" in n]
    assert adapters and all(g == "head" or f".{g}." in f".{n}" or g in ("stem", "embeddings") for g, n in adapters)
    assert any("modules_to_save" in n for n in groups[-1].parameters)
    trains = {n for n, p in wrapped.named_parameters() if p.requires_grad}
    assert trains == {n for g in groups for n, free in zip(g.parameters, g.requires_grad, strict=True) if free}


@pytest.mark.parametrize(
    "name", ["Bert", "DebertaV2", "MPNet", "XLNet", "GPT2", "Nystromformer", "Gemma", "Llama", "DistilBert"]
)
def test_a_model_of_one_layer(name):
    cls = getattr(transformers, f"{name}ForSequenceClassification")
    keys = {**arch.HUGGING_FACE[cls.__name__]}
    keys |= {"conv_kernel_size": 0} if "conv_kernel_size" in keys else {}  # it follows the first of several layers
    keys |= {k: 1 for k in ("num_hidden_layers", "n_layer", "n_layers") if k in keys}
    model = cls(cls.config_class(num_labels=4, **keys))
    groups = layer_groups(model)
    assert_covers(model, groups)
    assert len(groups) == 3


def test_a_stage_cannot_hide_its_blocks():
    """The count of groups is from the configuration: stages taken for blocks would be seen."""
    model = arch.hugging_face("SwinForImageClassification")
    merged = layer_groups(model, [("embeddings", "stem"), ("encoder|layernorm", 1), ("^classifier", "head")])
    assert len(merged) == 3 != arch.number_of_blocks("SwinForImageClassification") + 2
