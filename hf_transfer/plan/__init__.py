"""A run as data: which groups train when, and at what learning rate."""
