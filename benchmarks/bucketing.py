"""Batches of similar length: full fine-tuning against random batches, padded to 128 or to their longest.

    python benchmarks/bucketing.py [--quick] [--examples 512] [--epochs 2] [--seeds 0,1,2,3,4] [--slow_seeds 0,1]
                                   [--peers padded,random,grouped] [--again] [--table]

Ours: `strategy: full`, `length_bucketing`. The peers are plain Trainer: the example scripts' defaults (all padded to
128; only at `--slow_seeds`), random batches with dynamic padding, and `train_sampling_strategy: group_by_length`. The
share of padding of each stands in the second table. Writes benchmarks/results/bucketing.json and .md.
"""

from __future__ import annotations

from peers import race, text, trainers

RATE = 2e-4
RACE = race.Race(
    name="bucketing",
    title="Batches of similar length",
    about=(f"{text.ABOUT}, rate {RATE:g}; everything trains.", "The clock covers tokenisation."),
    sides=(
        race.Side("ours", "full, bucketing", text.ours(strategy="full", length_bucketing=True, learning_rate=RATE)),
        race.Side(
            "padded",
            "Trainer, padded to 128",
            text.plain(trainers.no_freeze, padded=True, learning_rate=RATE),
            slow=True,
        ),
        race.Side("random", "Trainer, random batches", text.plain(trainers.no_freeze, learning_rate=RATE)),
        race.Side(
            "grouped",
            "Trainer, group_by_length",
            text.plain(trainers.no_freeze, learning_rate=RATE, train_sampling_strategy="group_by_length"),
        ),
    ),
    claims=(
        race.Claim("ours", "padded", 4.0, "4.8"),
        race.Claim("ours", "random", 1.4, "1.8"),
        race.Claim("ours", "grouped"),
    ),
    epochs=2,
    settings={**text.SETTINGS, "rate": RATE},
)

if __name__ == "__main__":
    race.main(RACE)
