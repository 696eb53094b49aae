"""Push a run to a hub: files, model card, upload."""
