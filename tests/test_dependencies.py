"""What imports what: the rule that keeps the modules apart, and the time that importing takes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import hf_transfer

PACKAGE = Path(hf_transfer.__file__).parent
OUTSIDE_ALLOWED = {"torch"}  # beside the standard library
PURE = {"plan": {"errors", "strategies"}, "strategies": {"errors"}, "optim": {"plan"}, "errors": set()}


def imports(path: Path, everywhere: bool = True) -> set[str]:
    """Modules imported; relative ones with their dots."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module} if node.module else {f"{module}{a.name}" for a in node.names}
    return found


def test_pure_modules_import_torch_and_the_standard_library_only():
    for name, own in PURE.items():
        for module in imports(PACKAGE / f"{name}.py"):
            if module.startswith("."):
                assert module.lstrip(".") in own, (name, module)
            else:
                top = module.split(".")[0]
                assert top in sys.stdlib_module_names | OUTSIDE_ALLOWED, (name, module)


def test_layers_looks_only_at_what_is_imported_already():
    assert {m for m in imports(PACKAGE / "layers.py", everywhere=False) if not m.startswith(".")} <= (
        sys.stdlib_module_names | {"torch", "collections.abc"}
    )


def test_nothing_imports_run_or_cli():
    for path in PACKAGE.rglob("*.py"):
        if path.name in ("cli.py", "verbs.py", "__main__.py", "__init__.py") and path.parent == PACKAGE:
            continue
        assert not {m.lstrip(".").split(".")[0] for m in imports(path) if m.startswith(".")} & {
            "run",
            "cli",
            "verbs",
        }, path


def test_importing_is_quick_and_light():
    """Beyond torch and transformers: well under 1.5 s, and nothing that a text user could be hurt by."""
    code = """
import time, sys
import torch, transformers
from transformers import Trainer
start = time.perf_counter()
import hf_transfer
bare = time.perf_counter() - start
heavy = {"timm", "torchvision", "gradio", "matplotlib"}
print(bare, *sorted(m for m in sys.modules if m.split(".")[0] in heavy and "." not in m))
from hf_transfer import TransferTrainer, TransferArguments, layer_groups
print(time.perf_counter() - start)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    bare, full = done.stdout.splitlines()
    assert float(bare.split()[0]) < 0.5 and float(full) < 1.5
    alone = subprocess.run(
        [sys.executable, "-c", "import sys, hf_transfer; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert not {"torch", "transformers", "timm", "torchvision", "gradio"} & set(alone)


def test_the_public_surface():
    assert hf_transfer.__all__ == [
        "HeadBank",
        "LayerGroup",
        "Plan",
        "Predictor",
        "Result",
        "Stage",
        "TransferArguments",
        "TransferMixin",
        "TransferTrainer",
        "UserError",
        "fine_tune",
        "layer_groups",
        "make_plan",
        "merge",
    ]
    assert all(getattr(hf_transfer, name).__name__ == name for name in hf_transfer.__all__)
