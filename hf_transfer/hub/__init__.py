"""Pushing a run: files, model card, upload."""
