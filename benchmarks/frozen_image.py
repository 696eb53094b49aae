"""A frozen image backbone: the cache of its features against computing them in every epoch.

    python benchmarks/frozen_image.py [--quick] [--examples 1280] [--epochs 10] [--image_size 96] [--seeds 0,1,2,3,4]
                                      [--peers frozen,eval] [--again] [--table]

Ours: `strategy: linear-probe`, `boundary_cache: memory`. The peers are plain Trainer with the backbone frozen, and the
same with the backbone in eval by hand, which few scripts do. No augmentation. Writes
benchmarks/results/frozen_image.json and .md.
"""

from __future__ import annotations

from peers import image, race

RATE = 5e-3
RACE = race.Race(
    name="frozen_image",
    examples=1280,
    title="A frozen image backbone",
    about=(
        f"{image.ABOUT}, AdamW, linear schedule, rate {RATE:g}; all but the classifier frozen.",
        image.CLOCK,
        image.BATCH_NORM,
    ),
    sides=(
        race.Side(
            "ours",
            "linear-probe, cache",
            image.ours(strategy="linear-probe", boundary_cache="memory", learning_rate=RATE),
        ),
        race.Side("frozen", "Trainer, backbone frozen", image.plain(image.freeze_backbone, learning_rate=RATE)),
        race.Side(
            "eval",
            "Trainer, backbone frozen and in eval",
            image.plain(image.freeze_backbone_in_eval, learning_rate=RATE),
        ),
    ),
    claims=(race.Claim("ours", "eval", 8, "10"), race.Claim("ours", "frozen")),
    held_out=image.HELD_OUT,
    settings={**image.SETTINGS, "rate": RATE},
    add_options=image.add_options,
)

if __name__ == "__main__":
    race.main(RACE)
