"""What a run would do, without doing it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import set_seed

from .adapters import attach
from .config import Config
from .depth_map import DepthMap, depth_map
from .errors import UserError
from .layers import layer_groups
from .models import Labels, Loaded, read_config
from .plan import Plan, make_plan
from .preparation import announce, make_trainer, prepare, quiet_libraries
from .progress import say
from .strategies import is_wanted
from .tasks import TASKS, task_of_kind


@dataclass
class Planned:
    """What `hf-transfer plan` knows.

    Attributes:
        config: the keys.
        plan: in steps where the data is known, else in epochs.
        depth_map: of the plan.
        notes: sentences for the user.
        examples: by split; empty without data.
    """

    config: Config
    plan: Plan
    depth_map: DepthMap
    notes: list[str]
    examples: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        stages = [{**s, "start_step": at.start} for s, at in zip(self.plan.to_list(), self.plan.stages, strict=True)]
        return {
            "model": self.config.model.model_name_or_path,
            "dataset": self.config.data.dataset_name or self.config.data.train_file,
            "examples": self.examples,
            "strategy": self.plan.strategy,
            "num_train_epochs": self.plan.num_train_epochs,
            "groups": self.depth_map.to_list(),
            "stages": stages,
            "never_trained": list(self.plan.never_thawed),
            "total_parameters": sum(size for _, size in self.plan.groups),
            "notes": self.notes,
        }


def plan_only(config: Config, talks: bool = True) -> Planned:
    """The plan of a configuration, for the data if it names any, else for the model alone.

    Raises:
        UserError: as `run` does before it trains; no strategy is set.
    """
    args = config.training
    if not is_wanted(args):
        raise UserError("strategy: none is set, so there is no plan.", "Set one, for example --strategy gradual.")
    set_seed(args.seed)
    with quiet_libraries(args):
        if config.data.dataset_name or config.data.train_file:
            prepared = prepare(config)
            trainer = make_trainer(prepared, prepared.data.train, prepared.data.validation)
            plan, groups, notes = trainer.plan, trainer.layer_groups, prepared.notes
            examples = {name: len(split) for name, split in prepared.data.splits.items()}
            if talks:
                announce(prepared, trainer)
        else:
            loaded = _load_alone(config)
            rules = [*(args.layer_rules or ()), *loaded.layer_rules]
            model = attach(loaded.model, args, rules)
            groups, examples, notes = layer_groups(model, rules), {}, list(loaded.notes)
            plan = make_plan(args, groups)
            if talks:
                say(f"{config.model.model_name_or_path}, {len(loaded.labels.names)} labels")
                say(f"\n{plan}\n")
    assert plan is not None, "a strategy makes one"
    found = Planned(config, plan, depth_map(plan, groups), notes, examples)
    if talks:
        say(str(found.depth_map))
    return found


def _load_alone(config: Config) -> Loaded:
    """A model without data: with its own labels, or two where it has none."""
    checkpoint = read_config(config.model)
    name = config.data.task or task_of_kind(checkpoint)
    labels = Labels.of(checkpoint)
    data = replace(config.data, task=name)
    loaded, _ = TASKS[name].load(config.model, data, labels)
    return loaded
