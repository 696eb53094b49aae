"""One answer everywhere: training's evaluation, `evaluate`, `predict`, merged and exported models give the same logits.

In batches of any size and order, on ragged real inputs, within 1e-4 of PyTorch's in fp32, with equal labels. What was
pushed and pulled is compared in `tests/hub/test_push.py`.
"""

from __future__ import annotations

import importlib.util
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from hf_transfer import fine_tune, merge
from hf_transfer.data import bundled
from hf_transfer.inference.evaluating import Evaluating
from hf_transfer.inference.exported import ExportedModel
from hf_transfer.inference.exporting import export
from hf_transfer.inference.predictor import Predictor
from tests.helpers import tiny_timm_resnet, with_statistics

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

    def check(self, predictor: Predictor, tolerance: float = TOLERANCE, measured: bool = True) -> None:
        """The logits and labels in another order in batches of 32 and of 1, and the metrics of `evaluate`."""
        order = random.Random(0).sample(range(len(self.values)), len(self.values))
        orders = [(32, order), (1, order[:16])]
        for size, places in orders:
            rows = [self.values[i] for i in places]
            given = np.concatenate([predictor.logits(rows[i : i + size])[0] for i in range(0, len(rows), size)])
            assert np.abs(given - self.own[places]).max() <= tolerance * max(1, np.abs(self.own).max()), size
            assert [predictor.answer(z).get("label") for z in given] == [
                self.run.predictor.answer(z).get("label") for z in self.own[places]
            ]
        if measured:
            assert predictor.evaluate()["metrics"] == pytest.approx(self.run.metrics, abs=1e-4)


@pytest.fixture(scope="module")
def pairs(tiny_bert_folder, tmp_path_factory) -> Case:
    """An adapter and an MLP head on pairs of texts, from a word to the 16 tokens that the model reads."""
    folder = tmp_path_factory.mktemp("pairs")
    texts = bundled.load_dataset("bundled:rotten-tomatoes")["train"].select(range(260))
    cut = [(t.split()[: 1 + i % 9], t.split()[-1 - i % 5 :]) for i, t in enumerate(texts["text"])]
    rows = [{"a": " ".join(a), "b": " ".join(b), "label": i % 2} for i, (a, b) in enumerate(cut)]
    for name, part in {"train": rows[:60], "validation": rows[60:]}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    run = fine_tune(
        tiny_bert_folder,
        train_file=str(folder / "train.jsonl"),
        validation_file=str(folder / "validation.jsonl"),
        output_dir=str(folder / "out"),
        text_column_name=["a", "b"],
        label_column_name="label",
        strategy="lora",
        head="mlp",
        head_hidden_size=6,
        learning_rate=0.02,
        **HUSH,
    )
    return Case.of(run)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Case:
    """A timm model with BatchNorm on pictures of many sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    with_statistics(tiny_timm_resnet(labels=10)).save_pretrained(folder / "model")
    for i, row in enumerate(bundled.load_dataset("bundled:digits")["train"].select(range(240))):
        place = folder / "data" / ("train" if i < 40 else "validation") / f"digit {row['label']}"
        place.mkdir(parents=True, exist_ok=True)
        row["image"].resize((8 + i % 31, 9 + i % 17)).save(place / f"{i}.png")
    run = fine_tune(
        str(folder / "model"),
        str(folder / "data"),
        output_dir=str(folder / "out"),
        strategy="full",
        image_size=32,
        learning_rate=0.01,
        **HUSH,
    )
    return Case.of(run)


def check_everywhere(case: Case, place: Path, formats: tuple[str, ...]) -> None:
    assert len(case.values) == 200
    case.check(Predictor.load(case.run.output_dir), 1e-5, measured=False)  # `evaluate`: test_predictor.py
    for format in formats:
        done = export(case.run.output_dir, place / format, format=format)
        assert done.about is None or done.about.checked["other_labels"] == 0
        again = Predictor.load(done.folder, allow_pickle=True)
        assert isinstance(again.model, ExportedModel) == (format != "merged")
        case.check(again)


@needs_onnx
def test_pairs_with_an_adapter_and_an_mlp_head(pairs, tmp_path):
    check_everywhere(pairs, tmp_path, ("onnx",))


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
    check_everywhere(Case.of(run), tmp_path, ("onnx", "pt2", "merged"))


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
    check_everywhere(Case.of(run), tmp_path, ("onnx", "pt2"))
