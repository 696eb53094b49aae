"""Keys of `evaluate`: what is measured beyond the metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hf_transfer.config.fields import setting


@dataclass(frozen=True)
class Examining:
    """What `evaluate` measures beyond the metrics and the classes."""

    by: str | list[str] | None = setting(
        None,
        "column of the data, or several: metrics of the examples of each of its values, at most 50 (default: none)",
        resume="free",
    )

    robustness: bool = setting(
        False,
        "measure on corrupted examples too, at three severities: images with noise, blur, brightness, contrast, JPEG "
        "and pixelation, texts with typos",
        resume="free",
    )

    ood_data: str | None = setting(
        None,
        "data from elsewhere, without labels: how well out-of-distribution scores (energy, distance to the training "
        "examples) tell it apart (AUROC); a file, a folder, a hub id or bundled:<name> (default: none)",
        resume="free",
    )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Examining:
        """Of the keys of this class among `values`."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if values.get(f.name) is not None})

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of `by`."""
        return (self.by,) if isinstance(self.by, str) else tuple(self.by or ())
