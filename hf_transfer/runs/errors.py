"""`errors.csv`: the wrong answers on the split that a run was measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hf_transfer.data.labels import LABELS
from hf_transfer.evaluation.thresholds import thresholds_of
from hf_transfer.files import write_text
from hf_transfer.inference.reviewing import errors_csv, errors_frame
from hf_transfer.run_folder import ERRORS
from hf_transfer.runs.mistakes import write_mistakes
from hf_transfer.runs.neighbors import KEY, Nearest
from hf_transfer.runs.prepare import Prepared
from hf_transfer.training.trainer import TransferTrainer


def write_errors(
    prepared: Prepared, trainer: TransferTrainer, nearest: Nearest, split: str, logits: Any, given: Any
) -> None:
    """Write the wrong answers, those with the highest loss first; see `errors_frame`. Called by all processes.

    What a report shows of the first of them is written as well, see `write_mistakes`.

    Lists of labels are JSON. Nothing is written where the answers are not in the order of the examples, as Trainer
    gives them with `train_sampling_strategy: group_by_length`.

    Args:
        prepared: the run's data.
        trainer: with the trained model.
        nearest: training examples, for a column of their own; without it if there are none.
        split: name of the split.
        logits: (examples, outputs) logits, computed in the order of the examples.
        given: their encoded labels.
    """
    examples = prepared.data.splits[split]
    own, is_sorted = np.array(examples[LABELS][:]), trainer.args.train_sampling_strategy == "group_by_length"
    is_other = own.shape != np.shape(given) or not np.allclose(own, given)
    if not trainer.is_world_process_zero() or is_sorted or is_other:
        return
    labels, thresholds = prepared.loaded.labels, thresholds_of(trainer.model.config)
    frame, positions = errors_frame(examples, prepared.inputs, labels, logits, given, thresholds)
    if nearest.found is not None:
        frame[KEY] = nearest.cells(prepared, positions)
    folder = Path(str(trainer.args.output_dir))
    write_text(folder / ERRORS, errors_csv(frame))
    write_mistakes(prepared, nearest, split, positions, folder)
