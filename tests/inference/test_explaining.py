"""`predict --explain` and `Predictor.explain`: what an answer rests on, exact and by deletion."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from hf_transfer import UserError, fine_tune
from hf_transfer.cli.program import main
from hf_transfer.config.arguments import explaining
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data import bundled
from hf_transfer.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL, Labels
from hf_transfer.inference.attribution import Attribution
from hf_transfer.inference.explanations import ImageExplanation, TextExplanation, marked
from hf_transfer.inference.marked_words import Word, words_of
from hf_transfer.inference.predictor import Predictor
from hf_transfer.tasks import TASKS
from tests.helpers import TOKENS, copy_state, small_tokenizer, tiny_bert, tiny_timm_resnet, tiny_timm_vit, tiny_vit
from tests.helpers import with_statistics as settled

needs_captum = pytest.mark.skipif(not explaining.is_installed(), reason="needs captum")


def of_texts(problem_type: str = SINGLE_LABEL, names: tuple[str, ...] = ("bad", "good"), **keys) -> Predictor:
    model = tiny_bert(labels=len(names), vocab_size=TOKENS, problem_type=problem_type, initializer_range=0.5)
    torch.nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(1))
    return Predictor(
        TASKS["text-classification"], model.eval(), small_tokenizer(16), Labels(problem_type, names), **keys
    )


def of_images(model, size: int = 32) -> Predictor:
    processor = transformers.ViTImageProcessor(size={"height": size, "width": size})
    return Predictor(TASKS["image-classification"], model.eval(), processor, Labels(SINGLE_LABEL, ("a", "b")))


def noise(size: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def log_odds(answer: dict, label: str) -> float:
    return float(np.log(answer["scores"][label] / (1 - answer["scores"][label])))


# ---- the numbers -----------------------------------------------------------------------------------------------------


@needs_captum
def test_words_sum_to_what_hiding_all_of_them_takes():
    """Completeness of integrated gradients, in the log odds of the class and for a regression in its value."""
    text, hidden = "the man was not in it", " ".join(["[MASK]"] * 6)
    for predictor in (of_texts(), of_texts(names=("a", "b", "c"))):
        label = predictor.labels.names[-1]
        (found,) = predictor.explain([text], label)
        assert isinstance(found, TextExplanation) and found.label == label and len(found.words[0]) == 6
        whole, blank = (log_odds(a, label) for a in predictor.predict([text, hidden]))
        assert sum(word.value for word in found.words[0]) == pytest.approx(whole - blank, abs=0.02)
        assert abs(whole - blank) > 0.1
    predictor = of_texts(REGRESSION, ("stars",))
    (found,) = predictor.explain([text])
    whole, blank = (a["value"] for a in predictor.predict([text, hidden]))
    assert sum(w.value for w in found.words[0]) == pytest.approx(whole - blank, abs=0.02)
    assert found.title.startswith("stars: ") and found.probability is None and found.value == pytest.approx(whole)


@needs_captum
def test_feature_maps_are_grad_cam_where_the_network_averages_them():
    from captum.attr import LayerGradCam

    predictor = of_images(settled(tiny_timm_resnet()), 128)
    model = predictor.model
    pixels = {"pixel_values": torch.randn(2, 3, 128, 128)}
    found = Attribution(model, MULTI_LABEL, pixels)
    assert found.has_maps and "HiResCAM" in found.method
    one = {name: value[:1] for name, value in pixels.items()}
    theirs = LayerGradCam(lambda x: model(pixel_values=x).logits, model.timm_model.layer4).attribute(
        one["pixel_values"], target=1
    )
    mine = found.of(one, one, 1).values
    assert mine.shape == (4, 4) and mine.abs().max() > 0
    torch.testing.assert_close(mine, theirs[0, 0].detach(), rtol=1e-4, atol=1e-7)


@needs_captum
@pytest.mark.parametrize("make", [tiny_vit, tiny_timm_vit], ids=["transformers", "timm"])
def test_patches_sum_to_what_a_blank_image_takes(make):
    model = make().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    blank = pixels.mean((2, 3), keepdim=True).expand_as(pixels)
    found = Attribution(model, SINGLE_LABEL, {"pixel_values": torch.randn(3, 3, 32, 32)})
    spots = found.of({"pixel_values": pixels}, {"pixel_values": blank}, 1)
    with torch.no_grad():
        logits = model(pixel_values=torch.cat([pixels, blank])).logits
    whole, none = (logits[:, 1] - logits[:, 0]).tolist()
    assert spots.values.shape == (2, 2) and (spots.score, spots.blank) == pytest.approx((whole, none), rel=1e-5)
    assert float(spots.values.sum()) == pytest.approx(whole - none, abs=0.02 * max(1, abs(whole - none)))


@needs_captum
def test_a_heatmap_is_that_of_what_the_model_saw():
    predictor = of_images(tiny_vit())
    torch.nn.init.normal_(predictor.model.classifier.weight, generator=torch.Generator().manual_seed(1))
    pixels = np.asarray(noise(32))
    (found,), (answer,) = predictor.explain([pixels]), predictor.predict([pixels])
    assert isinstance(found, ImageExplanation) and np.array_equal(found.view, pixels)
    assert (found.label, found.probability) == (answer["label"], pytest.approx(answer["score"]))
    maps = [predictor.explain([pixels], label)[0].heatmap for label in ("a", "b")]
    assert all(heat.shape == (32, 32) and heat.min() == 0 and heat.max() == 1 for heat in maps)
    assert not ((maps[0] == 1) & (maps[1] > 0.5)).any(), "of two classes, what speaks for one speaks against the other"


@needs_captum
def test_a_model_is_afterwards_as_before_and_answers_the_same(tmp_path, capsys):
    predictor = of_texts()
    predictor.model.classifier.weight.requires_grad_(False)
    before, flags = copy_state(predictor.model), [p.requires_grad for p in predictor.model.parameters()]
    plain = predictor.predict(["the man", "a new one", "it was not"])
    read = list(predictor._checked(["the man", "a new one", "it was not"]))
    seen = []
    explain = predictor.explainer()

    def more(example, logits) -> dict:
        seen.append(example.shown)
        return {"label": explain(example, logits).label}

    assert list(predictor.stream(read, more=more)) == plain and seen == ["the man", "a new one", "it was not"]
    assert all(torch.equal(value, before[name]) for name, value in predictor.model.state_dict().items())
    assert [p.requires_grad for p in predictor.model.parameters()] == flags and not predictor.model.training


@needs_captum
def test_pairs_have_words_of_both_texts():
    predictor = of_texts(data=DataArguments(text_column_name=["one", "two"]))
    (found,) = predictor.explain([("the man", "it was not")])
    assert [[word.text for word in words] for words in found.words] == [["the", " man"], ["it", " was", " not"]]
    assert all(word.value is not None for words in found.words for word in words) and found.html().count("<p>") == 2
    with pytest.raises(UserError, match="give both"):
        predictor.explain(["the man"])


@needs_captum
def test_which_class_is_explained():
    predictor = of_texts(MULTI_LABEL, ("sad", "long", "loud"))
    (found,), (answer,) = predictor.explain(["the man"]), predictor.predict(["the man"])
    assert found.label == max(answer["scores"], key=answer["scores"].get)
    assert found.probability == pytest.approx(answer["scores"][found.label])
    (other,) = predictor.explain(["the man"], "sad")
    assert other.label == "sad" and other.probability == pytest.approx(answer["scores"]["sad"])


@needs_captum
def test_architectures_without_a_line_of_their_own():
    from hf_transfer.adapters.attach import attach
    from tests.helpers import arguments

    ids = {"input_ids": torch.arange(1, 25).view(3, 8), "attention_mask": torch.ones(3, 8, dtype=torch.int64)}
    adapted = attach(tiny_bert(), arguments("x", adapter="lora"))
    gpt2 = transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(vocab_size=64, n_embd=8, n_head=2, n_layer=2, n_positions=16, pad_token_id=0)
    )
    for model, inputs in ((adapted, ids), (gpt2, ids)):
        found = Attribution(model.eval(), SINGLE_LABEL, inputs)
        one = {name: value[:1] for name, value in inputs.items()}
        spots = found.of(one, {**one, "input_ids": torch.full((1, 8), 3)}, 0)
        assert spots.values.shape == (8,) and float(spots.values.sum()) == pytest.approx(
            spots.score - spots.blank, abs=0.01
        )
    swin = transformers.SwinForImageClassification(
        transformers.SwinConfig(
            embed_dim=4, depths=[1, 1], num_heads=[1, 2], window_size=4, image_size=32, patch_size=4, num_labels=2
        )
    )
    pixels = {"pixel_values": torch.randn(3, 3, 32, 32)}
    with torch.no_grad():
        before = swin.eval()(**pixels).logits
        spots = Attribution(swin, SINGLE_LABEL, pixels).of(
            {"pixel_values": pixels["pixel_values"][:1]}, {"pixel_values": torch.zeros(1, 3, 32, 32)}, 0
        )
        assert spots.values.shape == (8, 8) and torch.equal(swin(**pixels).logits, before)
    convnext = transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(hidden_sizes=[4, 8, 8, 8], depths=[1, 1, 1, 1], num_labels=2)
    )
    found = Attribution(convnext.eval(), SINGLE_LABEL, {"pixel_values": torch.randn(3, 3, 64, 64)})
    one = {"pixel_values": torch.randn(1, 3, 64, 64)}
    assert found.of(one, one, 0).values.shape == (4, 4), "the last map of 4 by 4, not that of 2 by 2"


# ---- words -----------------------------------------------------------------------------------------------------------


def test_words_are_those_of_the_text():
    tokenizer = small_tokenizer(8)
    texts = [" The xqz,  [SEP] <b>man</b> was not in it at all"]
    encoded = TASKS["text-classification"].encode([texts], tokenizer)
    values = torch.arange(len(encoded["input_ids"][0]), dtype=torch.float32)
    (words,) = words_of(texts, encoded, values, tokenizer)
    assert "".join(word.text for word in words) == texts[0]
    read = [(word.text.strip(), word.value) for word in words if word.value is not None]
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])
    assert tokens[:5] == ["[CLS]", "the", "x", "##q", "##z"] and read[:2] == [("The", 1), ("xqz", 2 + 3 + 4)]
    assert words[-1].value is None and words[-1].text.endswith("at all"), "what was cut off"
    pair = ["the man", "it was"]
    encoded = TASKS["text-classification"].encode([[text] for text in pair], tokenizer)
    first, second = words_of(pair, encoded, torch.arange(7.0), tokenizer)
    assert [w.value for w in first] == [1, 2] and [w.value for w in second] == [4, 5]


def test_a_page_is_escaped_and_loads_nothing():
    words = ((Word("<script>", 0.5), Word(" \"&'", -0.25), Word(" rest", None), Word(" x", 0.0)),)
    page = TextExplanation("<i>", "<b>no</b>", 0.75, None, "m", words).html()
    assert (
        "<script" not in page
        and "<b>no" not in page
        and "<i>" not in page
        and "http" not in page.replace("http-equiv", "")
    )
    assert "&lt;script&gt;</mark>" in page and "&lt;b&gt;no&lt;/b&gt;: 75.0%" in page and "not read" in page
    text = marked(words[0], 0.5)
    assert 'class="for" style="--share: 100%" title="+0.500"' in text and 'class="against" style="--share: 50%"' in text
    assert text.endswith('<span class="unread"> rest</span> x</span>')


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("explained") / "bert"
    predictor = of_texts()
    predictor.model.config.id2label, predictor.model.config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    predictor.save_merged(folder)
    return folder


@needs_captum
def test_the_command_writes_a_file_per_answer(saved, tmp_path, capsys):
    table = tmp_path / "t.csv"
    table.write_text('text\nthe man\n""\n"<b>it</b>"\n')
    folder = tmp_path / "why"
    assert main(["predict", str(saved), str(table), "--explain", str(folder), "--explain_label", "bad"]) == 1
    said = capsys.readouterr()
    answers = [json.loads(line) for line in said.out.splitlines()]
    assert "error" in answers[1] and "explanation" not in answers[1]
    assert [a.get("explanation") for a in answers] == [str(folder / "00001.html"), None, str(folder / "00002.html")]
    assert answers[0]["explained"] == "bad" and "&lt;" in (folder / "00002.html").read_text()
    plain = Predictor.load(saved).predict("the man")[0]
    assert answers[0]["scores"] == plain["scores"]
    assert main(["predict", str(saved), "the man", "--explain", str(folder)]) == 2
    assert "exists already" in capsys.readouterr().err


@needs_captum
def test_pictures_are_named_after_their_files(tmp_path):
    predictor = of_images(tiny_vit())
    noise(48).save(tmp_path / "a dog!.png")
    (found,) = predictor.explain(tmp_path / "a dog!.png")
    found.save(tmp_path / "why" / "x.png")
    width, height = Image.open(tmp_path / "why" / "x.png").size
    assert width > 2 * height * 0.8 > 300
    from hf_transfer.inference.explanation_files import Writer

    (example,) = (read for read in predictor.read([str(tmp_path / "a dog!.png")]) if read is not None)
    writer = Writer(predictor.explainer(), tmp_path / "all")
    assert writer(example, np.array([0.0, 1.0])) == {
        "explained": "b",
        "explanation": str(tmp_path / "all" / "00001-a-dog.png"),
    }


WRONG = [
    (["--explain_label", "good"], "no effect without"),
    (["--explain", "x", "--stride", "3"], "several"),
    (["--explain", "x", "--explain_label", "goood"], "Did you mean 'good'"),
]


@pytest.mark.parametrize(("words", "said"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_wrong_keys(saved, words, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(explaining, "is_installed", lambda: True)
    assert main(["predict", str(saved), "the man", *words]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and not shown.out and not (tmp_path / "x").exists()


def test_without_the_package(saved, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["predict", str(saved), "the man", "--explain", str(tmp_path / "x")]) == 2
    assert 'pip install "hf-transfer-toolkit[explain]"' in capsys.readouterr().err
    with pytest.raises(UserError, match="captum, which is not installed"):
        of_texts().explain("the man")


@needs_captum
def test_what_cannot_be_explained():
    with pytest.raises(UserError, match="the model predicts a number"):
        of_texts(REGRESSION, ("stars",)).explain("the man", "stars")
    tiny = {"pixel_values": torch.randn(1, 3, 12, 12)}
    found = Attribution(settled(tiny_timm_resnet()).eval(), SINGLE_LABEL, {"pixel_values": torch.randn(3, 3, 64, 64)})
    with pytest.raises(UserError, match="none of its layers has a map of 4 by 4 positions"):
        found.of(tiny, tiny, 0)


# ---- deletion, on real weights ---------------------------------------------------------------------------------------

SMALL = dict(save_strategy="no", log_level="error", preflight=False, label_issues=False, strategy="linear-probe")


@needs_captum
@pytest.mark.slow
def test_deleting_marked_words_lowers_the_probability_more_than_random_ones(tmp_path):
    keys = SMALL | dict(max_train_samples=400, max_eval_samples=50, max_predict_samples=100, pooling="mean")
    run = fine_tune("bundled:minilm-l6", "bundled:rotten-tomatoes", output_dir=str(tmp_path / "o"), **keys)
    texts = bundled.load_dataset("bundled:rotten-tomatoes")["test"].shuffle(seed=1)["text"][:20]
    rng, drops = np.random.default_rng(0), {"marked": [], "random": []}
    for found in run.predictor.explain(texts):
        words = found.words[0]
        number = max(1, len(words) // 5)
        order = np.argsort([-(word.value or 0) for word in words])[:number]
        for name, chosen in (("marked", order), *[("random", rng.permutation(len(words))[:number])] * 3):
            rest = "".join(word.text for i, word in enumerate(words) if i not in chosen)
            (answer,) = run.predict([rest])
            drops[name].append(found.probability - answer["scores"][found.label])
    marked_drop, random_drop = np.mean(drops["marked"]), np.mean(drops["random"])
    print(f"probability lost: {marked_drop:.3f} marked, {random_drop:.3f} random")
    assert marked_drop > 0.15 and marked_drop > 4 * random_drop, (marked_drop, random_drop)


@needs_captum
@pytest.mark.slow
def test_deleting_marked_pixels_lowers_the_probability_more_than_random_ones(tmp_path):
    keys = SMALL | dict(max_train_samples=300, max_eval_samples=50, max_predict_samples=100, image_size=96)
    run = fine_tune("bundled:efficientnet-lite0", "bundled:digits", output_dir=str(tmp_path / "o"), **keys)
    digits = bundled.load_dataset("bundled:digits")["test"]["image"][:20]
    rng, drops = np.random.default_rng(0), {"marked": [], "random": []}
    for found in run.predictor.explain(digits):
        assert found.heatmap.shape == (96, 96)
        maps = [("marked", found.heatmap)]
        for _ in range(3):  # as smooth, elsewhere
            coarse = Image.fromarray(rng.random((6, 6)).astype(np.float32))
            maps.append(("random", np.asarray(coarse.resize((96, 96), Image.Resampling.BILINEAR))))
        for name, heat in maps:
            picture = found.view.copy()
            picture[heat >= np.quantile(heat, 0.8)] = picture.mean((0, 1)).round()
            (answer,) = run.predict([picture])
            drops[name].append(found.probability - answer["scores"][found.label])
    marked_drop, random_drop = np.mean(drops["marked"]), np.mean(drops["random"])
    print(f"probability lost: {marked_drop:.3f} marked, {random_drop:.3f} random")
    assert marked_drop > random_drop + 0.05, (marked_drop, random_drop)
