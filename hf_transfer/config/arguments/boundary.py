"""Keys of the boundary cache."""

from __future__ import annotations

from dataclasses import dataclass

from hf_transfer.config.fields import key


@dataclass
class BoundaryArguments:
    """Whether, where and how exactly the frozen part's results are kept."""

    boundary_cache: str = key(
        "off",
        "compute what the frozen bottom of the model does once for each example, and keep it in memory or on disk; "
        "auto: where it is exact, fits, and pays",
        choices=("auto", "off", "memory", "disk"),
    )
    boundary_cache_dtype: str = key(
        "auto",
        "what is kept in: auto (as computed, exact), float16 or bfloat16 (half the room, rounded)",
        choices=("auto", "float16", "bfloat16"),
    )
    boundary_cache_budget: float | None = key(
        None, "gigabytes that may be kept (default: half of what is free in memory, or on the disk)"
    )
    boundary_cache_dir: str | None = key(
        None, "folder of what is kept on disk, shared by runs (default: hf_transfer in the Hugging Face cache)"
    )


def check(args: BoundaryArguments) -> list[str]:
    """Problems of the keys, a sentence each."""
    found = []
    for name, known in (("boundary_cache", ("auto", "off", "memory", "disk")), ("boundary_cache_dtype", DTYPES)):
        value = getattr(args, name)
        if value not in known:
            found.append(f"{name}: {value!r} is not one of {', '.join(known)}.")
    budget = args.boundary_cache_budget
    if budget is not None and not 0 < budget < float("inf"):
        found.append(f"boundary_cache_budget: {budget:g} is not a positive number of gigabytes.")
    return found


DTYPES = ("auto", "float16", "bfloat16")
