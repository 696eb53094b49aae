"""What `Predictor.load` reads of a run besides its model: its keys and the record of its examples."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import yaml

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.files import write_text
from hf_transfer.inference.predictor import Predictor
from hf_transfer.run_folder import EXAMPLES, RUN_FILE
from hf_transfer.settings import keys


def save_keys(predictor: Predictor, folder: Path) -> None:
    """Write them next to a model.

    Args:
        predictor: of the run; its `precision` is one of the keys.
        folder: of the model.
    """
    values = {f.name: getattr(predictor.data, f.name) for f in fields(DataArguments) if f.name in keys()}
    values |= {"per_device_eval_batch_size": predictor.batch_size, "seed": predictor.seed}
    values |= {predictor.precision: True} if predictor.precision else {}
    write_text(folder / RUN_FILE, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    if predictor.record is not None:
        predictor.record.save(folder / EXAMPLES)
