"""`report.html`: what is on the page for every kind of run, that it loads nothing, and that nothing in it is markup."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser

import pytest
from PIL import Image

from hf_transfer import UserError
from hf_transfer.cli.program import main
from hf_transfer.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from hf_transfer.report import page
from hf_transfer.report.answers import MOST_CLASSES, cut
from hf_transfer.report.course import rate_map_of
from hf_transfer.report.run_files import RunFiles
from hf_transfer.report.sections import SECTIONS, filled
from tests.report.made_up import GROUPS, write_run

COMMON = {
    "result", "curves", "layers", "cache", "mistakes", "labels", "data", "cost", "environment", "loading"
}  # fmt: skip
NASTY = ['<script>alert("x")</script>', "\"><img src=x onerror='alert(1)'>", "$\\frac{a}{b}$ & $x", "名前"]


class Read(HTMLParser):
    """Tags with their attributes, ids of the sections, and all text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sections, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self.sections.append(dict(attrs)["id"])

    def handle_data(self, data):
        self.text += data


def read(folder):
    return Read(page.html(RunFiles.read(folder)))


KINDS = {
    "texts": (dict(problem_type=SINGLE_LABEL), {"confusion", "classes", "calibration", "abstaining"}),
    "pictures": (
        dict(problem_type=SINGLE_LABEL, has_pictures=True, split="validation"),
        {"confusion", "classes", "calibration", "abstaining"},
    ),
    "several labels": (
        dict(problem_type=MULTI_LABEL, names=("a", "b", "c")),
        {"classes", "calibration", "thresholds"},
    ),
    "regression": (dict(problem_type=REGRESSION, names=("stars",)), {"values"}),
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """By kind: the folder of a run, and its page as text."""
    folders = {kind: write_run(tmp_path_factory.mktemp("runs") / "out", **keys) for kind, (keys, _) in KINDS.items()}
    return {kind: (folder, page.html(RunFiles.read(folder))) for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_sections_of_every_kind_of_run(pages, kind):
    found, (keys, more) = Read(pages[kind][1]), KINDS[kind]
    without = {"labels"} if keys["problem_type"] == REGRESSION else set()
    assert set(found.sections) == (COMMON | more) - without
    assert found.sections == [s.name for s in SECTIONS if s.name in found.sections]
    assert "do not have what is shown here" not in found.text
    drawings = sum(tag == "svg" for tag, _ in found.tags)
    assert drawings >= 3 + len(more & {"calibration", "abstaining", "values"})
    pictures = [attributes for tag, attributes in found.tags if tag == "img"]
    assert bool(pictures) == bool(keys.get("has_pictures"))
    assert ("There is no test split" in found.text) == (keys.get("split") == "validation")


def test_the_page_loads_nothing_and_has_no_scripts(pages):
    found = Read(pages["pictures"][1])
    policy = next(a for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")["content"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in found.tags}
    places = [a[name] for _, a in found.tags for name in ("src", "href", "xlink:href") if name in a]
    assert places and all(place.startswith(("data:image/", "#")) for place in places)
    ids = [a["id"] for _, a in found.tags if "id" in a]
    targets = {place[1:] for place in places if place.startswith("#")}
    assert targets <= set(ids) and len(ids) == len(set(ids))


def test_nothing_from_the_data_is_markup(tmp_path):
    folder = write_run(tmp_path / "out", names=NASTY, texts=NASTY)
    results = json.loads((folder / "results.json").read_text())
    results |= {"model": NASTY[0], "dataset": NASTY[1], "device": NASTY[0]}
    results["stages"][0]["cache"]["at"] = results["stages"][0]["name"] = results["data_facts"]["decided"][0] = NASTY[0]
    results["layer_groups"][0] = NASTY[0]
    (folder / "results.json").write_text(json.dumps(results))
    mistakes = json.loads((folder / "mistakes.json").read_text())
    mistakes[0]["picture"] = "https://example.org/x.png"
    mistakes[1]["nearest"][0]["place"] = NASTY[1]
    (folder / "mistakes.json").write_text(json.dumps(mistakes))
    about = {"label": NASTY[0], "probability": 0.9, "value": None, "method": "m", "words": [[[t, 0.5] for t in NASTY]]}
    (folder / "explanations.json").write_text(json.dumps({"of": 8, "examples": [about, {}]}))
    found = read(folder)
    assert "1 of 8 were explained" in found.text and sum(tag == "mark" for tag, _ in found.tags) == len(NASTY)
    assert "script" not in {tag for tag, _ in found.tags} and not any("onerror" in a for _, a in found.tags)
    assert all(a["src"].startswith("data:") for tag, a in found.tags if tag == "img")
    for text in NASTY:
        assert found.text.count(text) > 5, text  # in tables, cards and drawings, letter by letter
    assert page.confusion_figure([[3, 1], [1, 2]], NASTY[2:]).axes[0].get_xticklabels()[0].get_text() == NASTY[2]


def test_the_same_files_give_the_same_report(pages):
    folder, text = pages["texts"]
    names = ("report.html", "curves.png", "confusion_matrix.png")
    page.write(folder)
    assert (folder / "report.html").read_text() == text
    assert all(Image.open(folder / name).size[0] > 300 for name in names[1:])


def test_many_classes_and_examples(tmp_path):
    """10,000 examples of 200 classes: small, quick, and the matrix is cut to the classes of the worst confusions."""
    names = [f"class {i}" for i in range(200)]
    folder = write_run(tmp_path / "out", names=names, examples=10_000, has_pictures=True)
    began = time.process_time()
    found = Read(page.write(folder).read_text())
    assert time.process_time() - began < 5
    assert (folder / "report.html").stat().st_size < 3_000_000
    run = RunFiles.read(folder)
    matrix = next(s for s in filled(run, ["confusion"])).blocks[1]
    assert len(matrix.rows) <= MOST_CLASSES and matrix.head[-1] == "others"
    for row in matrix.rows:
        counts = [int(cell.text or 0) if hasattr(cell, "text") else int(cell or 0) for cell in row[1:]]
        support = run.results["per_class"][names.index(row[0])]["support"]
        assert sum(counts) == support, row[0]
    worst = run.results["confusions"][0]
    assert {worst["true"], worst["predicted"]} <= set(matrix.head)
    assert "All 200 classes" in found.text


def test_the_cut_by_hand():
    assert cut([[3, 1], [0, 2]], 2) == ([0, 1], [[3, 1], [0, 2]], [0, 0])
    size = MOST_CLASSES + 5
    pairs = [[4, 9, 7], [9, 9, 5], [4, 24, 2], *([i, i, 1] for i in range(size) if i != 9)]
    pairs += [[i, i + 1, 1] for i in range(0, size - 1)]
    classes, table, others = cut({"pairs": pairs}, size)
    assert len(classes) == MOST_CLASSES and {4, 9, 24} <= set(classes)
    assert table[classes.index(4)][classes.index(9)] == 7 and table[classes.index(9)][classes.index(9)] == 5
    assert sum(map(sum, table)) + sum(others) == sum(n for i, _, n in pairs if i in classes)


def test_learning_rates_over_time(tmp_path):
    """Groups in the order of the model, those that are frozen at 0, also where nothing but the plan says so."""
    run = RunFiles.read(write_run(tmp_path / "out"))
    found = rate_map_of(run)
    assert found.groups == list(GROUPS) and found.steps == 60 and found.stages == [(0, "head"), (20, "all groups")]
    embeddings, head = found.rates[0], found.rates[-1]
    assert len(head) == 60 and embeddings[:20] == [0.0] * 20 and all(embeddings[20:])
    logged = {line["step"]: line["learning_rate"]["head"] for line in run.history if "loss" in line}
    assert head[0] == logged[5] and head[19] == logged[20] and head[20] == logged[25] and head[59] == logged[60]
    lines = [line for line in run.history if line["stage"] == 1]
    planned = rate_map_of(RunFiles(run.folder, run.results, {}, tuple(lines)))
    assert planned.rates[-1][0] == 1e-3 and planned.rates[0][0] == 0


@pytest.mark.parametrize("missing", ["history", "errors", "mistakes", "label_issues"])
def test_runs_without_one_of_their_files(tmp_path, missing):
    folder = write_run(tmp_path / "out")
    next(folder.glob(f"{missing}.*")).unlink()
    names = ["result", "curves", "mistakes", "labels", "cost"]
    made = {section.name: section.blocks for section in filled(RunFiles.read(folder), names)}
    gone = {"history": "curves", "errors": "mistakes", "label_issues": "labels"}.get(missing)
    assert set(made) == {*names} - {gone}
    assert not any("do not have" in getattr(b, "text", "") for blocks in made.values() for b in blocks)
    if missing == "mistakes":
        assert all(not card.near for card in made["mistakes"][1].cards)


def test_an_interrupted_run_whose_log_was_cut(tmp_path):
    folder = write_run(tmp_path / "out")
    (folder / "results.json").unlink()
    with (folder / "history.jsonl").open("a") as file:
        file.write('{"step": 65, "lo')
    found = read(folder)
    assert "This run has not finished. The last line of its log is of step 60." in found.text
    assert "--resume_from_checkpoint auto" in found.text
    assert set(found.sections) == {"result", "curves", "layers", "mistakes", "labels", "environment", "loading"}


def test_labels_of_pictures_are_shown_with_them_while_they_are_there(tmp_path):
    folder, there = write_run(tmp_path / "out", has_pictures=True), tmp_path / "1.png"
    Image.new("RGB", (200, 100), "red").save(there)
    row = "out,wrong,positive,negative,0.0412,0.09,"
    lines = ["place,verdict,given,suggested,probability,score,image", f"{row}{there}", f"{row}{tmp_path}/2.png", row]
    (folder / "label_issues.csv").write_text("\n".join(lines))
    (section,) = filled(RunFiles.read(folder), ["labels"])
    first, second, third = section.blocks[1].cards
    assert first.picture.startswith("data:image/jpeg") and (second.picture, third.picture) == (None, None)
    assert second.place.endswith("2.png") and third.place == "out" and ("given", "positive") in first.lines


def test_the_target_domain_and_the_old_task(tmp_path):
    folder = write_run(tmp_path / "out")
    run = RunFiles.read(folder)
    measured = {"proxy_a_distance": 1.25, "error": 0.375, "mmd": 0.5}
    more = {
        "domain_adaptation": {"distance": {"layer": "layer.5", "examples": 30, "before": measured}},
        "forgetting": {"metric": "accuracy", "before": 0.9, "after": 0.7125, "num_examples": 40, "split": "test",
                       "dataset": NASTY[0], "curve": [{"step": 0, "accuracy": 0.9}, {"step": 9, "accuracy": 0.7125}]},
    }  # fmt: skip
    names = ["domains", "forgetting"]
    assert not filled(run, names)
    found = filled(RunFiles(folder, {**run.results, **more}), names)
    distances, old = (section.blocks for section in found)
    assert distances[0].rows[0] == ("proxy A-distance, 0 to 2", "1.2500", "–")
    assert [tile.value for tile in old[0].tiles] == ["0.9000", "0.7125"] and NASTY[0] in old[1].text
    assert "accuracy of the old task" in old[2].drawings[0]
    more["domain_adaptation"]["distance"] = {"layer": "layer.5", "skipped": "too few"}
    assert filled(RunFiles(folder, more), names)[0].blocks[0].text == "Not measured: too few."


def test_a_picture_that_is_gone(tmp_path):
    folder = write_run(tmp_path / "out", has_pictures=True)
    mistakes = json.loads((folder / "mistakes.json").read_text())
    mistakes[0]["picture"] = None
    (folder / "mistakes.json").write_text(json.dumps(mistakes))
    (section,) = filled(RunFiles.read(folder), ["mistakes"])
    about, shown = section.blocks
    assert "A picture that is missing could not be read any more." in about.text
    assert shown.cards[0].picture is None and shown.cards[0].place.startswith("pictures/") and shown.cards[1].picture


def test_results_of_older_versions(tmp_path):
    """Without any one of the entries, the page is written, and the sections that do not need it are whole."""
    folder = write_run(tmp_path / "out")
    run = RunFiles.read(folder)
    drawn = {"curves", "layers", "calibration", "abstaining"}  # which takes a while, and reads few entries
    whole = {s.name for s in filled(run)}
    needed = {"metrics": {"result"}, "labels": {"confusion"}}
    for name in run.results:
        older = RunFiles(folder, {k: v for k, v in run.results.items() if k != name}, run.keys, run.history, run.errors)
        made = filled(older, [s.name for s in SECTIONS if s.name not in drawn])
        broken = {s.name for s in made for b in s.blocks if "do not have what is shown" in getattr(b, "text", "")}
        assert broken == needed.get(name, set()), name
        assert len(whole - drawn - {s.name for s in made}) <= 2, name


def test_the_command(tmp_path, capsys):
    folder, other = write_run(tmp_path / "out"), write_run(tmp_path / "other")
    (other / "results.json").unlink()
    assert main(["report", str(folder), str(other)]) == 0
    assert capsys.readouterr().out.split() == [str(f / "report.html") for f in (folder, other)]
    assert (folder / "report.html").is_file() and (other / "curves.png").is_file()
    (tmp_path / "empty").mkdir()
    (folder / "report.html").unlink()
    for words, said in (([], "A RUN is needed"), ([str(tmp_path / "none")], "does not exist"),
                        ([str(folder), str(tmp_path / "empty")], "nothing to report")):  # fmt: skip
        assert main(["report", *words]) == 2
        assert said in capsys.readouterr().err
    assert not (folder / "report.html").exists()  # of none, where one is wrong
    (folder / "results.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        page.write(folder)


def test_drawings_take_their_colors_from_the_page(pages):
    text = pages["texts"][1]
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert all("var(--ink)" in one and "#000000" not in one and "fill: #ffffff" not in one for one in drawings)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
