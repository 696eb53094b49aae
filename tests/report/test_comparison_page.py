"""`report.html` of a comparison: what is on it, that it loads nothing, and that nothing in it is markup."""

from __future__ import annotations

import json

import pytest
import yaml

from hf_transfer import UserError
from hf_transfer.cli.program import main
from hf_transfer.report import comparison
from tests.report.test_report import NASTY, Read


def row(name: str, mean: float | None, **more) -> dict:
    """As `compare.json` has it, of two seeds."""
    values = {} if mean is None else {"0": mean - 0.01, "1": mean + 0.01}
    known = {
        "row": name,
        "settings": {"learning_rate": 1e-3, "strategy": "full"},
        "metric": "accuracy",
        "mean": mean,
        "interval": None if mean is None else [mean - 0.05, mean + 0.05],
        "values": values,
        "train_seconds": 12.0,
        "trainable_share": 0.5,
        "gap": 0.1,
        "by_epoch": {} if mean is None else {"1": mean - 0.1, "2": mean},
        "usd": None,
        "difference": None,
        "p_holm": None,
        "is_chosen": False,
        "stopped": "",
        "transfer": [],
        "failures": {},
        "cells": {"0": "aa", "1": "bb"},
    }
    return known | more


def write(folder, rows, **more) -> None:
    folder.mkdir()
    whole = {"metric": "accuracy", "is_search": False, "seeds": [0, 1], "rows": rows, "test": None, "combined": None}
    whole |= {"references": [], "left_out": [], "failures": [], "notes": ["Read it so."]} | more
    (folder / "compare.json").write_text(json.dumps(whole))
    keys = {"model_name_or_path": "acme/tiny", "dataset_name": "/data/reviews.csv", "output_dir": str(folder)}
    (folder / "compare.yaml").write_text(yaml.safe_dump(keys))


def read(folder) -> Read:
    return Read(comparison.write(folder).read_text())


VERDICT = {"against": "scratch", "metric": "accuracy", "verdict": "hurt", "reference": 0.9, "why_not": ""}
VERDICT["difference"] = {"mean": -0.15, "interval": [-0.2, -0.1], "p": 0.01, "count": 2}


def test_a_comparison_with_everything(tmp_path):
    difference = {"mean": 0.05, "interval": [0.01, 0.09], "p": 0.03, "count": 2}
    rows = [
        row("first", 0.7),
        row("second", 0.75, difference=difference, p_holm=0.06, is_chosen=True, transfer=[VERDICT]),
        row("third", None, failures={"0": "out of memory", "1": "out of memory"}, train_seconds=None),
    ]
    test = {"row": "second", "metric": "accuracy", "mean": 0.72, "interval": [0.7, 0.74]}
    write(tmp_path / "out", rows, test=test, left_out=["strategy=scratch: contradicts adapter"])
    found = read(tmp_path / "out")
    assert found.sections == ["result", "rows", "cost", "curves", "transfer", "failures", "loading"]
    for said in ("Comparison: acme/tiny on reviews.csv", "Best on validation: second.", "0.7200", "Read it so."):
        assert said in found.text, said
    for said in ("2 *  second", "+0.0100 to +0.0900", "0.06", "failed", "third, seed 0", "contradicts adapter"):
        assert said in found.text, said
    assert "Pretraining or tuning hurt in 1 comparison." in found.text and "-0.2000 to -0.1000" in found.text
    assert f"hf-transfer predict {tmp_path / 'out'}/cells/aa -" in found.text and "cells/bb" in found.text
    assert sum(tag == "svg" for tag, _ in found.tags) == 2 and "cost" not in [r["usd"] for r in rows]


def test_a_search_has_a_panel_per_key(tmp_path):
    rows = [row("as given", 0.6, settings={})]
    for i, rate in enumerate((1e-4, 1e-3, 1e-1)):
        rows.append(row(f"trial {i}", 0.7 + i / 50, settings={"learning_rate": rate, "strategy": "full"}))
    rows[2] |= {"is_chosen": True}
    rows[3] |= {"stopped": "worse than the median", "mean": None, "values": {}}
    write(tmp_path / "out", rows, is_search=True)
    found = read(tmp_path / "out")
    assert "trials" in found.sections and "Searched: learning_rate, strategy." in found.text
    assert "worse than the median" in found.text and "stopped" in found.text
    assert sum(tag == "svg" for tag, _ in found.tags) == 4 and "mathdefault" not in found.text


def test_nothing_from_the_keys_is_markup_and_nothing_is_loaded(tmp_path):
    rows = [row(name, 0.5, settings={"model_name_or_path": name}, is_chosen=i == 0) for i, name in enumerate(NASTY)]
    rows[1]["failures"] = {"0": NASTY[0]}
    write(tmp_path / "out", rows, is_search=True, notes=[NASTY[1]], left_out=[NASTY[0]])
    found = read(tmp_path / "out")
    assert not {"script", "img", "link", "iframe"} & {tag for tag, _ in found.tags}
    assert not any("onerror" in attributes for _, attributes in found.tags)
    places = [a[name] for _, a in found.tags for name in ("src", "href", "xlink:href") if name in a]
    assert places and all(place.startswith("#") for place in places)
    assert all(found.text.count(text) >= 2 for text in NASTY)
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_where_no_run_has_ended(tmp_path):
    write(tmp_path / "out", [row("only", None, failures={"0": "no", "1": "no"}, train_seconds=None)])
    found = read(tmp_path / "out")
    assert found.sections == ["result", "rows", "failures"] and "No run has ended." in found.text


def test_report_writes_it_again(tmp_path, capsys):
    write(tmp_path / "out", [row("first", 0.7, is_chosen=True)])
    text = comparison.write(tmp_path / "out").read_bytes()
    (tmp_path / "out" / "report.html").unlink()
    assert main(["report", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'report.html'}\n"
    assert (tmp_path / "out" / "report.html").read_bytes() == text
    (tmp_path / "out" / "compare.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        comparison.write(tmp_path / "out")
