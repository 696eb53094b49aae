"""`hf-transfer demo`: what is told before anything is loaded, what the page answers, and a browser that uses it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from PIL import Image

from hf_transfer import HeadBank, Predictor, UserError, fine_tune
from hf_transfer.cli.program import main
from hf_transfer.config.arguments.explaining import is_installed
from hf_transfer.config.extras import EXTRAS, missing_of
from hf_transfer.inference import space
from hf_transfer.inference.samples import Sample, load_samples, samples_of, save_samples
from hf_transfer.inference.served import Served
from tests.inference.test_serving import save, started

CHROMIUM = Path("/usr/bin/chromium")
needs_gradio = pytest.mark.skipif(bool(missing_of("demo")), reason='needs pip install "hf-transfer-toolkit[demo]"')
needs_browser = pytest.mark.skipif(
    not CHROMIUM.exists() or importlib.util.find_spec("playwright") is None,
    reason=f"needs {CHROMIUM} and pip install playwright",
)
QUICK = dict(num_train_epochs=1, save_strategy="no", log_level="error", preflight=False, label_issues=False)
FAR = {**QUICK, "learning_rate": 0.05, "num_train_epochs": 3}  # answers differ from text to text


@pytest.fixture(scope="module")
def run(tiny_bert_folder, tmp_path_factory) -> Path:
    """A run on 60 texts of three classes."""
    folder = tmp_path_factory.mktemp("run")
    rows = [f"text {i} of {'abc'[i % 3]},{('art', 'law', 'sport')[i % 3]}" for i in range(60)]
    (folder / "a.csv").write_text("\n".join(["text,label", *rows]))
    fine_tune(tiny_bert_folder, str(folder / "a.csv"), output_dir=str(folder / "topic"), adapter="lora", **FAR)
    return folder / "topic"


def png(color: str) -> bytes:
    file = BytesIO()
    Image.new("RGB", (40, 30), color).save(file, "png")
    return file.getvalue()


# ---- before anything is loaded ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "A RUN is needed"),
        (["./nowhere"], "RUN: './nowhere' does not exist"),
        (["x", "--examples", "-1"], "examples: expected a number at least 0, got -1"),
        (["x", "--port", "-1"], "port: expected a number at least 0 and at most 65535, got -1"),
    ],
)
def test_wrong_words_are_told_at_once(words, said, capsys):
    assert main(["demo", *words]) == 2
    assert said in capsys.readouterr().err


def test_without_its_package_demo_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(EXTRAS, "demo", ("no_such_module",))
    assert main(["demo", "no/run"]) == 2
    assert 'Install with `pip install "hf-transfer-toolkit[demo]"`.' in capsys.readouterr().err


# ---- examples --------------------------------------------------------------------------------------------------------


def test_samples_are_those_that_the_run_held_out(run, tmp_path):
    """With their labels, drawn by class; nothing that was trained on."""
    predictor = Predictor.load(run)
    held_out = predictor._held_out(None, "validation").examples
    found = samples_of(predictor, 3, tmp_path / "files")
    assert len(found) == 3 and {s.values[0] for s in found} <= set(held_out["text"][:])
    letters = {"art": "a", "law": "b", "sport": "c"}
    assert all(s.values[0].endswith(letters[s.label]) for s in found) and {s.label for s in found} == set(letters)
    assert samples_of(predictor, 0, tmp_path / "files") == [] and not (tmp_path / "files").exists()
    with pytest.raises(UserError, match="dataset_name is missing"):
        samples_of(replace(predictor, data=replace(predictor.data, dataset_name=None, train_file=None)), 3, tmp_path)


def test_samples_of_images_are_their_files(tiny_vit_folder, tmp_path):
    colors = ("red", "blue")
    for i in range(20):
        (tmp_path / "data" / colors[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / colors[i % 2] / f"{i}.png").write_bytes(png(colors[i % 2]))
    fine_tune(tiny_vit_folder, str(tmp_path / "data"), output_dir=str(tmp_path / "out"), strategy="full", **QUICK)
    found = samples_of(Predictor.load(tmp_path / "out"), 2, tmp_path / "files")
    assert sorted(s.label for s in found) == ["blue", "red"]
    for sample in found:
        (path,) = sample.values
        assert Path(path).parent == tmp_path / "files" and Path(path).read_bytes() == png(sample.label)


# ---- the page --------------------------------------------------------------------------------------------------------


@needs_gradio
def test_the_page_answers_as_predict_does(run, tmp_path, tiny_vit_folder):
    from hf_transfer.inference.page import OFF, Page, coverages

    served = Served({"tone": save(tmp_path / "tone", ("bad", "good"), 1), "topic": Predictor.load(run)})
    page = Page(served, {"topic": samples_of(served["topic"], 2, tmp_path)}, "A title")
    (expected,) = served["topic"].predict("a film")
    assert page._answer("topic", "a film", OFF) == (
        f"{expected['label']} ({expected['score']:.1%})",
        expected["scores"],
    )
    assert coverages(served["tone"]) == [] and "80%" in coverages(served["topic"])
    (sets,) = served["topic"].abstaining(0.8).predict("a film")
    said, _ = page._answer("topic", "a film", "80%")
    assert said == f"abstains: one of {', '.join(sets['set'])} (80% coverage)" if sets["abstains"] else sets["label"]
    assert (
        page._answer("tone", "", OFF)[0] == ""
        and page._answer("tone", "  ", OFF)[0] == "It cannot be read: empty text."
    )
    assert "exceed the limit of 100,000 per text" in page._answer("tone", "a" * 100_001, OFF)[0]
    assert page._chosen("topic", 1) == page.samples["topic"][1].values[0]
    assert {b["type"] for b in page.build().get_config_file()["components"]} >= {
        "dropdown",
        "textbox",
        "label",
        "dataset",
    }
    (tmp_path / "a.png").write_bytes(png("red"))
    (tmp_path / "b.png").write_bytes(b"text")
    images = Page(Served({"shape": Predictor.load(tiny_vit_folder)}), {}, "Shapes")
    expected = images.served["shape"].predict(tmp_path / "a.png")[0]
    assert images._answer("shape", str(tmp_path / "a.png"), OFF)[1] == expected["scores"]
    assert images._answer("shape", str(tmp_path / "b.png"), OFF)[0].startswith("The image: it is not an image")


@needs_gradio
def test_pairs_several_labels_and_numbers_are_shown(run, tmp_path):
    from hf_transfer.inference.page import OFF, Page, in_words

    single = Predictor.load(run)
    pair = replace(single, data=replace(single.data, text_column_name=["premise", "claim"]))
    page = Page(Served({"pair": pair, "single": single}), {"pair": [Sample(("a film", "it"), "art")]}, "Pairs")
    (expected,) = pair.predict([("a film", "it")])
    assert page._answer("pair", "a film", "it", OFF)[1] == expected["scores"]
    assert page._answer("single", "a film", "it", OFF)[1] == single.predict("a film")[0]["scores"]
    assert page._chosen("pair", 0) == ["a film", "it"]
    second, *_ = page._switched("single")
    assert second["visible"] is False and page._switched("pair")[0]["label"] == "claim"
    assert in_words({"labels": ["a", "b"]}, "multi_label_classification", OFF) == "a, b"
    assert in_words({"labels": []}, "multi_label_classification", OFF) == "none of the labels"
    assert in_words({"value": 1.5}, "regression", OFF) == "1.5"
    empty = {"set": [], "abstains": True}
    assert in_words(empty, "single_label_classification", "80%") == "abstains: no label is likely enough (80% coverage)"


@needs_gradio
@pytest.mark.skipif(not is_installed(), reason='needs pip install "hf-transfer-toolkit[explain]"')
def test_the_page_explains_an_answer(run, tiny_vit_folder, tmp_path):
    """As `explain` does; a text that names a file is a text, and what has no answer has no explanation."""
    from hf_transfer.inference.page import OFF, Page

    page = Page(Served({"topic": Predictor.load(run)}), {}, "A title")
    (tmp_path / "a.txt").write_text("line\n" * 3)
    for text in ("a film <b>", str(tmp_path / "a.txt")):
        update = page._explained("topic", text, OFF)
        assert update["visible"] and "<mark" in update["value"] and "<b>" not in update["value"]
    (expected,) = page.served["topic"].explain("a film <b>")
    assert page._explained("topic", "a film <b>", OFF)["value"] == expected._repr_html_()
    for nothing in ("", "  ", "a" * 100_001):
        assert page._explained("topic", nothing, OFF) == {"__type__": "update", "value": None, "visible": False}
    (tmp_path / "a.png").write_bytes(png("red"))
    images = Page(Served({"shape": Predictor.load(tiny_vit_folder)}), {}, "Shapes")
    assert images._explained("shape", str(tmp_path / "a.png"), OFF)["value"].size == (32, 32)


# ---- a Space ---------------------------------------------------------------------------------------------------------


def texts_of(folder: Path) -> str:
    """All text files of a Space but the package's."""
    files = (p for p in folder.rglob("*") if p.is_file() and "hf_transfer" not in p.relative_to(folder).parts)
    return "\n".join(p.read_text() for p in files if p.suffix in (".py", ".json", ".yaml", ".txt", ".md", ""))


@needs_gradio
def test_a_space_holds_all_that_it_needs_and_nothing_of_the_data(run, tiny_bert_folder, tmp_path, capsys):
    """An adapter with its backbone, and a whole model; both answer as before, bit for bit."""
    expected = Predictor.load(run).predict("a film")
    assert main(["demo", str(run), "--space", str(tmp_path / "space"), "--stride", "3", "--title", "Topics'"]) == 0
    said = capsys.readouterr()
    assert (
        said.out
        == f"{tmp_path / 'space'} is a Space. Next: hf upload OWNER/NAME {tmp_path / 'space'} --repo-type space\n"
    )
    names = {".gitattributes", "README.md", "app.py", "hf_transfer", "model", "requirements.txt"}
    assert {p.name for p in (tmp_path / "space").iterdir()} == names
    (tmp_path / "space").rename(tmp_path / "moved")
    assert Served.load([str(tmp_path / "moved" / "model")])["topic"].predict("a film") == expected
    written = texts_of(tmp_path / "moved")
    assert str(run.parent.parent) not in written and tiny_bert_folder not in written and "a.csv" not in written
    assert not list((tmp_path / "moved").rglob("examples.npz")) and not list((tmp_path / "moved").rglob("__pycache__"))
    app = (tmp_path / "moved" / "app.py").read_text()
    assert "Served.load([str(HERE / run) for run in RUNS], stride=3)" in app and '"Topics\'"' in app
    head = yaml.safe_load((tmp_path / "moved" / "README.md").read_text().split("---")[1])
    assert head["sdk"] == "gradio" and head["app_file"] == "app.py" and head["title"] == "Topics'"
    lines = (tmp_path / "moved" / "requirements.txt").read_text().splitlines()
    assert f"transformers=={version('transformers')}" in lines and "torch>=2.11" in lines
    assert not [line for line in lines if line.startswith(("timm", "pytest", "gradio"))]
    assert main(["demo", str(run), "--space", str(tmp_path / "moved")]) == 2
    assert "space: " in capsys.readouterr().err

    whole = save(tmp_path / "tone", ("bad", "good"), 1)
    assert main(["demo", str(tmp_path / "tone"), "--space", str(tmp_path / "other"), "--quiet"]) == 0
    assert Predictor.load(tmp_path / "other" / "model").predict("a film") == whole.predict("a film")
    assert str(tmp_path) not in texts_of(tmp_path / "other")


@needs_gradio
def test_a_version_that_gradio_refuses_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(space.metadata, "requires", lambda name: ["pyyaml<6", "numpy>=1"])
    assert space._pinned(Requirement("pyyaml>=5")) == "pyyaml>=5"
    assert space._pinned(Requirement("numpy>=2")) == f"numpy=={version('numpy')}"


def test_the_app_of_a_model_on_a_hub_loads_it_from_there():
    written = space._app(["me/topic@v2"], False, 'It\'s "it"', {"stride": 3, "pixel_range": [0.0, 1.0]})
    compile(written, "app.py", "exec")
    assert "RUNS = ['me/topic@v2']\n" in written
    assert "Served.load([run for run in RUNS], stride=3, pixel_range=[0.0, 1.0])" in written
    local = space._app(["model"], True, "It", {"model_revision": "v2"})
    assert "Served.load([str(HERE / run) for run in RUNS])" in local


def test_samples_are_read_as_they_were_saved(tmp_path):
    (tmp_path / "0.png").write_bytes(png("red"))
    samples = {"a": [Sample(("text", "pair"), "x")], "b": [Sample((str(tmp_path / "0.png"),), "y", is_file=True)]}
    (tmp_path / "space").mkdir()
    save_samples(samples, tmp_path / "space")
    (tmp_path / "space").rename(tmp_path / "moved")
    again = load_samples(tmp_path / "moved")
    assert again["a"] == samples["a"] and load_samples(tmp_path) == {}
    (image,) = again["b"][0].values
    assert Path(image).read_bytes() == png("red") and Path(image).is_relative_to(tmp_path / "moved")


@needs_gradio
@pytest.mark.slow
def test_a_space_runs_by_itself(run, tiny_bert_folder, tmp_path):
    """With its own copy of the package, without the run or its backbone, and from another folder."""
    from gradio_client import Client

    (expected,) = Predictor.load(run).predict("a film")
    shutil.copytree(run, tmp_path / "topic")
    backbone = shutil.copytree(tiny_bert_folder, tmp_path / "backbone")
    path = tmp_path / "topic" / "adapter_config.json"
    path.write_text(path.read_text().replace(tiny_bert_folder, str(backbone)))
    made = ["demo", str(tmp_path / "topic"), "--space", str(tmp_path / "space"), "--examples", "2", "--quiet"]
    assert main(made) == 0
    shutil.rmtree(tmp_path / "topic")
    shutil.rmtree(backbone)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(tmp_path / "uploads")}
    command = [sys.executable, str(tmp_path / "space" / "app.py")]
    with subprocess.Popen(command, env=environment, cwd=tmp_path) as process:
        try:
            for _ in range(600):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                assert process.poll() is None
                time.sleep(0.1)
            client = Client(f"http://127.0.0.1:{port}", verbose=False)
            said, scores, _ = client.predict("topic", "a film", "off", api_name="/answer")
        finally:
            process.terminate()
    assert said == f"{expected['label']} ({expected['score']:.1%})"
    assert {one["label"]: one["confidence"] for one in scores["confidences"]} == expected["scores"]
    entries = json.loads((tmp_path / "space" / "examples.json").read_text())
    assert len(entries["topic"]) == 2


# ---- a browser -------------------------------------------------------------------------------------------------------


@contextmanager
def browsing(*words: Any, log: Path) -> Iterator[Any]:
    """A page of a browser on a demo in a new process; nothing is asked for elsewhere."""
    from playwright.sync_api import sync_playwright

    command = [sys.executable, "-m", "hf_transfer", "demo", *map(str, words), "--port", "0"]
    with log.open("w") as file, subprocess.Popen(command, stdout=file) as process, sync_playwright() as play:
        try:
            address = f"http://127.0.0.1:{started(process, log.read_text, r'Demo of .* at').port}"
            browser = play.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page()
            asked: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            page.goto(address)
            yield page
            if folder := os.environ.get("DEMO_SCREENSHOTS"):
                page.screenshot(path=f"{folder}/{page.title()}.png", full_page=True)
            browser.close()
        finally:
            process.send_signal(signal.SIGTERM)
    assert process.returncode == 143
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))] and len(asked) > 5


def check(page: Any, answer: dict[str, Any], said: str = "") -> None:
    """The page shows an answer within half a minute: in words, and all probabilities."""
    said = said or f"{answer['label']} ({answer['score']:.1%})"
    expected = said, {name: f"{score:.0%}" for name, score in answer["scores"].items()}
    for _ in range(300):
        words = page.inner_text("#probabilities").split("\n")[1:]
        shown = page.input_value("#answer textarea"), dict(zip(words[::2], words[1::2], strict=False))
        if shown == expected:
            return
        page.wait_for_timeout(100)
    assert shown == expected


@needs_gradio
@needs_browser
@pytest.mark.slow
def test_a_browser_types_switches_tasks_and_clicks_an_example(run, tiny_bert_folder, tmp_path):
    rows = [f"text {i} of {'ab'[i % 2]},{('bad', 'good')[i % 2]}" for i in range(60)]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *rows]))
    keys = {**FAR, "seed": 3}
    fine_tune(tiny_bert_folder, str(tmp_path / "a.csv"), output_dir=str(tmp_path / "tone"), adapter="ia3", **keys)
    bank = HeadBank().add("tone", tmp_path / "tone").add("topic", run)
    bank.save(tmp_path / "bank")
    with browsing(tmp_path / "bank", log=tmp_path / "log") as page:
        page.fill("#text textarea", "a film")
        page.click("#predict")
        for task in ("tone", "topic"):
            if task == "topic":
                page.click("#task input")
                page.get_by_role("option", name="topic").click()
            (expected,) = bank.predict("a film", task=task)
            check(page, expected)
        row = page.locator("#examples tbody tr").first
        text, label = row.inner_text().split("\t")
        assert label.strip() in ("art", "law", "sport")
        row.click()
        (expected,) = bank.predict(text.strip(), task="topic")
        check(page, expected)
        assert page.input_value("#text textarea") == text.strip()
        if is_installed():
            page.click("#explain")
            page.wait_for_selector("#explanation .words mark")
        page.locator("#abstain label", has_text="80%").click()
        (sets,) = bank.predictors["topic"].abstaining(0.8).predict(text.strip())
        among = f"abstains: one of {', '.join(sets['set'])} (80% coverage)"
        check(page, {**expected, **sets}, among if sets["abstains"] else "")


@needs_gradio
@needs_browser
@pytest.mark.slow
def test_a_browser_uploads_an_image_and_clicks_an_example(tiny_vit_folder, tmp_path):
    colors = ("red", "blue")
    for i in range(20):
        (tmp_path / "data" / colors[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / colors[i % 2] / f"{i}.png").write_bytes(png(colors[i % 2]))
    result = fine_tune(
        tiny_vit_folder, str(tmp_path / "data"), output_dir=str(tmp_path / "out"), strategy="full", **QUICK
    )
    (tmp_path / "green.png").write_bytes(png("green"))
    (expected,) = result.predict(tmp_path / "green.png")
    with browsing(tmp_path / "out", log=tmp_path / "log") as page:
        page.set_input_files("#image input[type=file]", tmp_path / "green.png")
        page.wait_for_selector("#image img")
        page.click("#predict")
        check(page, expected)
        if is_installed():
            page.click("#explain")
            page.wait_for_selector("#explanation img")
        page.wait_for_selector("#examples img")
        before = page.locator("#image img").get_attribute("src")
        page.locator("#examples tbody tr").first.click()
        page.wait_for_function(f"document.querySelector('#image img').src != {before!r}")
