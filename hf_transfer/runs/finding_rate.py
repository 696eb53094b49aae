"""The learning rate that a range test finds: for `hf-transfer find-lr`, and for a run with `learning_rate: auto`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import set_seed

from hf_transfer.analysis.few_labels import Choice
from hf_transfer.analysis.range_test import CHOSEN, LEAST_STEPS, Curve, Sweep
from hf_transfer.config.arguments.plan import is_wanted
from hf_transfer.errors import UserError, option
from hf_transfer.files import say, write_bytes, write_text
from hf_transfer.report.range_plot import draw
from hf_transfer.run_folder import RANGE_TEST_CSV, RANGE_TEST_PNG
from hf_transfer.runs.announce import advise, announce
from hf_transfer.runs.choosing import choose
from hf_transfer.runs.decisions import recorded, with_decisions
from hf_transfer.runs.machine import check_writable, pin_memory, quiet_libraries, removed_if_empty, share_cores
from hf_transfer.runs.prepare import Prepared, make_trainer, prepare, prepare_splits
from hf_transfer.runs.range_testing import range_test, stage_to_try
from hf_transfer.settings import Config
from hf_transfer.training.console import is_silent
from hf_transfer.training.trainer import TransferTrainer

_RATES = ("learning_rate", "head_learning_rate")  # keys of a stage


@dataclass(frozen=True)
class Found:
    """What a range test found.

    Attributes:
        curve: the losses.
        stage: name of the stage that was tried.
        batch: examples per step, of all processes.
        keys: {suggestion: {key: value}}: `learning_rate`, and the other keys that hold learning rates of the run, which
            keep their ratio to it.
    """

    curve: Curve
    stage: str
    batch: int
    keys: Mapping[str, Mapping[str, Any]]

    @property
    def diverges_at_once(self) -> bool:
        """Whether the loss diverged before it could be seen to fall."""
        return self.curve.diverged and len(self.curve.rates) < LEAST_STEPS

    def lines(self) -> list[str]:
        """For display."""
        curve, steps = self.curve, len(self.curve.rates)
        ended = "; there the loss diverged" if curve.diverged else ""
        lines = [
            f"Range test of stage {self.stage!r}: {steps} steps of {self.batch} examples, learning_rate "
            f"{curve.rates[0]:.1e} to {curve.rates[-1]:.1e}{ended}."
        ]
        for name, values in self.keys.items():
            shown = " ".join(_as_option(key, value) for key, value in values.items())
            lines.append(f"  {name:<8} {_ABOUT[name]:<44} {shown}")
        return lines

    def write(self, folder: Path) -> None:
        """Write the curve as CSV and as PNG."""
        curve = self.curve
        write_text(folder / RANGE_TEST_CSV, curve.to_csv())
        title = f"Learning-rate range test of stage {self.stage!r}, {self.batch} examples per step"
        picture = draw(curve.rates, curve.losses, curve.smoothed, curve.suggestions, title)
        write_bytes(folder / RANGE_TEST_PNG, picture)


_ABOUT = {
    "valley": "middle of the longest fall of the loss",
    "steep": "where the loss falls fastest",
    "minimum": "a tenth of where the loss is lowest",
}


def _as_option(key: str, value: Any) -> str:
    return option(key, f"{value:.1e}" if isinstance(value, float) else json.dumps(value))


# ---- the verb ------------------------------------------------------------------------------------------------------


def find_lr(config: Config, sweep: Sweep, talks: bool = True) -> Found:
    """Range test of a run's own model and data; nothing is trained, and the curve is written to its folder.

    Raises:
        UserError: as `run` does before it trains; there is no learning rate to find.
    """
    args, folder = config.training, Path(str(config.training.output_dir))
    if not is_wanted(args):
        raise UserError("strategy: none is set, so there is no plan.", f"Set one: {option('strategy', 'full')}.")
    check_writable(folder)
    share_cores(args)
    set_seed(args.seed)
    with quiet_libraries(args), removed_if_empty(folder, not folder.exists()):
        prepared = choose(prepare(with_decisions(config, {"push_to_hub": False}, pin_memory(args))))
        splits = prepare_splits(prepared)
        trainer = make_trainer(prepared, splits["train"], splits["validation"])
        leads = trainer.is_world_process_zero()
        if talks and leads:
            announce(prepared, trainer, advise(prepared, trainer))
        found = _found(prepared, trainer, splits, sweep)
        if leads:
            found.write(folder)
    if talks and leads:
        for line in found.lines():
            say(line)
        say(f"Files in {folder}: {RANGE_TEST_CSV}, {RANGE_TEST_PNG}")
    if not found.keys:
        raise _nothing_found(found, sweep)
    return found


# ---- learning_rate: auto -------------------------------------------------------------------------------------------


def find_rate(
    prepared: Prepared, trainer: TransferTrainer, splits: dict[str, Any], checkpoint: str | None
) -> tuple[Prepared, Found | None]:
    """(the run with the learning rate that a range test finds, the test; None where it is given or was found before).

    Args:
        prepared: the run.
        trainer: with its plan resolved; it is made again.
        splits: prepared examples by split.
        checkpoint: the folder to resume from, or "auto", if any: the run that wrote it has found a learning rate.

    Raises:
        UserError: no learning rate can be found.
    """
    config = prepared.config
    if not config.finds_rate or recorded(checkpoint, Path(str(trainer.args.output_dir))) is not None:
        return prepared, None
    default = {"learning_rate": trainer.args.learning_rate}
    if trainer.args.probe_solver == "lbfgs":  # which the choice has set; where it is given, auto is refused
        return _set(prepared, trainer, default, "not used: the head is solved for"), None
    if not is_silent(config.training) and trainer.is_world_process_zero():
        say("learning_rate: auto: a range test, which leaves no trace in the run ...")
    sweep = Sweep()
    found = _found(prepared, trainer, splits, sweep)
    if not found.keys and found.diverges_at_once:
        raise _nothing_found(found, sweep)
    if not found.keys:
        why = f"the default: no learning rate clearly lowers the loss in a range test of stage {found.stage!r}"
        return _set(prepared, trainer, default, why), found
    values = [dict(found.keys[CHOSEN])]
    if trainer.args.world_size > 1:
        broadcast_object_list(values)
    why = f"range test of stage {found.stage!r}, {CHOSEN}: {_ABOUT[CHOSEN]}"
    return _set(prepared, trainer, values[0], why), found


def _set(prepared: Prepared, trainer: TransferTrainer, values: Mapping[str, Any], why: str) -> Prepared:
    """The run with these learning rates, which its trainer takes over."""
    keys = {n: Choice(v, why if n == "learning_rate" else "keeps its ratio to it") for n, v in values.items()}
    for name, value in values.items():
        setattr(trainer.args, name, value)
    chosen = replace(prepared.chosen, keys={**prepared.chosen.keys, **keys})
    trainer.chosen = {name: choice.value for name, choice in chosen.keys.items()}
    trainer.resolve_plan()
    config = prepared.config
    return replace(prepared, chosen=chosen, config=replace(config, values={**config.values, **values}))


# ---- the test ------------------------------------------------------------------------------------------------------


def _found(prepared: Prepared, trainer: TransferTrainer, splits: dict[str, Any], sweep: Sweep) -> Found:
    args = trainer.args
    curve = range_test(prepared, trainer, splits, sweep)
    assert trainer.plan is not None
    stage = trainer.plan.stages[stage_to_try(trainer.plan, sweep.stage)]
    suggestions = {} if len(curve.rates) < LEAST_STEPS else curve.suggestions
    keys = {name: _keys_at(args, _rounded(rate)) for name, rate in suggestions.items()}
    return Found(curve, stage.name, args.train_batch_size * args.gradient_accumulation_steps * args.world_size, keys)


def _keys_at(args: Any, rate: float) -> dict[str, Any]:
    """Every key that holds a learning rate, with its ratio to `learning_rate` unchanged."""
    factor = rate / args.learning_rate
    keys: dict[str, Any] = {"learning_rate": rate}
    if args.head_learning_rate is not None:
        keys["head_learning_rate"] = _rounded(args.head_learning_rate * factor)
    if args.layer_learning_rates is not None:
        keys["layer_learning_rates"] = {name: _rounded(r * factor) for name, r in args.layer_learning_rates.items()}
    if any(set(_RATES) & set(stage) for stage in args.stages or ()):
        keys["stages"] = [
            {name: _rounded(value * factor) if name in _RATES else value for name, value in stage.items()}
            for stage in args.stages
        ]
    return keys


def _rounded(rate: float) -> float:
    """To two digits: a curve of so few steps says no more."""
    return float(f"{rate:.1e}")


def _nothing_found(found: Found, sweep: Sweep) -> UserError:
    rates = found.curve.rates
    if found.diverges_at_once:
        return UserError(
            f"the loss of stage {found.stage!r} diverges at once: after {len(rates)} steps of the range test, at "
            f"learning rate {rates[-1]:.1e}.",
            f"Begin lower: hf-transfer find-lr --start_learning_rate {sweep.start / 1000:.0e}; or check the data.",
            key="learning_rate",
        )
    return UserError(
        f"no learning rate from {rates[0]:.1e} to {rates[-1]:.1e} clearly lowers the loss of stage {found.stage!r}.",
        "Check the labels, try hf-transfer find-lr with larger batches or more --num_steps, or give a number.",
        key="learning_rate",
    )
