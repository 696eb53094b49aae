"""What a finished run tells the user: the result, the files, and the commands to type next."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from typing import Any

from hf_transfer.adapters.attach import is_adapted
from hf_transfer.evaluation.calibration import describe
from hf_transfer.evaluation.measure import format_metrics
from hf_transfer.files import say
from hf_transfer.models.heads import MLP
from hf_transfer.run_folder import LABEL_ISSUES, RUN_FILE
from hf_transfer.runs.result import Result
from hf_transfer.tasks.base import Task


def conclude(result: Result, task: Task) -> None:
    """Print it."""
    results, folder = result.results, result.output_dir
    say()
    say(
        f"Result on {results['metrics_split']} ({results['train_seconds']:.0f} s of training, "
        f"{results['trainable_parameters']:,} of {results['total_parameters']:,} parameters trained):"
    )
    for line in format_metrics(results["metrics"], results["intervals"]):
        say(line)
    if calibration := results["calibration"]:
        say(f"Calibration: {describe(calibration)}.")
    if line := _on_labels(results["label_issues"]):
        say(line)
    files = sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    say(f"Files in {folder}: {', '.join(files)}")
    if not math.isfinite(results["metrics"]["loss"]):
        say("The loss is not a number: training diverged. Try a lower learning_rate.")
    python = shlex.quote(_python())
    ours = "hf-transfer" if shutil.which("hf-transfer") else f"{python} -m hf_transfer"
    say("Next:")
    recipe, again = shlex.quote(str(folder / RUN_FILE)), shlex.quote(f"{folder}-again")
    what = "texts" if not task.suffixes else "paths of images"
    say(f"  {ours} predict {shlex.quote(str(folder))} -   # answers {what} from standard input, a line each")
    say(f"  {ours} evaluate {shlex.quote(str(folder))}   # these metrics again; --test_file for others")
    say(f"  {ours} train --config {recipe} --output_dir {again}   # repeats the run")
    if task.auto_class and results["head"]["type"] == MLP:
        code = f"from hf_transfer import Predictor as P; print(P.load({json.dumps(str(folder))}).model.config.id2label)"
        say(f"  {python} -c {shlex.quote(code)}")
    elif task.auto_class and is_adapted(result.model):
        code = (
            f"import transformers as t, peft; c = peft.PeftConfig.from_pretrained({json.dumps(str(folder))}); "
            f"m = t.{task.auto_class}.from_pretrained(c.base_model_name_or_path, "
            f"config=t.AutoConfig.from_pretrained({json.dumps(str(folder))}), ignore_mismatched_sizes=True); "
            f"print(peft.PeftModel.from_pretrained(m, {json.dumps(str(folder))}).config.id2label)"
        )
        say(f"  {python} -c {shlex.quote(code)}")
    elif task.auto_class:
        load = f"M.from_pretrained({json.dumps(str(folder))})"
        code = f"from transformers import {task.auto_class} as M; print({load}.config.id2label)"
        say(f"  {python} -c {shlex.quote(code)}")


def _on_labels(found: Mapping[str, Any] | None) -> str:
    """A line about labels that look wrong; empty if there are none."""
    if not found or not found.get("wrong"):
        return ""
    looks = "1 label looks wrong" if found["wrong"] == 1 else f"{found['wrong']:,} labels look wrong"
    more = f", and {found['doubtful']:,} are doubtful" if found["doubtful"] else ""
    return f"{looks}{more}; the likeliest first: {LABEL_ISSUES}"


def _python() -> str:
    """How to call this interpreter from here."""
    if shutil.which("python") == sys.executable:
        return "python"
    beside = os.path.relpath(sys.executable)
    return sys.executable if beside.startswith("..") else beside
