"""What is written as JSON, whatever it is."""

from __future__ import annotations

import datetime
import enum
import json
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from hf_transfer.files import as_json, write_json


class Color(enum.Enum):
    RED = "red"


@dataclass
class Point:
    x: float
    y: tuple[int, ...]


class Odd:
    def __str__(self):
        return "odd"


DAY = datetime.date(2026, 11, 3)
VALUES = [
    (None, None),
    (True, True),
    ("é\ud800", "é\ud800"),
    (float("nan"), None),
    (-float("inf"), None),
    (1e40, 1e40),
    ((1.5, float("inf"), [float("nan")]), [1.5, None, [None]]),
    ({3, 1}, [1, 3]),
    (range(2), [0, 1]),
    ((n for n in (1, 2)), [1, 2]),
    ({"a": 1}.items(), [["a", 1]]),
    ({1: 2, None: 3, np.int64(4): float("nan"), (1, 2): 4, DAY: 5, Color.RED: 6}, None),
    (np.float32(0.5), 0.5),
    (np.float64("nan"), None),
    (np.longdouble(0.5), 0.5),
    (np.int64(3), 3),
    (np.bool_(True), True),
    (np.str_("a"), "a"),
    (np.array([[1.0, np.inf]]), [[1.0, None]]),
    (np.array(2), 2),
    (np.array([1 + 2j]), ["(1+2j)"]),
    (np.datetime64("2026-11-03T00:00:00", "ns"), "2026-11-03T00:00:00.000000000"),
    (np.array(["2026-11-03"], "datetime64[D]"), ["2026-11-03"]),
    (torch.tensor([0.5, float("nan")], requires_grad=True), [0.5, None]),
    (torch.tensor(2, dtype=torch.bfloat16), 2.0),
    (torch.float16, "torch.float16"),
    (torch.device("cpu"), "cpu"),
    (DAY, "2026-11-03"),
    (datetime.datetime(2026, 11, 3, 4, 5), "2026-11-03T04:05:00"),
    (datetime.time(4, 5), "04:05:00"),
    (pd.Timestamp("2026-11-03"), "2026-11-03T00:00:00"),
    (pd.NaT, "NaT"),
    (pd.Series([1, 2]), [1, 2]),
    (Path("a/b"), "a/b"),
    (b"a\xff", "a\\xff"),
    (Decimal("0.1"), "0.1"),
    (Color.RED, "red"),
    (Point(float("nan"), (1, 2)), {"x": None, "y": [1, 2]}),
    (Point, str(Point)),
    (Odd(), "odd"),
]


@pytest.mark.parametrize(("value", "expected"), VALUES, ids=lambda v: type(v).__name__)
def test_any_value_can_be_written(value, expected, tmp_path):
    if isinstance(value, dict):
        expected = {"1": 2, "null": 3, "4": None, "[1, 2]": 4, "2026-11-03": 5, "red": 6}
    write_json(tmp_path / "new" / "a.json", {"value": value})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"value": expected}
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.json"]


def test_what_is_json_already_stays_as_it_is():
    value = {"a": [1, 2.5, None, True, "x"], "b": {}}
    assert as_json(value) == value and json.dumps(as_json(value)) == json.dumps(value)
