"""Keys against forgetting: what holds a model to the one it starts from, and replay of earlier data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_transfer.config.arguments.adaptation import NONE
from hf_transfer.config.fields import setting

FISHERS = ("empirical", "true")
PENALTIES = ("l2_sp_alpha", "ewc_lambda", "distillation_alpha")
# Paths and hub ids, which `run.yaml` holds so that they work from another folder.
PLACES = ("ewc_dataset_name", "ewc_fisher_file", "teacher_model_name_or_path", "replay_dataset_name")
_BETA, _TEMPERATURE, _SAMPLES, _FRACTION = 0.01, 2.0, 1000, 0.1


@dataclass
class ForgettingArguments:
    """What a run keeps of what the model could do before."""

    l2_sp_alpha: float = setting(
        0.0,
        "L2-SP: adds alpha/2 times the squared distance of the pretrained weights from their initial values to the "
        "loss; 0: off, 0.1 is usual",
        minimum=0,
        resume="plan",
        card="changed",
    )
    l2_sp_beta: float = setting(
        _BETA,
        "l2_sp_alpha: adds beta/2 times the squared norm of a newly initialized head to the loss",
        minimum=0,
        resume="plan",
        card="changed",
    )
    ewc_lambda: float = setting(
        0.0,
        "EWC: adds lambda/2 times the squared distance of each pretrained weight from its initial value, times its "
        "Fisher information, to the loss; 0: off",
        minimum=0,
        resume="plan",
        card="changed",
    )
    ewc_dataset_name: str | None = setting(
        None,
        "ewc_lambda: dataset of the checkpoint's own task, on which the Fisher information is estimated; as "
        "dataset_name, with a train split",
        resume="free",
        card="changed",
    )
    ewc_fisher: str = setting(
        "empirical",
        "ewc_dataset_name: labels of the Fisher information: those of the dataset (empirical), or drawn from the "
        "model's predictions (true)",
        choices=FISHERS,
        resume="fixed",
        card="changed",
    )
    ewc_samples: int = setting(
        _SAMPLES,
        "ewc_dataset_name: maximum number of examples, each with a forward and backward pass of its own",
        above=0,
        resume="fixed",
    )
    ewc_fisher_file: str | None = setting(
        None, "ewc_lambda: fisher.safetensors of an earlier run from the same checkpoint", resume="free"
    )
    distillation_alpha: float = setting(
        0.0,
        "weight of the distance to a teacher: to the logits of teacher_model_name_or_path, or, without one, to the "
        "features of the pretrained model; 0: off",
        minimum=0,
        resume="plan",
        card="changed",
    )
    distillation_temperature: float = setting(
        _TEMPERATURE,
        "teacher_model_name_or_path: temperature of both softmaxes",
        above=0,
        resume="plan",
        card="changed",
    )
    teacher_model_name_or_path: str | None = setting(
        None,
        "distillation_alpha: a trained model with the labels and the tokenizer of this run, as model_name_or_path",
        resume="free",
        card="changed",
    )
    replay_dataset_name: str | None = setting(
        None,
        "earlier data that is mixed into the training batches, as dataset_name, with a train split; its labels are "
        "those of this run or, of another task, those of the checkpoint's own head",
        resume="free",
        card="changed",
    )
    replay_fraction: float = setting(
        _FRACTION,
        "replay_dataset_name: fraction of the examples of each batch that are replayed",
        above=0,
        below=1,
        resume="fixed",
        card="changed",
    )


def check(values: Mapping[str, Any]) -> list[str]:
    """Problems of the keys, among all keys of training, one sentence each."""
    problems = [
        f"{name} has no effect without {partner}; add {example}, or leave {name} out."
        for name, unset, partner, example in (
            ("l2_sp_beta", _BETA, "l2_sp_alpha", "l2_sp_alpha: 0.1"),
            ("ewc_dataset_name", None, "ewc_lambda", "ewc_lambda: 100"),
            ("ewc_fisher_file", None, "ewc_lambda", "ewc_lambda: 100"),
            ("ewc_fisher", FISHERS[0], "ewc_dataset_name", "the dataset to estimate the Fisher information on"),
            ("ewc_samples", _SAMPLES, "ewc_dataset_name", "the dataset to estimate the Fisher information on"),
            ("teacher_model_name_or_path", None, "distillation_alpha", "distillation_alpha: 0.5"),
            ("distillation_temperature", _TEMPERATURE, "teacher_model_name_or_path", "the teacher"),
            ("replay_fraction", _FRACTION, "replay_dataset_name", "the dataset to replay"),
        )
        if values[name] != unset and not values[partner]
    ]
    if values["ewc_dataset_name"] and values["ewc_fisher_file"]:
        problems.append(
            "ewc_dataset_name and ewc_fisher_file contradict each other: the Fisher information is estimated or read; "
            "keep one."
        )
    if _is_set(values["ewc_lambda"]) and not (values["ewc_dataset_name"] or values["ewc_fisher_file"]):
        problems.append(
            "ewc_lambda needs the Fisher information: set ewc_dataset_name, a dataset of the checkpoint's own task, or "
            "ewc_fisher_file, the fisher.safetensors of an earlier run."
        )
    for name in PENALTIES:
        if _is_set(values[name]) and values["probe_solver"] == "lbfgs":
            problems.append(f"{name}: probe_solver: lbfgs solves for the head alone, with its own penalty; leave one.")
    if values["replay_dataset_name"]:
        problems += [
            f"replay_dataset_name: {name} draws the examples of the training set alone; leave one of them out."
            for name, is_set in (
                ("balanced_sampling", values["balanced_sampling"]),
                ("length_bucketing: true", values["length_bucketing"] is True),
                ("probe_solver: lbfgs", values["probe_solver"] == "lbfgs"),
                ("contrastive_epochs", values["contrastive_epochs"]),
                ("domain_adaptation", values["domain_adaptation"] != NONE),
            )
            if is_set
        ]
    return problems


def check_run(values: Mapping[str, Any]) -> list[str]:
    """Problems of the keys of a run, which knows more than its trainer; one sentence each."""
    problems = []
    if values["from_scratch"] or values["strategy"] == "scratch":
        problems += [
            f"{name} holds the model to its pretrained weights, and from_scratch has none; leave one of them out."
            for name in PENALTIES
            if _is_set(values[name]) and not (name == "distillation_alpha" and values["teacher_model_name_or_path"])
        ]
    if values["replay_dataset_name"] and values["streaming"]:
        problems.append("replay_dataset_name: a stream's examples cannot be mixed with others; leave streaming out.")
    return problems


def _is_set(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0
