"""The same image model under fastai and under a loop as timm's training script has it.

    python benchmarks/fastai_timm.py [--quick] [--examples 512] [--epochs 5] [--image_size 96] [--seeds 0,1,2,3,4]
                                     [--peers timm_probe,fastai,timm_full] [--again] [--table]

Ours: `linear-probe` with the cache, and `two-phase` (one epoch of the head alone, BatchNorm frozen throughout, as in
recipes/image_classification/gradual.yaml). The peers: timm's `freeze`, optimizer, scheduler and transform in a plain
PyTorch loop, for the probe and for everything; and fastai's `fine_tune`, one frozen epoch and the rest unfrozen, with
fastai's own transforms and one-cycle rates on the same network. fastai is in the extra `bench`; without it that side is
left out. Writes benchmarks/results/fastai_timm.json and .md.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from peers import fastai_learner, image, race
from torch import nn

PROBE_RATE, RATE, HEAD_RATE = 5e-3, 1e-3, 2e-3
HEAD_EPOCHS = 1


class Rows(torch.utils.data.Dataset):
    """Images decoded and transformed as they are asked for, as timm's own `ImageDataset` does."""

    def __init__(self, data: Any, transform: Any):
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        row = self.data[i]
        return self.transform(row["image"].convert("RGB")), row["label"]


def timm_loop(probe: bool, seed: int, options: argparse.Namespace) -> race.Outcome:
    """timm's train.py without what it does for distribution, mixed precision, mixup and checkpoints."""
    from timm.data import create_transform
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import freeze

    train, held_out = image.examples(seed, options)
    wrapped, processor = image.fresh(seed, options)
    model = wrapped.timm_model
    with race.Clock() as clock:
        if probe:
            freeze(model, [name for name, _ in model.named_children() if name != "classifier"])
        rows = Rows(train, create_transform(**processor.data_config, is_training=False))  # no augmentation
        generator = torch.Generator().manual_seed(seed)
        loader = torch.utils.data.DataLoader(rows, image.BATCH, shuffle=True, generator=generator)
        optimizer = create_optimizer_v2(model, opt="adamw", lr=PROBE_RATE if probe else RATE)
        scheduler, epochs = create_scheduler_v2(
            optimizer, sched="cosine", num_epochs=options.epochs, step_on_epochs=False, updates_per_epoch=len(loader)
        )
        loss_fn, updates = nn.CrossEntropyLoss(), 0
        for _ in range(epochs):
            model.train()
            for pixels, target in loader:
                loss = loss_fn(model(pixels), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                updates += 1
                scheduler.step_update(num_updates=updates)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = image.accuracy(model, model, held_out, processor)
    return {**clock.outcome, "accuracy": found, "trained": trained, "steps": updates}


def fastai(seed: int, options: argparse.Namespace) -> race.Outcome:
    """`Learner.fine_tune` on the same network."""
    train, held_out = image.examples(seed, options)
    wrapped, processor = image.fresh(seed, options)
    model = wrapped.timm_model
    with race.Clock() as clock:
        labels = [image.NAMES[label] for label in train["label"]]
        data = (lambda i: train[i]["image"], labels)
        learner = fastai_learner.learner(model, data, image.NAMES, processor.data_config, image.BATCH)
        with learner.no_bar(), learner.no_logging():
            learner.fine_tune(max(1, options.epochs - HEAD_EPOCHS), fastai_learner.RATE, freeze_epochs=HEAD_EPOCHS)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {**clock.outcome, "accuracy": image.accuracy(model, model, held_out, processor), "trained": trained}


RACE = race.Race(
    name="fastai_timm",
    title="Beside fastai and timm's loop",
    about=(
        f"{image.ABOUT}, no augmentation. Rates: probes {PROBE_RATE:g}; two phases {RATE:g}, head {HEAD_RATE:g},",
        f"decayed by 0.95 per group, BatchNorm 0; timm {RATE:g}, cosine; fastai {fastai_learner.RATE:g}, one cycle,",
        "as its `fine_tune` does.",
        image.CLOCK,
        image.BATCH_NORM,
    ),
    sides=(
        race.Side(
            "ours",
            "linear-probe, cache",
            image.ours(strategy="linear-probe", boundary_cache="memory", learning_rate=PROBE_RATE),
        ),
        race.Side(
            "two_phase",
            "two-phase, cache",
            image.ours(
                strategy="two-phase",
                head_epochs=HEAD_EPOCHS,
                boundary_cache="memory",
                learning_rate=RATE,
                head_learning_rate=HEAD_RATE,
                layer_lr_decay=0.95,
                layer_learning_rates={r"bn\d": 0},
            ),
        ),
        race.Side("timm_probe", "timm's loop, frozen", partial(timm_loop, True)),
        race.Side("timm_full", "timm's loop, everything", partial(timm_loop, False)),
        race.Side("fastai", "fastai, fine_tune", fastai, missing=fastai_learner.missing),
    ),
    claims=(
        race.Claim("ours", "timm_probe"),
        race.Claim("two_phase", "fastai"),
        race.Claim("two_phase", "timm_full"),
    ),
    epochs=5,
    held_out=image.HELD_OUT,
    settings={
        **image.SETTINGS,
        "probe_rate": PROBE_RATE,
        "rate": RATE,
        "head_rate": HEAD_RATE,
        "fastai_rate": fastai_learner.RATE,
        "head_epochs": HEAD_EPOCHS,
    },
    add_options=image.add_options,
)

if __name__ == "__main__":
    race.main(RACE)
