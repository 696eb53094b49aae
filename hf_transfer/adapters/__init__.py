"""Adapters: choose their modules, attach, save and merge them."""
