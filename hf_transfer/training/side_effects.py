"""Forward passes that leave no trace: of `layers.side_effects`, for the training package."""

from hf_transfer.layers.side_effects import untouched, without_side_effects

__all__ = ["untouched", "without_side_effects"]
