"""What stands in the place of a layer that is left out (`models.pooled_head`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class PassThrough(nn.Module):
    """In the place of a module that is left out: returns the first tensor that it is given.

    Args:
        items: length of the tuple to return, whose other items are None; 0 for the tensor alone.
    """

    def __init__(self, items: int = 0):
        super().__init__()
        self.items = items

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        value = next((x for x in (*args, *kwargs.values()) if torch.is_tensor(x)), None)
        if value is None:
            raise TypeError("a module that takes no tensor cannot be left out")
        return (value, *[None] * (self.items - 1)) if self.items else value
