"""Examples: located, loaded, labeled, split, checked and batched."""
