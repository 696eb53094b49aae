"""The two ends of the versions that the package promises to work with, as pip reads them.

    python -m tests.pins constraints    upper bounds: what is installed here, where the tests pass
    python -m tests.pins floors         lower bounds: the oldest versions that pyproject.toml allows

torch and torchvision are not bounded from above, nor what only they require: they are installed in one command, which
picks a matching pair for the machine.
"""

from __future__ import annotations

import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PAIR = ("torch", "torchvision")
EXTRAS = ("test", "dev")


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared(*extras: str) -> dict[str, Requirement]:
    """Direct requirements of the package and of these extras, by name, without the package itself."""
    table = project()
    wanted, texts = list(extras), list(table["dependencies"])
    for extra in wanted:
        for text in table["optional-dependencies"][extra]:
            requirement = Requirement(text)
            if requirement.name == table["name"]:
                wanted += [e for e in requirement.extras if e not in wanted]
            else:
                texts.append(text)
    return {canonicalize_name(r.name): r for r in map(Requirement, texts)}


def installed_with(names: list[str], without: tuple[str, ...] = ()) -> set[str]:
    """These distributions and all that they require, as installed here."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(name, frozenset[str]()) for name in names]
    while waiting:
        name, extras = waiting.pop()
        if name in without or (name, extras) in seen:
            continue
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # an extra's, or for another system
        seen.add((name, extras))
        for requirement in map(Requirement, requires):
            markers = [{"extra": extra} for extra in (*extras, "")]
            if requirement.marker is None or any(requirement.marker.evaluate(m) for m in markers):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return {name for name, _ in seen}


def constraints() -> list[str]:
    """`name<=version` of everything that the tests and checks install, but for torch's own."""
    names = installed_with(list(declared(*EXTRAS)), without=PAIR)
    return [f"{name}<={metadata.version(name).split('+')[0]}" for name in sorted(names)]


def floors() -> list[str]:
    """`name==version` for each direct requirement of the package and its tests that has a lower bound."""
    bounds = {
        name: [s.version for s in r.specifier if s.operator in (">=", "==")] for name, r in declared("test").items()
    }
    return [f"{name}=={versions[0]}" for name, versions in bounds.items() if versions]


if __name__ == "__main__":
    print("\n".join({"constraints": constraints, "floors": floors}[sys.argv[1]]()))
