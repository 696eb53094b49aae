"""Keys of explanations, and what they need, as far as it can be said before torch is imported."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from hf_transfer.config.fields import setting
from hf_transfer.errors import UserError, option

PACKAGE = "captum"
INSTALL = 'pip install "hf-transfer-toolkit[explain]"'


@dataclass(frozen=True)
class Explaining:
    """What is explained of the answers, and where that goes."""

    explain: str | None = setting(
        None,
        "new folder for an explanation of each answer: a heatmap (.png) per image, a page with marked words (.html) "
        "per text; needs the package captum (default: none)",
        resume="free",
    )
    explain_label: str | None = setting(
        None,
        "class that is explained, instead of the predicted one (of several labels: the most probable one)",
        resume="free",
    )

    def check(self, looks_often: bool = False) -> None:
        """Check what can be said without the model.

        Args:
            looks_often: whether the model pools several views of an example.

        Raises:
            UserError: the package is missing, the folder has something in it, or keys contradict each other.
        """
        if self.explain is None:
            if self.explain_label is not None:
                raise UserError(
                    f"it has no effect without {option('explain')}.", f"Add {option('explain')} DIR.", "explain_label"
                )
            return
        folder = Path(self.explain)
        if not self.explain:
            raise UserError("the folder's name is empty.", key="explain")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{self.explain!r} exists already.", "Choose another folder, or remove it.", key="explain")
        self.check_package(looks_often)

    def check_package(self, looks_often: bool) -> None:
        """Check that explanations can be computed.

        Args:
            looks_often: as of `check`.

        Raises:
            UserError: the package is missing, or several views are pooled.
        """
        if looks_often:
            raise UserError(
                "one view of an example is explained, and tta and stride pool several.",
                "Leave out tta and stride.",
                key="explain",
            )
        if not is_installed():
            raise UserError(f"it needs {PACKAGE}, which is not installed.", f"Install it with `{INSTALL}`.", "explain")


def is_installed() -> bool:
    """Whether the package that computes explanations is there."""
    return importlib.util.find_spec(PACKAGE) is not None
