"""What a finished run tells the user: the result, the files, and the commands to type next."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_transfer.adapters.attach import is_adapted
from hf_transfer.data.locate import IN_MEMORY
from hf_transfer.evaluation import logit_adjustment
from hf_transfer.evaluation.calibration import describe
from hf_transfer.files import say
from hf_transfer.models.heads import LINEAR
from hf_transfer.run_folder import LABEL_ISSUES, REPORT, RUN_FILE, refitted
from hf_transfer.runs.ending import ending
from hf_transfer.runs.result import Result
from hf_transfer.settings import COMMAND_LINE_ONLY, Config
from hf_transfer.tasks.base import Task


def conclude(result: Result, task: Task, config: Config, inputs: tuple[str, ...]) -> None:
    """Print it.

    Args:
        result: of the run.
        task: what the model reads.
        config: of the run.
        inputs: names of the input columns.
    """
    results, folder = result.results, result.output_dir
    say()
    say(
        f"Result on {results['metrics_split']} ({results['train_seconds']:.0f} s of training, "
        f"{results['trainable_parameters']:,} of {results['total_parameters']:,} parameters trained):"
    )
    for line in ending(results):
        say(line)
    if calibration := results["calibration"]:
        say(f"Calibration: {describe(calibration)}.")
    if adjustment := results["logit_adjustment"]:
        say(f"Logit adjustment: {logit_adjustment.describe(adjustment)}.")
    if line := _on_labels(results["label_issues"]):
        say(line)
    if not math.isfinite(results["metrics"]["loss"]):
        say("Warning: the loss is NaN or infinite: training diverged. Try a lower learning_rate.")
    if (folder / REPORT).is_file():
        say(f"Report, for a browser: {folder / REPORT}")
    files = sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    say(f"Files in {folder}: {', '.join(files)}")
    say("Next:")
    for command in _next_commands(result, task, config, inputs):
        say(f"  {command}")


def _next_commands(result: Result, task: Task, config: Config, inputs: tuple[str, ...]) -> Iterator[str]:
    """Commands that work as they stand, with a comment after `   #`."""
    folder, python = result.output_dir, shlex.quote(_python())
    ours = "hf-transfer" if shutil.which("hf-transfer") else f"{python} -m hf_transfer"
    trusts = " --trust_remote_code" if config.values["trust_remote_code"] else ""
    where = shlex.quote(str(folder))
    if len(inputs) == 1:
        what = "texts" if not task.suffixes else "paths of images"
        yield f"{ours} predict {where} -{trusts}   # answers {what} from standard input, one per line"
    else:  # a line holds one text
        code = f"from hf_transfer import Predictor as P; print(P.load({json.dumps(str(folder))}).predict([('a', 'b')]))"
        yield f"{python} -c {shlex.quote(code)}   # answers pairs of texts"
    if config.data.dataset_name != IN_MEMORY:  # else no file says where the data is
        if result.results["metrics_split"] == "test" or not refitted(result.results):  # else nothing is held out
            yield f"{ours} evaluate {where}{trusts}   # these metrics again; --test_file for others"
        recipe, again = shlex.quote(str(folder / RUN_FILE)), shlex.quote(f"{folder}-again")
        flags = "".join(f" --{name}" for name in COMMAND_LINE_ONLY if config.values[name])
        yield f"{ours} train --config {recipe} --output_dir {again}{flags}   # repeats the run"
    if code := _loading(result, task, folder):
        yield f"{python} -c {shlex.quote(code)}"


def _loading(result: Result, task: Task, folder: Path) -> str:
    """Python that loads the model; empty if there is no class for it."""
    place = json.dumps(str(folder))
    if not task.auto_class:
        return ""
    if result.results["head"]["type"] != LINEAR:
        return f"from hf_transfer import Predictor as P; print(P.load({place}).model.config.id2label)"
    if is_adapted(result.model):
        return (
            f"import transformers as t, peft; c = peft.PeftConfig.from_pretrained({place}); "
            f"m = t.{task.auto_class}.from_pretrained(c.base_model_name_or_path, "
            f"config=t.AutoConfig.from_pretrained({place}), ignore_mismatched_sizes=True); "
            f"print(peft.PeftModel.from_pretrained(m, {place}).config.id2label)"
        )
    return f"from transformers import {task.auto_class} as M; print(M.from_pretrained({place}).config.id2label)"


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
