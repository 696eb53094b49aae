"""A run from configuration to files."""
