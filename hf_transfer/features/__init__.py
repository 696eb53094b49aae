"""What a frozen model computes, stored once and read by everything that needs it."""

from hf_transfer.features.columns import FeatureStore
from hf_transfer.features.frozen import FrozenFeatures, frozen_features

__all__ = ["FeatureStore", "FrozenFeatures", "frozen_features"]
