"""Names in messages."""

from __future__ import annotations

from hf_transfer.errors import closest, named, shortened


def test_long_names_are_shortened():
    assert shortened("a" * 60) == "a" * 60 and shortened("a" * 61) == "a" * 59 + "…"
    assert shortened("two\n lines") == "two lines"
    assert named(["b" * 99, 1, 2], 2) == f"{'b' * 59}…, 1 and 1 more"


def test_the_closest_name():
    assert closest("lerning_rate", ["learning_rate", "seed"]) == "learning_rate"
    assert closest("minilm-l7", ["minilm-l6"], 0.8) == "minilm-l6" and closest("x", ["minilm-l6"]) == ""
