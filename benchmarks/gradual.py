"""Gradual unfreezing with and without the cache, which follows the boundary down.

    python benchmarks/gradual.py [--quick] [--examples 2048] [--epochs 7] [--seeds 0,1,2,3,4] [--again] [--table]

Seven stages of one epoch: the head, then one more of MiniLM's 6 layers from the top in each; the embeddings never thaw.
Both sides are ours, with the same schedule; one has the cache and `length_bucketing`. Writes
benchmarks/results/gradual.json and .md.
"""

from __future__ import annotations

from typing import Any

from peers import race, text

KEYS: dict[str, Any] = {
    "strategy": "gradual",
    "unfreeze_until": "layer.0",
    "learning_rate": 2e-4,
    "head_learning_rate": 2e-3,
    "layer_lr_decay": 0.9,
}
RACE = race.Race(
    name="gradual",
    title="Gradual unfreezing",
    about=(f"{text.ABOUT}, rates as in recipes/text_classification/gradual.yaml; a stage per epoch.", text.CLOCK),
    sides=(
        race.Side(
            "ours", "gradual, cache, bucketing", text.ours(**KEYS, boundary_cache="memory", length_bucketing=True)
        ),
        race.Side("cache", "gradual, cache", text.ours(**KEYS, boundary_cache="memory")),
        race.Side("plain", "gradual, neither", text.ours(**KEYS, boundary_cache="off")),
    ),
    claims=(race.Claim("ours", "plain", 1.6), race.Claim("cache", "plain", 1.15, "1.22")),
    examples=2048,
    epochs=7,
    settings={**text.SETTINGS, **KEYS},
)

if __name__ == "__main__":
    race.main(RACE)
