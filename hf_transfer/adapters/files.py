"""The files of an adapter: load, save, merge and verify them.

`adapter_config.json` and `adapter_model.safetensors` are peft's; `config.json` next to them contains the labels.
Without `hf_transfer` they are loaded like this:

    config = AutoConfig.from_pretrained("out")
    base = json.load(open("out/adapter_config.json"))["base_model_name_or_path"]
    model = AutoModelForSequenceClassification.from_pretrained(base, config=config, ignore_mismatched_sizes=True)
    model = PeftModel.from_pretrained(model, "out")
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.utils import find_adapter_config_file

from hf_transfer.adapters import backbone, bottleneck, weights
from hf_transfer.errors import UserError, WorkFailed, one_line
from hf_transfer.layers.wrappers import plain_name, plain_names
from hf_transfer.run_folder import remove_other_kind

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError)
KEPT_APART = "base_model.model."  # peft's prefix of the names of a model's own parameters


def adapter_config(place: str, options: dict[str, Any]) -> PeftConfig | None:
    """peft's configuration in a folder or hub repository; None if there is no adapter.

    Raises:
        UserError: the configuration cannot be read, or its backbone is missing.
    """
    options = {k: v for k, v in options.items() if k in ("revision", "local_files_only")}
    if Path(place).is_dir() and not (Path(place) / "adapter_config.json").is_file():
        return None
    if find_adapter_config_file(place, **options) is None:
        return None
    try:
        config = PeftConfig.from_pretrained(place, **({} if Path(place).is_dir() else options))
    except _UNREADABLE as error:
        raise UserError(
            f"the adapter in {place!r} cannot be read ({one_line(error)}).", key="model_name_or_path"
        ) from error
    if not config.base_model_name_or_path:
        raise UserError(
            f"the adapter in {place!r} does not name its backbone.",
            "Set base_model_name_or_path in its adapter_config.json.",
            key="model_name_or_path",
        )
    config.base_model_name_or_path = backbone.located(config.base_model_name_or_path, place)
    return config


def put_on(
    model: Any,
    config: PeftConfig,
    place: str,
    restart: bool = False,
    head: Set[str] = frozenset(),
    missing: Set[str] = frozenset(),
    allow_pickle: bool = False,
) -> tuple[Any, set[str]]:
    """Load an adapter on its backbone.

    Args:
        model: the backbone.
        config: what `adapter_config` gave.
        place: folder of the adapter.
        restart: load only the head and other fully saved modules, not the adapter.
        head: plain names of parameters of the head; those of another shape than the saved ones are kept as they are.
        missing: plain names of parameters that the backbone's checkpoint does not contain.
        allow_pickle: whether weights may be read from a pickle.

    Returns:
        The model, and the plain names of the backbone parameters that the files contain.

    Raises:
        UserError: the files cannot be read, do not fit the backbone, or were trained on another one.
    """
    state = weights.read(place, allow_pickle)
    own = dict(model.state_dict())
    used = {k: v for k, v in state.items() if ".original_module." not in k}
    saved = {plain_name(k.removeprefix(KEPT_APART), "base_model."): v for k, v in used.items()}
    fitting = {n: t for n, t in saved.items() if n in own and own[n].shape == t.shape}
    weights.check_whole(model, config, state, place)
    if restart:
        model.load_state_dict(fitting, strict=False)
        return model, set(fitting)
    backbone.check_complete(str(config.base_model_name_or_path), place, missing - fitting.keys() - head)
    config.inference_mode = config.is_prompt_learning
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft's own
            if config.peft_type == "ADALORA":  # whose pattern peft takes for one of LoRA's, and then reads after all
                warnings.filterwarnings("ignore", message=".*rank_pattern keys did not match")
            adapted = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)(model, config)
            weights.put(adapted, state, place, head)
    except UserError:
        raise
    except _UNREADABLE as error:
        raise UserError(
            f"the adapter in {place!r} cannot be loaded ({one_line(error)}).", key="model_name_or_path"
        ) from error
    backbone.check(adapted, place)
    return adapted.eval() if config.inference_mode else adapted, set(fitting)


def write_config(model: PeftModel, folder: str | Path) -> None:
    """Write our files next to an adapter: `config.json`, with the labels and the class to load the backbone with, and
    `backbone.json`."""
    backbone.write(model, folder)
    core = model.get_base_model()
    config = copy.deepcopy(core.config)
    config.architectures = [type(core).__name__]
    config.save_pretrained(folder)


def complete(model: Any, folder: str | Path) -> None:
    """Complete a folder in which a model was just saved: our files next to an adapter, and no other model left.

    Args:
        model: with or without an adapter.
        folder: that holds it.
    """
    if isinstance(model, PeftModel):
        write_config(model, folder)
    remove_other_kind(Path(folder), is_adapter=isinstance(model, PeftModel))


def merged(model: Any) -> Any:
    """A copy of `model` with its adapter merged into the weights, as a plain model.

    Raises:
        UserError: this kind of adapter cannot be merged (prompts, prefixes, bottlenecks).
        WorkFailed: there is no memory for the copy.
    """
    if not isinstance(model, PeftModel):
        return model
    kind = str(getattr(model.active_peft_config.peft_type, "value", model.active_peft_config.peft_type))
    if model.active_peft_config.is_prompt_learning or kind == bottleneck.KIND:
        raise UserError(
            f"An adapter of type {kind} cannot be merged: it does not update weights.",
            "Keep it separate, or train lora, whose update can be merged.",
        )
    try:
        plain = _unwrapped(copy.deepcopy(model))
    except torch.OutOfMemoryError as error:  # says nothing about the adapter
        raise WorkFailed(
            f"Merging needs a copy of the model, for which there is no memory ({one_line(error)}).",
            "Merge it without a GPU: CUDA_VISIBLE_DEVICES= hf-transfer merge …",
        ) from error
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:  # peft raises any of these
        raise UserError(f"This adapter cannot be merged ({one_line(error)}).") from error
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    return plain


def _unwrapped(model: PeftModel) -> Any:
    """The backbone with merged layers in place of peft's.

    peft's own `merge_and_unload` is not used: for ln_tuning it leaves the head wrapped, so that the saved model has no
    head, and for ia3 and vera it requires every module in `modules_to_save` to be a single layer.
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
    """`merged`, verified to give the same logits up to rounding (relative difference at most 1e-4).

    Args:
        model: a model with an adapter.
        batch: model inputs without labels.

    Raises:
        UserError: this kind of adapter cannot be merged.
        WorkFailed: the merged model gives different logits (layers that transform their weights in the forward pass).
    """
    plain = merged(model)
    before, after = logits_of(model, batch), logits_of(plain, batch)
    scale = max(1.0, float(before.abs().max()))
    difference = float((before - after).abs().max())
    if not difference <= 1e-4 * scale:
        raise WorkFailed(
            f"The merged model gives different logits than the adapter (maximum difference {difference:.2g}).",
            "Keep the adapter separate: some layer of this model transforms its weights in the forward pass.",
        )
    return plain


@torch.no_grad()
def logits_of(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Logits in eval mode and float32, (examples, classes).

    Without the autocast of `bf16` and `fp16`, which accelerate puts into the forward pass of the model that trains, and
    which a model that is loaded has not.
    """
    was_training = {m: m.training for m in model.modules()}
    own = vars(model)
    casting = own["forward"] if "_original_forward" in own else None
    model.eval()
    try:
        if casting is not None:
            own["forward"] = own["_original_forward"]
        device = next(model.parameters()).device
        return model(**{k: v.to(device) for k, v in batch.items()}).logits.float()
    finally:
        if casting is not None:
            own["forward"] = casting
        for module, training in was_training.items():
            module.training = training


def check_reload(model: nn.Module, again: nn.Module, batch: dict[str, Any], folder: str | Path) -> None:
    """Check that a saved model gives the same logits as the trained one; see `reload_difference`.

    Args:
        model: the trained model.
        again: the model loaded from `folder`.
        batch: model inputs without labels.
        folder: folder of the saved model, for the message.

    Raises:
        WorkFailed: the logits differ.
    """
    if difference := reload_difference(model, again, batch):
        raise WorkFailed(
            f"The model saved in {str(folder)!r} gives different logits than the trained one ({difference}).",
            "The checkpoints of the run are unchanged. Please report this with the name of the model.",
        )


def reload_difference(model: nn.Module, again: nn.Module, batch: dict[str, Any]) -> str:
    """How the logits of a reloaded model differ; empty if they are equal: bit for bit on a CPU, else within 1e-5.

    Args:
        model: the model that was saved.
        again: the reloaded model.
        batch: model inputs without labels.
    """
    loaded = logits_of(again.to(next(model.parameters()).device), batch)
    trained = logits_of(model, batch)
    if same_logits(trained, loaded):
        return ""
    difference = float((trained - loaded).abs().max()) if trained.shape == loaded.shape else float("nan")
    own, other = (_by_plain_name(m) for m in (model, again))
    differing = [n for n, t in own.items() if n not in other or not torch.equal(t, other[n])]
    return f"maximum difference {difference:.2g}" + (
        f"; differing parameters: {', '.join(differing[:3])}" if differing else ""
    )


def same_logits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether logits are equal: bit for bit on a CPU, else within 1e-5, because kernels of a GPU may use atomics."""
    tolerance = 0.0 if one.device.type == "cpu" else 1e-5 * max(1.0, float(one.abs().max()))
    return one.shape == other.shape and torch.allclose(one, other, rtol=0.0, atol=tolerance, equal_nan=True)


def _by_plain_name(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by plain name, without the unused originals of `modules_to_save`."""
    plain = plain_names(model)
    used = {plain[n]: p for n, p in model.named_parameters() if ".original_module." not in n}
    return used | dict(model.named_buffers())
