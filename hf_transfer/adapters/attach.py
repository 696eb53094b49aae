"""Adapters by peft: small trained parts in a frozen backbone, right for every model that has layer groups.

Where an adapter goes follows from the layer groups and the types of modules, not from a list of architectures: a
low-rank update to every linear layer and every ungrouped convolution of the blocks that the model's forward pass calls
as a module (some models read a layer's weight directly, which an adapter would never see). The head, and everything
that the checkpoint lacked, is trained and saved whole (`modules_to_save`).

Sources: LoRA, Hu et al. 2021; DoRA, Liu et al. 2024; rsLoRA, Kalajdzievski 2023; (IA)³, Liu et al. 2022; AdaLoRA, Zhang
et al. 2023; VeRA, Kopiczko et al. 2023; LayerNorm tuning, Zhao et al. 2023; prompt tuning, Lester et al. 2021; prefix
tuning, Li and Liang 2021; bottleneck adapters, Houlsby et al. 2019 and Pfeiffer et al. 2021 (`hf_transfer.bottleneck`).
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from hf_transfer.adapters import bottleneck
from hf_transfer.adapters.targets import narrows, targets
from hf_transfer.config.arguments.adapter import AdapterArguments
from hf_transfer.errors import UserError, nearest, one_line
from hf_transfer.layers.forward_pass import REFUSALS, called_modules, example, forward
from hf_transfer.layers.groups import LayerGroup, layer_groups, plain_names

# Adapters whose name is no peft_type.
PEFT_TYPES = {"dora": "LORA", "rslora": "LORA", "prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}
VIRTUAL_TOKENS = 20
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
VECTORS = re.compile(r"\.(ia3_l|lora_E|lora_magnitude_vector|vera_lambda_[bd])(\.|$)")  # scales: decay would undo them


def is_adapted(model: Any) -> bool:
    """Whether peft wraps it."""
    return isinstance(model, PeftModel)


def peft_type(model: PeftModel) -> str:
    """Of its active adapter, for example `LORA`."""
    kind = model.active_peft_config.peft_type
    return str(getattr(kind, "value", kind))


def name_of(keys: AdapterArguments, model: Any) -> str:
    """What `results.json` calls the adapter of a run."""
    if isinstance(keys.adapter, str) and keys.is_adapted:
        return keys.adapter
    return peft_type(model).lower() if is_adapted(model) else "none"


# ---- attaching -----------------------------------------------------------------------------------------------------


def attach(model: Any, keys: AdapterArguments, layer_rules: Sequence[Any] = ()) -> Any:
    """`model` with the adapter that `keys` asks for, or as it is where they ask for none.

    The head's layer group, with what `layer_rules` put there, is trained and saved with the adapter. A model that has
    an adapter keeps it.

    Raises:
        UserError: the adapter does not fit the model, matches nothing in it, or cannot be combined with its own.
    """
    if is_adapted(model):
        _check_same(model, keys)
    elif keys.is_adapted and model is not None:
        groups = layer_groups(model, layer_rules)
        written = _written(keys)
        try:
            config = _config(model, groups, written, keys.lora_target_modules)
            frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft's own
                model = get_peft_model(model, config)
        except UserError:
            raise
        except REFUSALS as error:
            raise UserError(
                f"adapter: {_shown(keys)} cannot be put into {type(model).__name__} ({one_line(error)})."
            ) from error
        _keep_frozen(model, frozen)
        if config.is_prompt_learning:
            _check_prompt(model, keys)
    if is_adapted(model):
        _check_saved(model)
    return model


def _written(keys: AdapterArguments) -> dict[str, Any]:
    """The keys as a configuration of peft in plain data, modules left open."""
    if isinstance(keys.adapter, Mapping):
        return {**keys.adapter, "peft_type": str(keys.adapter["peft_type"]).upper()}
    name = str(keys.adapter)
    kind = PEFT_TYPES.get(name, name.upper())
    alpha = 2 * keys.lora_r if keys.lora_alpha is None else keys.lora_alpha
    own: dict[str, Any] = {}
    if kind == "LORA":
        own = {"r": keys.lora_r, "lora_alpha": alpha, "lora_dropout": keys.lora_dropout}
        own |= {"use_dora": name == "dora", "use_rslora": name == "rslora"}
    elif kind == "ADALORA":  # `AdaLora` sets the steps when their number is known
        own = {"target_r": keys.lora_r, "init_r": -(-3 * keys.lora_r // 2), "lora_alpha": alpha, "total_step": 1}
        own |= {"lora_dropout": keys.lora_dropout}
    elif name in ("prompt", "prefix"):
        own = {"num_virtual_tokens": VIRTUAL_TOKENS}
    return {"peft_type": kind, **own}


def _config(
    model: nn.Module, groups: Sequence[LayerGroup], written: Mapping[str, Any], wanted: Sequence[str] | None
) -> PeftConfig:
    """A configuration of peft with its modules filled in from the model."""
    kind = written["peft_type"]
    known = {str(getattr(k, "value", k)): cls for k, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in known:
        raise UserError(f"adapter: peft has no peft_type {kind!r}.{nearest(kind, known)}")
    cls = known[kind]
    fields = {f.name for f in dataclasses.fields(cls) if f.init}
    for name in written:
        if name not in fields:
            raise UserError(f"adapter: {kind} has no key {name!r}.{nearest(name, fields)}")
    own = {k: v for k, v in written.items() if k != "peft_type"}
    if "modules_to_save" in fields:
        more = own.get("modules_to_save") or []
        own["modules_to_save"] = list(dict.fromkeys([*saved_modules(model, groups), *more]))
    if "target_modules" in fields:
        given = wanted or own.get("target_modules")
        given = [given] if isinstance(given, str) else given
        own["target_modules"] = targets(model, groups, kind, given)
        if kind == "IA3":  # what widens or keeps the width scales its output, what narrows it scales its input
            contracting = [n for n in own["target_modules"] if narrows(model.get_submodule(n))]
            own.setdefault("feedforward_modules", contracting)
        if kind == bottleneck.KIND and not given:
            order = called_modules(model, own["target_modules"]) or own["target_modules"]
            own["target_modules"] = bottleneck.places(model, groups, order, own.get("placement"))
    made = cls(**own)
    if made.is_prompt_learning:
        made.task_type = "SEQ_CLS"  # peft's only class that feeds a prompt to a classifier
    return made


def saved_modules(model: nn.Module, groups: Sequence[LayerGroup]) -> list[str]:
    """The largest modules whose parameters are all in the head's group: they are trained and saved whole.

    Raises:
        UserError: a parameter that the checkpoint lacks shares its module with pretrained ones.
    """
    head = set(groups[-1].parameters)
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{f}.") for f in found)
        own = [f"{name}.{n}" for n, _ in module.named_parameters()]
        if name and own and not inside and not isinstance(module, _LISTS) and head.issuperset(own):
            found.append(name)
    left = [n for n in groups[-1].parameters if not any(n.startswith(f"{f}.") for f in found)]
    if left:
        raise UserError(
            f"adapter: {', '.join(left[:4])} must train with the head, but no module holds it alone, so an adapter's "
            "files cannot hold it.",
            "Train this checkpoint without an adapter, or take one that holds it.",
        )
    return found


def summary(model: PeftModel) -> str:
    """Where the adapter sits and how much of the model trains, in a line."""
    names = list(getattr(model.base_model, "targeted_module_names", ()))
    ends = Counter(n.rpartition(".")[2] for n in names)
    where = f"in {len(names)} modules ({', '.join(ends)})" if names else "before the input"
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for n, p in model.named_parameters() if ".original_module." not in n)
    share = f"{trains:,} of {total:,} parameters may train ({trains / total:.2%})"
    return f"Adapter {peft_type(model).lower()} {where}: {share}."


# ---- checks --------------------------------------------------------------------------------------------------------


def _shown(keys: AdapterArguments) -> str:
    return str(keys.adapter) if isinstance(keys.adapter, str) else str(dict(keys.adapter or {}))


def _check_same(model: PeftModel, keys: AdapterArguments) -> None:
    if not keys.is_adapted:
        return
    written, own = _written(keys), peft_type(model)
    config = model.active_peft_config
    other = [k for k, v in written.items() if k != "peft_type" and getattr(config, k, v) != v]
    if own != written["peft_type"] or any(k in ("use_dora", "use_rslora", "r") for k in other):
        raise UserError(
            f"adapter: {_shown(keys)} is not the adapter that the checkpoint has ({own.lower()}"
            + (f" with {', '.join(f'{k}={getattr(config, k)}' for k in other)}" if own == written["peft_type"] else "")
            + ").",
            "Leave the adapter's keys out to train the one that is there, or start a new one with "
            "--restart_adapter true.",
        )


def _keep_frozen(model: PeftModel, frozen: Sequence[str]) -> None:
    """What the caller froze in the head stays frozen."""
    plain = plain_names(model)
    for name, parameter in model.named_parameters():
        if plain[name] in frozen:
            parameter.requires_grad_(False)


def _check_saved(model: PeftModel) -> None:
    """Everything that trains must be in the adapter's files.

    Raises:
        UserError: base weights were unfrozen that no file would hold.
    """
    held = {t.untyped_storage().data_ptr() for t in get_peft_model_state_dict(model).values()}
    lost = [
        n
        for n, p in model.named_parameters()
        if p.requires_grad and p.device.type != "meta" and p.untyped_storage().data_ptr() not in held
    ]
    if lost and not model.active_peft_config.is_prompt_learning:
        plain = plain_names(model)
        raise UserError(
            f"adapter: {plain[lost[0]]} and {len(lost) - 1} more parameters of the backbone require a gradient, and "
            "the adapter's files would not hold them.",
            "Name their modules in the adapter's modules_to_save, or freeze them.",
        )


def _check_prompt(model: PeftModel, keys: AdapterArguments) -> None:
    """Whether the model takes a prompt, tried out: another prompt must give another answer, and a padded example the
    answer that it gets without padding.

    Raises:
        UserError: it does not.
    """
    refusal = "it is no text model"
    try:
        both = forward(model, padded=True)
        if both is not None:
            batch = example(model, padded=True)
            assert batch is not None
            model.eval()
            with torch.no_grad():
                alone = model(**{k: v[1:, :5] for k, v in batch.items()}).logits
            model.train()
            if not torch.allclose(alone[0], both.logits[1], rtol=1e-3, atol=1e-4):
                refusal = "behind a prompt it takes padding for text"
            elif torch.equal(both.logits, _with_another_prompt(model).logits):
                refusal = "it does not look at one"
            else:
                return
    except REFUSALS as error:
        refusal = _no_prefix(model) or one_line(error).rstrip(".")
    raise UserError(
        f"adapter: {_shown(keys)} does not go with {type(model.get_base_model()).__name__}: {refusal}.",
        "Take lora, ia3 or another adapter inside the layers.",
    )


def _no_prefix(model: PeftModel) -> str:
    """Why peft cannot hand this model a prefix; empty where it can, and for a prompt."""
    base, argument = model.get_base_model(), "past_key_values"
    takes = [m for m in (base, base.base_model) if argument in inspect.signature(m.forward).parameters]
    if takes or peft_type(model) != "PREFIX_TUNING":
        return ""
    return (
        f"peft {version('peft')} passes the prefix as {argument}, which this model does not take in transformers "
        f"{version('transformers')}"
    )


def _with_another_prompt(model: PeftModel) -> Any:
    prompts = list(model.prompt_encoder.parameters())
    kept = [p.detach().clone() for p in prompts]
    with torch.no_grad():
        for prompt in prompts:
            prompt.add_(1.0).mul_(3.0)
        found = forward(model, padded=True)
        for prompt, before in zip(prompts, kept, strict=True):
            prompt.copy_(before)
    return found


def spare_tokens(keys: AdapterArguments, model: Any) -> int:
    """Positions that a prompt takes away from the text."""
    if is_adapted(model):
        config = model.active_peft_config
        return config.num_virtual_tokens if peft_type(model) == "PROMPT_TUNING" else 0
    written = _written(keys) if keys.is_adapted else {}
    return int(written.get("num_virtual_tokens") or 0) if written.get("peft_type") == "PROMPT_TUNING" else 0
