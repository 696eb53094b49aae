"""Single keys: default, help, unit, bounds, and what resuming makes of them."""

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.config.arguments.model import ModelArguments

__all__ = ["DataArguments", "ModelArguments"]
