"""Whether the input fits the checkpoint is measured, and said only where it is clearly off."""

from __future__ import annotations

import json

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as Pictures
from transformers import AutoTokenizer

from hf_transfer import UserError
from hf_transfer.cli.program import main
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.bundled import DATASETS
from hf_transfer.data.images import glance
from hf_transfer.models import bundled
from hf_transfer.tasks import choose_task, image_fit, text_fit

RUSSIAN = "Этот фильм был очень скучным, и актёры играли плохо. Прекрасная история о любви и верности."
CHINESE = "这部电影非常好看，演员的表演很精彩。剧情很无聊，浪费时间。我不会再看第二遍。"
CODE = "def get(self, name):\n    return self._made.get(name, [])[0] if name in self._made else f(*args, **kwargs)"


@pytest.fixture(scope="module")
def english():
    return AutoTokenizer.from_pretrained(bundled.model_path("bundled:minilm-l6"))


def test_reviews_in_english_fit(english):
    reviews = DATASETS["bundled:rotten-tomatoes"]()["train"].select(range(300))["text"][:]
    assert text_fit.misfits([reviews], english) == []
    spanish = "Esta película fue muy aburrida y los actores actuaron muy mal, no la recomiendo a nadie."
    assert text_fit.misfits([[spanish] * 5], english) == [], "not well, but not clearly off"
    assert text_fit.misfits([["Хорошо"]], english) == [], "one word shows nothing"


@pytest.mark.parametrize(
    ("text", "measure", "low", "high"),
    [
        (RUSSIAN, "tokens per word", 4.5, 6),
        (CHINESE, "unknown tokens", 0.5, 0.9),
        ("great film 😀😂👍🔥 and 😍", "unknown tokens", 0.1, 0.7),
        (CODE, "tokens between spaces", 2.8, 5),
        ("0.1234 12.7 -3.50 8e-5", "tokens between spaces", 3, 5),
    ],
)
def test_what_a_tokenizer_was_not_made_for(text, measure, low, high, english):
    (misfit,) = text_fit.misfits([[text] * 10], english)
    assert misfit.measure == measure and low < misfit.value < high and misfit.value > misfit.limit
    shown = f"{misfit.value:.0%}" if measure == "unknown tokens" else f"{misfit.value:.1f}"
    assert shown in misfit.text and "Choose a checkpoint" in misfit.text


class Bytes:
    """A tokenizer of bytes: three for a Chinese character, one for a Latin letter."""

    unk_token_id = eos_token_id = 0

    def __call__(self, texts, **options):
        return {"input_ids": [list(text.encode()) for text in texts]}


class Characters(Bytes):
    def __call__(self, texts, **options):
        return {"input_ids": [[ord(c) for c in text if not c.isspace()] for text in texts]}


def test_scripts_without_spaces_are_counted_by_character():
    (misfit,) = text_fit.misfits([[CHINESE] * 2], Bytes())
    assert (misfit.measure, misfit.value) == ("tokens per character", 3.0)
    assert text_fit.misfits([[CHINESE] * 2], Characters()) == []


def encoded(size, color, mode="RGB"):
    from io import BytesIO

    buffer = BytesIO()
    Pictures.new(mode, size, color).save(buffer, "PNG")
    return glance(buffer.getvalue())


def test_images():
    small, large = encoded((8, 6), (9, 9, 9)), encoded((300, 200), (250, 20, 20))
    (misfit,) = image_fit.misfits([small] * 3, 224, 3)
    assert (misfit.measure, misfit.value) == ("enlargement", 28.0) and "8 px" in misfit.text
    assert image_fit.misfits([encoded((32, 32), (1, 2, 3))], 224, 3) == [], "CIFAR is enlarged 7 times, as is usual"
    assert image_fit.misfits([large, small, large], 224, 3) == []
    assert image_fit.misfits([small], None, 3) == [] and image_fit.misfits([], 224, 3) == []
    (misfit,) = image_fit.misfits([large, large, encoded((300, 200), 7, "L")], 224, 1)
    assert misfit.measure == "color images" and misfit.value == pytest.approx(2 / 3)
    assert image_fit.misfits([encoded((300, 200), (120, 121, 119))], 224, 1) == [], "gray, though stored as RGB"


def test_plan_says_it_and_stores_it(tiny_bert_folder, tmp_path, capsys):
    rows = [f"{RUSSIAN} {i},{'ab'[i % 2]}" for i in range(40)]
    (tmp_path / "r.csv").write_text("text,label\n" + "\n".join(f'"{r.rpartition(",")[0]}",{r[-1]}' for r in rows))
    argv = ["plan", tiny_bert_folder, str(tmp_path / "r.csv"), "--use_cpu", "true", "--strategy", "full"]
    quick = ["--preflight", "false", "--expected_accuracy", "false"]
    assert main([*argv, *quick]) == 0
    assert "Warning: the tokenizer does not know" in capsys.readouterr().out
    assert main([*argv, *quick, "--json"]) == 0
    (misfit,) = json.loads(capsys.readouterr().out)["data_facts"]["misfits"]
    assert misfit["measure"] == "unknown tokens" and misfit["value"] > misfit["limit"]
    assert main([*argv, *quick, "--data_facts", "false"]) == 0
    assert "does not know" not in capsys.readouterr().out


BOXES = List({"bbox": List(Value("float32")), "category": Value("int64")})
ANSWERS = {"text": List(Value("string")), "answer_start": List(Value("int32"))}


@pytest.mark.parametrize(
    ("features", "task"),
    [
        ({"image": Image(), "objects": BOXES}, "object detection"),
        ({"image": Image(), "bbox": List(Value("float32")), "width": Value("int64")}, "object detection"),
        ({"image": Image(), "mask": Image()}, "segmentation"),
        ({"image": Image(), "label": Image()}, "segmentation"),
        ({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "B"]))}, "token classification"),
        ({"context": Value("string"), "question": Value("string"), "answers": ANSWERS}, "extractive question"),
        ({"translation": {"de": Value("string"), "en": Value("string")}}, "translation"),
    ],
)
def test_datasets_for_other_tasks_are_refused(features, task):
    with pytest.raises(UserError, match=f"for {task}.* out of scope"):
        choose_task(Features(features), DataArguments())


def test_what_is_in_scope_is_not_refused():
    kinds = Features({"text": Value("string"), "labels": List(ClassLabel(names=["a", "b"]))})
    assert choose_task(kinds, DataArguments())[1] == ("text",)
    both = Features({"image": Image(), "objects": BOXES, "label": ClassLabel(names=["a", "b"])})
    assert choose_task(both, DataArguments(label_column_name="label"))[1] == ("image",)
    data = DatasetDict(train=Dataset.from_dict({"text": ["a"], "tags": [["x", "y"]], "label": [0]}))
    assert choose_task(data["train"].features, DataArguments())[1] == ("text",)
