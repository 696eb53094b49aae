"""Which mixed precision suits the device, and whether it computes in bfloat16 or only emulates it.

Measured: on a CPU without AVX512-BF16 and AMX, bfloat16 ran about 40 times slower than float32.
"""

from __future__ import annotations

import platform

import torch

from hf_transfer.errors import option

NONE, FP16, BF16 = "no", "fp16", "bf16"
_TENSOR_CORES = (7, 0)  # compute capability of the first GPUs with tensor cores for float16
_X86 = ("x86_64", "AMD64")


def device_type(use_cpu: bool) -> str:
    """The kind of device that trains."""
    accelerator = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def best(device: str) -> str:
    """What the device does well; on a CPU nothing, which costs no accuracy."""
    return _best(device)[0]


def _best(device: str) -> tuple[str, str]:
    """(what the device does well, why)."""
    if device == "xpu":
        return BF16, "the device computes in it"
    if device != "cuda":
        return NONE, f"float32 costs no accuracy, and on {device} half precision is not sure to be quicker"
    lacks = emulates_bf16(device)
    if not lacks:
        return BF16, f"{torch.cuda.get_device_name()} computes in it"
    if torch.cuda.get_device_capability() >= _TENSOR_CORES:
        return FP16, f"{lacks}, and has tensor cores for float16"
    return NONE, f"{lacks}, and no tensor cores"


def line(wanted: str | None, device: str) -> str:
    """What `mixed_precision: auto` came to and why, for display; empty where it was not asked for."""
    if wanted != "auto":
        return ""
    taken, why = _best(device)
    return f"mixed_precision: auto: {taken} ({why})"


def emulates_bf16(device: str) -> str:
    """What the device lacks to compute in bfloat16; empty if it does, or nothing is known."""
    if device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return f"{torch.cuda.get_device_name()} has no bfloat16 units"
    if device == "cpu" and platform.machine() in _X86:
        has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "" if has else "this CPU has neither AVX512-BF16 nor AMX"
    return ""


def refusal(precision: str | None, device: str) -> str:
    """Why a precision is refused on a device, as a problem of the key; empty if it is not."""
    if precision != BF16 or not (lacks := emulates_bf16(device)):
        return ""
    instead = best(device)
    return (
        f"mixed_precision: bf16 would be emulated, and slower than float32: {lacks}. Use "
        f"{option('mixed_precision', instead)} or auto."
    )
