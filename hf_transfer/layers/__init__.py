"""A model as ordered layer groups, from input to head."""
