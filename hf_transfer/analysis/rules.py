"""What `strategy: auto` chooses: a table of rules, of which the first that applies holds.

Each rule says what it rests on: something that was measured here, by the page with the numbers, or a rule of thumb of
the field, which says so. A key that is given wins over any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hf_transfer.analysis.few_labels import (
    FEW,
    LEAST_PER_CLASS,
    LESS_PER_CLASS,
    MANY,
    Choice,
    Seen,
    course,
)
from hf_transfer.config.arguments.plan import learning_rate_of

DECAY = 0.9  # `layer_lr_decay` of many examples
RULE_OF_THUMB = "a rule of thumb, not measured here"
SHORT_OF_MEMORY = "short of memory"
_Keys = dict[str, Choice]


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Attributes:
        name: of the rule.
        applies: when, in words.
        when: the same as a function.
        sets: what it sets, each with its reason.
        because: why, as part of a sentence.
        basis: what that rests on.
    """

    name: str
    applies: str
    when: Callable[[Seen], bool]
    sets: Callable[[Seen], _Keys]
    because: str
    basis: str

    @property
    def _overrule(self) -> str:
        keys = "--strategy or --adapter" if self.name == SHORT_OF_MEMORY else "--strategy"
        return f"overrule it with {keys}"

    def __str__(self) -> str:
        return f"{self.name} ({self.applies}), because {self.because} ({self.basis}); {self._overrule}"


def rule_for(seen: Seen) -> Rule:
    """The first rule that applies."""
    return next(rule for rule in RULES if rule.when(seen))


def choose(seen: Seen) -> _Keys:
    """Values for a run with `strategy: auto`; keys that are not here keep their defaults."""
    return rule_for(seen).sets(seen)


def _count(seen: Seen) -> str:
    return "a stream" if seen.examples is None else f"{seen.examples:,} training examples"


def _is_many(seen: Seen) -> bool:
    return (seen.examples or 0) > MANY and not seen.is_random and not seen.begins


def _two_phase(seen: Seen) -> _Keys:
    return {"strategy": Choice("two-phase", _count(seen))}


def _adapted(seen: Seen) -> _Keys:
    if seen.begins:
        return _two_phase(seen)
    return {"strategy": Choice("full", "an adapter begins as the pretrained function")}


def _trains_all_without_room(seen: Seen) -> bool:
    if not seen.no_room or seen.is_adapted or seen.begins:
        return False
    otherwise = next(rule for rule in RULES if rule.name != SHORT_OF_MEMORY and rule.when(seen))
    return otherwise.sets(seen)["strategy"].value != "linear-probe"


def _with_lora(seen: Seen) -> _Keys:
    return {
        "strategy": Choice("full", "an adapter begins as the pretrained function"),
        "adapter": Choice("lora", seen.no_room),
        **(
            {}
            if seen.rate is not None
            else {"learning_rate": Choice(learning_rate_of(None, "full", "lora"), "of LoRA")}
        ),
    }


def _everything(seen: Seen) -> _Keys:
    keys = {"strategy": Choice("full", f"{_count(seen)}: {RULE_OF_THUMB}")}
    if not seen.has_rates:
        keys["layer_lr_decay"] = Choice(DECAY, f"lower layers are more general; {RULE_OF_THUMB}")
    return keys


def _kept_head(seen: Seen) -> _Keys:
    kept = "the checkpoint's head is kept"
    wanted = Choice("two-phase", f"{kept}; {seen.begins} was given") if seen.begins else Choice("full", kept)
    return {"strategy": wanted, **course(seen, _count(seen))}


def _unsolvable(seen: Seen) -> _Keys:
    return {"strategy": Choice("two-phase", f"{_count(seen)}; the head cannot be solved for: {seen.unsolvable}")}


def _head_alone(seen: Seen) -> _Keys:
    few = f"{seen.per_class:.2g} training examples per class: too few to train more than the head"
    solver = Choice("sgd", seen.not_alone) if seen.not_alone else Choice("lbfgs", "the best such head")
    return {"strategy": Choice("linear-probe", few), "probe_solver": solver}


def _from_best_head(seen: Seen) -> _Keys:
    why = f"{_count(seen)}: the best linear head on frozen features, then everything"
    if seen.domain is not None and seen.is_distant:
        why = (
            f"{seen.per_class:.2g} training examples per class are few, but frozen features "
            f"({seen.domain.features:.2f} in cross-validation) are not clearly better than {seen.domain.input_is} "
            f"({seen.domain.input:.2f})"
        )
    return {
        "strategy": Choice("two-phase", why),
        "head_init": Choice("probe", "fine-tuning begins with that head"),
        "head_epochs": Choice(0.0, "it needs no epochs of its own"),
        **course(seen, _count(seen)),
    }


RULES: tuple[Rule, ...] = (
    Rule(
        name=SHORT_OF_MEMORY,
        applies="training all layers does not fit the memory that is free, and an adapter does",
        when=_trains_all_without_room,
        sets=_with_lora,
        because="LoRA keeps gradients and optimizer states of the adapter and the head only",
        basis="Hu et al. 2021; the memory is that of plan's budget",
    ),
    Rule(
        name="stream",
        applies="the training data is a stream",
        when=lambda seen: seen.examples is None and not seen.is_adapted,
        sets=_two_phase,
        because="a new head must not pull at pretrained layers while it is random",
        basis="Kumar et al. 2022",
    ),
    Rule(
        name="adapter",
        applies="an adapter trains",
        when=lambda seen: seen.is_adapted,
        sets=_adapted,
        because="it begins as the pretrained function and cannot be pulled far",
        basis="Hu et al. 2021",
    ),
    Rule(
        name="many examples",
        applies=f"over {MANY:,} training examples",
        when=_is_many,
        sets=_everything,
        because="so many can train every layer from the first step, lower ones at lower rates",
        basis=RULE_OF_THUMB,
    ),
    Rule(
        name="some examples",
        applies=f"over {FEW:,} training examples, or over {MANY:,} with BatchNorm, or with random weights",
        when=lambda seen: (seen.examples or 0) > (MANY if seen.has_batchnorm else FEW),
        sets=_two_phase,
        because="it was as accurate as gradual unfreezing and full fine-tuning on 7,677 sentences, in less time",
        basis="one run each, docs/benchmarks.md",
    ),
    Rule(
        name="kept head",
        applies="the checkpoint has a head for these labels",
        when=lambda seen: not seen.is_new_head,
        sets=_kept_head,
        because="a head that is no longer random needs no phase of its own",
        basis="Kumar et al. 2022",
    ),
    Rule(
        name="unsolvable head",
        applies="the best head cannot be solved for",
        when=lambda seen: bool(seen.unsolvable),
        sets=_unsolvable,
        because="the head then has to be trained first by steps",
        basis="Kumar et al. 2022",
    ),
    Rule(
        name="few per class, distant",
        applies=f"under {LESS_PER_CLASS} training examples per class, with BatchNorm, and frozen "
        "features that are not clearly better than raw pixels",
        when=lambda seen: seen.asks_domain and seen.is_distant,
        sets=_from_best_head,
        because="a head on features that know so little of the data cannot be good",
        basis="docs/few-labels.md",
    ),
    Rule(
        name="few per class",
        applies=f"under {LEAST_PER_CLASS} training examples per class, {LESS_PER_CLASS} with BatchNorm or where "
        "several trainings are averaged",
        when=lambda seen: seen.has_few,
        sets=_head_alone,
        because="on so few, fine-tuning undoes the head that it begins with",
        basis="docs/few-labels.md",
    ),
    Rule(
        name="few examples",
        applies=f"up to {FEW:,} training examples, or {MANY:,} with BatchNorm",
        when=lambda seen: True,
        sets=_from_best_head,
        because="the best head on frozen features, then everything, was ahead of a tuned Trainer or level with it",
        basis="docs/few-labels.md",
    ),
)
