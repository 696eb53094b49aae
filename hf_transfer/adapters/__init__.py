"""Adapters: where they go, how they are attached, saved and merged."""
