"""The objective of a run: a loss, the weight of a micro-batch in the accumulated batch, and penalties.

The gradient of an accumulated batch, over all micro-batches and processes, is that of the same examples in one batch:
a micro-batch counts by its share of the label items (the loss) or of the examples (the penalties).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from hf_transfer.config.arguments.adaptation import NONE
from hf_transfer.data.labels import IGNORED, LABELS
from hf_transfer.data.pairs import DOMAIN
from hf_transfer.data.replay import EARLIER
from hf_transfer.features.batches import count_of
from hf_transfer.objectives.losses import Loss, make_loss

ASIDE = (LABELS, DOMAIN, EARLIER)  # keys in a batch that are no inputs of a model
Batch = Mapping[str, Any]
Gather = Callable[[torch.Tensor], torch.Tensor]
PenaltyFunction = Callable[[nn.Module | None, nn.Module, Batch, Any], torch.Tensor]
Watch = Callable[[nn.Module, Batch], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Penalty:
    """A term that is added to the training loss, and to no evaluation.

    Attributes:
        name: for messages, unique within an objective.
        weight: the factor on the term at an optimizer step, counted from 0. The term is computed also where the factor
            is 0, so that the parameters it reaches stay the same for DistributedDataParallel.
        module: what the term needs beyond the model (a teacher, a discriminator); None where it needs nothing.
        function: called with (module, model, batch, outputs), where `model` is not wrapped, `batch` has the labels, and
            `outputs` are the model's. Returns a scalar: a mean over the examples of the batch, or a value that does not
            depend on the batch, such as a norm of the weights.
        watch: called with (model, batch) before each forward pass of training, which runs within the context that it
            returns; None where outputs are enough.
        learning_rate: of the module's parameters, which are an optimizer group of their own from step 0, in checkpoints
            and not in the model; None where nothing in the module trains.

    Raises:
        ValueError: `module` has trainable parameters and no learning rate, or the other way round.
    """

    name: str
    weight: Callable[[int], float]
    module: nn.Module | None
    function: PenaltyFunction
    watch: Watch | None = None
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        trains = self.module is not None and any(p.requires_grad for p in self.module.parameters())
        if trains and self.learning_rate is None:
            raise ValueError(
                f"penalty {self.name!r}: its module has trainable parameters, which are in no optimizer group; give a "
                "`learning_rate`, or call `module.requires_grad_(False)`"
            )
        if not trains and self.learning_rate is not None:
            raise ValueError(f"penalty {self.name!r}: it has a learning rate, and nothing in its module trains")

    def term(self, model: nn.Module, batch: Batch, outputs: Any, step: int) -> torch.Tensor:
        """What is added to the loss at an optimizer step: the weighted value of `function`."""
        return self.weight(step) * self.function(self.module, model, batch, outputs)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass is computed on.

    Attributes:
        inputs: of the model, with the labels.
        num_items: weight of the accumulated batch over all processes that share it, as `Trainer` passes it on; None
            where the micro-batch stands alone.
        processes: number of processes that `num_items` was summed over; gradients are averaged over them.
    """

    inputs: Batch
    num_items: torch.Tensor | int | None
    processes: int


@dataclass
class Objective:
    """What a trainer minimizes.

    Attributes:
        loss: takes the place of the model's own loss where it applies to the labels; None leaves everything to Trainer.
        weighs_items: whether the model's own mean loss is weighted by the micro-batch's share of the label items.
            Trainer divides by the number of micro-batches or, for models that accept loss keywords and ignore them
            (BERT), not at all: neither is the loss of the whole batch when the last micro-batch is short.
        penalties: are added to the loss in training.
        values: the newest value of each penalty, with its weight, by name.
        num_examples: examples of the current accumulated batch; counted only where there are penalties.
    """

    loss: Loss | None = None
    weighs_items: bool = False
    penalties: list[Penalty] = field(default_factory=list)
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    num_examples: torch.Tensor | int | None = None

    @property
    def is_default(self) -> bool:
        """Whether Trainer's own computation is the objective."""
        return self.loss is None and not self.weighs_items and not self.penalties

    def replaces_loss(self, labels: torch.Tensor | None) -> bool:
        """Whether `loss` takes the place of the model's own for these labels."""
        return self.loss is not None and self.loss.applies(labels)

    # ---- the weight of the accumulated batch ----

    def count(self, batches: Sequence[Batch], device: torch.device, gather: Gather | None) -> torch.Tensor | None:
        """Weight of an accumulated batch, a float64 scalar; None where Trainer's count of label items is the weight.

        Args:
            batches: the micro-batches of this process.
            device: for the weight.
            gather: collects a scalar from all processes; None where each counts for itself.
        """
        if self.penalties and batches:
            examples = torch.tensor(float(sum(map(count_of, batches))), dtype=torch.float64, device=device)
            self.num_examples = examples if gather is None else gather(examples).sum()
        labels = [batch.get("labels") for batch in batches]
        if not (self.weighs_items and labels and all(self.replaces_loss(one) for one in labels)):
            return None
        assert self.loss is not None
        weight = torch.stack([self.loss.weight(one) for one in labels if one is not None]).sum().to(device)
        return weight if gather is None else gather(weight).sum()

    def countable(self, batches: Sequence[Batch]) -> list[Batch]:
        """The micro-batches with labels that Trainer can count: it takes every -100 for an ignored label."""
        if not self.weighs_items:
            return list(batches)
        return [{**one, "labels": _countable(one["labels"])} if "labels" in one else one for one in batches]

    # ---- the loss of a micro-batch ----

    def compute(
        self, wrapped: nn.Module, batch: MicroBatch, trainer_loss: Callable[..., tuple[torch.Tensor, Any]], trains: bool
    ) -> tuple[torch.Tensor, Any]:
        """(loss, outputs) without penalties, weighted by the micro-batch's share of the accumulated batch.

        Args:
            wrapped: the model, as it was prepared for training.
            batch: to compute it on.
            trainer_loss: Trainer's own computation: called with `num_items_in_batch`, it returns (loss, outputs).
            trains: whether this is a training step; an evaluation measures the mean of the model's own loss.
        """
        labels = batch.inputs.get("labels")
        if self.replaces_loss(labels):
            return self._own_loss(wrapped, batch) if trains else trainer_loss(None)
        if batch.num_items is None or not self.weighs_items:
            return trainer_loss(batch.num_items)
        items = _countable(labels).ne(IGNORED).sum()
        loss, outputs = trainer_loss(None)
        return loss * items * batch.processes / batch.num_items, outputs  # in the loss's precision, left to right

    def _own_loss(self, wrapped: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, Any]:
        assert self.loss is not None
        labels = batch.inputs["labels"]
        outputs = wrapped(**{name: value for name, value in batch.inputs.items() if name not in ASIDE})
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        total = self.loss.total(logits[: len(labels)], labels)  # target examples come last, and have none
        weight = self.loss.weight(labels) if batch.num_items is None else batch.num_items / batch.processes
        return total / torch.as_tensor(weight).to(total).clamp(min=torch.finfo(total.dtype).tiny), outputs

    def add_penalties(
        self, loss: torch.Tensor, model: nn.Module, batch: MicroBatch, outputs: Any, step: int
    ) -> torch.Tensor:
        """The loss with all penalties, weighted by the micro-batch's share of the examples.

        Args:
            loss: of `compute`.
            model: not wrapped.
            batch: that the loss was computed on.
            outputs: of the model.
            step: the optimizer step, counted from 0.
        """
        share: torch.Tensor | float = 1.0
        if self.penalties and batch.num_items is not None and self.num_examples is not None:
            share = count_of(batch.inputs) * batch.processes / self.num_examples
        for penalty in self.penalties:
            term = penalty.term(model, batch.inputs, outputs, step)
            self.values[penalty.name] = term.detach()
            loss = loss + (share * term).to(loss)
        return loss

    @contextlib.contextmanager
    def watching(self, model: nn.Module, inputs: Batch) -> Iterator[None]:
        """Within the context, penalties see the forward pass of the model, which is not wrapped."""
        with contextlib.ExitStack() as stack:
            for penalty in self.penalties:
                if penalty.watch is not None:
                    stack.enter_context(penalty.watch(model, inputs))
            yield

    # ---- what penalties train ----

    @property
    def trained(self) -> list[Penalty]:
        """The penalties with parameters of their own."""
        return [penalty for penalty in self.penalties if penalty.learning_rate is not None]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of penalties, each by the penalty's name and its own."""
        return {
            f"{penalty.name}.{name}": parameter
            for penalty in self.trained
            if penalty.module is not None
            for name, parameter in penalty.module.named_parameters()
        }

    def owns(self, group: str) -> bool:
        """Whether an optimizer group of this name, as logs have it, is a penalty's."""
        return group.partition("#")[0] in {penalty.name for penalty in self.trained}

    def parameter_groups(self, stages: int, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups of the penalties, as `plan.optimizer_groups.parameter_groups` has those of a model.

        Args:
            stages: of the plan; penalties train in all of them, at one learning rate.
            weight_decay: of parameters with two or more dimensions.
        """
        groups = []
        for penalty in self.trained:
            assert penalty.module is not None
            own = [p for p in penalty.module.parameters() if p.requires_grad]
            rate = {"lr": penalty.learning_rate, "rates": (penalty.learning_rate,) * stages, "layers": [penalty.name]}
            for decays in (True, False):
                params = [p for p in own if (p.ndim > 1) == decays]
                if params:
                    groups.append({"params": params, "weight_decay": weight_decay if decays else 0.0, **rate})
        return groups


def make_objective(args: Any, config: Any, train_dataset: Any, has_plan: bool) -> Objective:
    """The objective that the keys ask for, without penalties.

    With a plan, class weights, the focal loss and label smoothing are of the training loss alone: evaluations measure
    the mean of the model's own loss, as they do for a saved model, of which nobody knows how it was trained. Without
    one, `label_smoothing_factor` is left to Trainer, which smooths its evaluation losses too.

    Args:
        args: `TransferArguments`.
        config: of the model; None for a module without one.
        train_dataset: for class weights.
        has_plan: whether a plan is executed. With neither a plan nor a key of the loss, the objective is Trainer's own.

    Raises:
        UserError: a key of the loss does not fit the model or the dataset.
    """
    loss = make_loss(args, config, train_dataset)
    adapts = args.domain_adaptation != NONE  # the model cannot compute the loss of a part of its batch
    if not (has_plan or loss.always or adapts):
        return Objective()
    if (has_plan and loss.smoothing) or adapts:
        loss = replace(loss, always=True)
    return Objective(loss, weighs_items=args.n_gpu <= 1)  # DataParallel keeps Trainer's computation


def _countable(labels: Any) -> Any:
    """Labels to count: a regression target of -100 is a value, not the mark of an ignored label."""
    return torch.zeros_like(labels) if torch.is_tensor(labels) and labels.is_floating_point() else labels
