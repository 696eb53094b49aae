"""Training arguments that a run decides itself: the only place that changes them.

Functions such as `machine.choose_loader` return what they decided, as values by name of the argument; `with_decisions`
applies them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hf_transfer.settings import Config

Decisions = dict[str, Any]


def with_decisions(config: Config, *decisions: Mapping[str, Any]) -> Config:
    """The configuration with other training arguments; `config` itself stays as it is.

    The arguments are copied instead of created anew: creating them would derive other arguments a second time.
    """
    training = copy.copy(config.training)
    for decision in decisions:
        for name, value in decision.items():
            assert hasattr(training, name), name
            setattr(training, name, value)
    return replace(config, training=training)
