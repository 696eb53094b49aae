"""Pushing a finished run, which must not cost the run if it fails."""

from __future__ import annotations

import warnings

from hf_transfer.errors import UserError, WorkFailed
from hf_transfer.files import say
from hf_transfer.hub import push
from hf_transfer.runs.machine import quiet_libraries
from hf_transfer.runs.result import Result


def push_run(result: Result, target: push.Target, talks: bool) -> WorkFailed | None:
    """Push a finished run; what went wrong, if anything."""
    try:
        with quiet_libraries(result.trainer.args):
            done = push.push(result.output_dir, target, result.model)
    except UserError as error:
        warnings.warn(str(error), stacklevel=3)
        return WorkFailed(error.message, error.fix)
    if talks:
        say("\n".join(done.lines()))
    return None
