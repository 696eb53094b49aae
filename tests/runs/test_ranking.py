"""`plan --models`: models that work, models that do not, and data on which none can be compared."""

from __future__ import annotations

import json

import pytest

from hf_transfer.cli.program import main
from tests.helpers import tiny_bert, tiny_timm_resnet
from tests.runs.test_preflight import words_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two text models, an image model, and 40 sentences."""
    folder = tmp_path_factory.mktemp("ranking")
    for layers in (1, 3):
        tiny_bert(layers=layers).base_model.save_pretrained(folder / f"bert{layers}")
        words_tokenizer().save_pretrained(folder / f"bert{layers}")
    tiny_timm_resnet().save_pretrained(folder / "resnet")
    rows = [f"{'a ' * (i % 3)}film {i % 5} {'fine' if i % 2 else 'dull'},{'xy'[i % 2]}" for i in range(40)]
    (folder / "a.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return folder


def plan(folder, models, *more):
    names = ",".join(str(folder / name) for name in models)
    return main(["plan", str(folder / "a.csv"), "--models", names, "--use_cpu", "true", *more])


def test_one_that_cannot_be_used_is_a_row_and_the_others_go_on(folder, capsys):
    assert plan(folder, ["nothing", "bert1", "resnet", "bert3"], "--json") == 0
    ranking = json.loads(capsys.readouterr().out)["ranking"]
    rows = {row["model"].rpartition("/")[2]: row for row in ranking["models"]}
    assert list(rows)[:2] in (["bert1", "bert3"], ["bert3", "bert1"]) and ranking["looked_at"] == 32
    assert "does not exist" in rows["nothing"]["why_not"]
    assert rows["resnet"]["why_not"] and rows["resnet"]["accuracy"] is None and "\n" not in rows["resnet"]["why_not"]
    assert rows["bert3"]["parameters"] > rows["bert1"]["parameters"] and ranking["largest"].endswith("bert3")
    assert 0 <= rows["bert1"]["accuracy"] <= 1 and rows["bert1"]["imagenet"] is None


def test_a_table_is_printed(folder, capsys):
    assert plan(folder, ["bert1", "bert3"]) == 0
    out = capsys.readouterr().out
    assert "Heads on the frozen features of 32 training examples, 2 classes" in out and "LogME" in out


def test_no_model_or_no_classes_is_an_error(folder, tmp_path, capsys):
    assert plan(folder, ["resnet", "resnet"]) == 2
    assert "models: " in capsys.readouterr().err
    assert plan(folder, ["no", "none"]) == 2
    assert "does not exist" in capsys.readouterr().err
    numbers = tmp_path / "a.csv"
    numbers.write_text("text,label\n" + "".join(f"film {i},{i / 7:.3f}\n" for i in range(40)))
    assert main(["plan", str(numbers), "--models", str(folder / "bert1"), "--use_cpu", "true"]) == 2
    assert "models: they cannot be compared on this data: accuracy is of one class" in capsys.readouterr().err
    assert main(["plan", "--models", str(folder / "bert1")]) == 2
    assert "there is no data to compare them on" in capsys.readouterr().err
