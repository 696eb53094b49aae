"""What imports what. The contracts are in pyproject.toml; here, that they hold and catch what they should."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_transfer

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
# The contract that must refuse it, the module that gets it, the import.
PLANTED = [
    ("Packages import downwards only", "data/labels.py", "hf_transfer.training.trainer"),
    ("Packages import downwards only", "evaluation/metrics.py", "hf_transfer.features.store"),
    ("No cycles", "training/ddp.py", "hf_transfer.training.trainer"),
    ("A plan is data", "plan/plan.py", "transformers"),
    ("doctor imports nothing", "cli/doctor.py", "transformers"),
]
FUTURE = "from __future__ import annotations\n"


def contracts(folder: Path) -> str:
    """What import-linter says of the package in `folder`."""
    lint = (
        "import sys; from importlinter.cli import lint_imports_command as lint; sys.argv[1:] = ['--no-cache']; lint()"
    )
    return subprocess.run([sys.executable, "-c", lint], cwd=folder, capture_output=True, text=True).stdout


def test_a_wrong_import_is_seen(tmp_path):
    pytest.importorskip("importlinter")
    shutil.copy(PYPROJECT, tmp_path)
    shutil.copytree(Path(hf_transfer.__file__).parent, tmp_path / "hf_transfer")
    assert " 0 broken" in contracts(tmp_path)
    for _, module, planted in PLANTED:
        path = tmp_path / "hf_transfer" / module
        path.write_text(path.read_text().replace(FUTURE, f"{FUTURE}import {planted}\n", 1))
    summary, _, details = contracts(tmp_path).partition("Broken contracts")
    assert " 0 kept" in summary, summary
    for contract, module, planted in PLANTED:
        assert re.search(rf"{re.escape(contract)}.* BROKEN", summary), contract
        if contract != "No cycles":  # which lists the first of many ways around
            assert f"{module[:-3].replace('/', '.')} -> {planted}" in details, (module, planted)


def test_importing_is_light():
    """Nothing beyond torch and transformers that a text user could be hurt by; `import hf_transfer` not even these.

    Nor does a run wait for what it does not need: `evaluate` imports all pipelines of transformers.
    """
    code = """
import sys
from transformers import Trainer
theirs = set(sys.modules)
from hf_transfer import TransferTrainer, TransferArguments, layer_groups
print(*{m.split(".")[0] for m in set(sys.modules) - theirs} & {"timm", "torchvision", "gradio", "matplotlib"})
import hf_transfer.cli.train, hf_transfer.runs.run
from hf_transfer.evaluation import metrics
import numpy as np
metrics.compute("single_label_classification", np.eye(8), np.arange(8))
metrics.intervals("single_label_classification", np.eye(8), np.arange(8))
slow = {"timm", "matplotlib", "evaluate", "sklearn", "cleanlab", "scipy.stats", "transformers.pipelines"}
print(*slow & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.split()
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
        "compare",
        "fine_tune",
        "label_issues",
        "layer_groups",
        "load",
        "make_plan",
        "merge",
    ]
    assert all(getattr(hf_transfer, name).__name__ == name for name in hf_transfer.__all__)


def test_modules_stay_short():
    long = {
        str(p): n
        for p in (PYPROJECT.parent / "hf_transfer").rglob("*.py")
        if (n := len(p.read_text().splitlines())) > 350
    }
    assert not long
