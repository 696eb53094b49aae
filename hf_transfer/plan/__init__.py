"""A fine-tuning run as data: which layer groups train when, and at what learning rate."""
