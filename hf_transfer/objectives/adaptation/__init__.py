"""Penalties that draw the features of a source and a target domain together."""
