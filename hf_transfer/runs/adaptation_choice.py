"""`domain_adaptation: auto`: the model that was trained on the source alone, unless an adapted one is better.

Every candidate is an ordinary run in `candidates/<method>`, on the same data; finished ones are kept, and one that was
interrupted goes on from its checkpoint. No label of the target is read to compare them (`analysis.validators`).
Labels of `target_label_column_name` are trained on by every candidate, that on the source included.
The chosen one becomes the run: it goes on from its last checkpoint, where nothing is left to train, and is measured.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_transfer.analysis.pace import Pace, in_time
from hf_transfer.analysis.validators import Scores, Verdict, choose
from hf_transfer.config.arguments.adaptation import AUTO, METHODS, NONE, values_for
from hf_transfer.errors import UserError, WorkFailed, listed, one_line, option
from hf_transfer.files import as_json, say, write_json
from hf_transfer.hub import push
from hf_transfer.objectives.adaptation.outcome import KEY, named
from hf_transfer.run_folder import OF_ONE_RUN, RESULTS
from hf_transfer.runs import saving
from hf_transfer.runs.decisions import with_decisions
from hf_transfer.runs.resumed import checkpoint_of
from hf_transfer.runs.shared import Shared
from hf_transfer.settings import Config, keys
from hf_transfer.training import checkpoints
from hf_transfer.training.console import is_silent
from hf_transfer.training.pace import exactly

CANDIDATES = (NONE, *METHODS)
FOLDER, ASKED = "candidates", "asked.json"
MARGIN = 0.03  # nats of information by which an adapted model must be better; `docs/domain-adaptation.md`
MOST_LOSS = 0.02  # accuracy on the source's validation split that it may lose, beyond a standard error
_KEY = "domain_adaptation"
Run = Callable[[Config, Shared], Any]


class KeepLast(TrainerCallback):
    """Saves a checkpoint where training ends, whatever `save_strategy` is."""

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if control.should_training_stop or state.global_step >= state.max_steps:
            place = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            control.should_save |= not place.is_dir()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_training_stop:
            self.on_epoch_end(args, state, control)


def is_asked(config: Config) -> bool:
    """Whether a configuration is of several runs."""
    return bool(config.training.domain_adaptation == AUTO)


def run_auto(config: Config, run: Run, among: Shared | None) -> Any:
    """Train all candidates, choose, and finish the chosen one in the run's own folder; its `Result`.

    Args:
        config: with `domain_adaptation: auto`.
        run: runs a configuration.
        among: of several runs, what they share.

    Raises:
        UserError: as a run does; the folder holds candidates of other keys.
        WorkFailed: the model cannot be trained on the source alone.
    """
    folder = Path(str(config.training.output_dir))
    if target := push.wanted(config.values):
        push.before_training(target, folder)
    _open(config, folder)
    shared = shared_by_candidates(among)
    talks = config.training.process_index == 0 and not is_silent(config.training)
    tell = say if talks else _silent
    tell(f"domain_adaptation: auto trains {len(CANDIDATES)} models, one after another, in {folder / FOLDER}.")
    failed, has_labels = dict[str, str](), config.data.target_label_column_name is not None
    for number, method in enumerate(CANDIDATES):
        tell(f"{number + 1}/{len(CANDIDATES)}  {named(method, has_labels)}")
        began = time.perf_counter()
        try:
            found = _finished(config, method) or _trained(config, method, run, shared)
        except (KeyboardInterrupt, SystemExit):
            again = option("resume_from_checkpoint", "auto")
            tell(f"Interrupted. The same command with {again} goes on; finished candidates are kept.")
            raise
        except (UserError, WorkFailed) as error:
            if method == NONE:
                _leave_nothing(config, folder)
                raise
            failed[method] = one_line(error).rstrip(".")
            tell(f"     left out: {failed[method]}.")
            continue
        tell(f"     {_scored(found)} ({exactly(time.perf_counter() - began)})")
    results = {m: r for m in CANDIDATES if m not in failed and (r := _finished(config, m)) is not None}
    verdict = decide(results)
    tell(f"Kept: {named(verdict.chosen, has_labels)}.")
    tell()
    selection = _selection(results, failed, verdict)
    gives = shared.but(keeps_last=False, one_class="", leaves_test=among is not None, selection=selection)
    return run(_final(config, verdict.chosen, results), gives)


def shared_by_candidates(among: Shared | None = None) -> Shared:
    """What the candidates share; each keeps a checkpoint of its end, and leaves the test split to the chosen one."""
    return (among or Shared()).but(keeps_last=True, one_class=f"{_KEY}: {AUTO}")


def cost(alone: Pace | None, paired: Pace | None) -> str:
    """How long the training steps of all candidates take, for `plan`.

    Args:
        alone: of a run on the source alone; None if it is not known.
        paired: of one whose batches hold the target too.
    """
    others = listed(METHODS)
    said = f"domain_adaptation: auto trains {len(CANDIDATES)} models: on the source alone, {others}"
    if alone is None or paired is None:
        return f"{said}. The plan and the budget are those of dann alone."
    total = alone.seconds + len(METHODS) * paired.seconds
    return (
        f"{said}, about {in_time(alone.seconds)} and at most {in_time(paired.seconds)} for each of the others, "
        f"{in_time(total)} of training steps in all. The plan and the budget are those of dann alone."
    )


def decide(results: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """Which candidate is kept.

    Args:
        results: what its `results.json` holds, by method, with that of `none`.
    """
    scores = {method: Scores.of(found[KEY]["validators"]) for method, found in results.items()}
    return choose(scores, NONE, MARGIN, MOST_LOSS)


# ---- candidates ----------------------------------------------------------------------------------------------------


def candidate(config: Config, method: str) -> Config:
    """The configuration of one method in place of `auto`; with `none`, the target is only looked at."""
    values = values_for(config.values, method)
    changed = {name: value for name, value in values.items() if config.values[name] != value}
    of_training = {name: value for name, value in changed.items() if hasattr(config.training, name)}
    return replace(with_decisions(config, of_training), values=values)


def _place(config: Config, method: str) -> Path:
    return Path(str(config.training.output_dir)) / FOLDER / method.replace(NONE, "source-only")


def _in_folder(config: Config, folder: Path, overwrites: bool, **changes: Any) -> Config:
    """A configuration that is written to another folder."""
    own = {"output_dir": str(folder), **changes}
    data = replace(config.data, overwrite_output_dir=overwrites)
    values = config.values | {"overwrite_output_dir": overwrites} | {k: v for k, v in own.items() if k in config.values}
    return replace(with_decisions(config, own), data=data, values=values)


def _trained(config: Config, method: str, run: Run, shared: Shared) -> Mapping[str, Any]:
    """Train a candidate, or go on with it; what its `results.json` holds."""
    folder = _place(config, method)
    resumes, exists = _agreed(config, (checkpoints.newest_valid(folder)[0] is not None, folder.exists()))
    run(
        _in_folder(
            candidate(config, method),
            folder,
            overwrites=exists and not resumes,
            resume_from_checkpoint="auto" if resumes else None,
            push_to_hub=False,
            log_level="error",  # five announcements hide the one line on each
        ),
        shared,
    )
    gc.collect()  # the model, before the next one is loaded
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    found = _finished(config, method)
    assert found is not None, "a run ends with its results"
    return found


def _finished(config: Config, method: str) -> dict[str, Any] | None:
    """What a candidate's `results.json` holds; None if it is not finished."""
    path = _place(config, method) / RESULTS
    found: dict[str, Any] | None
    (found,) = _agreed(config, (json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None,))
    return found


def _agreed(config: Config, seen: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the main process has seen, on all processes."""
    return tuple(broadcast_object_list(list(seen))) if config.training.world_size > 1 else seen


def _final(config: Config, method: str, results: Mapping[str, Mapping[str, Any]]) -> Config:
    """The chosen candidate in the run's own folder, from its last checkpoint."""
    folder, place = Path(str(config.training.output_dir)), _place(config, method)
    (last,) = _agreed(config, (str(checkpoints.newest_valid(place)[0]),))
    if config.training.process_index == 0:
        for name in OF_ONE_RUN:  # its history, the examples it was trained on
            if name != RESULTS and (place / name).is_file():
                shutil.copy2(place / name, folder / name)
    return _in_folder(candidate(config, method), folder, overwrites=False, resume_from_checkpoint=last)


# ---- the folder ----------------------------------------------------------------------------------------------------


def _open(config: Config, folder: Path) -> None:
    """Make the folder of the candidates, or check that those in it are of this run.

    Raises:
        UserError: it holds those of another one, or nobody asked to go on with them.
    """
    training, place = config.training, folder / FOLDER
    checkpoint_of(config, folder)
    resumes, overwrites = training.resume_from_checkpoint is not None, config.data.overwrite_output_dir
    if resumes and training.resume_from_checkpoint != "auto":
        raise UserError(
            f"{training.resume_from_checkpoint!r} is one checkpoint, and auto trains several models.",
            f"Go on with all of them: {option('resume_from_checkpoint', 'auto')}.",
            key="resume_from_checkpoint",
        )
    (exists,) = _agreed(config, (place.is_dir(),))
    if exists and not resumes and not overwrites:
        raise UserError(
            f"output_dir: {str(folder)!r} holds an unfinished run.",
            f"Continue it with {option('resume_from_checkpoint', 'auto')}, or start over with "
            f"{option('overwrite_output_dir', True)}.",
        )
    asked = _asked(config)
    with training.main_process_first(desc="candidates"):
        if training.process_index == 0 and exists and not resumes:
            shutil.rmtree(place)
        if training.process_index == 0 and overwrites and not resumes and folder.is_dir():
            saving.clear(folder, talks=False)
        if (place / ASKED).is_file():
            then = json.loads((place / ASKED).read_text(encoding="utf-8"))
            changed = [f"{n}: {then.get(n)!r} then, {asked[n]!r} now" for n in asked if then.get(n) != asked[n]]
            if changed:
                raise UserError(
                    f"resume_from_checkpoint: this is not the same run. {'; '.join(changed)}.",
                    "Resume with the keys of the original run, or start a new run in another folder.",
                )
        elif training.process_index == 0:
            write_json(place / ASKED, asked)


def _leave_nothing(config: Config, folder: Path) -> None:
    """Remove the folder of the candidates where none has begun: what is refused can be corrected and run again."""
    place = folder / FOLDER
    if config.training.process_index == 0 and [path.name for path in place.iterdir()] == [ASKED]:
        shutil.rmtree(place)
        if not any(folder.iterdir()):
            folder.rmdir()


def _asked(config: Config) -> dict[str, Any]:
    """The keys that decide what the candidates become."""
    decide_it = [name for name, key in keys().items() if key.about.resume in ("fixed", "plan")]
    return {name: as_json(config.values[name]) for name in (*decide_it, *_DATA) if name in config.values}


_DATA = ("model_name_or_path", "dataset_name", "train_file", "validation_file", "target_dataset_name")


# ---- words ---------------------------------------------------------------------------------------------------------


def _scored(found: Mapping[str, Any]) -> str:
    scores = found[KEY]["validators"]
    return (
        f"accuracy on the source's validation split {scores['source_accuracy']:.4f}, information on the target "
        f"{scores['information']:.4f}"
    )


def _selection(results: Mapping[str, Mapping[str, Any]], failed: Mapping[str, str], verdict: Verdict) -> dict[str, Any]:
    """For `results.json`."""
    rows: Iterator[dict[str, Any]] = (
        {
            "method": method,
            "validators": found[KEY]["validators"],
            "train_seconds": found["train_seconds"],
            "why_not": verdict.reasons.get(method, ""),
        }
        for method, found in results.items()
    )
    left_out = [{"method": m, "validators": None, "train_seconds": None, "why_not": why} for m, why in failed.items()]
    return {
        "by": "information",
        "margin": MARGIN,
        "chosen": verdict.chosen,
        "candidates": [*rows, *left_out],
    }


def _silent(text: str = "") -> None:
    """Say nothing."""
