"""The files of an adapter: what `output_dir` holds, how it is loaded, merged, and checked.

`adapter_config.json` and `adapter_model.safetensors` are peft's; `config.json` beside them holds the labels. Plain
libraries load them so:

    config = AutoConfig.from_pretrained("out")
    base = json.load(open("out/adapter_config.json"))["base_model_name_or_path"]
    model = AutoModelForSequenceClassification.from_pretrained(base, config=config, ignore_mismatched_sizes=True)
    model = PeftModel.from_pretrained(model, "out")
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.utils import find_adapter_config_file

from hf_transfer.adapters import bottleneck
from hf_transfer.errors import UserError, WorkFailed, one_line
from hf_transfer.layers.groups import plain_names

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError)
KEPT_APART = "base_model.model."  # what peft puts before a model's own names


def adapter_config(place: str, options: dict[str, Any]) -> PeftConfig | None:
    """peft's configuration in a folder or a hub repository; None where it holds no adapter.

    Raises:
        UserError: it cannot be read.
    """
    options = {k: v for k, v in options.items() if k in ("revision", "local_files_only")}
    if Path(place).is_dir() and not (Path(place) / "adapter_config.json").is_file():
        return None
    if find_adapter_config_file(place, **options) is None:
        return None
    try:
        config = PeftConfig.from_pretrained(place, **({} if Path(place).is_dir() else options))
    except _UNREADABLE as error:
        raise UserError(f"model_name_or_path: the adapter in {place!r} cannot be read ({one_line(error)}).") from error
    if not config.base_model_name_or_path:
        raise UserError(
            f"model_name_or_path: the adapter in {place!r} does not name its backbone.",
            "Write base_model_name_or_path into its adapter_config.json.",
        )
    base = Path(config.base_model_name_or_path)
    if base.is_absolute() and not base.is_dir():
        raise UserError(
            f"model_name_or_path: the adapter in {place!r} needs the backbone {str(base)!r}, which is not there.",
            "Bring the folder back, or write its new place into adapter_config.json.",
        )
    return config


def put_on(model: Any, place: str, options: dict[str, Any], restart: bool = False) -> tuple[Any, set[str]]:
    """(backbone with the adapter of `place`, plain names of the parameters that its files hold).

    Args:
        model: the backbone, with a head of any size: one of another size than the file's stays as it is.
        place: folder or hub id.
        options: of `from_pretrained`.
        restart: take the head and what else was saved whole, not the adapter.

    Raises:
        UserError: the files do not belong to this backbone.
    """
    options = {k: v for k, v in options.items() if k in ("revision", "local_files_only")}
    try:
        state = load_peft_weights(place, device="cpu", **({} if Path(place).is_dir() else options))
        own = dict(model.state_dict())
        held = {k.removeprefix(KEPT_APART).removeprefix("base_model."): v for k, v in state.items()}
        whole = {n: t for n, t in held.items() if n in own and own[n].shape == t.shape}
        if restart:
            model.load_state_dict(whole, strict=False)
            return model, set(whole)
        config = PeftConfig.from_pretrained(place, **({} if Path(place).is_dir() else options))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft's own
            made = PeftModel.from_pretrained(
                model,
                place,
                is_trainable=not config.is_prompt_learning,
                torch_device="cpu",
                ignore_mismatched_sizes=True,
                **({} if Path(place).is_dir() else options),
            )
    except _UNREADABLE as error:
        raise UserError(
            f"model_name_or_path: the adapter in {place!r} cannot be loaded ({one_line(error)})."
        ) from error
    return made, set(whole)


def write_config(model: PeftModel, folder: str | Path) -> None:
    """`config.json` beside an adapter: the labels, and the class that the backbone is loaded with."""
    core = model.get_base_model()
    config = copy.deepcopy(core.config)
    config.architectures = [type(core).__name__]
    config.save_pretrained(folder)


def merged(model: Any) -> Any:
    """A plain model whose weights hold what the adapter of `model` learnt; `model` stays as it is.

    Raises:
        UserError: its kind of adapter is no change of weights (prompts, prefixes, bottlenecks).
    """
    if not isinstance(model, PeftModel):
        return model
    kind = str(getattr(model.active_peft_config.peft_type, "value", model.active_peft_config.peft_type))
    if model.active_peft_config.is_prompt_learning or kind == bottleneck.KIND:
        raise UserError(
            f"An adapter of type {kind} cannot be merged: it is no change of weights.",
            "Keep it as it is, or train lora, whose update can be merged.",
        )
    try:
        whole = _unwrapped(copy.deepcopy(model))
    except (*_UNREADABLE, NotImplementedError, AttributeError) as error:
        raise UserError(f"This adapter cannot be merged ({one_line(error)}).") from error
    for parameter in whole.parameters():
        parameter.requires_grad_(True)
    return whole


def _unwrapped(model: PeftModel) -> Any:
    """The backbone with merged layers in place of peft's.

    Not peft's own `merge_and_unload`, which for ln_tuning keeps the head wrapped, so that a saved model has none, and
    for ia3 and vera wants everything that is saved whole to be a single layer.
    """
    core = model.get_base_model()
    for name, module in list(core.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            core.set_submodule(name, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            core.set_submodule(name, module.modules_to_save[module.active_adapters[0]])
    for name in ("peft_config", "_hf_peft_config_loaded"):
        core.__dict__.pop(name, None)
    return core


def merge_checked(model: Any, batch: dict[str, Any]) -> Any:
    """`merged`, with logits that are the adapter's within rounding.

    Args:
        model: with an adapter.
        batch: what the model reads, without labels.

    Raises:
        UserError: its kind of adapter cannot be merged.
        WorkFailed: the merged weights answer otherwise (layers that transform their weights at each use).
    """
    whole = merged(model)
    before, after = logits_of(model, batch), logits_of(whole, batch)
    scale = max(1.0, float(before.abs().max()))
    apart = float((before - after).abs().max())
    if not apart <= 1e-4 * scale:
        raise WorkFailed(
            f"The merged weights do not answer as the adapter does (logits differ by up to {apart:.2g}).",
            "Keep the adapter: some layer of this model changes its weights at each use.",
        )
    return whole


@torch.no_grad()
def logits_of(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """(examples, labels) in eval mode."""
    was_training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        device = next(model.parameters()).device
        return model(**{k: v.to(device) for k, v in batch.items()}).logits.float()
    finally:
        for module, training in was_training.items():
            module.training = training


def check_reload(model: nn.Module, again: nn.Module, batch: dict[str, Any], folder: str | Path) -> None:
    """Whether what was saved answers as what was trained.

    Args:
        model: as trained.
        again: loaded from `folder`.
        batch: what both read, without labels.
        folder: for the message.

    Raises:
        WorkFailed: a parameter that the files should hold, or a logit, differs.
    """
    theirs = logits_of(again.to(next(model.parameters()).device), batch)
    ours = logits_of(model, batch)
    tolerance = 0.0 if ours.device.type == "cpu" else 1e-5 * max(1.0, float(ours.abs().max()))  # atomics of a GPU
    if ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=0.0, atol=tolerance, equal_nan=True):
        return
    apart = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("nan")
    own, other = (_by_plain_name(m) for m in (model, again))
    differing = [n for n, t in own.items() if n not in other or not torch.equal(t, other[n])]
    raise WorkFailed(
        f"The model saved in {str(folder)!r} does not answer as the trained one: logits differ by up to {apart:.2g}"
        + (f", and so do {', '.join(differing[:3])}." if differing else "."),
        "The checkpoints of the run are as they were; please report this with the model's name.",
    )


def _by_plain_name(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters in use and buffers; the copies that peft keeps of what it trains whole are not used."""
    plain = plain_names(model)
    used = {plain[n]: p for n, p in model.named_parameters() if ".original_module." not in n}
    return used | dict(model.named_buffers())
