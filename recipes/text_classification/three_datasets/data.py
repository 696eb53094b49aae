"""Two data sets of real text that every machine has: Python's own standard library.

`out/three_datasets/topics.csv`: which package a sentence of documentation is from. `kinds.csv`: whether a line is a
comment, documentation or the message of an error.
"""

from __future__ import annotations

import ast
import csv
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LIBRARY = Path(sysconfig.get_path("stdlib"))
TOPICS = ("asyncio", "email", "importlib", "logging", "multiprocessing", "unittest", "xml")
PER_LABEL = {"topics": 160, "kinds": 400}


def modules(folder: Path) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(folder.rglob("*.py")):
        if "test" not in path.relative_to(folder).as_posix() and "site-packages" not in path.parts:
            source = path.read_text(encoding="utf-8", errors="ignore")
            yield source, ast.parse(source)


def sentences(tree: ast.Module) -> Iterator[str]:
    """The first sentence of each documented thing."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            text = " ".join((ast.get_docstring(node) or "").split())
            yield text.split(". ")[0]


def messages(tree: ast.Module) -> Iterator[str]:
    """What errors say."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield from (a.value for a in node.exc.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def comments(source: str) -> Iterator[str]:
    for line in source.splitlines():
        if line.strip().startswith("# "):
            yield line.strip()[2:].strip()


def write(path: Path, found: dict[str, list[str]]) -> None:
    """As many of each label, shuffled; texts of 20 to 200 characters, each once."""
    draw, rows = random.Random(0), []
    taken: set[str] = set()
    for label, texts in found.items():
        fitting = sorted({t for t in texts if 20 <= len(t) <= 200 and t.isprintable()} - taken)
        chosen = draw.sample(fitting, min(len(fitting), PER_LABEL[path.stem]))
        taken |= set(chosen)
        rows += [(text, label) for text in chosen]
    draw.shuffle(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


def main() -> None:
    topics = {name: [s for _, tree in modules(LIBRARY / name) for s in sentences(tree)] for name in TOPICS}
    write(Path("out/three_datasets/topics.csv"), topics)
    kinds: dict[str, list[str]] = {"comment": [], "documentation": [], "error": []}
    for name in ("", *TOPICS):
        parts = modules(LIBRARY / name) if name else ((p.read_text(), ast.parse(p.read_text())) for p in flat())
        for source, tree in parts:
            kinds["comment"] += comments(source)
            kinds["documentation"] += sentences(tree)
            kinds["error"] += messages(tree)
    write(Path("out/three_datasets/kinds.csv"), kinds)


def flat() -> list[Path]:
    """The library's modules outside packages."""
    return sorted(p for p in LIBRARY.glob("*.py") if "test" not in p.stem)


if __name__ == "__main__":
    main()
