"""Keys that are missing, or that exclude each other."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hf_transfer.config.arguments import tracking
from hf_transfer.config.arguments.adaptation import NONE
from hf_transfer.config.arguments.adapter import with_adapter
from hf_transfer.config.arguments.plan import AUTO
from hf_transfer.config.places import SUITED, data_in_place_of_model, installed_model, kind_of_data, similar


def missing(values: Mapping[str, Any], rejected: Collection[str], needs: Collection[str]) -> list[str]:
    """Keys that every run needs; one whose value was refused is not missing, nor a model that such data may bring."""
    problems = []
    values = {**values, **dict.fromkeys(rejected, "given")}
    if not values["model_name_or_path"] and not {"dataset_name", "train_file"} & set(rejected):
        problems.append(_no_model(str(values["dataset_name"] or values["train_file"] or "")))
    if "output" in needs and not values["output_dir"]:
        problems.append(
            "output_dir is missing: the folder that the run is written to (several processes or a resumed run need it)."
        )
    if "data" in needs and not values["dataset_name"] and not values["train_file"]:
        problems.append(_no_data(str(values["model_name_or_path"] or "")))
    return problems


def _no_model(data: str) -> str:
    """What to say where the model is missing."""
    said = "model_name_or_path is missing: a hub id, a folder, timm/<name> or bundled:<name>."
    kind = kind_of_data(data)
    if not kind:
        return said
    bundled, _, on_hub = SUITED[kind]
    if installed_model(kind):
        return f"{said} For {kind}s there is {bundled}, which is installed."
    install = 'pip install "hf-transfer-toolkit[quickstart]"'
    return f"{said} For {kind}s: {bundled} after `{install}`, or one of a hub, such as {on_hub}."


def _no_data(model: str) -> str:
    """What to say where the data is missing: what was meant as data may have been taken for the model."""
    if said := data_in_place_of_model(model):
        return said
    is_name = model and not model.startswith("bundled:") and not Path(model).expanduser().exists()
    near = similar(Path(model)) if is_name else ""
    taken = f" ({model!r} was taken for the model)" if is_name else ""
    return f"dataset_name or train_file is missing: what to train on{taken}.{' ' if near else ''}{near}"


def contradictions(values: Mapping[str, Any], chosen: Mapping[str, Any]) -> list[str]:
    """Keys that exclude each other.

    Args:
        values: every key with its value.
        chosen: the keys that were given.
    """
    problems = []
    problems += _streaming(values) if values["streaming"] else []
    if values["augmented_views"] is not None and values["augmentation"] == "none" and not values["random_erasing"]:
        problems.append(
            f"augmented_views: {values['augmented_views']} has no effect with augmentation: none; choose one, for "
            "example augmentation: basic."
        )
    for one, other in (
        ("dataset_name", "train_file"),
        ("fp16", "bf16"),
        ("mixed_precision", "fp16"),
        ("mixed_precision", "bf16"),
    ):
        if values[one] and values[other]:
            problems.append(f"{one} and {other} contradict each other: keep one.")
    if chosen.get("from_scratch") is False and values["strategy"] == "scratch":
        problems.append("from_scratch: false contradicts strategy: scratch, which trains from random weights.")
    if values["from_scratch"] and with_adapter(values["strategy"], values["adapter"]) != "none":
        problems.append("from_scratch: an adapter's files hold no backbone, so it needs a pretrained one.")
    if values["from_scratch"] and values["batchnorm"] == "frozen" and values["strategy"] != "scratch":
        problems.append("batchnorm: frozen keeps the checkpoint's running statistics, and from_scratch leaves none.")
    if values["save_only_model"] and values["on_nonfinite"] == "rollback":
        problems.append(
            "on_nonfinite: rollback returns to the optimizer of a checkpoint, and save_only_model: true saves none."
        )
    return [*problems, *tracking.check(values), *_auto_rate(values, chosen), *_lengths(chosen)]


def _streaming(values: Mapping[str, Any]) -> list[str]:
    """What a stream needs, and what wants to see all of it."""
    problems = [
        f"streaming: a stream has no length, so {name} must say {what}."
        for name, what, there in (
            ("max_steps", "how long to train", values["max_steps"] > 0),
            ("max_eval_samples", "how many examples to validate on", values["max_eval_samples"] is not None),
        )
        if not there
    ]
    wants_all = (
        ("drop_leaks", values["drop_leaks"]),
        ("balanced_sampling", values["balanced_sampling"]),
        ("length_bucketing", values["length_bucketing"] is True),
        ("class_weights: auto", values["class_weights"] == "auto"),
        ("max_train_samples", values["max_train_samples"] is not None),
    )
    problems += [
        f"streaming: {name} needs all examples before training; leave it out." for name, is_set in wants_all if is_set
    ]
    if values["augmented_views"] is not None:
        problems.append(
            "streaming: augmented_views are reused, and a stream's examples are not recognized; leave it out."
        )
    return problems


def _auto_rate(values: Mapping[str, Any], chosen: Mapping[str, Any]) -> list[str]:
    """What leaves `learning_rate: auto` nothing to find, or nothing to find it on."""
    if values["learning_rate"] != AUTO:
        return []
    reasons = (
        (chosen.get("probe_solver") == "lbfgs", "probe_solver: lbfgs takes no steps, so there is none to find"),
        (values["streaming"], "streaming has not read the training set, from which its batches are drawn"),
        (values["domain_adaptation"] != NONE, "the range test would train the discriminator of domain_adaptation too"),
        (bool(values["contrastive_epochs"]), "the contrastive stage would change the model after it was found"),
        (values["strategy"] is None and values["stages"] is None, "without a strategy there is no plan to find it for"),
    )
    return [f"learning_rate: auto: {reason}; give a number." for holds, reason in reasons if holds]


def _is_epochs(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _lengths(chosen: Mapping[str, Any]) -> list[str]:
    """The number of epochs, where `stages` says another one."""
    stages, epochs = chosen.get("stages"), chosen.get("num_train_epochs")
    if stages is None or epochs is None:
        return []
    total = sum(float(s["epochs"]) for s in stages if isinstance(s, Mapping) and _is_epochs(s.get("epochs")))
    if epochs == total:
        return []
    return [
        f"num_train_epochs: {epochs:g} contradicts stages, which last {total:g} epochs; leave num_train_epochs out."
    ]
