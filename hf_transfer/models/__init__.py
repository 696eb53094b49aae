"""Pretrained backbones and their classification heads."""
