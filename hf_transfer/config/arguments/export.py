"""Keys of `export`, and what each format needs, as far as it can be said before torch is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_transfer.config.fields import setting, settings_of, wrong_values
from hf_transfer.errors import UserError, option

MERGED = "merged"
MAX_DROP = 0.01
_EXTRA = 'pip install "hf-transfer-toolkit[onnx]"'


@dataclass(frozen=True)
class Packages:
    """What a format needs besides torch: packages that write it, packages that read it, and what installs them."""

    writes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    install: str = ""


PACKAGES = {
    "onnx": Packages(("onnx", "onnxscript", "onnxruntime"), ("onnxruntime",), _EXTRA),
    "pt2": Packages(),
    "openvino": Packages(("onnx", "onnxscript", "openvino"), ("openvino",), f"{_EXTRA} openvino"),
    MERGED: Packages(),
}

# The forms that `benchmark` makes of a model: the format and the keys of each.
TORCH = "pytorch"
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "onnx": ("onnx", {}),
    "onnx-int8": ("onnx", {"quantize": "int8"}),
    "onnx-fp16": ("onnx", {"half": True}),
    "pt2": ("pt2", {}),
    "openvino": ("openvino", {}),
}


@dataclass(frozen=True)
class ExportArguments:
    """What is written, and how much worse it may be."""

    output_dir: str | None = setting(None, "new folder for the exported model, instead of OUT", resume="free")
    format: str = setting(
        "onnx",
        "onnx: for ONNX Runtime; pt2: for torch.export; openvino: where its package is installed; merged: a plain "
        "model of transformers, the adapter in its weights",
        choices=tuple(PACKAGES),
        resume="free",
    )
    half: bool = setting(False, "weights in 16-bit floats: half the size", resume="free")
    quantize: str | None = setting(
        None,
        "onnx: int8 for weights in 8 bits: about a quarter of the size, and on most CPUs faster",
        choices=("int8",),
        resume="free",
    )
    max_drop: float | None = setting(
        None,
        "half, quantize: how much accuracy may be lost on the validation split, as a fraction; of several labels "
        "micro F1, of a regression RMSE in standard deviations of the labels (default: 0.01)",
        minimum=0,
        resume="free",
    )

    @property
    def precision(self) -> str:
        return self.quantize or ("fp16" if self.half else "fp32")

    def check(self) -> None:
        """Raises:
        UserError: a value is wrong, keys contradict each other, or a package is missing.
        """
        for problem in wrong_values(vars(self), settings_of(type(self))):
            raise UserError(problem)
        if self.half and self.quantize:
            raise UserError("half and quantize contradict each other: keep one.")
        if self.quantize and self.format != "onnx":
            raise UserError(
                f"{self.quantize} is possible for onnx, and the format is {self.format}.",
                f"Use {option('format', 'onnx')}" + (f", or {option('half')}." if self.format != MERGED else "."),
                key="quantize",
            )
        if self.half and self.format == MERGED:
            raise UserError("a merged model keeps the precision that it was trained in.", "Leave it out.", key="half")
        if self.max_drop is not None and self.precision == "fp32":
            raise UserError(
                "it has no effect without half or quantize: fp32 must agree with PyTorch within 1e-4.",
                "Leave it out.",
                key="max_drop",
            )
        if not self.output_dir:
            raise UserError("OUT is missing: the new folder for the exported model.")
        check_new(Path(self.output_dir))
        check_installed(self.format, PACKAGES[self.format].writes)


def check_new(folder: Path, key: str = "output_dir") -> None:
    """Raises:
    UserError: it exists, and is not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{str(folder)!r} exists already.", "Choose another folder, or remove it.", key=key)


def check_installed(format: str, packages: Collection[str]) -> None:
    """Raises:
    UserError: one of these packages is missing.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise UserError(
            f"{format} needs {' and '.join(missing)}, which {are} not installed.",
            f"Install with `{PACKAGES[format].install}`; {option('format', 'pt2')} needs no other package.",
            key="format",
        )
