"""A text encoder whose lower part is frozen: the cache at the boundary against computing it in every epoch.

    python benchmarks/partial.py [--quick] [--examples 512] [--epochs 5] [--seeds 0,1,2,3,4] [--peers frozen,full]
                                 [--again] [--table]

Embeddings and 4 of MiniLM's 6 layers are frozen. Ours: `strategy: partial`, `unfrozen_groups: 2`, with the cache and
`length_bucketing`. The peers are plain Trainer with the same freeze, and with nothing frozen, both with dynamic
padding. Writes benchmarks/results/partial.json and .md.
"""

from __future__ import annotations

from functools import partial

from peers import race, text, trainers

RATE = 2e-4
FROZEN = 4
RACE = race.Race(
    name="partial",
    title="A half frozen text encoder",
    about=(f"{text.ABOUT}, rate {RATE:g} for all; embeddings and {FROZEN} of 6 layers frozen.", text.CLOCK),
    sides=(
        race.Side(
            "ours",
            "partial, cache, bucketing",
            text.ours(
                strategy="partial",
                unfrozen_groups=6 - FROZEN,
                boundary_cache="memory",
                length_bucketing=True,
                learning_rate=RATE,
            ),
        ),
        race.Side(
            "frozen", "Trainer, the same freeze", text.plain(partial(text.freeze_bottom, FROZEN), learning_rate=RATE)
        ),
        race.Side("full", "Trainer, full fine-tuning", text.plain(trainers.no_freeze, learning_rate=RATE)),
    ),
    claims=(race.Claim("ours", "frozen", 2.2), race.Claim("ours", "full", 3.8)),
    epochs=5,
    settings={**text.SETTINGS, "rate": RATE, "frozen_layers": FROZEN},
)

if __name__ == "__main__":
    race.main(RACE)
