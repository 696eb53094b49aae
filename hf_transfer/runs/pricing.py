"""What an hour of a run costs on this machine, for `max_usd`."""

from __future__ import annotations

from dataclasses import replace

import torch

from hf_transfer.analysis.prices import Gpu, Prices, read_prices
from hf_transfer.config.arguments.stopping import StoppingArguments
from hf_transfer.errors import UserError
from hf_transfer.runs.decisions import with_decisions
from hf_transfer.runs.machine import device_name
from hf_transfer.settings import Config


def with_price(config: Config) -> Config:
    """The configuration with `usd_per_hour`, if `max_usd` needs it.

    Raises:
        UserError: the price file lacks this device, or cannot be read.
    """
    args = config.training
    if args.max_usd is None or args.usd_per_hour is not None:
        return config
    gpu = _this_gpu(args, args.device.type)
    priced = with_decisions(config, {"usd_per_hour": gpu.price})
    return replace(priced, values=priced.values | {"usd_per_hour": gpu.price})


def price_here(args: StoppingArguments, kind: str) -> float | None:
    """Dollars per hour of a device of this machine; None if neither a key nor the price file says.

    Args:
        args: with `usd_per_hour` and `prices_file`.
        kind: of the device, such as cuda.
    """
    if args.usd_per_hour is not None:
        return args.usd_per_hour
    try:
        return _this_gpu(args, kind).price if kind == "cuda" else None
    except UserError:  # the price file lacks it
        return None


def _this_gpu(args: StoppingArguments, kind: str) -> Gpu:
    prices, name = read_prices(args.prices_file), device_name(kind)
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9 if kind == "cuda" else 0.0
    gpu = gpu_of(name, memory, prices) if kind == "cuda" else None
    if gpu is None:
        device = f"this {kind.upper() if kind == 'cpu' else kind}" if kind != "cuda" else repr(name)
        raise UserError(
            f"the price file has no price for {device}; it has {', '.join(g.name for g in prices.gpus)}.",
            "Set usd_per_hour, the price of one device in dollars per hour.",
            key="max_usd",
        )
    return gpu


def gpu_of(device: str, memory_gb: float, prices: Prices) -> Gpu | None:
    """The GPU of a price table that a device is; None if there is none.

    Args:
        device: name as the driver has it, such as NVIDIA A100-SXM4-80GB.
        memory_gb: of the device.
        prices: names such as A100-80: words of the device's name, and the memory where that tells two apart.
    """
    words = set(device.lower().replace("-", " ").replace("_", " ").split())
    alike = [gpu for gpu in prices.gpus if _words(gpu) and _words(gpu) <= words]
    most = max((len(_words(gpu)) for gpu in alike), default=0)
    alike = [gpu for gpu in alike if len(_words(gpu)) == most]
    return min(alike, key=lambda gpu: abs(gpu.memory_gb - memory_gb), default=None)


def _words(gpu: Gpu) -> set[str]:
    """Words of its name, without its memory in GB."""
    words = gpu.name.lower().replace("-", " ").replace("_", " ").split()
    size = f"{gpu.memory_gb:g}"
    return {word for word in words if word not in (size, f"{size}gb")}
