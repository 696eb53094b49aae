"""What a run would do, without doing it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from transformers import set_seed

from hf_transfer.adapters.attach import attach
from hf_transfer.adapters.continued import train_head
from hf_transfer.analysis.budget_report import Budget
from hf_transfer.analysis.expected import Expected
from hf_transfer.analysis.pace import COMPILE_ANYWAY, Pace
from hf_transfer.analysis.prices import Prices, read_prices
from hf_transfer.config.arguments.adaptation import DANN, NONE
from hf_transfer.config.arguments.plan import is_wanted
from hf_transfer.config.arguments.stopping import budget_seconds
from hf_transfer.data.labels import Labels
from hf_transfer.data.preview import draw_preview
from hf_transfer.errors import UserError, option
from hf_transfer.files import say
from hf_transfer.layers.groups import layer_groups
from hf_transfer.models.load import Loaded
from hf_transfer.models.source import read_config
from hf_transfer.plan.make import make_plan
from hf_transfer.plan.plan import Plan
from hf_transfer.report.depth_map import DepthMap, depth_map
from hf_transfer.runs import adaptation_choice, refitting
from hf_transfer.runs.announce import Advice, advise, announce
from hf_transfer.runs.budgeting import budget_of, budget_of_model
from hf_transfer.runs.calibrating import choose as choose_calibration
from hf_transfer.runs.choosing import choose
from hf_transfer.runs.domains import domains_of
from hf_transfer.runs.expecting import expect, lines_of
from hf_transfer.runs.machine import own_threads, quiet_libraries, share_cores
from hf_transfer.runs.preflight import Preflight, try_run
from hf_transfer.runs.prepare import make_trainer, prepare, prepare_splits
from hf_transfer.runs.pricing import with_price
from hf_transfer.runs.threads import choose_threads
from hf_transfer.runs.timing import compilation, measure, search_note
from hf_transfer.runs.workers import choose_workers
from hf_transfer.settings import Config
from hf_transfer.tasks import TASKS, task_of_kind
from hf_transfer.training import contrastive, time_budget
from hf_transfer.training.linear_probe import note
from hf_transfer.training.schedules import run_schedule

STEPS_PER_EPOCH = 100  # for the schedule's picture, where no data says


@dataclass
class Planned:
    """What `hf-transfer plan` knows.

    Attributes:
        config: the keys.
        plan: in steps where the data is known, else in epochs.
        depth_map: of the plan.
        notes: sentences for the user.
        examples: by split; empty without data.
        data_facts: of the data; None without data.
        boundary_cache: what is decided of each stage; empty without data.
        preflight: what was tried; None without data or without the key.
        chosen: keys that were set because they were not given, with the reasons; empty without data.
        advice: input sizes that would save time, and learning rates that cannot work; empty without data.
        budget: memory, time and money.
        rule: that chose the strategy, in words; empty if none did.
        domain_distance: of source and target in the features that are aligned; None without domain adaptation.
        expected: the accuracy to expect, or why it cannot be said; None without data or without the key.
    """

    config: Config
    plan: Plan
    depth_map: DepthMap
    notes: list[str]
    examples: dict[str, int]
    data_facts: dict[str, Any] | None
    boundary_cache: list[dict[str, Any]]
    budget: Budget
    preflight: Preflight | None = None
    chosen: dict[str, Any] = field(default_factory=dict)
    advice: Advice = field(default_factory=lambda: Advice([], []))
    expected: Expected | str | None = None
    rule: str = ""
    domain_distance: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        stages = [{**s, "start_step": at.start} for s, at in zip(self.plan.to_list(), self.plan.stages, strict=True)]
        return {
            "model": self.config.model.model_name_or_path,
            "dataset": self.config.data.dataset_name or self.config.data.train_file,
            "examples": self.examples,
            "data_facts": self.data_facts,
            "strategy": self.plan.strategy,
            "num_train_epochs": self.plan.num_train_epochs,
            "budget_seconds": budget_seconds(self.config.training, self.config.training.world_size),
            "groups": self.depth_map.to_list(),
            "stages": stages,
            "chosen": self.chosen,
            "rule": self.rule,
            "boundary_cache": self.boundary_cache,
            "budget": self.budget.to_dict(),
            "preflight": self.preflight.to_dict() if self.preflight else None,
            "never_trained": list(self.plan.never_thawed),
            "total_parameters": sum(size for _, size in self.plan.groups),
            "notes": self.notes,
            "hints": self.advice.costs,
            "warnings": self.advice.rates,
            "domain_distance": self.domain_distance,
            "expected": {"skipped": self.expected} if isinstance(self.expected, str) else _or_none(self.expected),
        }


def _or_none(found: Expected | None) -> dict[str, Any] | None:
    return found.to_dict() if found else None


def plan_only(config: Config, talks: bool = True, preview: str | None = None, prices: Prices | None = None) -> Planned:
    """The plan of a configuration, for the data if it names any, else for the model alone.

    Args:
        config: the keys.
        talks: whether it is printed too.
        preview: a picture of training images to write.
        prices: the GPUs that are compared; None: those of this package.

    Raises:
        UserError: as `run` does before it trains; no strategy is set.
    """
    args = config.training
    if not is_wanted(args):
        raise UserError(
            "strategy: none is set, so there is no plan.", f"Set one, for example {option('strategy', 'gradual')}."
        )
    set_seed(args.seed)
    has_data = config.data.dataset_name or config.data.train_file
    if preview and not has_data:
        raise UserError("preview: there is no data to draw.", "Name it with dataset_name or train_file.")
    if preview and config.data.streaming:
        raise UserError("preview: a stream cannot be drawn.", "Leave streaming out for the picture.")
    config, prices = with_price(config), prices or read_prices()
    args = config.training
    with quiet_libraries(args), own_threads():
        share_cores(args)
        planned = _plan_for_data(config, talks, preview, prices) if has_data else _plan_for_model(config, talks, prices)
    if talks:
        say(str(planned.depth_map))
        say("\n".join(["", *planned.budget.lines()]))
    return planned


def _plan_for_data(config: Config, talks: bool, preview: str | None, prices: Prices) -> Planned:
    """What `run` prepares, up to the first step."""
    alone = None
    if is_auto := adaptation_choice.is_asked(config):
        alone, config = _alone(config), adaptation_choice.candidate(config, DANN)
    prepared = choose(prepare(config))
    config = prepared.config
    splits = prepare_splits(prepared)
    trainer = make_trainer(prepared, splits["train"], splits["validation"])
    prepared = choose_workers(choose_threads(prepared, trainer, splits), trainer, splits)
    config = prepared.config
    trainer.boundary.decide()
    plan, num_steps = trainer.plan, trainer.resolve_plan()
    assert plan is not None and trainer.plan is not None, "a strategy makes one"
    advice = advise(prepared, trainer)
    if talks:
        announce(prepared, trainer, advice)
        if prepared.chosen.rule:
            say(f"Rule: {prepared.chosen.rule}.")
    preflight = try_run(prepared, trainer, splits) if config.training.preflight else None
    for line in preflight.lines() if preflight and talks else ():
        say(line)
    here = measure(prepared, trainer, splits)
    if reason := compilation(config, here):
        line = f"{reason} {COMPILE_ANYWAY}"
        advice.rates.append(line)
        if talks:
            say(f"Warning: {line}")
    several = adaptation_choice.cost(alone, here) if is_auto else ""
    searches = search_note(config, here)
    refits = refitting.choose(prepared, trainer)
    answers = refitting.calibrates_on(refits, prepared, trainer)
    calibrates = choose_calibration(trainer, prepared.loaded.labels.problem_type, answers).line()
    again = refitting.line(refits, prepared, trainer, here)
    for line in filter(None, [searches, several, calibrates, again]) if talks else ():
        say(line)
    expected = expect(prepared, trainer, asks_domain=True) if config.data.expected_accuracy else None
    if expected is not None and talks:
        say("\n".join(lines_of(expected)))
    domains = domains_of(prepared, trainer, talks)
    if preview:
        labels, collate = prepared.loaded.labels, trainer.data_collator
        draw_preview(
            preview, splits["train"], collate, processor=prepared.processor, labels=labels, chance=prepared.chance
        )
    return Planned(
        config=config,
        plan=plan,
        depth_map=depth_map(trainer.plan, trainer.layer_groups, run_schedule(config.training, num_steps), num_steps),
        notes=[
            *prepared.notes,
            *filter(None, [trainer.choices["batchnorm"].line(), _contrast_note(config, splits), searches, several]),
        ],
        examples={name: len(split) for name, split in prepared.data.splits.items()},
        data_facts=prepared.facts.to_dict(),
        boundary_cache=[entry.to_dict() for entry in trainer.boundary.entries],
        budget=replace(budget_of(prepared, trainer, splits, prices), here=here),
        preflight=preflight,
        chosen=prepared.chosen.to_dict()["auto"],
        advice=advice,
        expected=expected,
        rule=prepared.chosen.rule,
        domain_distance=domains.to_dict() if domains else None,
    )


def _alone(config: Config) -> Pace | None:
    """The pace of the candidate of `domain_adaptation: auto` that is trained on the source alone.

    Raises:
        UserError: the data has not one class per example.
    """
    prepared = choose(
        prepare(adaptation_choice.candidate(config, NONE), adaptation_choice.shared_by_candidates()),
        is_one_of_several=True,
    )
    splits = prepare_splits(prepared)
    trainer = make_trainer(prepared, splits["train"], splits["validation"])
    trainer.boundary.decide()
    trainer.resolve_plan()
    return measure(prepared, trainer, splits)


def _contrast_note(config: Config, splits: dict[str, Any]) -> str:
    """The contrastive stage, if there is one."""
    return contrastive.note(config.training, None if config.data.streaming else len(splits["train"]))


def _plan_for_model(config: Config, talks: bool, prices: Prices) -> Planned:
    """The plan of a model on the meta device, for `STEPS_PER_EPOCH` steps per epoch."""
    args, loaded = config.training, _load_alone(config)
    rules = [*(args.layer_rules or ()), *loaded.layer_rules]
    train_head(loaded.model, rules)
    model = attach(loaded.model, args, rules)
    groups = layer_groups(model, rules)
    plan = make_plan(args, groups)
    num_steps = max(1, round(STEPS_PER_EPOCH * plan.num_train_epochs))
    if talks:
        say(f"{config.model.model_name_or_path}, {len(loaded.labels.names)} labels")
        notes = [time_budget.note(args, args.world_size), contrastive.note(args), note(args)]
        say("\n".join(["", str(plan), *filter(None, notes), ""]))
    shown = depth_map(plan.resolve(STEPS_PER_EPOCH), groups, run_schedule(args, num_steps), num_steps)
    budget = budget_of_model(args, model, groups, plan, prices)
    return Planned(
        config, plan, shown, list(loaded.notes), examples={}, data_facts=None, boundary_cache=[], budget=budget
    )


def _load_alone(config: Config) -> Loaded:
    """A model without data: with its own labels, or two where it has none."""
    checkpoint = read_config(config.model)
    name = config.data.task or task_of_kind(checkpoint)
    labels = Labels.of(checkpoint)
    data = replace(config.data, task=name)
    loaded, _ = TASKS[name].load(config.model, data, labels)
    return loaded
