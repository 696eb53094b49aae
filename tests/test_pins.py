"""constraints.txt bounds what is installed, and nothing else; the floors are what pyproject.toml promises."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

from tests import pins

CONSTRAINTS = [Requirement(line) for line in (pins.ROOT / "constraints.txt").read_text().splitlines()]


def test_constraints_are_upper_bounds_of_names():
    """No address, no pin: a machine that has older versions only still resolves."""
    assert all(r.url is None and r.marker is None and not r.extras for r in CONSTRAINTS)
    assert all([s.operator for s in r.specifier] == ["<="] for r in CONSTRAINTS)


def test_all_that_we_ask_for_is_bounded_but_torch():
    bounded = {r.name for r in CONSTRAINTS}
    assert set(pins.declared(*pins.EXTRAS)) - bounded == set(pins.PAIR)
    assert not {name for name in bounded if name.startswith(("torch", "nvidia", "cuda", "triton"))}


def test_bounds_do_not_contradict_the_floors():
    bounds = {r.name: r.specifier for r in CONSTRAINTS}
    for line in pins.floors():
        name, _, version = line.partition("==")
        assert name in pins.PAIR or Version(version) in bounds[name], line


def test_what_only_torch_requires_is_left_out():
    alone = pins.installed_with(["torch"]) - pins.installed_with(list(pins.declared(*pins.EXTRAS)), without=pins.PAIR)
    assert "torch" in alone and not alone & {r.name for r in CONSTRAINTS}
    assert all(metadata.version(name) for name in alone)
