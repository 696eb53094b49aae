"""A frozen image backbone with augmentation: a few stored views of each image against a new one in every epoch.

    python benchmarks/stored_views.py [--quick] [--examples 512] [--epochs 12] [--views 4] [--image_size 96]
                                      [--seeds 0,1,2,3,4] [--peers live,eval] [--again] [--table]

Ours: `strategy: linear-probe`, `augmentation: strong` without mirroring (they are digits), `augmented_views: 4`,
through the same steps as `fine_tune`. The peers are plain Trainer with the backbone frozen, and with it in eval by
hand, which draw the same kind of change anew for each image and epoch. Writes benchmarks/results/stored_views.json
and .md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from datasets import DatasetDict
from peers import image, race, trainers
from transformers import PreTrainedModel, PrinterCallback, set_seed

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.augment import EXAMPLE, Chance, Epochs
from hf_transfer.data.labels import LABELS
from hf_transfer.keys import keys
from hf_transfer.runs.machine import quiet_libraries
from hf_transfer.runs.prepare import make_trainer, prepare, prepare_splits
from hf_transfer.settings import Config

RATE = 5e-3
AUGMENTATION: dict[str, Any] = {"augmentation": "strong", "horizontal_flip": 0.0}


def add_options(parser: argparse.ArgumentParser) -> None:
    image.add_options(parser)
    parser.add_argument("--views", type=int, default=4, help="stored of each image")


def missing() -> str | None:
    return None if "augmented_views" in keys() else "this version has no `augmented_views`"


def ours(seed: int, options: argparse.Namespace) -> race.Outcome:
    """What `fine_tune` does between reading the data and saving the model."""
    train, held_out = image.examples(seed, options)
    with tempfile.TemporaryDirectory() as folder:
        config = Config.from_sources(
            {},
            {
                "model_name_or_path": image.SETTINGS["model"],
                "dataset_name": image.SETTINGS["data"],
                "output_dir": folder,
                "image_size": options.image_size,
                "data_facts": False,
                "strategy": "linear-probe",
                "boundary_cache": "memory",
                "augmented_views": options.views,
                "num_train_epochs": options.epochs,
                "per_device_train_batch_size": image.BATCH,
                "learning_rate": RATE,
                "seed": seed,
                "eval_strategy": "no",
                "save_strategy": "no",
                "logging_strategy": "no",
                "disable_tqdm": True,
                "log_level": "error",
                "dataloader_pin_memory": False,
                **AUGMENTATION,
            },
        )
        splits = DatasetDict(train=train, validation=held_out)
        config = replace(config, data=replace(config.data, in_memory=splits))
        set_seed(seed)
        with quiet_libraries(config.training):
            prepared = prepare(config)
            with race.Clock() as clock:
                read = prepare_splits(prepared)
                trainer = make_trainer(prepared, read["train"], read["validation"])
                trainer.remove_callback(PrinterCallback)
                trainer.train()
    model = prepared.loaded.model
    return {
        **clock.outcome,
        "trained": trainer.plan.stages[-1].num_trainable,
        "steps": trainer.state.global_step,
        "accuracy": image.accuracy(lambda x: model(pixel_values=x).logits, model, held_out, prepared.processor),
    }


def live(freeze: Callable[[PreTrainedModel], None], seed: int, options: argparse.Namespace) -> race.Outcome:
    """Plain Trainer; our own transform draws the changes, so that they are of the same kind."""
    train, held_out = image.examples(seed, options)
    model, processor = image.fresh(seed, options)
    chance = Chance(seed)
    collate = image.TASK.collator(processor)

    def prepared() -> tuple[Any, Any]:
        rows = train.rename_column("label", LABELS).add_column(EXAMPLE, list(range(len(train))))
        changed = image.TASK.prepare_training(rows, ("image",), processor, DataArguments(**AUGMENTATION), chance)
        return changed, collate

    outcome = trainers.fit(
        model,
        prepared,
        seed,
        options,
        image.BATCH,
        {"remove_unused_columns": False, "learning_rate": RATE},
        freeze,
        callbacks=[Epochs(chance)],
    )
    found = image.accuracy(lambda x: model(pixel_values=x).logits, model, held_out, processor)
    return {**outcome, "accuracy": found}


RACE = race.Race(
    name="stored_views",
    title="A frozen image backbone with augmentation",
    about=(
        f"{image.ABOUT}, AdamW, linear schedule, rate {RATE:g}; all but the classifier frozen, strong augmentation.",
        image.CLOCK,
        image.BATCH_NORM,
    ),
    sides=(
        race.Side("ours", "linear-probe, stored views", ours, missing=missing),
        race.Side("live", "Trainer, backbone frozen, live", partial(live, image.freeze_backbone)),
        race.Side("eval", "Trainer, frozen and in eval, live", partial(live, image.freeze_backbone_in_eval)),
    ),
    claims=(race.Claim("ours", "live", 2.8, "3"), race.Claim("ours", "eval")),
    epochs=12,
    held_out=image.HELD_OUT,
    settings={**image.SETTINGS, **AUGMENTATION, "rate": RATE},
    add_options=add_options,
)

if __name__ == "__main__":
    race.main(RACE)
