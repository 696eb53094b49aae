"""What `Predictor.predict` takes: one input, or several in anything that can be iterated over."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, IterableDataset
from datasets import Image as ImageColumn
from PIL import Image as Pixels

from hf_transfer.inference.given import items_of

TEXTS = ["one", "two", "three"]
ARRAYS = [np.full((6, 6, 3), 40 * i, np.uint8) for i in range(3)]
PICTURES = [Pixels.fromarray(a) for a in ARRAYS]
TABLE = Dataset.from_dict({"text": TEXTS})


@pytest.mark.parametrize(
    "given",
    [
        TEXTS,
        tuple(TEXTS),
        iter(TEXTS),
        (text for text in TEXTS),
        map(str, TEXTS),
        dict.fromkeys(TEXTS).keys(),
        TABLE["text"],
        pd.Series(TEXTS, index=[7, 8, 9]),
        np.array(TEXTS),
        np.array(TEXTS, dtype=object),
    ],
    ids=lambda given: type(given).__name__,
)
def test_several_texts(given):
    items = list(items_of(given, is_pair=False))
    assert items == TEXTS and all(isinstance(item, str) for item in items)


@pytest.mark.parametrize("given", [TABLE, pd.DataFrame({"text": TEXTS}), IterableDataset.from_generator(lambda: TABLE)])
def test_rows(given):
    assert list(items_of(given, is_pair=False)) == [{"text": text} for text in TEXTS]


def test_pairs():
    pairs = [("one", "two"), ("three", "four")]
    assert list(items_of(pairs[0], is_pair=True)) == [pairs[0]]
    for given in (pairs, iter(pairs), np.array(pairs)):
        assert list(items_of(given, is_pair=True)) == pairs


@pytest.mark.parametrize("given", ["text", np.str_("text"), b"bytes", {"text": "a"}, 3, None, PICTURES[0]])
def test_one_input(given):
    assert list(items_of(given, is_pair=False)) == [given]


@pytest.mark.parametrize(
    ("shape", "count"),
    [((6, 6), 1), ((6, 6, 1), 1), ((6, 6, 3), 1), ((6, 6, 4), 1), ((2, 6, 6), 2), ((2, 6, 6, 3), 2), ((2, 6, 6, 1), 2)],
)
def test_arrays_of_pixels(shape, count):
    items = list(items_of(np.zeros(shape, np.uint8), is_pair=False))
    assert len(items) == count and items[0].shape == (shape if count == 1 else shape[1:])


def test_a_model_answers_every_form_alike(tiny_vit_folder, tmp_path):
    from hf_transfer import fine_tune

    table = Dataset.from_dict({"image": PICTURES * 4, "label": ["a", "b", "a", "b", "a", "b"] * 2})
    keys = dict(num_train_epochs=1, save_strategy="no", log_level="error", data_facts=False)
    run = fine_tune(tiny_vit_folder, table, output_dir=str(tmp_path / "o"), **keys)
    expected = [answer["scores"] for answer in run.predict(PICTURES)]
    files = []
    for i, picture in enumerate(PICTURES):
        picture.save(tmp_path / f"{i}.png")
        files.append(tmp_path / f"{i}.png")
    stored = [{"bytes": f.read_bytes(), "path": None} for f in files]
    several = [
        table.select(range(3))["image"],
        table.select(range(3)),
        (p for p in PICTURES),
        np.stack(ARRAYS),
        pd.Series(PICTURES),
        pd.DataFrame({"image": [str(f) for f in files]}),
        np.array([str(f) for f in files]),
        [f.read_bytes() for f in files],
        Dataset.from_dict({"image": stored}).cast_column("image", ImageColumn(decode=False))["image"],
    ]
    for given in several:
        assert [answer["scores"] for answer in run.predict(given)] == expected
    (one,) = run.predict(ARRAYS[1])
    assert list(one["scores"].values()) == pytest.approx(list(expected[1].values()), abs=1e-6)
