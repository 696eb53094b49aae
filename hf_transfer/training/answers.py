"""What a trainer's model answers to examples whose labels nobody knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from hf_transfer.data.augment import Mixed
from hf_transfer.data.pairs import LABEL_NAMES, Example
from hf_transfer.features.examples import TRAINING, Source
from hf_transfer.layers.side_effects import untouched
from hf_transfer.training.running import RunningTrainer

Array = Any  # np.ndarray


class _Unlabeled:
    """Makes batches without labels; a collator that wants some is given those of another example."""

    def __init__(self, collate: Callable[[list[Any]], Any], labels: Example):
        self.collate = collate.unmixed if isinstance(collate, Mixed) else collate
        self.labels = labels

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        rows = [{n: v for n, v in one.items() if n not in LABEL_NAMES} | self.labels for one in examples]
        return {name: value for name, value in dict(self.collate(rows)).items() if name not in LABEL_NAMES}


def answers(trainer: RunningTrainer, dataset: Any) -> Array:
    """(examples, outputs) logits of the model as it is evaluated: in eval mode, with `ema_decay` the average.

    All processes must call it, and all get the same. The model and the random numbers are afterwards as they were.

    Args:
        trainer: of the model.
        dataset: map-style, as the model takes it; labels are not read.
    """
    source = Source.of(trainer, TRAINING, dataset)
    first = trainer.boundary.sources[TRAINING].dataset[0]
    collate = _Unlabeled(source.collate, {name: first[name] for name in LABEL_NAMES if name in first})
    args, size, count = trainer.args, trainer.args.eval_batch_size, len(dataset)
    batches = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
    own, found = batches[args.process_index :: args.world_size], list[tuple[int, Array]]()
    with untouched(trainer.model), trainer.ema.applied(), torch.no_grad():
        trainer.model.eval()
        loader = DataLoader(
            source.dataset, batch_sampler=own, collate_fn=collate, num_workers=args.dataloader_num_workers
        )
        for numbers, batch in zip(own, loader, strict=True):
            with trainer.accelerator.autocast():
                outputs = trainer.model(**trainer._prepare_inputs(batch))
            logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
            found.append((numbers[0], (logits if logits.dtype == torch.float64 else logits.float()).cpu().numpy()))
    return np.concatenate([logits for _, logits in sorted(gather_object(found), key=lambda one: one[0])])
