"""Comparisons of tiny models, from the grid to the table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from hf_transfer import UserError, compare, fine_tune
from hf_transfer.cli.program import main
from hf_transfer.data import load
from hf_transfer.inference.predictor import Predictor
from hf_transfer.runs import run as runs
from hf_transfer.runs import saving
from hf_transfer.runs import shared as sharing
from hf_transfer.studies import answering, running
from hf_transfer.studies.combining import mean_answer
from tests.studies.conftest import QUICK

GRID = {"strategy": ["linear-probe", "full"]}


@pytest.fixture(scope="module")
def done(tiny_bert_folder, reviews, tmp_path_factory):
    """(frame, folder) of two rows and two seeds."""
    folder = tmp_path_factory.mktemp("comparison") / "out"
    keys = {**QUICK, **reviews, "learning_rate": 1e-2}
    return compare(tiny_bert_folder, output_dir=folder, grid=GRID, seeds=(0, 1), talks=False, **keys), folder


def again(tiny_bert_folder, reviews, folder, **changes):
    keys = {**QUICK, **reviews, "learning_rate": 1e-2, "grid": GRID, "seeds": (0, 1), "talks": False, "estimate": False}
    keys |= changes
    return compare(tiny_bert_folder, output_dir=folder, **keys)


def test_a_cell_is_the_run_that_it_would_be_alone(done, tiny_bert_folder, reviews, tmp_path):
    frame, _ = done
    cell = Path(frame.attrs["cells"]["strategy=full"][1])
    keys = {**QUICK, **reviews, "learning_rate": 1e-2, "strategy": "full", "seed": 1, "log_level": "error"}
    alone = fine_tune(tiny_bert_folder, output_dir=str(tmp_path / "alone"), **keys)
    one, other = load_file(cell / "model.safetensors"), load_file(tmp_path / "alone" / "model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in other)
    results = json.loads((cell / "results.json").read_text())
    assert results["validation_metrics"] == alone.results["validation_metrics"]
    assert results["metrics_split"] == "validation" and alone.results["metrics_split"] == "test"


def test_the_table_holds_means_pairs_and_costs(done):
    frame, folder = done
    whole = json.loads((folder / "compare.json").read_text())
    first, second = whole["rows"]
    assert list(frame["row"]) == ["strategy=linear-probe", "strategy=full"] == [first["row"], second["row"]]
    for row in whole["rows"]:
        values = [
            json.loads((folder / "cells" / key / "results.json").read_text())["validation_metrics"]["accuracy"]
            for key in row["cells"].values()
        ]
        assert list(row["values"].values()) == values and row["mean"] == pytest.approx(sum(values) / 2)
    assert second["difference"]["mean"] == pytest.approx(second["mean"] - first["mean"])
    assert first["trainable_share"] < 0.01 and second["trainable_share"] == 1
    rows = list(csv.DictReader((folder / "compare.csv").open()))
    assert [row["strategy"] for row in rows] == GRID["strategy"] and float(rows[1]["mean"]) == second["mean"]
    assert "| strategy=full |" in (folder / "compare.md").read_text()
    assert (folder / "compare.png").read_bytes()[:4] == b"\x89PNG"
    page = (folder / "report.html").read_text()
    assert f"{second['mean']:.4f}" in page and 'id="loading"' in page and f"cells/{first['cells']['0']}" in page


def test_the_test_split_is_measured_for_the_chosen_row_alone(done):
    frame, folder = done
    test = frame.attrs["test"]
    assert test["row"] == frame.attrs["chosen"] == frame.loc[frame["mean"].idxmax(), "row"]
    for seed, key in test["cells"].items():
        measured = Predictor.load(folder / "cells" / key).evaluate(split="test")["metrics"]
        assert test["metrics"][seed] == measured


def test_what_is_finished_is_kept_and_the_test_split_left_alone(done, tiny_bert_folder, reviews, monkeypatch):
    frame, folder = done

    def never(*_):
        raise AssertionError("run again")

    monkeypatch.setattr(running, "run", never)
    monkeypatch.setattr(answering, "_on_test", never)
    pd.testing.assert_frame_equal(again(tiny_bert_folder, reviews, folder), frame)


def test_another_comparison_in_the_folder_is_refused(done, tiny_bert_folder, reviews):
    _, folder = done
    with pytest.raises(UserError, match=r"holds another comparison: learning_rate was 0\.01 and is now 0\.1"):
        again(tiny_bert_folder, reviews, folder, learning_rate=0.1)
    cell = next((folder / "cells").iterdir())
    with pytest.raises(UserError, match="holds a model already"):
        again(tiny_bert_folder, reviews, cell)


def test_too_many_cells_are_refused_with_their_time(tiny_bert_folder, reviews, tmp_path):
    grid = {"learning_rate": [n / 1000 for n in range(1, 100)], "weight_decay": [0, 0.1]}
    keys = {**QUICK, **reviews, "usd_per_hour": 2, "strategy": "full"}
    with pytest.raises(UserError) as raised:
        compare(tiny_bert_folder, output_dir=tmp_path, grid=grid, seeds=(0, 1), against=["scratch"], **keys)
    said = str(raised.value)
    assert (
        "792 cells (198 rows, 2 seeds, 1 references each), more than 200; at the time of the first one, about" in said
    )
    assert "$" in said and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": (1, 1)}, "seeds: expected different whole numbers"),
        ({"grid": {}, "seeds": (1,)}, "there is nothing to compare"),
        ({"metric": "acuracy"}, "metric: 'acuracy' is not a metric. Did you mean 'accuracy'?"),
        ({"against": ["scrach"]}, "Did you mean 'scratch'?"),
        ({"seed": 3}, "seed: give seeds"),
    ],
)
def test_a_question_without_an_answer_is_refused(tiny_bert_folder, reviews, tmp_path, changes, said):
    with pytest.raises(UserError) as raised:
        again(tiny_bert_folder, reviews, tmp_path / "out", **changes)
    assert said in str(raised.value) and not (tmp_path / "out").exists()


def test_a_cell_that_fails_is_a_reason_and_the_others_go_on(tiny_bert_folder, reviews, tmp_path, capsys):
    argv = ["compare", "--model_name_or_path", tiny_bert_folder, "--output_dir", str(tmp_path / "out")]
    argv += [word for name, value in {**QUICK, **reviews}.items() for word in (f"--{name}", str(value))]
    argv += ["--grid", "{lora_target_modules: [[query], [nothing_here]]}", "--strategy", "lora", "--estimate", "false"]
    assert main(argv) == 1
    whole = json.loads((tmp_path / "out" / "compare.json").read_text())
    good, bad = whole["rows"]
    assert good["mean"] is not None and not good["failures"] and bad["mean"] is None
    assert "nothing_here" in bad["failures"]["42"] and whole["chosen"] == good["row"]
    said = capsys.readouterr()
    assert "1 cell failed" in said.err and "One seed: no intervals" in said.out and "Traceback" not in said.err


def test_an_interrupted_cell_goes_on_from_its_checkpoint(done, tiny_bert_folder, reviews, tmp_path, monkeypatch):
    frame, _ = done
    save = saving.save_model

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "save_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        again(tiny_bert_folder, reviews, tmp_path / "out", seeds=(0,))
    monkeypatch.setattr(saving, "save_model", save)
    seen = []

    def noted(config, among):
        seen.append(config.training.resume_from_checkpoint)
        return runs.run(config, among)

    monkeypatch.setattr(running, "run", noted)
    found = again(tiny_bert_folder, reviews, tmp_path / "out", seeds=(0,))
    assert seen == ["auto", None]
    whole = (
        Path(frame.attrs["cells"]["strategy=linear-probe"][0]),
        Path(found.attrs["cells"]["strategy=linear-probe"][0]),
    )
    one, other = (load_file(folder / "model.safetensors") for folder in whole)
    assert whole[0].name == whole[1].name and all(torch.equal(one[name], other[name]) for name in one)


def test_one_cell_of_several_jobs(done, tiny_bert_folder, reviews, tmp_path, capsys):
    argv = ["compare", "--model_name_or_path", tiny_bert_folder, "--output_dir", str(tmp_path / "out"), "--quiet"]
    keys = {**QUICK, **reviews, "learning_rate": 1e-2}
    argv += [word for name, value in keys.items() for word in (f"--{name}", str(value))]
    argv += ["--grid", json.dumps(GRID), "--seeds", "0,1"]
    assert main([*argv, "--cell", "3"]) == 0
    frame, _folder = done
    (cell,) = (tmp_path / "out" / "cells").iterdir()
    assert (
        cell.name == Path(frame.attrs["cells"]["strategy=full"][1]).name and not (tmp_path / "out/compare.md").exists()
    )
    assert main([*argv, "--cell", "4"]) == 2
    assert "there are 4 cells, 0 to 3, and no 4" in capsys.readouterr().err


@pytest.mark.slow
def test_data_in_memory(tiny_bert_folder, reviews, tmp_path):
    frames = {name: pd.read_csv(reviews[f"{name}_file"]) for name in ("train", "validation", "test")}
    found = compare(
        tiny_bert_folder, frames, output_dir=tmp_path / "out", grid=GRID, estimate=False, talks=False, **QUICK
    )
    assert found.attrs["test"]["mean"] is not None and not found.attrs["failures"]


def test_data_is_read_once(tiny_bert_folder, reviews, tmp_path, monkeypatch):
    reads = []
    read = load.load_splits
    monkeypatch.setattr(sharing, "load_splits", lambda *a: reads.append(1) or read(*a))
    again(
        tiny_bert_folder,
        reviews,
        tmp_path / "out",
        grid={"augmentation": ["none", "basic"]},
        seeds=(0,),
        strategy="full",
    )
    assert len(reads) == 1


class Noted:
    """Data keys that note which of them are read."""

    def __init__(self, keys):
        self.keys, self.read = keys, set()

    def __getattr__(self, name):
        self.read.add(name)
        return getattr(self.keys, name)


def test_all_keys_that_loading_reads_tell_data_apart(tiny_bert_folder, reviews, tmp_path):
    from hf_transfer.data.locate import locate
    from hf_transfer.runs.configured import configured

    folder = tmp_path / "texts"
    folder.mkdir()
    Path(folder / "train.csv").write_text(Path(reviews["train_file"]).read_text())
    read = set()
    for keys in (reviews, {"dataset_name": str(folder)}, {"dataset_name": "bundled:digits"}):
        args = configured(tiny_bert_folder, None, {"output_dir": "out", **keys}).data
        noted = Noted(args)
        load.load_splits(noted, locate(args))
        read |= noted.read
    assert read <= {*sharing._READ, "in_memory"} and len(read) > 2


@pytest.mark.slow
def test_frozen_features_are_computed_once(tiny_bert_folder, reviews, tmp_path, monkeypatch):
    """Rows that pool the same layers of the same model read one pass."""
    from hf_transfer.runs import choosing_pooled

    computed = []
    whole = choosing_pooled.features
    monkeypatch.setattr(choosing_pooled, "features", lambda *a, **k: computed.append(whole(*a, **k)) or computed[-1])
    changes = {"grid": {"weight_decay": [0.0, 0.1]}, "seeds": (0,), "strategy": "auto", "data_seed": 0}
    again(tiny_bert_folder, reviews, tmp_path / "out", **changes)
    assert [one.computed > 0 for one in computed] == [True, False]


def test_runs_are_combined_on_validation(done, tiny_bert_folder, reviews):
    frame, folder = done
    cells = [Path(cell) for row in frame.attrs["cells"].values() for cell in row]
    ensemble = again(tiny_bert_folder, reviews, folder, combine="ensemble").attrs["combined"]
    answers = [pd.DataFrame(Predictor.load(c).predict(reviews["validation_file"]))["scores"] for c in cells]
    positive = sum(pd.Series([one["positive"] for one in own]) for own in answers) / len(cells)
    labels = pd.read_csv(reviews["validation_file"])["label"] == "positive"
    assert ensemble["value"] == pytest.approx(((positive > 0.5) == labels).mean())
    singles = [json.loads((c / "results.json").read_text())["validation_metrics"]["accuracy"] for c in cells]
    assert ensemble["best_single"] == max(singles) and ensemble["runs"] == 4
    souped = again(tiny_bert_folder, reviews, folder, combine="soup").attrs["combined"]
    results = json.loads((folder / "soup" / "results.json").read_text())
    assert results["metrics_split"] == "validation" and souped["value"] == results["metrics"]["accuracy"] >= max(
        singles
    )


def test_a_mean_answer_is_that_of_probabilities():
    logits = [torch.tensor([[2.0, 0.0, 1.0]]).numpy(), torch.tensor([[0.0, 1.0, -3.0]]).numpy()]
    mean = sum(torch.tensor(one).softmax(-1) for one in logits) / 2
    assert torch.allclose(torch.tensor(mean_answer("single_label_classification", logits)).exp(), mean.double())
    both = sum(torch.tensor(one).sigmoid() for one in logits) / 2
    assert torch.allclose(torch.tensor(mean_answer("multi_label_classification", logits)).sigmoid(), both.double())


def test_runs_of_different_splits_are_not_combined(tiny_bert_folder, reviews, tmp_path):
    keys = {**QUICK, "train_file": reviews["train_file"], "strategy": "full"}
    with pytest.raises(UserError, match="combine: runs are combined on one validation split"):
        compare(tiny_bert_folder, output_dir=tmp_path, seeds=(0, 1), combine="soup", **keys)
    data = {"text": ["a", "b"] * 5, "label": ["x", "y"] * 5}
    with pytest.raises(UserError, match="combine: runs are loaded again to be combined"):
        compare(tiny_bert_folder, data, output_dir=tmp_path, seeds=(0, 1), combine="soup", data_seed=0, **QUICK)
    assert not any(tmp_path.iterdir())


def test_the_recipe_repeats_a_comparison_however_loud(done, tiny_bert_folder, reviews, monkeypatch):
    _, folder = done
    monkeypatch.setattr(running, "run", lambda *_: pytest.fail("run again"))
    argv = ["compare", "--config", str(folder / "compare.yaml"), "--output_dir", str(folder), "--estimate", "false"]
    assert main(argv) == main([*argv, "--quiet"]) == 0
