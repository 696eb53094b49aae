"""Before training: what the frozen features of the data say about how to train."""
