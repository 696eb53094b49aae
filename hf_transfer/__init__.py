"""hf_transfer: transfer learning on the Hugging Face Trainer, for vision and text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import UserError
    from .heads import HeadBank
    from .layers import LayerGroup, layer_groups
    from .plan import Plan, Stage, make_plan
    from .predictor import Predictor, merge
    from .run import Result, fine_tune
    from .trainer import TransferArguments, TransferMixin, TransferTrainer

__version__ = "0.1.0.dev0"

_HOME = {
    "HeadBank": "heads",
    "merge": "predictor",
    "UserError": "errors",
    "LayerGroup": "layers",
    "layer_groups": "layers",
    "Plan": "plan",
    "Stage": "plan",
    "make_plan": "plan",
    "Predictor": "predictor",
    "Result": "run",
    "fine_tune": "run",
    "TransferArguments": "trainer",
    "TransferMixin": "trainer",
    "TransferTrainer": "trainer",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import hf_transfer` alone must stay quick."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
