"""A folder of explanations: one file per answer, named in the answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_transfer.inference.explanations import Explanation
from hf_transfer.inference.inputs import Example

_NAME = 40  # characters of an image's name


class Writer:
    """Writes an explanation of each answer into a folder.

    Args:
        explain: from an example and its logits to an explanation.
        folder: is made with the first file.

    Attributes:
        count: files written.
    """

    def __init__(self, explain: Callable[[Example, Any], Explanation], folder: Path):
        self.explain, self.folder, self.count = explain, folder, 0

    def __call__(self, read: Example, logits: Any) -> dict[str, Any]:
        """What the answer says of it: `explained`, the class, and `explanation`, the file."""
        found = self.explain(read, logits)
        self.count += 1
        path = self.folder / f"{self.count:05d}{_named(read.shown, found.suffix)}"
        found.save(path)
        return {"explained": found.label, "explanation": str(path)}


def _named(shown: Any, suffix: str) -> str:
    """The end of a file's name: that of the image, if it came from a file."""
    name = Path(shown).stem if suffix == ".png" and isinstance(shown, str) else ""
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-.")[:_NAME]
    return f"-{plain}{suffix}" if plain else suffix
