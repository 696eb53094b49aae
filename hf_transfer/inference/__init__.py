"""Predictions of a saved run."""
