"""hf_transfer: transfer learning on the Hugging Face Trainer, for vision and text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_transfer.errors import UserError
    from hf_transfer.inference.head_bank import HeadBank
    from hf_transfer.inference.predictor import Predictor, load, merge
    from hf_transfer.layers.groups import LayerGroup, layer_groups
    from hf_transfer.plan.make import make_plan
    from hf_transfer.plan.plan import Plan, Stage
    from hf_transfer.runs.frozen import label_issues
    from hf_transfer.runs.result import Result
    from hf_transfer.runs.run import fine_tune
    from hf_transfer.studies.compare import compare
    from hf_transfer.training.arguments import TransferArguments
    from hf_transfer.training.trainer import TransferMixin, TransferTrainer

__version__ = "0.1.0.dev0"

_HOME = {
    "HeadBank": "inference.head_bank",
    "load": "inference.predictor",
    "merge": "inference.predictor",
    "UserError": "errors",
    "LayerGroup": "layers.groups",
    "layer_groups": "layers.groups",
    "Plan": "plan.plan",
    "Stage": "plan.plan",
    "make_plan": "plan.make",
    "Predictor": "inference.predictor",
    "compare": "studies.compare",
    "label_issues": "runs.frozen",
    "Result": "runs.result",
    "fine_tune": "runs.run",
    "TransferArguments": "training.arguments",
    "TransferMixin": "training.trainer",
    "TransferTrainer": "training.trainer",
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
