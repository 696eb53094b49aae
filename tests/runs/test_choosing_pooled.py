"""Runs whose head reads a pooled layer that the architecture does not offer: trained, loaded, resumed, repeated."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageClassification, ViTImageProcessor

from hf_transfer import UserError, fine_tune
from hf_transfer.features.convex_head import STRENGTHS, Problem
from hf_transfer.features.cross_validation import divisions, held_out_logits
from hf_transfer.inference.predictor import Predictor
from hf_transfer.runs import choosing_layers
from hf_transfer.runs.choosing import choose
from hf_transfer.runs.prepare import prepare
from hf_transfer.settings import Config
from hf_transfer.training.probe_features import features
from tests.helpers import PIXELS, tiny_timm_resnet, tiny_vit
from tests.runs.helpers import sentences, three_layers

QUIET = dict(use_cpu=True, log_level="error", report_to="none", save_strategy="no", preflight=False, calibrate=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """40 images whose class is the color of one pixel in each patch: `max` shows it, an average hardly."""
    folder, chance = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(40):
        picture = chance.integers(100, 140, (PIXELS, PIXELS, 3), dtype=np.uint8)
        picture[3::8, 5::8, i % 2] = 255
        (folder / "xy"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(picture).save(folder / "xy"[i % 2] / f"{i}.png")
    return str(folder)


def saved(model, folder):
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": PIXELS, "width": PIXELS}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return saved(tiny_vit(labels=3), tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    return saved(tiny_timm_resnet(labels=3), tmp_path_factory.mktemp("resnet"))


@pytest.fixture(scope="module")
def finished(vit, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "max"
    return fine_tune(vit, train_file=data, output_dir=str(out), pooling="max", num_train_epochs=1, **QUIET)


def test_the_run_says_what_was_changed_and_predicts(finished, data):
    out, results = finished.output_dir, finished.results
    change = results["pooling"]
    assert (change["pooling"], change["is_standard"]) == ("max", False)
    assert "stops with an error" in (out / "README.md").read_text()
    assert f"the maximum of `{change['layer']}`" in (out / "README.md").read_text()
    files = [f"{data}/x/{i}.png" for i in (0, 2, 4)]
    assert Predictor.load(out).predict(files) == finished.predict(files)
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        AutoModelForImageClassification.from_pretrained(out)


def test_run_yaml_repeats_it_bit_for_bit(finished, tmp_path):
    file = yaml.safe_load((finished.output_dir / "run.yaml").read_text()) | {"output_dir": str(tmp_path / "again")}
    again = fine_tune(**{n: v for n, v in file.items() if v is not None or n.startswith("pooling")})
    for name, value in finished.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


@pytest.mark.parametrize(("model", "layer"), [("vit", "layers.0"), ("resnet", "layer3.0")])
def test_a_resumed_run_ends_the_same(model, layer, data, tmp_path, request):
    name = request.getfixturevalue(model)
    keys = {**QUIET, "save_strategy": "epoch", "num_train_epochs": 2, "pooling": "mean", "pooling_layer": layer}
    whole = fine_tune(name, train_file=data, output_dir=str(tmp_path / "out"), strategy="full", **keys)
    first = sorted((tmp_path / "out").glob("checkpoint-*"), key=lambda one: int(one.name.rpartition("-")[2]))[0]
    resumed = fine_tune(
        name,
        train_file=data,
        output_dir=str(tmp_path / "again"),
        strategy="full",
        resume_from_checkpoint=str(first),
        **keys,
    )
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    dropped = json.loads((tmp_path / "again" / "results.json").read_text())["pooling"]["dropped"]
    assert dropped == {"vit": ["layers.1"], "resnet": ["layer4.0"]}[model]


def test_another_run_can_begin_with_it(finished, data, tmp_path):
    keys = dict(num_train_epochs=1, strategy="full", **QUIET)
    more = fine_tune(str(finished.output_dir), train_file=data, output_dir=str(tmp_path / "out"), **keys)
    assert more.results["pooling"] is None and more.results["head"]["type"] == "pooled"
    assert "stops with an error" in (tmp_path / "out" / "README.md").read_text()


def test_auto_compares_class_token_and_mean_of_each_layer(vit, data):
    keys = dict(model_name_or_path=vit, train_file=data, output_dir="o", **QUIET)
    unasked = choose(prepare(Config.from_sources({}, keys))).chosen
    assert "plain transformers could not load" in unasked.keys["pooling"].why and not unasked.candidates
    prepared = prepare(Config.from_sources({}, {**keys, "pooling": "auto"}))
    found, _ = choosing_layers.compare(prepared, fine_tunes=True)
    assert found is not None and found.own.group == "head" and found.margin == 2
    chosen = choose(prepared).chosen
    assert chosen.candidates == found.candidates
    cells = {(one.group, one.pooling) for one in found.candidates}
    assert cells == {(name, pooling) for name in ("layers.0", "layers.1") for pooling in ("cls", "mean")}
    assert chosen.keys["pooling"].why.count("cross-validation") == 1


@pytest.fixture(scope="module")
def averaging(tmp_path_factory):
    """A run on a small table whose head is the average of one on each layer of the upper half."""
    folder = tmp_path_factory.mktemp("average")
    file, model = sentences(folder / "train.csv"), three_layers(folder / "model")
    keys = dict(pooling="mean", pooling_layer="average", strategy="linear-probe", probe_solver="lbfgs", refit=False)
    return fine_tune(model, train_file=file, output_dir=str(folder / "out"), **keys, **QUIET), file


def test_the_average_of_heads_on_the_upper_half(averaging):
    result, _ = averaging
    results, trainer = result.results, result.trainer
    assert results["pooling"]["layers"] == ["layer.1", "layer.2"] == results["head"]["layers"]
    head = trainer.model.classifier
    x, y = features(trainer, head.output, trainer.train_dataset)
    problems = [Problem(results["problem_type"], part, y, 2) for part in x.split(head.parts, 1)]
    wanted = (
        sum(
            p.exact(results["probe"]["l2"]).logits(part)
            for p, part in zip(problems, x.split(head.parts, 1), strict=True)
        )
        / 2
    )
    with torch.no_grad():
        torch.testing.assert_close(head.output(x).double(), wanted, rtol=0, atol=1e-3 * float(wanted.abs().max()))
    draws = divisions(results["problem_type"], y, 1, trainer.args.seed)
    held = [held_out_logits(results["problem_type"], part, y, 2, draws) for part in x.split(head.parts, 1)]
    losses = [float(torch.nn.functional.cross_entropy(sum(one)[0] / 2, y)) for one in zip(*held, strict=True)]
    best = losses.index(results["probe"]["score"]) if results["probe"]["score"] in losses else int(np.argmin(losses))
    assert results["probe"]["l2"] == STRENGTHS[best] and results["probe"]["score"] == pytest.approx(losses[best], 1e-6)


def test_the_average_loads_here_answers_alike_and_is_said(averaging):
    result, file = averaging
    out = result.output_dir
    loaded, texts = Predictor.load(out), ["a a film fine", "film 3 dull", "good"]
    together = loaded.predict(texts)
    assert together == result.predict(texts)
    assert [one["score"] for one in together] == pytest.approx([loaded.predict([t])[0]["score"] for t in texts], 1e-6)
    assert loaded.evaluate()["metrics"] == result.metrics
    card = (out / "README.md").read_text()
    assert "the mean of `layer.1`, `layer.2`, and is the average of one linear head on each" in card
    assert "stops with an error" in card
    more = fine_tune(
        str(out), train_file=file, output_dir=str(out) + "-more", strategy="full", num_train_epochs=1, **QUIET
    )
    assert more.results["head"] == result.results["head"]


def test_the_average_is_trained_by_steps_and_resumed(averaging, tmp_path):
    """Activations of the frozen layers are not stored: the head reads more than the last of them."""
    first, file = averaging
    keys = {**QUIET, "save_strategy": "epoch", "num_train_epochs": 2, "pooling": "mean", "pooling_layer": "average"}
    keys |= {"strategy": "linear-probe", "boundary_cache": "memory", "learning_rate": 1e-2}
    model = first.results["model"]
    whole = fine_tune(model, train_file=file, output_dir=str(tmp_path / "out"), **keys)
    begin = sorted((tmp_path / "out").glob("checkpoint-*"), key=lambda one: int(one.name.rpartition("-")[2]))[0]
    again = fine_tune(model, train_file=file, output_dir=str(tmp_path / "b"), resume_from_checkpoint=str(begin), **keys)
    assert "the head reads layer.1 too" in whole.results["stages"][0]["cache"]["why"]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("model", "keys", "sentence"),
    [
        ("vit", {"pooling": "max", "pooling_layer": "layers.9"}, "no layer group 'layers.9'"),
        ("vit", {"pooling": "mean", "adapter": "lora"}, "an adapter is saved without the backbone"),
        ("vit", {"pooling": "mean", "head": "mlp"}, "its head is an MLP"),
        ("resnet", {"pooling": "cls"}, "it has no cls token"),
        ("vit", {"pooling": "auto", "pooling_layer": "average"}, "'average' is only for pooling: mean or max"),
        ("vit", {"pooling_layer": "average"}, "'average' is only for pooling: mean or max"),
        ("vit", {"pooling": "mean", "pooling_layer": "averge"}, "Did you mean 'average'"),
    ],
)
def test_keys_that_do_not_fit(model, keys, sentence, data, request):
    config = dict(model_name_or_path=request.getfixturevalue(model), train_file=data, output_dir="o", **QUIET)
    with pytest.raises(UserError, match=sentence):
        choose(prepare(Config.from_sources({}, {**config, **keys})))


def test_what_the_model_reads_anyway_changes_nothing(resnet, data):
    keys = dict(model_name_or_path=resnet, train_file=data, output_dir="o", strategy="full", **QUIET)
    prepared = choose(prepare(Config.from_sources({}, {**keys, "pooling": "mean", "pooling_layer": "last"})))
    assert prepared.chosen.change is None


def test_the_maximum_over_the_tokens_of_a_text_is_the_same_in_any_batch(tiny_bert_folder, tmp_path):
    texts = [f"{'a ' * (i % 5)}film {'fine' if i % 2 else 'dull'}" for i in range(24)]
    file = tmp_path / "train.csv"
    file.write_text("\n".join(["text,label", *(f"{text},{'xy'[i % 2]}" for i, text in enumerate(texts))]) + "\n")
    keys = dict(pooling="max", pooling_layer="layer.0", strategy="full", num_train_epochs=1)
    result = fine_tune(tiny_bert_folder, train_file=str(file), output_dir=str(tmp_path / "out"), **keys, **QUIET)
    assert result.results["pooling"]["dropped"] == ["layer.1"]
    loaded = Predictor.load(tmp_path / "out")
    together = [answer["score"] for answer in loaded.predict(texts)]
    alone = [loaded.predict([text])[0]["score"] for text in texts[:5]]
    assert together[:5] == pytest.approx(alone, abs=1e-6)
    assert together == pytest.approx([answer["score"] for answer in result.predict(texts)], abs=1e-6)


def test_on_few_images_far_from_the_pretraining_more_than_the_head_trains(resnet, tmp_path):
    """Random layers know no more of the brightness than the pixels do."""
    chance = np.random.default_rng(0)
    for i in range(30):
        (tmp_path / "xyz"[i % 3]).mkdir(exist_ok=True)
        picture = chance.integers(0, 70, (PIXELS, PIXELS, 3), dtype=np.uint8) + np.uint8(70 * (i % 3))
        Image.fromarray(picture).save(tmp_path / "xyz"[i % 3] / f"{i}.png")
    keys = dict(model_name_or_path=resnet, train_file=str(tmp_path), output_dir="o", **QUIET)
    prepared = prepare(Config.from_sources({}, keys))
    before = {name: value.clone() for name, value in prepared.loaded.model.state_dict().items()}
    chosen = choose(prepared).chosen
    assert chosen.keys["strategy"].value == "two-phase"
    assert "8 training examples per class are few, but frozen features (1.00" in chosen.keys["strategy"].why
    assert chosen.rule.startswith("few per class, distant")
    assert all(torch.equal(value, before[name]) for name, value in prepared.loaded.model.state_dict().items())
    quick = choose(prepare(Config.from_sources({}, {**keys, "effort": "quick"}))).chosen
    assert quick.keys["strategy"].value == "linear-probe"
