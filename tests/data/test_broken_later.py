"""Images that break after they were looked at, or that nobody looked at: named, without a traceback."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pixels

from hf_transfer import UserError, fine_tune
from hf_transfer.cli.program import main
from hf_transfer.errors import WorkFailed
from hf_transfer.runs import prepare
from tests import warm

KEYS = dict(num_train_epochs=1, save_strategy="no", strategy="full", log_level="error", train_val_split=0.25)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(24):
        place = tmp_path / "d" / ("cat", "dog")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Pixels.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(place / f"{i}.jpg")
    return tmp_path / "d"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_nobody_looked_at(workers, folder, tiny_vit_folder, tmp_path, capfd):
    """Without the look at the data, as beyond the 100,000 that are looked at; also from a loader's worker."""
    (folder / "cat" / "4.jpg").write_bytes(b"\xff\xd8 cut off")
    keys = {**KEYS, "data_facts": False, "dataloader_num_workers": workers, "train_val_split": 0.05}
    words = [w for k, v in keys.items() for w in (f"--{k}", str(v))]
    name = ["--model_name_or_path", tiny_vit_folder, "--dataset_name", str(folder), "--output_dir", f"{tmp_path}/o"]
    assert main(["train", *name, *words]) == 2
    said = capfd.readouterr().err
    assert "4.jpg: cannot be read as an image" in said and "--resume_from_checkpoint auto" in said
    assert "Traceback" not in said and "Caught" not in said


def test_a_picture_that_vanishes_while_a_worker_reads(folder, tiny_vit_folder, tmp_path):
    keys = {**KEYS, "dataloader_num_workers": 2, "train_val_split": 0.05, "num_train_epochs": 3}
    words = [w for k, v in keys.items() for w in (f"--{k}", str(v))]
    name = ["--model_name_or_path", tiny_vit_folder, "--dataset_name", str(folder), "--output_dir", f"{tmp_path}/o"]
    ordinary = prepare.know

    def know(*rest):
        found = ordinary(*rest)
        (folder / "dog" / "7.jpg").unlink()  # after the look at the data, before training
        return found

    def vanish() -> None:
        prepare.know = know

    done = warm.hf_transfer("train", *name, *words, first=vanish)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "7.jpg: cannot be read as an image" in done.stderr and "No such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_picture_without_a_file_is_named_by_its_row(tiny_vit_folder, tmp_path):
    rng = np.random.default_rng(0)
    cells = []
    for i in range(20):
        path = tmp_path / f"{i}.png"
        Pixels.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(path)
        cells.append({"path": None, "bytes": path.read_bytes() if i != 13 else b"broken"})
    features = Features({"image": Image(decode=False), "label": Value("string")})
    data = Dataset.from_dict({"image": cells, "label": ["a", "b"] * 10}, features=features)
    with pytest.raises(UserError, match="Bad image in the dataset, row 13: cannot be read"):
        fine_tune(tiny_vit_folder, data, output_dir=str(tmp_path / "o"), data_facts=False, **KEYS)


def test_what_a_worker_says_keeps_its_kind():
    """torch makes a worker's error anew from its class and its whole traceback."""
    text = 'Caught {} in DataLoader worker process 1.\nOriginal Traceback (most recent call last):\n  File "a.py"\n'
    for kind in (UserError, WorkFailed):
        name = kind.__name__
        made = kind(message=f"{text.format(name)}hf_transfer.errors.{name}: x.jpg: broken. Mend it.\n")
        assert made.message == str(made) == "x.jpg: broken. Mend it."
    assert UserError("Caught in the act.").message == "Caught in the act."
