"""A frozen text encoder: the cache of its outputs against computing them in every epoch.

    python benchmarks/frozen_text.py [--quick] [--examples 2048] [--epochs 10] [--seeds 0,1,2,3,4] [--slow_seeds 0,1]
                                     [--peers frozen,eval,padded] [--again] [--table]

Ours: `strategy: linear-probe`, `boundary_cache: memory`, `length_bucketing`. The peers are plain Trainer with the
encoder frozen: with dynamic padding; the same with the encoder in eval by hand, which few scripts do; and as the
example scripts do by default, all padded to 128 (only at `--slow_seeds`). Writes benchmarks/results/frozen_text.json
and .md.
"""

from __future__ import annotations

from peers import race, text

RATE = 5e-3
RACE = race.Race(
    name="frozen_text",
    title="A frozen text encoder",
    about=(f"{text.ABOUT}, rate {RATE:g}; all but the classifier frozen.", text.CLOCK),
    examples=2048,
    sides=(
        race.Side(
            "ours",
            "linear-probe, cache, bucketing",
            text.ours(strategy="linear-probe", boundary_cache="memory", length_bucketing=True, learning_rate=RATE),
        ),
        race.Side("frozen", "Trainer, encoder frozen", text.plain(text.freeze_encoder, learning_rate=RATE)),
        race.Side(
            "eval", "Trainer, encoder frozen and in eval", text.plain(text.freeze_encoder_in_eval, learning_rate=RATE)
        ),
        race.Side(
            "padded",
            "Trainer, encoder frozen, padded to 128",
            text.plain(text.freeze_encoder, padded=True, learning_rate=RATE),
            slow=True,
        ),
    ),
    claims=(
        race.Claim("ours", "frozen", 20, "25 to 31"),
        race.Claim("ours", "padded", 60, "81"),
        race.Claim("ours", "eval"),
    ),
    settings={**text.SETTINGS, "rate": RATE},
)

if __name__ == "__main__":
    race.main(RACE)
