"""Exported models: what they hold, what they refuse, and that nothing wrong is kept."""

from __future__ import annotations

import importlib.util
import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from hf_transfer import UserError, fine_tune
from hf_transfer.cli.program import main
from hf_transfer.config.arguments.export import ExportArguments
from hf_transfer.errors import WorkFailed
from hf_transfer.inference import onnx_files
from hf_transfer.inference.benchmarking import benchmark
from hf_transfer.inference.exported import About, ExportedModel
from hf_transfer.inference.exporting import Exporter, export
from hf_transfer.inference.predictor import Predictor
from tests.helpers import TOKENS, small_tokenizer, tiny_bert, tiny_timm_vit, tiny_vit, with_mlp

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason='needs pip install "hf-transfer-toolkit[onnx]"')
WORDS = ("the", "film", "is", "of", "a", "and", "it", "that")


def save(model, folder, names=("bad", "good"), problem_type="single_label_classification") -> str:
    """A saved text model with these labels, as `save_pretrained` leaves it."""
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    model.config.problem_type = problem_type
    with torch.no_grad():  # far from chance, so that labels mean something
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    small_tokenizer(16).save_pretrained(folder)
    return str(folder)


def table(folder, label, size=40) -> str:
    """Labeled texts of 1 to 8 words."""
    path = folder / "table.jsonl"
    rows = ({"text": " ".join(WORDS[i % 3 : i % 3 + 1 + i % 6]), "label": label(i)} for i in range(size))
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def table_as_answered(predictor, folder) -> str:
    """The same texts, labeled as a model answers them: its accuracy is 1."""
    rows = Path(table(folder, lambda i: "bad")).read_text().splitlines()
    answers = predictor.predict([json.loads(row)["text"] for row in rows])
    return table(folder, lambda i: answers[i]["label"])


@pytest.fixture(scope="module")
def text_model(tmp_path_factory) -> str:
    return save(tiny_bert(vocab_size=TOKENS), tmp_path_factory.mktemp("models") / "text")


@pytest.fixture(scope="module")
def in_pt2(text_model, tmp_path_factory) -> str:
    return str(export(text_model, tmp_path_factory.mktemp("exports") / "pt2", format="pt2").folder)


# ---- refused before anything is loaded -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "RUN and OUT are needed"),
        (["run"], "OUT is missing"),
        (["run", "a", "--output_dir", "b"], "'a' was given as OUT too"),
        (["run", "taken"], "'taken' exists already"),
        (["run", "out", "--format", "onyx"], "Did you mean 'onnx'?"),
        (["run", "out", "--format", "pt2", "--half", "--quantize", "int8"], "half and quantize contradict each other"),
        (["run", "out", "--format", "pt2", "--quantize", "int8"], "int8 is possible for onnx, and the format is pt2"),
        (["run", "out", "--format", "merged", "--half"], "half: a merged model keeps the precision"),
        (["run", "out", "--format", "pt2", "--max_drop", "0.1"], "max_drop: it has no effect without half or quantize"),
        (["run", "out", "--format", "pt2", "--half", "--max_drop", "-1"], "expected a number at least 0"),
        (["./nowhere", "out", "--format", "pt2"], "'./nowhere' does not exist"),
    ],
)
def test_wrong_words(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", None)
    assert main(["export", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err and not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name.startswith("onnx") else name)
    assert main(["export", "run", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "onnx needs onnx and onnxscript and onnxruntime, which are not installed" in err
    assert 'pip install "hf-transfer-toolkit[onnx]"' in err and "--format pt2" in err


def test_an_unfinished_run_says_how_to_finish(tmp_path, capsys):
    (tmp_path / "run" / "checkpoint-40").mkdir(parents=True)
    for verb in (
        ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "pt2"],
        ["predict", str(tmp_path / "run"), "x"],
    ):
        assert main(verb) == 2
        err = capsys.readouterr().err
        assert "holds an unfinished run: checkpoint-40 and no model" in err and "--resume_from_checkpoint auto" in err


# ---- what an export is ----------------------------------------------------------------------------------------------


def test_an_export_answers_like_its_model_by_folder_and_by_file(text_model, in_pt2, capsys):
    texts = ["the film", "a", "it is that of a film and it is that of a film and the"]
    own = Predictor.load(text_model).predict(texts)
    for place in (in_pt2, f"{in_pt2}/model.pt2"):
        predictor = Predictor.load(place, allow_pickle=True)
        assert isinstance(predictor.model, ExportedModel) and not list(predictor.model.parameters())
        for one, other in zip(own, predictor.predict(texts), strict=True):
            assert one["label"] == other["label"]
            assert list(one["scores"].values()) == pytest.approx(list(other["scores"].values()), abs=1e-5)
    assert main(["predict", in_pt2, *texts, "--allow_pickle"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["label"] for line in lines] == [answer["label"] for answer in own]


def test_what_an_export_says_of_itself(in_pt2):
    about = About.load(Path(in_pt2))
    assert (about.format, about.precision, about.task) == ("pt2", "fp32", "text-classification")
    assert about.longest == 16 and about.checked["on"] == "made-up inputs" and about.checked["examples"] == 64
    assert about.checked["max_difference"] <= 1e-4 and set(about.versions) >= {"torch", "transformers"}


def test_a_pickle_is_not_read_unasked(in_pt2):
    with pytest.raises(UserError, match="may hold pickles"):
        Predictor.load(in_pt2)


def test_an_export_is_measured_like_its_model(text_model, in_pt2, tmp_path):
    data = table(tmp_path, lambda i: ("bad", "good")[i % 2])
    own, other = (Predictor.load(p, allow_pickle=True).evaluate(data)["metrics"] for p in (text_model, in_pt2))
    assert own == pytest.approx(other, abs=1e-5)


def test_what_only_weights_can_do_is_refused(in_pt2, tmp_path):
    predictor = Predictor.load(in_pt2, allow_pickle=True)
    with pytest.raises(UserError, match="is an exported model, which has no weights for torch"):
        fine_tune(in_pt2, table(tmp_path, lambda i: "ab"[i % 2]), output_dir=str(tmp_path / "out"), log_level="error")
    for refused in (
        lambda: predictor.predict("the film", features=True),
        lambda: predictor.save_merged(tmp_path / "merged"),
        lambda: Exporter(predictor),
    ):
        with pytest.raises(UserError, match="an exported model gives nothing but logits"):
            refused()


def test_a_batch_that_the_model_does_not_read_is_refused(in_pt2):
    model = Predictor.load(in_pt2, allow_pickle=True).model
    ids = torch.ones(2, 17, dtype=torch.long)
    with pytest.raises(UserError, match="17 tokens per text is longer than the 16"):
        model(input_ids=ids, attention_mask=ids, token_type_ids=ids * 0)
    with pytest.raises(UserError, match="the batch has no token_type_ids and no attention_mask"):
        model(input_ids=ids[:, :4])
    about = replace(model.about, inputs=("pixel_values",), longest=None, image_shape=(3, 32, 32))
    with pytest.raises(UserError, match="images of 3 × 32 × 32"):
        about.check_batch({"pixel_values": torch.zeros(1, 3, 48, 32)})


def test_a_file_alone_and_a_folder_without_its_file(in_pt2, tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"no archive")
    with pytest.raises(UserError, match="is a file alone"):
        Predictor.load(tmp_path / "model.pt2")
    for name in ("export.json", "config.json"):
        (tmp_path / name).write_bytes((Path(in_pt2) / name).read_bytes())
    small_tokenizer(16).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"cannot be read by torch\.export"):
        Predictor.load(tmp_path, allow_pickle=True)
    (tmp_path / "model.pt2").unlink()
    with pytest.raises(UserError, match=r"has no model\.pt2"):
        Predictor.load(tmp_path, allow_pickle=True)
    (tmp_path / "export.json").write_text("{}")
    with pytest.raises(UserError, match="is not what an export writes"):
        Predictor.load(tmp_path, allow_pickle=True)


# ---- nothing wrong is kept -------------------------------------------------------------------------------------------


def test_an_export_that_answers_otherwise_is_not_kept(text_model, tmp_path, monkeypatch):
    from hf_transfer.inference import formats

    whole = formats.FORMATS["pt2"]

    def opened(path):
        run = whole.open(path)
        return lambda inputs: run(inputs) + 2e-4 * torch.tensor([1.0, -1.0])

    monkeypatch.setitem(formats.FORMATS, "pt2", replace(whole, open=opened))
    with pytest.raises(WorkFailed, match=r"logits differ by up to 0\.000\d+ \(0\.0001 is allowed\)"):
        export(text_model, tmp_path / "out", format="pt2")
    assert not list(tmp_path.iterdir())


def test_a_loss_of_accuracy_is_measured_and_refused(text_model, tmp_path):
    """A form that answers the opposite, of labels that the model gives."""
    predictor = Predictor.load(text_model)
    data = table_as_answered(predictor, tmp_path)
    exporter = Exporter(predictor, data)
    other = replace(predictor, model=opposite(predictor.model))
    arguments = ExportArguments("out", "pt2", half=True)
    with pytest.raises(WorkFailed, match=r"fp16 loses 1\.0000 of accuracy \(1\.0000 → 0\.0000 on 40 examples\)"):
        exporter._accuracy(other, arguments)
    found = exporter._accuracy(other, replace(arguments, max_drop=1.0))
    assert (found["before"], found["after"], found["examples"]) == (1.0, 0.0, 40)


def opposite(model):
    """A model with the logits of the other class."""
    made = deepcopy(model)
    with torch.no_grad():
        made.classifier.weight.neg_()
        made.classifier.bias.neg_()
    return made


def test_half_without_labeled_data_is_refused(text_model, tmp_path):
    with pytest.raises(UserError, match="dataset_name: it is missing: how much accuracy is lost"):
        export(text_model, tmp_path / "out", format="pt2", half=True)
    assert not list(tmp_path.iterdir())


class Undecided(transformers.BertForSequenceClassification):
    """A model whose code depends on the values of the batch."""

    def forward(self, input_ids=None, **kwargs):
        return super().forward(input_ids if input_ids.sum() > 3 else input_ids * 0, **kwargs)


def test_a_model_that_cannot_be_traced_says_so(text_model, tmp_path):
    predictor = Predictor.load(text_model)
    predictor.model.__class__ = Undecided
    with pytest.raises(UserError, match=r"\(Undecided\) cannot be traced for any number of examples"):
        Exporter(predictor).export(ExportArguments(str(tmp_path / "out"), "pt2"))
    assert not list(tmp_path.iterdir())


# ---- benchmark -------------------------------------------------------------------------------------------------------


def test_a_benchmark_compares_an_export_with_its_run(text_model, in_pt2, tmp_path, capsys):
    data = table(tmp_path, lambda i: ("bad", "good")[i % 2])
    argv = ["benchmark", text_model, in_pt2, "--dataset_name", data, "--seconds", "0.01", "--json"]
    assert main([*argv, "--per_device_eval_batch_size", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    one, other = found["rows"]
    assert (one["name"], other["name"]) == ("pytorch", in_pt2) and one["speedup"] == 1.0
    assert one["score"] == other["score"] and found["examples"] == 40 and found["batch"] == 8
    assert one["nbytes"] == sum(p.nbytes for p in Predictor.load(text_model).model.state_dict().values())
    assert all(0 < row["p50_ms"] <= row["p95_ms"] and row["per_second"] > 0 for row in found["rows"])


def test_exports_of_another_model_are_not_compared(in_pt2, tmp_path):
    other = save(tiny_bert(vocab_size=TOKENS, labels=3), tmp_path / "other", names=("a", "b", "c"))
    with pytest.raises(UserError, match="is of another model: it predicts bad, good, and RUN a, b, c"):
        benchmark(other, [in_pt2])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "A RUN is needed"),
        (["run", "--forms", "onx"], "Did you mean 'onnx'?"),
        (["run", "nothing"], "'nothing' is not a folder that `hf-transfer export` wrote"),
        (["run", "nothing", "--forms", "pt2"], "Leave out one of them"),
        (["run", "--seconds", "0"], "seconds: expected a positive number"),
    ],
)
def test_wrong_words_of_benchmark(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", *words]) == 2 and said in capsys.readouterr().err


# ---- ONNX ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_onnx(tmp_path_factory) -> str:
    """Several labels with thresholds."""
    folder = tmp_path_factory.mktemp("onnx")
    model = tiny_bert(vocab_size=TOKENS, labels=3)
    model.config.label_thresholds = {"sad": 0.2, "funny": 0.7, "long": 0.5}
    place = save(model, folder / "model", ("sad", "funny", "long"), "multi_label_classification")
    return str(export(place, folder / "onnx").folder)


@pytest.mark.slow
@needs_onnx
def test_an_onnx_file_is_enough_for_others(in_onnx):
    """What somebody reads who has ONNX Runtime and the file, and neither torch nor this package."""
    import onnxruntime

    session = onnxruntime.InferenceSession(f"{in_onnx}/model.onnx", providers=["CPUExecutionProvider"])
    said = session.get_modelmeta().custom_metadata_map
    assert (said["task"], said["problem_type"]) == ("text-classification", "multi_label_classification")
    assert json.loads(said["labels"]) == ["sad", "funny", "long"] and json.loads(said["thresholds"]) == [0.2, 0.7, 0.5]
    assert json.loads(said["preprocessing"])["model_max_length"] == 16
    assert {i.name for i in session.get_inputs()} == {"input_ids", "attention_mask", "token_type_ids"}
    assert all(i.shape == ["batch", "length"] for i in session.get_inputs())
    for shape in ((1, 2), (1, 16), (5, 3), (9, 11)):
        ids = np.full(shape, 7)
        given = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
        (logits,) = session.run(["logits"], given)
        assert logits.shape == (shape[0], 3) and np.abs(logits - logits[0]).max() < 1e-5


@pytest.mark.slow
@needs_onnx
def test_several_labels_keep_their_thresholds(in_onnx):
    folder = Path(in_onnx).parent / "model"
    texts = ["the film", "it is that of a film", "a"]
    own, other = (Predictor.load(place).predict(texts) for place in (folder, in_onnx))
    assert [a["labels"] for a in own] == [a["labels"] for a in other]
    limits = {"sad": 0.2, "funny": 0.7, "long": 0.5}
    assert all(set(a["labels"]) == {n for n, p in a["scores"].items() if p > limits[n]} for a in other)


@pytest.mark.slow
@needs_onnx
def test_int8_is_smaller_and_measured(text_model, tmp_path, capsys):
    data = table_as_answered(Predictor.load(text_model), tmp_path)
    argv = ["export", text_model, str(tmp_path / "int8"), "--quantize", "int8", "--max_drop", "0.2"]
    assert main([*argv, "--dataset_name", data]) == 0
    out = capsys.readouterr().out
    about = About.load(tmp_path / "int8")
    assert about.precision == "int8" and about.accuracy["before"] == 1.0 and about.accuracy["lost"] <= 0.2
    assert f"accuracy 1.0000 → {about.accuracy['after']:.4f} on 40 examples (train)" in out
    import onnx

    kinds = {node.op_type for node in onnx.load(str(tmp_path / "int8" / "model.onnx")).graph.node}
    assert "MatMulInteger" in kinds or "DynamicQuantizeMatMul" in kinds


class Bessel(transformers.BertForSequenceClassification):
    """A model with an operator that ONNX has not."""

    def forward(self, **kwargs):
        output = super().forward(**kwargs)
        output.logits = torch.special.bessel_j0(output.logits)
        return output


def test_a_refused_operator_is_named():
    """As PyTorch's exporter says it, among the causes of its own error."""
    try:
        try:
            raise RuntimeError("No ONNX function found for <OpOverload(op='aten.igamma', overload='default')>. Failure")
        except RuntimeError as cause:
            raise torch.onnx.OnnxExporterError("Failed to convert the exported program") from cause
    except torch.onnx.OnnxExporterError as error:
        said = onnx_files._refusal(error)
    assert "ONNX has no operator for aten.igamma" in said.message and "format='pt2'" in said.fix


@pytest.mark.slow
@needs_onnx
def test_an_operator_that_onnx_lacks_is_named(text_model, tmp_path):
    predictor = Predictor.load(text_model)
    predictor.model.__class__ = Bessel
    with pytest.raises(UserError, match=r"ONNX has no operator for prims.bessel_j0.*format='pt2'"):
        Exporter(predictor).export(ExportArguments(str(tmp_path / "out")))
    assert not list(tmp_path.iterdir())


@needs_onnx
def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read by ONNX Runtime"):
        onnx_files.opened(tmp_path / "model.onnx")


# ---- many architectures ----------------------------------------------------------------------------------------------


def text_models():
    config = dict(vocab_size=TOKENS, pad_token_id=0)
    small = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=2, intermediate_size=16)
    yield "regression", lambda: tiny_bert(vocab_size=TOKENS, labels=1)
    yield "mlp", lambda: with_mlp(tiny_bert(vocab_size=TOKENS))
    yield "mlp-norm", lambda: with_mlp(tiny_bert(vocab_size=TOKENS), norm="batch")
    yield (
        "distilbert",
        lambda: transformers.DistilBertForSequenceClassification(
            transformers.DistilBertConfig(**config, dim=8, n_heads=2, n_layers=2, hidden_dim=16)
        ),
    )
    yield (
        "roberta",
        lambda: transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(**{**config, "pad_token_id": 1}, **small, max_position_embeddings=40)
        ),
    )
    yield (
        "deberta-v2",
        lambda: transformers.DebertaV2ForSequenceClassification(
            transformers.DebertaV2Config(**config, **small, relative_attention=True, pos_att_type=["c2p", "p2c"])
        ),
    )
    yield (
        "electra",
        lambda: transformers.ElectraForSequenceClassification(
            transformers.ElectraConfig(**config, **small, embedding_size=8)
        ),
    )
    yield (
        "modernbert",
        lambda: transformers.ModernBertForSequenceClassification(transformers.ModernBertConfig(**config, **small)),
    )
    yield (
        "gpt2",
        lambda: transformers.GPT2ForSequenceClassification(
            transformers.GPT2Config(**config, n_embd=8, n_layer=2, n_head=2)
        ),
    )
    yield (
        "qwen2",
        lambda: transformers.Qwen2ForSequenceClassification(
            transformers.Qwen2Config(**{**config, "vocab_size": TOKENS + 1}, **small, num_key_value_heads=1)
        ),
    )


TEXT = dict(text_models())


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_text_architectures(name, format, tmp_path):
    torch.manual_seed(0)
    kind = "regression" if name == "regression" else "single_label_classification"
    place = save(TEXT[name](), tmp_path / "model", ("score",) if name == "regression" else ("bad", "good"), kind)
    done = export(place, tmp_path / format, format=format)
    assert done.about.checked["max_difference"] <= 1e-4 and done.about.checked["examples"] == 64
    key = "value" if name == "regression" else "label"
    own, other = (Predictor.load(p, allow_pickle=True).predict(["the film", "it"]) for p in (place, done.folder))
    assert [a[key] for a in own] == pytest.approx([a[key] for a in other], abs=1e-4) if key == "value" else own


IMAGES = {
    "vit": tiny_vit,
    "timm-vit": tiny_timm_vit,
    "convnext": lambda: transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], image_size=32)
    ),
    "swin": lambda: transformers.SwinForImageClassification(
        transformers.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, image_size=32)
    ),
    "dinov2": lambda: transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    ),
}


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_image_architectures(name, format, tmp_path):
    if (name, format) == ("swin", "onnx"):
        pytest.skip("PyTorch's exporter decomposes its attention into a view that is not possible (torch 2.14)")
    model = IMAGES[name]()
    if name == "timm-vit":
        model.config.pretrained_cfg = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    model.save_pretrained(tmp_path / "model")
    if name != "timm-vit":
        side = 28 if name == "dinov2" else 32
        transformers.ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(tmp_path / "model")
    done = export(str(tmp_path / "model"), tmp_path / format, format=format)
    assert done.about.checked["max_difference"] <= 1e-4 and done.about.image_shape[0] == 3


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs openvino")
@needs_onnx
def test_openvino(text_model, tmp_path):
    done = export(text_model, tmp_path / "out", format="openvino")
    assert sorted(p.name for p in done.folder.glob("model*")) == ["model.bin", "model.xml"]
    own, other = (Predictor.load(p).predict(["the film", "it"]) for p in (text_model, done.folder))
    assert [a["label"] for a in own] == [a["label"] for a in other]
