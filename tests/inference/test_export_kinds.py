"""Every format takes every kind of model and refuses the same mistakes: pairs, several labels, regression, adapters."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers

from hf_transfer import UserError, fine_tune
from hf_transfer.cli.program import main
from hf_transfer.config.arguments.export import MERGED, PACKAGES, ExportArguments
from hf_transfer.inference.exporting import Exporter, export
from hf_transfer.inference.formats import FORMATS
from hf_transfer.inference.predictor import Predictor
from tests.helpers import TOKENS, tiny_bert
from tests.inference.test_exporting import WORDS, Bessel, save


def installed(format: str) -> bool:
    return all(importlib.util.find_spec(name) for name in PACKAGES[format].writes)


WRITTEN = [
    pytest.param(
        name,
        marks=[
            pytest.mark.skipif(not installed(name), reason=f"needs {PACKAGES[name].install}"),
            *([pytest.mark.slow] if name != MERGED else []),
        ],
    )
    for name in (MERGED, *FORMATS)
]
KINDS = ("pairs", "several labels", "regression")
SAID = {"pairs": "label", "several labels": "labels", "regression": "value"}
PROMPT = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
PAIR = {"text_column_name": ["a", "b"]}


def test_every_format_is_here():
    assert [p.values[0] for p in WRITTEN] == ["merged", "onnx", "pt2", "openvino"] == [MERGED, *FORMATS]


# ---- kinds of models ------------------------------------------------------------------------------------------------


def labeled(folder: Path, kind: str) -> str:
    """40 examples of a kind, of 1 to 8 words."""
    rows: list[dict[str, object]] = []
    for i in range(40):
        words = " ".join(WORDS[i % 3 : i % 3 + 1 + i % 6])
        if kind == "pairs":
            rows.append({"a": words, "b": WORDS[i % 8], "label": ("bad", "good")[i % 2]})
        elif kind == "regression":
            rows.append({"text": words, "score": i / 7 + 0.5})
        else:
            rows.append(
                {"text": words, **{name: int(i % n == 0) for n, name in enumerate(("sad", "funny", "long"), 2)}}
            )
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def model_of(folder: Path, kind: str) -> tuple[str, dict[str, object]]:
    """A saved model of a kind, and the keys that say what it reads."""
    if kind == "pairs":
        return save(tiny_bert(vocab_size=TOKENS), folder / "model"), {**PAIR, "label_column_name": "label"}
    if kind == "regression":
        model = tiny_bert(vocab_size=TOKENS, labels=1)
        return save(model, folder / "model", ("score",), "regression"), {"label_column_name": "score"}
    model = tiny_bert(vocab_size=TOKENS, labels=3)
    model.config.label_thresholds = {"sad": 0.2, "funny": 0.7, "long": 0.5}
    names = ("sad", "funny", "long")
    return save(model, folder / "model", names, "multi_label_classification"), {"label_column_name": list(names)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", WRITTEN)
def test_every_kind_in_every_format(format, kind, tmp_path):
    """The same answers and metrics, without being told again which columns it reads."""
    place, keys = model_of(tmp_path, kind)
    data = labeled(tmp_path, kind)
    done = export(place, tmp_path / "out", format=format, data=data, **keys)
    own, other = Predictor.load(place, **keys), Predictor.load(done.folder, allow_pickle=True)
    assert other.columns == own.columns and (kind != "pairs" or len(other.columns) == 2)
    _, values = own.inputs_of(data)
    given = [value if kind == "pairs" else value[0] for value in values]
    for one, two in zip(own.predict(given), other.predict(given), strict=True):
        assert one[SAID[kind]] == (pytest.approx(two["value"], abs=1e-4) if kind == "regression" else two[SAID[kind]])
    assert other.evaluate(data)["metrics"] == pytest.approx(own.evaluate(data)["metrics"], abs=1e-4)
    if done.about is not None:
        assert done.about.checked["on"] == "examples of the train split" and done.about.checked["examples"] == 40


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "metric"), [("several labels", "f1_micro"), ("regression", "rmse")])
def test_what_half_precision_loses_is_measured_in_the_right_unit(kind, metric, tmp_path):
    place, keys = model_of(tmp_path, kind)
    about = export(
        place, tmp_path / "out", format="pt2", half=True, max_drop=0.1, data=labeled(tmp_path, kind), **keys
    ).about
    assert about is not None and about.accuracy is not None and about.precision == "fp16"
    assert about.accuracy["metric"] == metric and about.accuracy["lost"] <= 0.1 and about.accuracy["examples"] == 40


# ---- adapters -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(tiny_bert_folder, tmp_path_factory):
    """Runs with an adapter that can be merged, and with one that cannot."""
    folder = tmp_path_factory.mktemp("adapted")
    (folder / "table.csv").write_text("text,label\n" + "\n".join(f"{WORDS[i % 8]},{'ab'[i % 2]}" for i in range(40)))
    quiet = dict(save_strategy="no", log_level="error", num_train_epochs=1, preflight=False, learning_rate=0.02)
    return {
        name: fine_tune(tiny_bert_folder, str(folder / "table.csv"), output_dir=str(folder / name), **keys, **quiet)
        for name, keys in {"lora": {"strategy": "lora"}, "prompt": {"adapter": PROMPT}}.items()
    }


LINEAR = 2 * 6 + 2  # layers of the tiny BERT with weights: six in each block, the pooler and the head
ATTENTION = 2 * 2  # products of two blocks


def is_merged(folder: Path, format: str) -> bool:
    """Whether an exported model has nothing of LoRA: no weights of such a name, or no more products than it needs."""
    if format == MERGED:
        return "lora" not in " ".join(
            transformers.AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
        )
    if format == "pt2":
        return "lora" not in " ".join(torch.export.load(folder / "model.pt2").state_dict)
    if format == "onnx":
        import onnx

        kinds = [node.op_type for node in onnx.load(str(folder / "model.onnx")).graph.node]
        return kinds.count("MatMul") + kinds.count("Gemm") == LINEAR + ATTENTION
    said = (folder / "model.xml").read_text()
    return LINEAR <= said.count('type="MatMul"') <= LINEAR + ATTENTION


@pytest.mark.parametrize("format", WRITTEN)
def test_an_adapter_is_merged_first(format, adapted, tmp_path):
    run = adapted["lora"]
    done = export(run.output_dir, tmp_path / "out", format=format)
    assert is_merged(done.folder, format) and not done.notes
    assert not list(done.folder.glob("adapter*"))
    own, other = Predictor.load(run.output_dir), Predictor.load(done.folder, allow_pickle=True)
    for one, two in zip(own.predict(WORDS), other.predict(WORDS), strict=True):
        assert one["label"] == two["label"] and one["score"] == pytest.approx(two["score"], abs=1e-5)


@pytest.mark.parametrize("format", WRITTEN)
def test_an_adapter_that_cannot_be_merged_stays_in_the_graph(format, adapted, tmp_path, capsys):
    run = adapted["prompt"]
    argv = ["export", str(run.output_dir), str(tmp_path / "out"), "--format", format]
    if format == MERGED:
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert "cannot be merged" in err and "Use onnx or pt2" in err and not list(tmp_path.iterdir())
        return
    assert main(argv) == 0
    assert "Note: The adapter stays beside the weights, in the same graph." in capsys.readouterr().out
    own, other = Predictor.load(run.output_dir), Predictor.load(tmp_path / "out", allow_pickle=True)
    for one, two in zip(own.predict(WORDS), other.predict(WORDS), strict=True):
        assert one["label"] == two["label"] and one["score"] == pytest.approx(two["score"], abs=1e-4)


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [MERGED, *FORMATS])
def test_a_place_that_is_taken_is_refused_before_anything_is_loaded(format, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as if every package were installed
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", None)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (tmp_path / "file").write_text("mine")
    for taken in (run, tmp_path / "file"):
        assert main(["export", str(run), str(taken), "--format", format]) == 2
        assert f"output_dir: {str(taken)!r} exists already" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine" and [p.name for p in run.iterdir()] == ["config.json"]


@pytest.mark.parametrize("format", [MERGED, *FORMATS])
def test_an_unfinished_run_is_refused(format, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    (tmp_path / "run" / "checkpoint-40").mkdir(parents=True)
    for words in (["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", format], ["benchmark", "run"]):
        monkeypatch.chdir(tmp_path)
        assert main(words) == 2
        err = capsys.readouterr().err
        assert "holds an unfinished run: checkpoint-40 and no model" in err and "--resume_from_checkpoint auto" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", WRITTEN[1:])
def test_an_operator_that_onnx_lacks_and_the_alternative_that_is_named(format, tmp_path):
    """Bessel's function is refused by what goes through ONNX; pt2, which is named instead, computes it."""
    predictor = Predictor.load(save(tiny_bert(vocab_size=TOKENS), tmp_path / "model"))
    predictor.model.__class__ = Bessel
    exporter, arguments = Exporter(predictor), ExportArguments(str(tmp_path / "out"), format)
    if format == "pt2":
        checked = exporter.export(arguments).about.checked
        assert checked["max_difference"] <= 1e-4 and not checked["other_labels"]
        return
    with pytest.raises(UserError, match=r"ONNX has no operator for prims.bessel_j0.*format='pt2'"):
        exporter.export(arguments)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("format", WRITTEN[1:])
def test_a_batch_that_the_model_does_not_read(format, tmp_path):
    """Told with both sizes where the model is called; `predict` truncates texts and never meets it."""
    place = save(tiny_bert(vocab_size=TOKENS), tmp_path / "model")
    predictor = Predictor.load(export(place, tmp_path / "out", format=format).folder, allow_pickle=True)
    ids = torch.ones(2, 17, dtype=torch.long)
    with pytest.raises(UserError, match=r"17 tokens per text is longer than the 16.*max_length=16"):
        predictor.model(input_ids=ids, attention_mask=ids, token_type_ids=ids * 0)
    (answer,) = predictor.predict(["film " * 100])
    assert answer["label"] == Predictor.load(place).predict(["film " * 100])[0]["label"]
