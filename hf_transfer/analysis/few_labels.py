"""What `strategy: auto` depends on, and what it sets where labels are few: {key: value and reason}.

Which case is which is a table (`analysis.rules`). Up to `FEW` training examples (`MANY` with BatchNorm) a run begins
with the best linear head on frozen features and fine-tunes everything from there, slowly enough not to undo it (LP-FT,
Kumar et al. 2022, section 3). Only keys that were not given are set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_transfer.analysis.baselines import NEAR, Distance
from hf_transfer.analysis.pooling_choice import Candidate, PoolingChoice
from hf_transfer.features.pooled_layer import PooledChange
from hf_transfer.layers.architectures import HEAD
from hf_transfer.models.pooling_layer import PoolingChange

FEW = 1000  # training examples
MANY = 10_000  # likewise, of an image model with BatchNorm: the default rates were made for transformers
# Training examples per class below which only the head is fitted: of a single training, and of several that are
# averaged or an image model with BatchNorm.
LEAST_PER_CLASS, LESS_PER_CLASS = 14, 10
BATCH = 16
STEPS, CONVOLUTIONAL_STEPS = 60, 100  # optimizer steps in all, at least; the latter of an image model with BatchNorm
MOST_EPOCHS, LEAST_EPOCHS = 40, 4
CONVOLUTIONAL_LEAST_EPOCHS = 8  # of an image model with BatchNorm on up to `FEW` examples
AVERAGED = 300  # training examples, up to which the weights of several trainings are averaged
AVERAGED_STEPS, AVERAGED_LEAST_EPOCHS = 35, 3  # of each of them, at least
RATE = 1e-4  # of the whole model, head included
CONVOLUTIONAL_RATE = 1e-3  # of an image model with BatchNorm


@dataclass(frozen=True)
class Choice:
    """What a key was set to.

    Attributes:
        value: of the key.
        why: the reason, as part of a sentence.
    """

    value: Any
    why: str


@dataclass(frozen=True)
class Chosen:
    """What a run chose.

    Attributes:
        keys: by name; only keys that were not given.
        given: {name: value} of keys that were given where `auto` would have chosen another value.
        candidates: layers that cross-validation compared, best first, if another one than the head's own is read.
        change: of the model, if its head reads another state than before.
        rule: that chose the strategy, in words; empty if none did.
    """

    keys: Mapping[str, Choice] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    candidates: tuple[Candidate, ...] = ()
    change: PoolingChange | PooledChange | None = None
    rule: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For `results.json`."""
        return {
            "auto": {name: asdict(choice) for name, choice in self.keys.items()},
            "pooling": self.change.to_dict() if self.change else None,
            "pooling_candidates": [asdict(one) for one in self.candidates],
        }

    def lines(self) -> list[str]:
        """For display; empty where nothing was chosen."""
        told = {name: choice for name, choice in self.keys.items() if choice.why}
        lines = [f"  {name}: {_shown(choice.value)} ({choice.why})" for name, choice in told.items()]
        lines += [f"  {name}: {_shown(value)} (given)" for name, value in self.given.items()]
        if told:
            lines.insert(0, "Chosen from the data and the model (a key that is given wins):")
        if self.change:
            lines.append(f"The model was changed: {self.change}.")
        return lines


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()  # as in run.yaml
    return "as the model is made" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Seen:
    """What the choice depends on.

    Attributes:
        examples: number of training examples; None of a stream.
        per_class: training examples per class, on average: one rare class decides nothing; None without classes.
        is_adapted: whether an adapter trains.
        is_new_head: whether the head was newly initialized.
        unsolvable: why a head cannot be solved for, as part of a sentence; empty if it can.
        has_batchnorm: whether the model has BatchNorm layers.
        batch_size: examples per step of all processes, accumulation included.
        has_steps: whether the number of steps was given.
        not_alone: why the head cannot be solved for and left at that, as part of a sentence; empty if it can.
        begins: a key that was given and asks for the head first and then everything, with its value.
        holds: a key that was given and is about how the backbone trains (what it keeps, the domains that it draws
            together), with its value.
        rate: learning rate, if the key was given.
        is_random: whether the weights are random.
        has_rates: whether rates of single layers were given.
        domain: what the frozen features are worth beside raw pixels; None where it decides nothing, or is not known.
        no_room: why memory does not suffice to train all layers, as part of a sentence; empty if it does.
        averages: whether several trainings would be averaged.
    """

    examples: int | None
    per_class: float | None
    is_adapted: bool
    is_new_head: bool
    unsolvable: str
    has_batchnorm: bool
    batch_size: int | None
    rate: float | None
    has_steps: bool = False
    not_alone: str = ""
    begins: str = ""
    holds: str = ""
    is_random: bool = False
    has_rates: bool = False
    domain: Distance | None = None
    no_room: str = ""
    averages: bool = False

    @property
    def has_few(self) -> bool:
        """Whether there are so few examples per class that fine-tuning undoes the head that it begins with."""
        least = LESS_PER_CLASS if self.has_batchnorm or self.averages else LEAST_PER_CLASS
        return self.per_class is not None and self.per_class < least and not (self.begins or self.holds)

    @property
    def asks_domain(self) -> bool:
        """Whether the choice depends on `domain`: on so few examples, of an image model with BatchNorm."""
        is_plain = self.is_new_head and not (self.is_adapted or self.is_random or self.unsolvable)
        return self.examples is not None and self.has_batchnorm and self.has_few and is_plain

    @property
    def is_distant(self) -> bool:
        """Whether the frozen features are not clearly better than raw pixels."""
        return self.domain is not None and self.domain.verdict != NEAR


def pooling(found: PoolingChoice | None, why_not: str) -> dict[str, Choice]:
    """Values of `pooling` and `pooling_layer`.

    Args:
        found: what cross-validation says of the layers; None if it was not asked.
        why_not: why not, as part of a sentence; empty if there is nothing to say.
    """
    if found is None:
        return {"pooling": Choice(None, why_not), "pooling_layer": Choice(None, "")}
    best, own = found.best, found.own
    is_own = own.group == HEAD
    against = f"{own.loss:.3f} of {'what' if is_own else f'{own.pooling} of {own.group}, which'} the head reads"
    if not found.pays:
        how = "clearly below" if found.margin > 0 else "near"
        kept = Choice(None, f"no layer's loss in cross-validation is {how} {against}")
        return {"pooling": kept, "pooling_layer": Choice(None, "")}
    why = f"its loss in cross-validation is {best.loss:.3f}, against {against}"
    if found.gain <= 0:
        why += f": not clearly lower (standard error {found.error:.3f})"
    is_alone = len({candidate.group for candidate in found.candidates}) == 1
    which = (
        "the last: more than the head trains" if is_alone else "the best of those compared; those above it are left out"
    )
    return {"pooling": Choice(best.pooling, why), "pooling_layer": Choice(best.group, which)}


def warm_up(is_solved: bool) -> dict[str, Choice]:
    """A warm-up for fine-tuning that begins with a head that is no longer random.

    Adam's first steps are as large as any, whatever the gradient is, and a large head turns what they change below it
    into large errors.

    Args:
        is_solved: whether the head is solved for, by which its weights become large; else the checkpoint's is kept.
    """
    why = "a tenth of the steps" + (": the first would undo a head that is solved for" if is_solved else "")
    return {"warmup_steps": Choice(0.1, why)}


def averaged(seen: Seen) -> dict[str, Choice]:
    """Several short trainings in place of a long one.

    On 64 sentences per class, five of half the length were 0.9 points better than one; see `docs/few-labels.md`.
    """
    steps = math.ceil((seen.examples or 1) / (seen.batch_size or BATCH))
    epochs = min(MOST_EPOCHS, max(AVERAGED_LEAST_EPOCHS, math.ceil(AVERAGED_STEPS / steps)))
    why = "so few examples: short trainings that hold out others are averaged, more accurate than a long one"
    return {"refit": Choice(True, why), "num_train_epochs": Choice(float(epochs), f"{epochs * steps} steps in each")}


def course(seen: Seen, count: str) -> dict[str, Choice]:
    """Length and learning rates of training everything."""
    steps = math.ceil((seen.examples or 1) / (seen.batch_size or BATCH))
    rate, least = (CONVOLUTIONAL_RATE, CONVOLUTIONAL_STEPS) if seen.has_batchnorm else (RATE, STEPS)
    short = Choice("no", "repeating so few steps is quicker than saving each epoch")
    is_short = seen.has_batchnorm and (seen.examples or 0) <= FEW
    fewest = CONVOLUTIONAL_LEAST_EPOCHS if is_short else LEAST_EPOCHS
    epochs = min(MOST_EPOCHS, max(fewest, math.ceil(least / steps)))
    kind = "a model with BatchNorm" if seen.has_batchnorm else "a model without BatchNorm"
    length = {} if seen.has_steps else {"num_train_epochs": Choice(float(epochs), f"{epochs * steps} steps in all")}
    return {
        "per_device_train_batch_size": Choice(BATCH, count),
        **length,
        "learning_rate": Choice(rate, kind),
        "head_learning_rate": Choice(seen.rate or rate, "the head is no longer random"),
        **({"save_strategy": short} if (seen.examples or 0) <= FEW else {}),
    }
