"""The key of mixed precision."""

from __future__ import annotations

from dataclasses import dataclass

from hf_transfer.config.fields import setting

PRECISIONS = ("auto", "no", "fp16", "bf16")


@dataclass
class PrecisionArguments:
    """In which precision a model computes, whose weights stay as they are.

    `TrainingArguments` gives the attribute the precision that its `fp16` and `bf16` come to; `bf16` and `fp16` are what
    a checkpoint is compared by.
    """

    mixed_precision: str | None = setting(
        None,
        "precision of matrix products (default: fp16 and bf16 say it); auto: bf16 on GPUs that compute in it, fp16 on "
        "older ones with tensor cores, else no",
        choices=PRECISIONS,
        topic="precision",
        resume="free",
    )
