"""Data: loading, labels, splits, checks, augmentation and batching."""
