"""The end of a finished run: what it tells, and the push to a hub."""

from __future__ import annotations

import warnings

from hf_transfer.errors import UserError, WorkFailed
from hf_transfer.files import say
from hf_transfer.hub import push
from hf_transfer.runs.conclusion import conclude
from hf_transfer.runs.machine import quiet_libraries
from hf_transfer.runs.prepare import Prepared
from hf_transfer.runs.result import Result


def publish(result: Result, prepared: Prepared, target: push.Target | None, talks: bool) -> None:
    """Report the result, and push it if it was asked for; by the main process.

    Args:
        result: of the run; is told what went wrong with the push.
        prepared: the run.
        target: where it is pushed, if anywhere.
        talks: whether the run reports its progress.
    """
    if talks:
        conclude(result, prepared.task, prepared.config, prepared.inputs)
    if target:
        result.push_error = _push(result, target, talks)


def _push(result: Result, target: push.Target, talks: bool) -> WorkFailed | None:
    """Push a finished run; what went wrong, if anything."""
    try:
        with quiet_libraries(result.trainer.args):
            done = push.push(result.output_dir, target, result.model)
    except UserError as error:
        warnings.warn(str(error), stacklevel=2)
        return WorkFailed(error.message, error.fix)
    if talks:
        say("\n".join(done.lines()))
    return None
