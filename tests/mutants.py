"""Forty faults of one line each, and the tests that must see them: what the quick suite is able to catch.

    python -m tests.mutants              all of them, about a quarter of an hour
    python -m tests.mutants 3 7          some of them
    python -m tests.mutants --table      the table of docs/testing.md, from the last results

Each fault is put into a copy of the package, one at a time, and the files that should see it are run until the first
failure. A fault that no test sees is an error, and so is one whose line has changed since.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "build" / "mutants.json"


@dataclass(frozen=True)
class Mutant:
    """One fault: in `module`, `line` becomes `fault`; `tests` are files, or parts of them, that should see it."""

    subject: str
    module: str
    line: str
    fault: str
    tests: str

    @property
    def source(self) -> str:
        return (ROOT / "hf_transfer" / self.module).read_text()


P, G, S, D = "plan/plan.py", "plan/optimizer_groups.py", "training/stages.py", "tests/distributed"
MUTANTS = [
    # ---- plan
    Mutant("plan", P, "(step - start) / self.unfreeze", "(step - start + 1) / self.unfreeze", "tests/plan"),
    Mutant("plan", P, "stage.start <= step)", "stage.start < step)", "tests/plan"),
    Mutant("plan", P, "first = starts[-1] + 1 if starts", "first = starts[-1] if starts", "tests/plan"),
    Mutant("plan", P, r"(?:{pattern})(?:\.|$)", r"(?:{pattern})", "tests/plan"),
    Mutant("plan", "plan/make.py", "decay ** (n - 1 - i)", "decay ** (n - i)", "tests/plan"),
    Mutant(
        "plan", "plan/strategies.py", "keys.groups_per_unfreeze), most]", "keys.groups_per_unfreeze)]", "tests/plan"
    ),
    Mutant(
        "plan",
        "plan/plateau.py",
        "so_far.since_best < stage.patience",
        "so_far.since_best <= stage.patience",
        "tests/plan tests/training/test_stages.py",
    ),
    # ---- optimizer groups
    Mutant("optimizer groups", G, "requires_grad or not any(rates)", "requires_grad", "tests/plan"),
    Mutant(
        "optimizer groups",
        G,
        '"lr": next(r for r in rates if r)',
        '"lr": rates[0]',
        "tests/plan tests/training/test_trainer.py",
    ),
    Mutant("optimizer groups", G, "sum(size > 1 for size in parameter.shape) > 1", "parameter.ndim > 1", "tests/plan"),
    Mutant(
        "optimizer groups",
        G,
        "plan().rate(step, rates) / base",
        "plan().rate(step, rates)",
        "tests/plan tests/training/test_trainer.py",
    ),
    # ---- layers
    Mutant(
        "layers",
        "layers/frozen.py",
        "frozen.extend(module.modules())",
        "frozen.append(module)",
        "tests/layers tests/training/test_stages.py",
    ),
    Mutant(
        "layers",
        "layers/frozen.py",
        "group_of[id(own[-1])]) in group_trains",
        "group_of[id(own[0])]) in group_trains",
        "tests/layers tests/training/test_stages.py tests/training/test_trainer.py",
    ),
    # ---- stages
    Mutant(
        "stages",
        S,
        "parameter.grad = None",
        "parameter.grad = torch.zeros_like(parameter)",
        "tests/training/test_stages.py tests/training/test_trainer.py",
    ),
    Mutant("stages", S, "self.trainer.optimizer.state.pop(parameter, None)", "pass", "tests/training/test_stages.py"),
    Mutant(
        "stages", S, "module.training = False", "pass", "tests/training/test_trainer.py tests/training/test_stages.py"
    ),
    Mutant(
        "stages",
        S,
        "progress.since_best >= patience",
        "progress.since_best > patience",
        "tests/training/test_stages.py",
    ),
    Mutant("stages", S, "tensors[name].copy_(value)", "pass", "tests/training/test_stages.py"),
    # ---- DDP
    Mutant("DDP", S, "ddp.data_parallel(self.trainer.model_wrapped) is not None", "False", D),
    Mutant("DDP", "training/ddp.py", "dist.broadcast(buffer, src=0)", "pass", D),
    Mutant("DDP", "training/ddp.py", "dist.ReduceOp.MAX", "dist.ReduceOp.MIN", D),
    # ---- resuming
    Mutant(
        "resuming",
        "training/checkpoints.py",
        '_digest(path) != expected["sha256"]',
        "False",
        "tests/training/test_resuming.py -k damage",
    ),
    Mutant(
        "resuming",
        "training/checkpoints.py",
        "        if defect is None:\n",
        "        if True:\n",
        "tests/training/test_resuming.py -k 'not killed'",
    ),
    Mutant(
        "resuming",
        "training/checkpoints.py",
        "if keep and p.name == Path(keep).name",
        "if False",
        "tests/training/test_resuming.py -k 'not killed'",
    ),
    Mutant(
        "resuming",
        "training/run_identity.py",
        'then["rates"] != now["rates"]',
        "False",
        "tests/training/test_resuming.py tests/training/test_trainer.py -k 'refused or another or plan'",
    ),
    Mutant(
        "resuming",
        "training/run_identity.py",
        "return {number: state[name]",
        'return dict(saved["state"]) or {number: state[name]',
        "tests/training/test_run_identity.py",
    ),
    Mutant("resuming", "training/resuming.py", 'state["total_loss"]', "0.0", "tests/training/test_resuming.py"),
    # ---- losses
    Mutant(
        "losses",
        "objectives/losses.py",
        "targets * (1 - log_probabilities.exp())",
        "targets * (log_probabilities.exp())",
        "tests/objectives",
    ),
    Mutant("losses", "objectives/losses.py", "[classes].sum()", "[classes].mean()", "tests/objectives"),
    Mutant(
        "losses",
        "objectives/losses.py",
        "(present * np.maximum(counts, 1))",
        "np.maximum(counts, 1)",
        "tests/objectives",
    ),
    Mutant(
        "losses",
        "objectives/objective.py",
        "loss * items * batch.processes / batch.num_items",
        "loss * items / batch.num_items",
        f"tests/objectives {D}",
    ),
    # ---- adapters
    Mutant(
        "adapters",
        "adapters/configuration.py",
        "not inside and not isinstance",
        "inside and not isinstance",
        "tests/adapters/test_attach.py -k 'bert or targets'",
    ),
    Mutant("adapters", "adapters/targets.py", "module.groups == 1 and", "", "tests/adapters/test_attach.py -k targets"),
    # ---- evaluation and inference
    Mutant(
        "inference",
        "evaluation/thresholds.py",
        "sorted(config.id2label)] if by_name else []",
        "sorted(config.id2label)][::-1] if by_name else []",
        "tests/evaluation tests/inference/test_predictor.py",
    ),
    Mutant(
        "inference",
        "inference/answering.py",
        "order = np.argsort(-scores",
        "order = np.argsort(scores",
        "tests/inference/test_predictor.py -k top",
    ),
    # ---- hub
    Mutant(
        "hub",
        "hub/files.py",
        "if path.is_file() and any(fnmatch(path.name, pattern) for pattern in wanted)",
        "if path.is_file()",
        "tests/hub/test_push.py -k 'beside or exactly or stays'",
    ),
    Mutant(
        "hub",
        "hub/push.py",
        'private=values["hub_private_repo"])',
        "private=False)",
        "tests/hub/test_push.py -k 'recipe or private'",
    ),
    # ---- data
    Mutant(
        "data",
        "data/rows.py",
        "if len(cells) != len(self.names):",
        "if len(cells) > len(self.names):",
        "tests/data/test_tables.py",
    ),
    Mutant(
        "data",
        "data/draws.py",
        "generate_indices(values, ",
        "generate_indices(values * 0, ",
        "tests/data/test_draws.py tests/data/test_load.py",
    ),
    Mutant(
        "data",
        "data/augment.py",
        'text = " ".join(str(value) for value in values)',
        'text = ""',
        "tests/data/test_augment.py",
    ),
]


def run(number: int, mutant: Mutant) -> str:
    """The first test that fails with the fault; empty where none does."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder)
        for name in ("tests", "benchmarks", "recipes", "accelerate_configs", "docs", "launch"):
            (tree / name).symlink_to(ROOT / name)
        for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md", "constraints.txt", "Makefile"):
            shutil.copy(ROOT / name, tree)
        shutil.copytree(ROOT / "hf_transfer", tree / "hf_transfer")
        path = tree / "hf_transfer" / mutant.module
        path.write_text(path.read_text().replace(mutant.line, mutant.fault))
        words = re.findall(r"'[^']*'|\S+", mutant.tests)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *(w.strip("'") for w in words)]
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    seen = failed[1].rstrip(":") if failed and done.returncode == 1 else ""
    print(f"{number:2} {mutant.subject:17} {mutant.module:28} {seen or 'NOT SEEN'}", flush=True)
    return seen


def table(seen: dict[str, str]) -> str:
    """Markdown of faults and the tests that see them."""
    lines = ["| | subject | in | line | becomes | seen by |", "|---|---|---|---|---|---|"]
    for number, mutant in enumerate(MUTANTS, 1):
        line, fault = (text.strip().replace("|", "\\|") for text in (mutant.line, mutant.fault))
        test = seen.get(str(number), "").partition("[")[0]
        lines.append(f"| {number} | {mutant.subject} | `{mutant.module}` | `{line}` | `{fault or ' '}` | `{test}` |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("numbers", nargs="*", type=int, help="which faults (default: all)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print the table of the last results")
    options = parser.parse_args()
    seen = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if options.table:
        print(table(seen))
        return 0
    chosen = [(n, MUTANTS[n - 1]) for n in options.numbers or range(1, len(MUTANTS) + 1)]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = dict(zip((str(n) for n, _ in chosen), pool.map(lambda one: run(*one), chosen), strict=True))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**seen, **results}, indent=1))
    missed = [n for n, test in results.items() if not test]
    print(
        f"{len(results) - len(missed)} of {len(results)} seen" + (f"; not seen: {', '.join(missed)}" if missed else "")
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
