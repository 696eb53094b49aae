"""transformers' `TrainingArguments` as a dataclass of the same fields, without importing transformers.

The import takes seconds, because it brings torch; a wrong key, `--help` and completion need the fields alone: names,
types, defaults and help. They are read from the installed source: the declarations of the class and of the
enumerations in its types are executed, and nothing else. Where the source cannot be read this way, the class itself is
imported.
"""

from __future__ import annotations

import ast
import enum
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

_ENUMERATIONS = ("trainer_utils.py", "debug_utils.py", "training_args.py")  # where they are declared
# Conditions in the class body that hold for every version of torch that this package takes.
_TRUE = ("is_torch_available()", "is_torch_greater_or_equal_than_2_8")

# Another layout of the source.
_UNREADABLE = (OSError, SyntaxError, NameError, AttributeError, KeyError, TypeError, ValueError)


@cache
def training_arguments() -> type:
    """A dataclass with the fields and the docstring of `TrainingArguments`; it cannot be used for training."""
    try:
        return _names()["TrainingArguments"]
    except _UNREADABLE:
        from transformers import TrainingArguments

        return TrainingArguments


@cache
def scheduler_types() -> tuple[str, ...]:
    """The values of transformers' `SchedulerType`."""
    try:
        return tuple(member.value for member in _names()["SchedulerType"])
    except _UNREADABLE:
        from transformers.trainer_utils import SchedulerType

        return tuple(member.value for member in SchedulerType)


@cache
def _names() -> Mapping[str, Any]:
    """What the installed source declares: the enumerations and the class."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        raise OSError("transformers is not installed")
    folder = Path(spec.origin).parent
    names: dict[str, Any] = {
        "__name__": __name__,
        "Any": Any,
        "Literal": Literal,
        "ExplicitEnum": enum.Enum,
        "ParallelismConfig": Any,
        "dataclass": dataclass,
        "field": field,
        "logging": logging,
    }
    _execute([_assignment(_parsed(folder / "utils" / "logging.py"), "log_levels")], names)
    names["trainer_log_levels"] = {**names["log_levels"], "passive": -1}
    modules = {name: _parsed(folder / name) for name in _ENUMERATIONS}
    for module in modules.values():
        _execute(list(_enumerations(module)), names)
    whole = _class(modules["training_args.py"], "TrainingArguments")
    whole.body = list(_declarations(whole.body))
    _execute([whole], names)
    return names


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _execute(statements: list[Any], names: dict[str, Any]) -> None:
    code = compile(ast.Module(statements, type_ignores=[]), "<transformers>", "exec", dont_inherit=True)
    exec(code, names)


def _assignment(module: ast.Module, name: str) -> ast.stmt:
    for node in module.body:
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == [name]:
            return node
    raise KeyError(name)


def _class(module: ast.Module, name: str) -> ast.ClassDef:
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise KeyError(name)


def _enumerations(module: ast.Module) -> Iterator[ast.ClassDef]:
    for node in module.body:
        if isinstance(node, ast.ClassDef) and [ast.unparse(b) for b in node.bases] == ["ExplicitEnum"]:
            node.body = [n for n in node.body if isinstance(n, ast.Assign)]
            yield node


def _declarations(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The docstring, the fields, and the names that their defaults use.

    Raises:
        ValueError: a condition that is not known to hold.
    """
    for node in body:
        if isinstance(node, ast.If):
            if ast.unparse(node.test) not in _TRUE:
                raise ValueError(f"an unknown condition: {ast.unparse(node.test)}")
            yield from _declarations(node.body)
        elif isinstance(node, ast.AnnAssign | ast.Expr) or _is_public(node):
            yield node


def _is_public(node: ast.stmt) -> bool:
    """Whether a statement gives a value to a public name; `__repr__ = __str__` needs methods, which are left out."""
    return isinstance(node, ast.Assign) and not any(ast.unparse(t).startswith("_") for t in node.targets)
