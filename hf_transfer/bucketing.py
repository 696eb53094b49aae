"""Batches of texts of similar length."""

from __future__ import annotations

from dataclasses import dataclass

from .strategies import key


@dataclass
class BucketingArguments:
    """How examples are put into batches."""

    length_bucketing: bool = key(False, "put texts of similar length into a batch, so that little of it is padding")
