"""Names and configurations of timm models."""

from __future__ import annotations

from transformers import PreTrainedConfig

from hf_transfer.config.timm_sources import no_model
from hf_transfer.errors import UserError


def timm_config(name: str) -> PreTrainedConfig:
    """Configuration of transformers' timm wrapper for a timm model name, without access to the hub.

    Raises:
        UserError: timm has no such model, or is not installed.
    """
    architecture = check_timm_name(name)
    import timm
    from transformers import TimmWrapperConfig

    pretrained = timm.get_pretrained_cfg(name, allow_unregistered=True)
    config = TimmWrapperConfig(architecture=architecture)
    config.pretrained_cfg = {k: v for k, v in pretrained.to_dict().items() if k != "num_classes"} if pretrained else {}
    return config


def check_timm_name(name: str) -> str:
    """The architecture of a timm model name.

    Raises:
        UserError: timm has no such model, or is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"timm/{name} requires timm and torchvision, which are not installed.",
            'Install them with `pip install torch torchvision "hf-transfer-toolkit[vision]"`.',
            key="model_name_or_path",
        ) from error
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise UserError(no_model(architecture), key="model_name_or_path")
    return architecture


def prefix_hint(name: str) -> str:
    """A hint for a name without owner that timm has; empty for any other name."""
    try:
        import timm
    except ImportError:
        return ""
    is_timms = "/" not in name and ":" not in name and timm.is_model(name.split(".")[0])
    return f"Did you mean 'timm/{name}'?" if is_timms else ""
