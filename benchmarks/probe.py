"""The best linear head: `probe_solver: lbfgs` against scikit-learn on exported features.

    python benchmarks/probe.py [--quick] [--examples 2048] [--seeds 0,1,2,3,4] [--peers sklearn,sgd] [--again] [--table]

Ours: `strategy: linear-probe`, `probe_solver: lbfgs`, which solves for the head with the L2 penalty that validates
best. The peers: scikit-learn's LogisticRegressionCV on the features that a plain forward pass exports, standardised,
with the same 13 penalties and five folds; and our own head trained by AdamW. Writes benchmarks/results/probe.json
and .md.
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np
import torch
from datasets import Dataset
from peers import race, text
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler

RATE = 5e-3
# Of the squared weights against the mean loss, as ours; scikit-learn's C is 1 / (strength * examples).
STRENGTHS = tuple(10 ** (2 - i / 2) for i in range(13))
FOLDS = 5


def sklearn(seed: int, options: argparse.Namespace) -> race.Outcome:
    """Features of the frozen encoder, in batches of similar length; then scikit-learn alone."""
    train, held_out = text.examples(seed, options)
    model, tokenizer = text.fresh(seed)
    model.eval()

    def exported(data: Dataset) -> tuple[np.ndarray, np.ndarray]:
        found, labels = [], []
        with torch.no_grad():
            for inputs, answers in text.batches(data, tokenizer):
                found.append(model.bert(**inputs).pooler_output)
                labels.append(answers)
        return torch.cat(found).numpy(), torch.cat(labels).numpy()

    with race.Clock() as clock, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arguments whose defaults will change, and of weak penalties
        x, y = exported(train)
        scaler = StandardScaler().fit(x)
        solved = LogisticRegressionCV(
            Cs=[1 / (strength * len(y)) for strength in STRENGTHS],
            cv=StratifiedKFold(FOLDS, shuffle=True, random_state=seed),
            max_iter=1000,
        ).fit(scaler.transform(x), y)
    x, y = exported(held_out)
    return {**clock.outcome, "accuracy": float((solved.predict(scaler.transform(x)) == y).mean())}


LBFGS = {"strategy": "linear-probe", "boundary_cache": "memory", "length_bucketing": True}
RACE = race.Race(
    name="probe",
    title="The best linear head",
    about=(
        f"{text.ABOUT} with rate {RATE:g} (of the side that trains in steps); all but the classifier frozen.",
        f"{text.CLOCK} scikit-learn: {len(STRENGTHS)} penalties from 100 to 0.0001, {FOLDS} folds.",
    ),
    sides=(
        race.Side("ours", "linear-probe, lbfgs", text.ours(**LBFGS, probe_solver="lbfgs", learning_rate=RATE)),
        race.Side("sklearn", "features, scikit-learn", sklearn),
        race.Side("sgd", "linear-probe, AdamW", text.ours(**LBFGS, learning_rate=RATE)),
    ),
    claims=(race.Claim("ours", "sklearn"), race.Claim("ours", "sgd")),
    examples=2048,
    settings={**text.SETTINGS, "rate": RATE, "folds": FOLDS, "strengths": list(STRENGTHS)},
)

if __name__ == "__main__":
    race.main(RACE)
