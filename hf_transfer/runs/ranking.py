"""Which of several models suits the data, before one is chosen: `hf-transfer plan --models a,b,c`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from transformers import set_seed

from hf_transfer.analysis.model_ranking import Ranking, Row, answers_of, ranked
from hf_transfer.config.arguments.model import MAIN
from hf_transfer.errors import UserError, UserErrors, one_line
from hf_transfer.features.layouts import MEAN
from hf_transfer.files import say
from hf_transfer.models.bundled import IMAGENET
from hf_transfer.runs.expecting import by_layer, inputs_of, sample, unsuited
from hf_transfer.runs.frozen_pass import frozen_pass
from hf_transfer.runs.machine import quiet_libraries
from hf_transfer.runs.prepare import Prepared, prepare
from hf_transfer.runs.solvable import groups_of
from hf_transfer.settings import Config


class _Unsuited(Exception):
    """No model can be judged on this data."""


def rank_models(config: Config, names: Sequence[str], talks: bool = True) -> Ranking:
    """The models in the order of their frozen features' worth for the data.

    A model that cannot be loaded, or cannot read the data, is a row with the reason.

    Args:
        config: the keys; its model does not matter.
        names: of the models.
        talks: whether the ranking is printed.

    Raises:
        UserError: there is no data, it has no classes to compare by, or no model can be used.
    """
    if not (config.data.dataset_name or config.data.train_file):
        raise UserError("models: there is no data to compare them on.", "Name it with dataset_name or train_file.")
    if config.values["from_scratch"]:
        raise UserError("models: random weights cannot be compared.", "Leave from_scratch out.")
    rows, seen = [], (0, 0)
    with quiet_libraries(config.training):
        for name in dict.fromkeys(names):
            try:
                row, seen = _row(config, name)
            except _Unsuited as error:
                raise UserError(f"models: they cannot be compared on this data: {error}.") from None
            except UserError as error:
                row = Row(name, why_not=one_line(error))
            rows.append(row)
    if all(row.answers is None for row in rows):
        raise UserErrors(f"models: {row.refusal}" for row in rows)
    ranking = ranked(rows, *seen)
    if talks:
        say("\n".join(ranking.lines()))
    return ranking


def _row(config: Config, name: str) -> tuple[Row, tuple[int, int]]:
    """(a model, (examples looked at, classes)).

    Raises:
        UserError: it cannot be loaded, or not with this data.
    """
    set_seed(config.training.seed)
    revision = config.model.model_revision if "model_revision" in config.given else MAIN
    model = replace(config.model, model_name_or_path=name, model_revision=revision)
    values = {key: getattr(model, key) for key in ("model_name_or_path", "model_revision")}
    prepared = prepare(replace(config, model=model, values=config.values | values))
    if reason := unsuited(prepared):
        raise _Unsuited(reason)
    return _answered(prepared, name)


def _answered(prepared: Prepared, name: str) -> tuple[Row, tuple[int, int]]:
    rows, labels = sample(prepared)
    model, classes = prepared.loaded.model.to(prepared.config.training.device), len(prepared.loaded.labels.names)
    dataset = inputs_of(prepared, rows)
    began = time.perf_counter()
    features = frozen_pass(prepared, model, groups_of(prepared), dataset, poolings=[MEAN])
    seconds = time.perf_counter() - began
    row = Row(
        model=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        imagenet=IMAGENET[name].top1 if name in IMAGENET else None,
        answers=answers_of(by_layer(features), labels, classes, prepared.config.split_seed),
        seconds=1000 * seconds / len(rows),
    )
    return row, (len(rows), classes)
