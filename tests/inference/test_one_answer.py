"""One answer everywhere: training's evaluation, `evaluate`, `predict`, merged and exported models give the same logits.

In batches of any size and order, on 200 ragged real inputs, within 1e-4 of PyTorch's in fp32, with equal labels. So is
what was pushed and pulled, from a hub in a process of its own, whose other tests are in `tests/hub/test_push.py`.
"""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from hf_transfer import fine_tune, hub_client, merge
from hf_transfer.data import bundled
from hf_transfer.hub.push import Target, push
from hf_transfer.inference.evaluating import Evaluating
from hf_transfer.inference.exported import ExportedModel
from hf_transfer.inference.exporting import export
from hf_transfer.inference.inputs import Example, arrive_slowly
from hf_transfer.inference.predictor import Predictor
from tests.helpers import tiny_timm_resnet, tiny_timm_vit, with_statistics
from tests.hub_client import Client, Hub

TOLERANCE = 1e-4
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason='needs pip install "hf-transfer-toolkit[onnx]"')
HUSH = dict(save_strategy="no", log_level="error", num_train_epochs=1, preflight=False, label_issues=False)


@dataclass
class Case:
    """A run, and what it is asked.

    Attributes:
        run: result of `fine_tune`.
        values: inputs as `Predictor.logits` takes them.
        own: their logits by the Trainer's own evaluation.
    """

    run: object
    values: list
    own: np.ndarray

    @classmethod
    def of(cls, run) -> Case:
        predictor: Evaluating = run.predictor
        held_out = predictor._held_out()
        prepared = predictor.task.prepare(held_out.examples, held_out.inputs, predictor.processor, predictor.data)
        own = run.trainer.predict(prepared).predictions
        _, values = predictor.inputs_of()
        return cls(run, values, own)

    def check(
        self,
        predictor: Predictor,
        tolerance: float = TOLERANCE,
        measured: bool = True,
        singly: int = 16,
        data: str | None = None,
    ) -> None:
        """The logits and labels in another order in batches of 32 and of 1, and the metrics of `evaluate`.

        Args:
            predictor: the form to judge.
            tolerance: of logits, relative to the largest where that is above 1.
            measured: whether to compare what `evaluate` says.
            singly: how many inputs are compared one by one.
            data: what `evaluate` reads, for a model that does not know it.
        """
        order = random.Random(0).sample(range(len(self.values)), len(self.values))
        orders = [(32, order), (1, order[:singly])]
        for size, places in orders:
            rows = [self.values[i] for i in places]
            given = np.concatenate([predictor.logits(rows[i : i + size])[0] for i in range(0, len(rows), size)])
            assert np.abs(given - self.own[places]).max() <= tolerance * max(1, np.abs(self.own).max()), size
            assert [predictor.answer(z).get("label") for z in given] == [
                self.run.predictor.answer(z).get("label") for z in self.own[places]
            ]
        if measured:
            found = predictor.evaluate(data, split=data and "validation")
            assert found["num_examples"] == len(self.values)
            assert found["metrics"] == pytest.approx(self.run.metrics, abs=1e-4)


# ---- data and runs -------------------------------------------------------------------------------------------------


def write_pairs(folder: Path) -> dict[str, object]:
    """60 and 200 pairs of texts, from a word to more than the 16 tokens that the model reads; the keys of a run."""
    texts = bundled.load_dataset("bundled:rotten-tomatoes")["train"].select(range(260))
    cut = [(t.split()[: 1 + i % 9], t.split()[-1 - i % 5 :]) for i, t in enumerate(texts["text"])]
    rows = [{"a": " ".join(a), "b": " ".join(b), "label": i % 2} for i, (a, b) in enumerate(cut)]
    place = folder / "data"
    place.mkdir()
    for name, part in {"train": rows[:60], "validation": rows[60:]}.items():
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return dict(dataset_name=str(place), text_column_name=["a", "b"], label_column_name="label")


def write_pictures(folder: Path) -> dict[str, object]:
    """40 and 200 digits of many sizes; the keys of a run."""
    for i, row in enumerate(bundled.load_dataset("bundled:digits")["train"].select(range(240))):
        place = folder / "data" / ("train" if i < 40 else "validation") / f"digit {row['label']}"
        place.mkdir(parents=True, exist_ok=True)
        row["image"].resize((8 + i % 31, 9 + i % 17)).save(place / f"{i}.png")
    return dict(dataset_name=str(folder / "data"))


def write_timm_resnet(folder: Path) -> None:
    with_statistics(tiny_timm_resnet(labels=10)).save_pretrained(folder)


def write_timm_vit(folder: Path) -> None:
    model = tiny_timm_vit(labels=10)
    model.config.pretrained_cfg = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    model.save_pretrained(folder)


ADAPTED = dict(strategy="lora", head="mlp", head_hidden_size=6, learning_rate=0.02)


@pytest.fixture(scope="module")
def pairs(tiny_bert_folder, tmp_path_factory) -> Case:
    """An adapter and an MLP head on pairs of texts, from a word to the 16 tokens that the model reads."""
    folder = tmp_path_factory.mktemp("pairs")
    keys = {**write_pairs(folder), **ADAPTED}
    run = fine_tune(tiny_bert_folder, output_dir=str(folder / "out"), **keys, **HUSH)
    return Case.of(run)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Case:
    """A timm model with BatchNorm on pictures of many sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    write_timm_resnet(folder / "model")
    keys = dict(**write_pictures(folder), strategy="full", image_size=32, learning_rate=0.01)
    run = fine_tune(str(folder / "model"), output_dir=str(folder / "out"), **keys, **HUSH)
    return Case.of(run)


def check_everywhere(case: Case, place: Path, formats: tuple[str, ...], singly: int = 16) -> None:
    assert len(case.values) == 200
    # `evaluate`: test_predictor.py
    case.check(Predictor.load(case.run.output_dir), 1e-5, measured=singly > 16, singly=singly)
    for format in formats:
        done = export(case.run.output_dir, place / format, format=format)
        assert done.about is None or done.about.checked["other_labels"] == 0
        again = Predictor.load(done.folder, allow_pickle=True)
        assert isinstance(again.model, ExportedModel) == (format != "merged")
        case.check(again, singly=singly)


@needs_onnx
def test_pairs_with_an_adapter_and_an_mlp_head(pairs, tmp_path):
    check_everywhere(pairs, tmp_path, ("onnx",))


def test_windows_are_the_same_everywhere(pairs, monkeypatch):
    """Bit for bit, in training, `evaluate` and `predict`; in batches of two, so that 200 pairs are two windows."""
    model = replace(pairs.run.predictor, batch_size=2)
    held_out = model._held_out()
    prepared = model.task.prepare(held_out.examples, held_out.inputs, model.processor, model.data)
    sizes, forward = [], Evaluating._forward
    monkeypatch.setattr(Evaluating, "_forward", lambda *a: sizes.append(len(a[1][0]["input_ids"])) or forward(*a))
    _, evaluated, labels = model._measured(prepared)
    monkeypatch.setattr(pairs.run.trainer.args, "per_device_eval_batch_size", 2)
    trained = pairs.run.trainer.predict(prepared)
    assert (trained.predictions == evaluated).all() and (trained.label_ids == labels).all()
    assert (model._logits_of(held_out.examples, held_out.inputs) == evaluated).all() and len(sizes) == 100
    assert sizes[:50] == sorted(sizes[:50], reverse=True) != sizes[:50][:1] * 50 and sizes[49] < sizes[50]
    answers = model.predict(pairs.values)
    assert [a["scores"] for a in answers] == [model.answer(z)["scores"] for z in evaluated]
    assert [tuple(a["input"]) for a in answers] == pairs.values  # in the order of the inputs
    rows = [tuple(ids) for ids in prepared["input_ids"]]
    assert len({len(ids) for ids in rows}) > 3 and rows != sorted(rows, key=len, reverse=True)


def test_what_arrives_slowly_is_not_held_back(pairs):
    def arriving():
        for number, value in enumerate(pairs.values):
            read.append(number)
            yield Example(value, value)

    model = replace(pairs.run.predictor, batch_size=2)
    for waits, count in ((False, 2), (True, 100)):
        read: list[int] = []
        next(model.stream(arriving(), waits=waits))
        assert len(read) == count
    assert arrive_slowly(["a", "-"]) and not arrive_slowly(["a", "b.csv"])


@pytest.mark.slow
def test_pairs_merged_and_in_pt2(pairs, tmp_path):
    check_everywhere(pairs, tmp_path, ("pt2", "merged"))
    merge(pairs.run.output_dir, tmp_path / "plain")
    pairs.check(Predictor.load(tmp_path / "plain", text_column_name=["a", "b"]), measured=False)


@needs_onnx
def test_pictures_of_many_sizes(pictures, tmp_path):
    check_everywhere(pictures, tmp_path, ("onnx",))


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_real_weights_on_texts(strategy, tmp_path):
    run = fine_tune(
        "bundled:minilm-l6",
        "bundled:rotten-tomatoes",
        output_dir=str(tmp_path / "out"),
        strategy=strategy,
        max_train_samples=64,
        max_eval_samples=200,
        max_predict_samples=200,
        **HUSH,
    )
    check_everywhere(Case.of(run), tmp_path, ("onnx", "pt2", "merged"), singly=200)


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_real_weights_on_pictures(head, tmp_path):
    run = fine_tune(
        "bundled:efficientnet-lite0",
        "bundled:digits",
        output_dir=str(tmp_path / "out"),
        strategy="linear-probe",
        head=head,
        image_size=64,
        max_train_samples=60,
        max_eval_samples=200,
        max_predict_samples=200,
        **HUSH,
    )
    check_everywhere(Case.of(run), tmp_path, ("onnx", "pt2"), singly=200)


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_vision_transformers_with_an_adapter_and_an_mlp_head(library, tiny_vit_folder, tmp_path):
    if library == "timm":
        write_timm_vit(tmp_path / "model")
    model = tiny_vit_folder if library == "transformers" else str(tmp_path / "model")
    run = fine_tune(model, output_dir=str(tmp_path / "out"), **write_pictures(tmp_path), **ADAPTED, **HUSH)
    check_everywhere(Case.of(run), tmp_path, ("onnx", "pt2", "merged"), singly=200)


# ---- pushed and pulled -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tmp_path_factory, tiny_bert_folder, tiny_vit_folder):
    """A hub with the backbones; a client's process, in which runs are made and pushed."""
    place = tmp_path_factory.mktemp("hub")
    server = Hub(place / "hub")
    write_timm_vit(place / "timm-vit")
    write_timm_resnet(place / "timm-resnet")
    folders = {"bert": tiny_bert_folder, "vit": tiny_vit_folder}
    for name in ("timm-vit", "timm-resnet"):
        folders[name] = str(place / name)
    for name, folder in folders.items():
        server.seed(f"acme/{name}", folder)
    client = Client(server.endpoint, place / "home")
    yield client
    client.close()
    server.process.terminate()
    server.process.wait()


def push_and_pull(backbone: str, folder: Path, keys: dict[str, object]) -> list[str]:
    """In the client's process: train, push, forget the cache, pull, and compare each form; the forms that agreed."""
    run = fine_tune(backbone, output_dir=str(folder / "out"), **keys, **HUSH)
    case, name, agreed = Case.of(run), f"alice/{backbone.partition('/')[2]}", []
    assert len(case.values) == 200
    is_adapted = (run.output_dir / "adapter_model.safetensors").is_file()
    for merged in (False, True)[: 1 + is_adapted]:
        pushed = push(run.output_dir, Target(f"{name}-merged" if merged else name, merged=merged)).hub_model_id
        shutil.rmtree(constants.HF_HUB_CACHE)
        hub_client.find.cache_clear()
        hub_client.fetch.cache_clear()
        columns = {k: v for k, v in keys.items() if k.endswith("column_name")}
        case.check(Predictor.load(pushed, **columns), 1e-5, singly=200, data=str(keys["dataset_name"]))
        agreed.append("merged" if merged else "pushed")
        if HAS_ONNX:
            exported = export(pushed, folder / f"onnx-{merged}", data=str(keys["dataset_name"]), **columns).folder
            case.check(Predictor.load(exported), singly=200, data=str(keys["dataset_name"]))
            agreed.append("onnx")
    return agreed


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["bert", "vit", "timm-vit", "timm-resnet"])
def test_what_was_pushed_and_pulled(backbone, hub, tmp_path):
    keys = write_pairs(tmp_path) if backbone == "bert" else write_pictures(tmp_path)
    is_adapted = backbone != "timm-resnet"
    keys |= ADAPTED if is_adapted else dict(strategy="full", image_size=32, learning_rate=0.01)
    code = "from pathlib import Path\nfrom tests.inference.test_one_answer import push_and_pull\n"
    agreed = hub.python(f"{code}found = push_and_pull('acme/{backbone}', Path({str(tmp_path)!r}), {keys!r})")
    forms = ["pushed", "onnx"] if HAS_ONNX else ["pushed"]
    assert agreed == ([*forms, "merged", *forms[1:]] if is_adapted else forms)
