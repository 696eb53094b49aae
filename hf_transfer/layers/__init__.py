"""A model as an ordered list of layer groups, from input to head."""
