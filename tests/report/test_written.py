"""The report that a run writes, its pictures, and the figures of a result in a notebook."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings

import pytest
from PIL import Image

from hf_transfer import UserError, fine_tune
from hf_transfer.config.arguments.explaining import is_installed
from hf_transfer.report import page
from hf_transfer.report.run_files import RunFiles
from hf_transfer.report.sections import filled
from hf_transfer.runs import explaining, label_issues, reporting, run
from tests.helpers import tiny_timm_resnet, with_statistics
from tests.runs.helpers import sentences, three_layers
from tests.runs.test_preflight import QUIET, pictures, saved

KEYS = QUIET | dict(preflight=False, strategy="full", num_train_epochs=1, calibrate=True, label_issues=True)
DRAWN = KEYS | dict(train_val_split=0.5)


@pytest.fixture(scope="module")
def patched():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "write_report", reporting.write_report)
        patch.setattr(run, "write_label_issues", label_issues.write_label_issues)
        yield


@pytest.fixture(scope="module")
def texts(patched, tmp_path_factory):
    place = tmp_path_factory.mktemp("texts")
    return fine_tune(three_layers(place / "m"), sentences(place / "d.csv"), output_dir=str(place / "out"), **DRAWN)


@pytest.fixture(scope="module")
def images(patched, tmp_path_factory):
    place = tmp_path_factory.mktemp("images")
    model = saved(with_statistics(tiny_timm_resnet()), place / "m")
    return fine_tune(model, pictures(place / "d", 12), output_dir=str(place / "out"), **KEYS)


def test_a_run_writes_it(texts, images):
    for result in (texts, images):
        folder = result.output_dir
        for name in ("report.html", "train_batch.png", "confusion_matrix.png", "curves.png", "mistakes.json"):
            assert (folder / name).is_file(), name
        assert Image.open(folder / "train_batch.png").size[0] > 300 and not list(folder.glob(".*"))
        text = (folder / "report.html").read_text()
        assert "do not have what is shown here" not in text and 'id="inputs"' in text and 'id="layers"' in text
        assert page.write(folder).read_text() == text
        assert result.results["layer_groups"] == [group.name for group in result.trainer.layer_groups]
        bins = result.results["diagnostics"]["reliability"]
        count = result.results["data_facts"]["splits"][result.results["metrics_split"]]["examples"]
        assert sum(bins["count"]) == count and "reliability_before" in result.results["diagnostics"]


def test_mistakes_have_their_pictures_and_neighbors(texts, images):
    for result, kind in ((texts, "text"), (images, "picture")):
        entries = json.loads((result.output_dir / "mistakes.json").read_text())
        assert len(entries) == min(24, len(result.errors())) and entries
        for entry in entries:
            assert (entry["picture"] is not None) == (kind == "picture")
            assert len(entry["nearest"]) == 3 and all(near[kind] for near in entry["nearest"])


def test_the_worst_mistakes_are_explained_where_captum_is_installed(texts, images, tmp_path, monkeypatch):
    for result in (texts, images):
        found = json.loads((result.output_dir / "explanations.json").read_text())
        (section,) = filled(RunFiles.read(result.output_dir), ["why"])
        if not is_installed():
            assert set(found) == {"skipped"} and "needs captum" in section.blocks[0].text
            continue
        cards, entries = section.blocks[1].cards, found["examples"]
        rows = RunFiles.read(result.output_dir).errors
        assert len(cards) == len(entries) == found["of"] == min(8, len(result.errors()))
        assert [entry["label"] for entry in entries] == [row["predicted"] for row in rows[: len(entries)]]
        if result is images:
            assert all(card.picture.startswith("data:image/") and not card.words for card in cards)
            assert "HiResCAM" in section.blocks[0].text
            continue
        for entry, row in zip(entries, rows, strict=False):
            assert "".join(text for words in entry["words"] for text, _ in words) == row["input"]
        assert all("<mark" in card.words[0] for card in cards)
    monkeypatch.setattr(explaining, "is_installed", lambda: False)
    shutil.copytree(texts.output_dir, tmp_path / "out")
    explaining.write_explanations(None, texts.predictor, tmp_path / "out")
    (section,) = filled(RunFiles.read(tmp_path / "out"), ["why"])
    assert section.blocks[0].text == 'Not explained: it needs captum (pip install "hf-transfer-toolkit[explain]").'


def test_figures_and_cells_of_a_notebook(texts, images, tmp_path):
    for number, result in enumerate((texts, images)):
        for draw in (result.plot_curves, result.plot_confusion, result.plot_mistakes, result.plot_plan):
            path = tmp_path / f"{draw.__name__}{number}.png"
            draw().savefig(path)
            assert Image.open(path).size[0] > 200
        shown = result._repr_html_()
        assert shown.startswith('<div class="hft">') and "<html" not in shown and "<svg" in shown
    axes = texts.plot_confusion().axes[0]
    counts = texts.confusion_matrix().to_numpy()
    assert sorted(int(t.get_text()) for t in axes.texts) == sorted(n for n in counts.ravel().tolist() if n)
    other = texts.plot_confusion(str(texts.results["dataset"]), split="train").axes[0]
    assert sum(int(t.get_text()) for t in other.texts) == 44
    (texts.output_dir / "history.jsonl").rename(tmp_path / "history.jsonl")
    with pytest.raises(UserError, match="no learning rates by layer group"):
        texts.plot_plan()
    (tmp_path / "history.jsonl").rename(texts.output_dir / "history.jsonl")


def test_a_failure_is_a_warning_and_the_run_is_the_same(texts, tmp_path, monkeypatch):
    def broken(folder):
        raise OSError("No space left on device")

    monkeypatch.setattr(page, "write", broken)
    place = texts.output_dir.parent
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again = fine_tune(str(place / "m"), str(place / "d.csv"), output_dir=str(tmp_path / "out"), **DRAWN)
    assert any("report.html was not written (OSError: No space left on device)" in str(w.message) for w in said)
    assert again.metrics == texts.metrics and not (tmp_path / "out" / "report.html").exists()
    files = [r.output_dir / "model.safetensors" for r in (again, texts)]
    assert len({hashlib.sha256(file.read_bytes()).digest() for file in files}) == 1
