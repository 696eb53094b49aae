"""Domain adaptation in a trainer: its target examples, the layer that is aligned, and the penalty on it.

The statistics of a method are those of one micro-batch on one process: the rows that one forward pass computes. Their
gradients are averaged over the accumulated micro-batches and the processes, by number of examples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_transfer.config.arguments.adaptation import (
    AUTO,
    METHODS,
    NONE,
    PSEUDO_LABEL,
    AdaptationArguments,
    aligns_frozen,
)
from hf_transfer.data.augment import Epochs
from hf_transfer.data.bucketing_choice import stated_lengths
from hf_transfer.data.pairs import DOMAIN, Partners, Targets, check_inputs
from hf_transfer.errors import UserError, listed, nearest
from hf_transfer.features.cut import Refused
from hf_transfer.features.examples import TRAINING, Source, is_numbered
from hf_transfer.features.places import Place, find_places
from hf_transfer.layers.architectures import HEAD
from hf_transfer.layers.side_effects import untouched
from hf_transfer.objectives.adaptation.layer import LayerFeatures
from hf_transfer.objectives.adaptation.methods import Settings, penalty_of
from hf_transfer.objectives.adaptation.schedule import weight_at
from hf_transfer.training import self_training
from hf_transfer.training.running import RunningTrainer

_EXAMPLES = 4  # of the batch on which the layer is looked for


class PairEpochs(Epochs):
    """`Epochs` of the pairs: Trainer warns of two callbacks of one class."""


def wanted(args: object) -> bool:
    """Whether source and target are drawn together; plain `TrainingArguments` lack the key."""
    return isinstance(args, AdaptationArguments) and args.domain_adaptation != NONE


def follow(trainer: RunningTrainer) -> None:
    """Called when the number of steps is known.

    Raises:
        UserError: the run has too few epochs for the rounds of self-training.
    """
    if trainer.self_training is not None:
        trainer.self_training.follow(self_training.epochs_of(trainer.num_steps, trainer.steps_per_epoch))


def attach(trainer: RunningTrainer, target: object) -> None:
    """Give a trainer its target examples and its penalty, before the optimizer is made.

    Args:
        trainer: with a plan.
        target: dataset of target examples, as the model takes them; labels are not read.

    Raises:
        UserError: the trainer cannot adapt, or the target does not fit the source.
    """
    _check(trainer, target)
    source, other = (Source.of(trainer, TRAINING, data) for data in (trainer.train_dataset, target))
    check_inputs(source.dataset[0], other.dataset[0])
    if aligns_frozen(trainer.args):  # by `linear_probe.solve`
        return
    trainer.boundary.blocked.append("domain_adaptation draws other target examples in each epoch")
    if trainer.args.domain_adaptation == PSEUDO_LABEL:
        trainer.self_training = self_training.attach(trainer, other.dataset, _lengths(trainer, target))
        return
    partners = Partners(len(source.dataset), len(other.dataset), _seed(trainer), _lengths(trainer, target))
    trainer.targets = Targets(other.dataset, partners)
    trainer.add_callback(PairEpochs(trainer.targets.chance))
    args = trainer.args
    trainer.aligned_layer, place = place_of(trainer)
    _check_trained(trainer, place)
    trainer.aligned = place

    def weight(step: int) -> float:
        progress = min(1.0, step / max(1, trainer.num_steps))
        return weight_at(args.domain_adaptation_schedule, args.domain_adaptation_weight, progress)

    stretched = trainer.time_budget.stretched(weight)
    settings = Settings(LayerFeatures(place), stretched, args.discriminator_learning_rate, args.seed)
    penalty = penalty_of(args.domain_adaptation, settings)
    if penalty.module is not None:
        is_double = next(trainer.model.parameters()).dtype == torch.float64
        penalty.module.to(args.device, torch.float64 if is_double else torch.float32)
    trainer.objective.penalties.append(penalty)


def _lengths(trainer: RunningTrainer, target: object) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Of the texts of source and target, in tokens; None of images, and where they are not known without reading."""
    column, main_input = trainer.args.length_column_name, trainer._main_input
    source, other = (stated_lengths(data, column, main_input) for data in (trainer.train_dataset, target))
    return None if source is None or other is None else (source, other)


def in_words(layer: str) -> str:
    """What is aligned: the features of a layer group."""
    return "what the head reads" if layer == HEAD else f"the mean output of {layer}"


def note(trainer: RunningTrainer) -> str:
    """A line for a printed plan; empty without adaptation."""
    args = trainer.args
    if not wanted(args) or trainer.plan is None:
        return ""
    if aligns_frozen(args):
        return (
            f"Domain adaptation: {args.domain_adaptation} maps the frozen features of the source to the mean and "
            f"covariance of those of {len(trainer.target_dataset):,} target examples, and the head is solved for there."
        )
    examples = f"{len(trainer.targets.dataset):,} target examples"
    if trainer.self_training is not None:
        return f"Domain adaptation: {args.domain_adaptation}, {trainer.self_training.in_words}; {examples}."
    what = in_words(trainer.aligned_layer)
    grows = ", growing from 0" if args.domain_adaptation_schedule == "ramp" else ""
    idle = [stage.name for stage in trainer.plan.stages if not _trains_below(trainer, stage, trainer.aligned)]
    nothing = f" In {listed(idle)} nothing below it trains, so there it changes nothing." if idle else ""
    return (
        f"Domain adaptation: {args.domain_adaptation} on {what}, weight {args.domain_adaptation_weight:g}{grows}; one "
        f"of {examples} next to each training example.{nothing}"
    )


# ---- the target ----------------------------------------------------------------------------------------------------


def _check(trainer: RunningTrainer, target: object) -> None:
    """Raises:
    UserError: the trainer cannot adapt.
    """
    args, key = trainer.args, "domain_adaptation"
    if args.domain_adaptation == AUTO:
        raise UserError(
            "auto trains several models, and a trainer has one.",
            f"Name one of {', '.join(METHODS)}; `hf-transfer train` and `fine_tune` take auto.",
            key=key,
        )
    if not wanted(args):
        raise UserError(
            "there are target examples, and no method that reads them.",
            f"Set domain_adaptation to one of {', '.join(METHODS)}, or leave target_dataset out.",
            key=key,
        )
    if target is None:
        raise UserError(
            "the trainer has no target examples.", "Pass them: TransferTrainer(..., target_dataset=…).", key=key
        )
    for data, name in ((trainer.train_dataset, "training set"), (target, "target")):
        if not is_numbered(data):
            raise UserError(f"the {name} is a stream, whose examples have no numbers.", "Use a dataset.", key=key)
        if not len(data):  # type: ignore[arg-type]
            raise UserError(f"the {name} has no examples.", key=key)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UserError(
            "features are read inside the model, and FSDP and DeepSpeed shard it.", "Use plain DDP.", key=key
        )
    if args.n_gpu > 1:
        raise UserError("one process trains on several GPUs.", "Launch one process per GPU.", key=key)
    if args.accelerator_config.dispatch_batches:
        raise UserError("dispatch_batches would cut source and target apart.", "Leave it out.", key=key)
    if trainer.objective.loss is None:
        raise UserError(
            "the trainer has a loss of its own, which would see the target's examples.",
            "Do not override `compute_loss`.",
            key=key,
        )


def _seed(trainer: RunningTrainer) -> int:
    """Of the draws of target examples."""
    args = trainer.args
    return int(args.seed if args.data_seed is None else args.data_seed)


# ---- the layer -----------------------------------------------------------------------------------------------------


def place_of(trainer: RunningTrainer) -> tuple[str, Place]:
    """The layer group whose features are compared between the domains, and where they are.

    Raises:
        UserError: there is no such layer, or its output cannot be pooled.
    """
    name, names = trainer.args.domain_adaptation_layer, [group.name for group in trainer.layer_groups]
    key = "domain_adaptation_layer"
    if name is not None and name not in names[:-1]:
        raise UserError(
            f"there is no layer group {name!r} below the head.",
            f"The groups are {listed(names[:-1], 12)}.{nearest(name, names[:-1])}",
            key=key,
        )
    wanted_group = HEAD if name is None else name
    try:
        with untouched(trainer.model):
            trainer.model.eval()
            places = find_places(trainer.model, trainer.layer_groups, _batch(trainer))
    except Refused as refusal:
        raise UserError(f"the features cannot be found in the model: {refusal}.", key="domain_adaptation") from refusal
    if name is None and HEAD in places.refused and names[-2:-1] and names[-2] in places.by_group:
        wanted_group = names[-2]  # a head that pools by itself reads all of its positions
    if wanted_group not in places.by_group:
        reason = places.refused.get(wanted_group, "the model has no head")
        what = "what the head reads is not one vector" if name is None else f"the output of {name} cannot be pooled"
        raise UserError(f"{what}: {reason}.", f"Name one of {listed(_others(places.by_group), 12)}.", key=key)
    return wanted_group, places.by_group[wanted_group]


def _others(groups: Sequence[str] | dict[str, Place]) -> list[str]:
    return [name for name in groups if name != HEAD]


def _batch(trainer: RunningTrainer) -> dict[str, object]:
    """A few source examples as the model takes them, with their target examples."""
    source = trainer.boundary.sources[TRAINING]
    batch = trainer.boundary.sources.load(source, range(min(_EXAMPLES, len(source.dataset))))
    if "labels" not in batch:
        raise UserError("the training examples have no labels.", "Name the column `labels`.", key="domain_adaptation")
    return {name: value for name, value in batch.items() if name not in ("labels", DOMAIN)}


def _trains_below(trainer: RunningTrainer, stage: object, place: Place) -> bool:
    return bool(trainer.unfreezing.trains(stage) & place.parameters)


def _check_trained(trainer: RunningTrainer, place: Place) -> None:
    """Raises:
    UserError: no stage trains anything that the aligned features depend on.
    """
    assert trainer.plan is not None
    if any(_trains_below(trainer, stage, place) for stage in trainer.plan.stages):
        return
    layer = trainer.args.domain_adaptation_layer
    below = "below the head" if layer is None else f"in or below {layer}"
    raise UserError(
        f"the plan trains nothing {below}, so the features cannot change.",
        "Use another strategy" + (", or align a higher layer." if layer is not None else "."),
        key="domain_adaptation",
    )
