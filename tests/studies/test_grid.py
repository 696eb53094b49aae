"""The cells of a comparison, what is refused, and the hash that a cell is kept by."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hf_transfer import UserError
from hf_transfer.runs.configured import configured
from hf_transfer.settings import Config
from hf_transfer.studies.grid import Row, cells_of, digest, possible, read_grid, read_rows, rows_of


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"strateg": ["full", "linear-probe"]}, "grid: 'strateg'|strateg is not a key. Did you mean 'strategy'?"),
        ({"strategy": ["full", "linar-probe"]}, "Did you mean 'linear-probe'?"),
        ({"strategy": "full"}, "grid: strategy: expected a list of values, got 'full'."),
        ({"strategy": ["full"]}, "grid: strategy has 1 value, so it does not vary"),
        ({"strategy": ["full", "full"]}, "grid: strategy names a value twice."),
        ({"learning_rate": [1e-3, 0.001]}, "grid: learning_rate names a value twice."),
        ({"seed": [1, 2]}, "grid: seed cannot vary: give seeds"),
        ({"push_to_hub": [True, False]}, "grid: push_to_hub cannot vary"),
        ({"weight_decay": [0, 1]}, "grid: weight_decay is given for all cells as well; keep one."),
        (["full"], "grid: expected a mapping of keys to lists"),
    ],
)
def test_a_wrong_grid_is_refused(grid, said):
    with pytest.raises(UserError) as raised:
        read_grid(grid, {"weight_decay"})
    assert any(part in str(raised.value) for part in said.split("|"))


def test_every_problem_of_a_grid_is_told():
    with pytest.raises(UserError) as raised:
        read_grid({"strateg": [1, 2], "weight_decay": ["fast", 1]}, ())
    assert "2 problems found" in str(raised.value)


def test_rows_are_every_combination_and_are_named():
    rows = rows_of(read_grid({"strategy": ["full", "linear-probe"], "learning_rate": ["1e-3", 0.1]}, ()))
    assert [row.name for row in rows] == [
        "strategy=full, learning_rate=0.001",
        "strategy=full, learning_rate=0.1",
        "strategy=linear-probe, learning_rate=0.001",
        "strategy=linear-probe, learning_rate=0.1",
    ]


def test_a_list_is_rows_as_they_stand():
    rows = read_rows([{}, {"strategy": "full"}, {"learning_rate": "1e-3"}], {"strategy": "gradual"})
    assert [row.name for row in rows] == ["as given", "strategy=full", "learning_rate=0.001"]
    with pytest.raises(UserError) as raised:
        read_rows([{"strateg": 1}, {"seed": 1}, "full", {"num_train_epochs": "long"}], ())
    said = str(raised.value)
    assert "row 1: strateg is not a key" in said and "row 2: seed cannot vary" in said
    assert "row 3: expected a mapping" in said and "row 4: 'long' is not a number" in said
    with pytest.raises(UserError, match="1 row is nothing to compare"):
        read_rows([{}], ())


@pytest.fixture
def make(tiny_bert_folder, reviews):
    def made(changes, without=()):
        given = {"output_dir": "out", **reviews, "model_name_or_path": tiny_bert_folder}
        return Config.from_sources({}, {**{k: v for k, v in given.items() if k not in without}, **changes})

    return made


def test_contradictory_rows_are_listed_or_left_out(make):
    rows = rows_of({"strategy": ["full", "scratch"], "adapter": ["none", "lora"]})
    with pytest.raises(UserError) as raised:
        possible(rows, make, 0, skips=False)
    assert "strategy=scratch, adapter=lora: adapter: it belongs to a pretrained backbone" in str(raised.value)
    assert "strategy=full, adapter=lora" not in str(raised.value) and "skip_contradictions" in str(raised.value)
    kept, left_out = possible(rows, make, 0, skips=True)
    assert [row.name for row in kept] == [row.name for row in rows[:3]] and len(left_out) == 1


def test_what_is_wrong_with_every_row_is_told_once(make):
    with pytest.raises(UserError) as raised:
        possible(
            rows_of({"strategy": ["full", "linear-probe"]}), lambda c, w: make({**c, "nonsense": 1}), 0, skips=True
        )
    assert str(raised.value) == "1 problem found:\n  - nonsense is not a key."


def test_a_model_that_does_not_exist_is_told_before_anything_runs(make, tmp_path):
    rows = rows_of({"model_name_or_path": [str(tmp_path / "none"), "bundled:minilm-l6"]})
    with pytest.raises(UserError) as raised:
        possible(rows, make, 0, skips=False)
    assert f"model_name_or_path={tmp_path / 'none'}" in str(raised.value)


def test_two_rows_of_one_configuration_are_refused(make):
    rows = [Row({"strategy": "lora"}), Row({"strategy": "lora", "adapter": "lora"})]
    with pytest.raises(UserError, match="are the same configuration"):
        cells_of(rows, [0], make, Path("out"))


def test_the_hash_is_of_what_decides_the_result(make, reviews, tmp_path):
    one = digest(make({"seed": 1}))
    assert one == digest(make({"seed": 1, "output_dir": "elsewhere", "log_level": "error"}))
    assert len({one, digest(make({"seed": 2})), digest(make({"seed": 1, "weight_decay": 0.1}))}) == 3
    moved = shutil.copy(reviews["train_file"], tmp_path / "same.csv")
    assert digest(make({"seed": 1, "train_file": str(moved)})) == one
    Path(moved).write_text(Path(moved).read_text() + "a fine film,positive\n")
    assert digest(make({"seed": 1, "train_file": str(moved)})) != one


def test_the_hash_is_of_data_in_memory_too(tiny_bert_folder):
    def of(label):
        return digest(configured(tiny_bert_folder, {"text": ["a", "b"], "label": ["x", label]}, {"output_dir": "out"}))

    assert of("y") == of("y") != of("z")
