"""Data and keys of small comparisons."""

from __future__ import annotations

import pandas as pd
import pytest

from hf_transfer.data.bundled import load_dataset

QUICK = dict(
    num_train_epochs=1,
    max_seq_length=16,
    preflight=False,
    expected_accuracy=False,
    label_issues=False,
    calibrate=False,
    use_cpu=True,
    boundary_cache="off",
)


@pytest.fixture(scope="session")
def reviews(tmp_path_factory) -> dict[str, str]:
    """Files by key."""
    root = tmp_path_factory.mktemp("reviews")
    rows = load_dataset("bundled:rotten-tomatoes")["train"].shuffle(seed=0)
    names = ["negative", "positive"]
    files = {}
    for name, numbers in {"train": range(16), "validation": range(16, 32), "test": range(32, 44)}.items():
        part = [{"text": row["text"], "label": names[row["label"]]} for row in rows.select(numbers)]
        files[f"{name}_file"] = str(root / f"{name}.csv")
        pd.DataFrame(part).to_csv(files[f"{name}_file"], index=False)
    return files
