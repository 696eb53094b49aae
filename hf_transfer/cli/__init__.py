"""The command line."""

from hf_transfer.cli.program import main

__all__ = ["main"]
