"""Keys of the boundary cache."""

from __future__ import annotations

from dataclasses import dataclass

from hf_transfer.config.fields import setting


@dataclass
class BoundaryArguments:
    """Whether, where and how exactly the frozen part's results are kept."""

    boundary_cache: str = setting(
        "off",
        "compute the frozen bottom of the model once per example and store the result in memory or on disk; auto: "
        "where it is exact, fits and pays off",
        choices=("auto", "off", "memory", "disk"),
        resume="free",
    )
    boundary_cache_dtype: str = setting(
        "auto",
        "data type of the cache: auto (as computed, exact), float16 or bfloat16 (half the space, rounded)",
        choices=("auto", "float16", "bfloat16"),
        resume="fixed",
    )
    boundary_cache_budget: float | None = setting(
        None, "largest size of the cache in GB (default: half of the free memory or disk space)", above=0, resume="free"
    )
    boundary_cache_dir: str | None = setting(
        None,
        "folder of the cache on disk, shared between runs (default: hf_transfer in the Hugging Face cache)",
        resume="free",
    )
