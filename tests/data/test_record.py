"""What a run's examples were, recognized by content."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset, Image
from PIL import Image as Pixels

from hf_transfer import UserError
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.labels import MULTI_LABEL, SINGLE_LABEL, Labels
from hf_transfer.data.record import Record, SplitRecord, content_of, positions
from hf_transfer.data.splits import Data
from hf_transfer.tasks import TASKS

LABELS = Labels(SINGLE_LABEL, ("a", "b"))


def split(*texts, labels=None) -> Dataset:
    return Dataset.from_dict({"text": list(texts), "labels": labels or [0] * len(texts)})


def record(train, validation, test=None, **keys) -> Record:
    return Record.of(Data(train, validation, test, ("text",), LABELS), DataArguments(**keys))


def change(then: Dataset, now: Dataset):
    whole = record(split("x"), split("y"), then)
    return whole.change("test", SplitRecord.of(now, ("text",), LABELS))


def test_changes_are_counted_with_repetitions_and_in_any_order():
    then = split("a", "b", "b", "c", labels=[0, 0, 1, 1])
    assert not change(then, then.select([3, 1, 0, 2]))
    assert str(change(then, split("a", "b", "d", "d", labels=[0, 0, 1, 1]))) == "test: 2 new, 2 gone"
    assert str(change(then, split("a", "b", "b", "c", labels=[1, 0, 0, 1]))) == "test: 2 with another label"
    several = change(then, split("a", "b", "b", labels=[0, 1, 1]))
    assert (several.new, several.gone, several.relabeled) == (0, 1, 1)
    assert str(change(split("a"), split("b", "c"))) == "test: 2 new, 1 gone"


def test_labels_are_compared_by_name():
    one = SplitRecord.of(split("t", labels=[1]), ("text",), LABELS)
    assert one.labels == SplitRecord.of(split("t", labels=[0]), ("text",), Labels(SINGLE_LABEL, ("b", "a"))).labels
    rows = Dataset.from_dict({"text": ["t"], "labels": [[1.0, 0.0, 1.0]]})
    several = SplitRecord.of(rows, ("text",), Labels(MULTI_LABEL, ("a", "b", "c")))
    assert several.labels == SplitRecord.of(rows, ("text",), Labels(MULTI_LABEL, ("c", "b", "a"))).labels


def test_what_was_held_out_too_does_not_count_as_trained_on():
    whole = record(split("a", "b", "c"), split("b"), split("c", "d"))
    assert whole.trained.tolist() == content_of(split("a"), ("text",)).tolist()


def test_a_file_keeps_all_of_it_and_a_damaged_one_is_an_error(tmp_path):
    whole = record(split("a", "b"), split("c"), split("d"), max_eval_samples=7)
    path = tmp_path / "out" / "examples.npz"
    whole.save(path)
    again = Record.load(path)
    assert again is not None and again.limits == {"train": None, "validation": 7, "test": None}
    assert again.inputs == ("text",) and list(again.splits) == ["train", "validation", "test"]
    for name, one in whole.splits.items():
        assert np.array_equal(again.splits[name].content, one.content) and again.splits[name].content.dtype == np.uint64
        assert np.array_equal(again.splits[name].labels, one.labels)
    assert b"text" not in np.load(path)["train.content"].tobytes() and Record.load(tmp_path / "none") is None
    for content in (path.read_bytes()[:100], b"no archive"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is damaged"):
            Record.load(path)


def test_the_training_set_of_a_stream_is_not_recorded():
    whole = record(split("a"), split("b"), streaming=True)
    assert not whole.has_train and not len(whole.trained) and list(whole.splits) == ["validation"]


def test_a_resumed_run_has_trained_on_both_parts():
    earlier, later = record(split("a", "b"), split("v")), record(split("b", "c"), split("v"))
    both = later.including(earlier)
    assert set(both.trained.tolist()) == set(content_of(split("a", "b", "c"), ("text",)).tolist())
    stream = replace(earlier, splits={"validation": earlier.splits["validation"]})
    assert later.including(stream).streamed is None
    ended = replace(stream, streamed=np.array([3], np.uint64))
    assert later.including(ended).streamed.tolist() == [3], "until it has been read again"


def test_texts_have_the_hash_that_finds_duplicates():
    texts = ["plain", "café \U0001f600", "", "a\0b"]
    traced = [TASKS["text-classification"].trace([t]).exact for t in texts if t]
    assert content_of(split(*texts), ("text",))[[0, 1, 3]].tobytes() == b"".join(traced)
    pairs = Dataset.from_dict({"one": ["a", "ab", None], "two": ["bc", "c", "x"]})
    assert len(set(content_of(pairs, ("one", "two")).tolist())) == 3


def test_images_are_recognized_in_files_in_memory_and_under_other_names(tmp_path):
    rng = np.random.default_rng(0)
    for name in "abc":
        Pixels.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "a again.png").write_bytes((tmp_path / "a.png").read_bytes())
    paths = [str(tmp_path / f"{name}.png") for name in ("a", "b", "c", "a again", "missing")]
    files = Dataset.from_dict({"image": paths}).cast_column("image", Image())
    stored = Dataset.from_dict({"image": [{"bytes": (tmp_path / "b.png").read_bytes(), "path": None}]})
    hashes = content_of(files, ("image",))
    assert hashes[0] == hashes[3] and len(set(hashes.tolist())) == 4
    assert content_of(stored.cast_column("image", Image()), ("image",))[0] == hashes[1]
    assert TASKS["image-classification"].trace([{"path": paths[2], "bytes": None}]).exact == hashes[2].tobytes()


def test_positions_take_each_as_often_as_it_is_wanted():
    content = np.array([5, 6, 5, 7, 5, 8], dtype=np.uint64)
    assert positions(content, np.array([5, 8, 5, 9], dtype=np.uint64)).tolist() == [0, 2, 5]
