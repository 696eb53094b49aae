"""What is said of the data before training, and what is left out of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image as Pixels

from hf_transfer import UserError
from hf_transfer.cli.program import main
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data import examine as module
from hf_transfer.data.duplicates import Trace, Traces, look_hash, normalized
from hf_transfer.data.examine import examine
from hf_transfer.data.labels import infer_labels
from hf_transfer.data.splits import make_data
from hf_transfer.tasks import TASKS

TEXT = TASKS["text-classification"].trace


def data_of(columns, args=None, **splits):
    """Splits of (text, label) pairs, given by name."""
    made = DatasetDict(
        {n: Dataset.from_list([dict(zip(columns, row, strict=True)) for row in s]) for n, s in splits.items()}
    )
    args = args or DataArguments()
    skips = args.on_bad_example == "skip"
    return make_data(made, ("text",), "label", infer_labels(made["train"], "label", None, skips), args, 0)


def leaky(args=None):
    train = [("One film.", "a"), ("one  FILM", "a"), ("two", "b"), ("two", "a"), ("three", "b"), ("four", "b")]
    validation = [("five", "a"), ("two", "b"), ("six!", "a")]
    test = [("TWO!", "b"), ("seven", "a"), ("six", "b")]
    return data_of(("text", "label"), args, train=train, validation=validation, test=test)


def test_duplicates_leaks_and_conflicts_are_counted():
    _, facts = examine(leaky(), TEXT, DataArguments(), 0)
    train, validation, test = (facts.splits[n] for n in ("train", "validation", "test"))
    assert train.classes == {"a": 3, "b": 3} and train.duplicates == {"exact": 1, "near": 1} and train.conflicts == 2
    assert validation.duplicates == test.duplicates == {"exact": 0, "near": 0}
    assert train.sizes == {"characters": pytest.approx((3, 4.5, 9, 9))}
    found = {(leak.kept, leak.other): (leak.exact, leak.near) for leak in facts.leaks}
    assert found == {("test", "validation"): (0, 2), ("test", "train"): (0, 1), ("validation", "train"): (1, 0)}
    assert facts.leaks[1].shown == [("row 0 ('TWO!')", "row 2 ('two')")]
    assert sum("drop_leaks: true removes them" in w for w in facts.warnings()) == 3


def test_leaks_are_dropped_from_the_earlier_split():
    args = DataArguments(drop_leaks=True)
    data, facts = examine(leaky(args), TEXT, args, 0)
    assert data.train["text"][:] == ["One film.", "one  FILM", "three", "four"]
    assert data.validation["text"][:] == ["five"] and len(data.test) == 3
    assert facts.dropped == {"validation": 2, "train": 2} and facts.splits["train"].classes == {"a": 2, "b": 2}
    again, clean = examine(data, TEXT, args, 0)
    assert not clean.leaks and again.train["text"][:] == data.train["text"][:]


def test_a_large_split_is_sampled_unless_something_is_left_out(monkeypatch):
    monkeypatch.setattr(module, "SAMPLE", 3)
    _, facts = examine(leaky(), TEXT, DataArguments(), 0)
    assert facts.splits["train"].examined == 3 and facts.splits["train"].classes == {"a": 3, "b": 3}
    assert any("3 of 6" in line for line in facts.lines())
    for keys in ({"drop_leaks": True}, {"on_bad_example": "skip"}):
        assert examine(leaky(), TEXT, DataArguments(**keys), 0)[1].splits["train"].examined == 6


def test_imbalance_and_classes_without_examples():
    rows = [(f"t{i}", "a") for i in range(24)] + [("u", "b"), ("v", "b")]
    _, facts = examine(data_of(("text", "label"), train=rows, validation=rows[-2:]), TEXT, DataArguments(), 0)
    assert facts.imbalance == 12 and any("12 times" in w for w in facts.warnings())


@pytest.mark.parametrize(
    ("one", "other"), [("A  b, c!", "a b c"), ("Straße", "STRASSE"), ("ﬁne №1", "fine no1"), ("…", " ... ")]
)
def test_normalized_texts(one, other):
    assert normalized(one) == normalized(other)


def test_words_are_not_normalized_away():
    assert len({normalized(t) for t in ("good", "not good", "goods", "good 1", "!", "?")}) == 6


# ---- pictures ------------------------------------------------------------------------------------------------------


def photo(seed, size=128):
    """Smooth noise in colours, as a photograph has."""
    rng = np.random.default_rng(seed)
    layers = [
        np.asarray(Pixels.fromarray(rng.integers(0, 255, (k, k, 3), dtype=np.uint8)).resize((size, size), 3)) / k
        for k in (4, 8, 16, 32)
    ]
    total = sum(layers)
    return Pixels.fromarray((255 * (total - total.min()) / np.ptp(total)).astype(np.uint8))


def numbers(pictures):
    return Traces.of([Trace(bytes([i] * 8), look_hash(p), {}) for i, p in enumerate(pictures)]).alike()


def test_a_picture_saved_again_is_nearly_equal_and_another_is_not(tmp_path):
    photo(0).save(tmp_path / "0.jpg", quality=40)
    again = [
        photo(0),
        Pixels.open(tmp_path / "0.jpg"),
        photo(0).resize((64, 64)),
        photo(0).point(lambda v: min(255, v + 9)),
    ]
    found = numbers([*again, *(photo(i) for i in range(1, 40))])
    assert len(set(found[:4])) == 1 and len(set(found)) == 40


def test_colours_and_flat_pictures_are_told_apart():
    shape = np.zeros((32, 32), np.uint8)
    shape[8:20, 5:30] = 255
    red, blue = (np.stack([shape * (c == k) for k in range(3)], -1) for c in (0, 2))
    flat = [Pixels.new("RGB", (32, 32), (v, v, v)) for v in (10, 200)]
    assert len(set(numbers([Pixels.fromarray(red), Pixels.fromarray(blue), *flat]))) == 4


def test_the_bands_find_what_comparing_all_pairs_finds():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (300, 35), dtype=np.uint8)
    base[:, 32:] = 0
    flips = rng.integers(0, 30, 300)
    twins = base.copy()
    for row, count in zip(twins, flips, strict=True):
        bits = rng.choice(256, count, replace=False)
        np.bitwise_xor.at(row, bits // 8, (1 << (bits % 8)).astype(np.uint8))
    found = Traces.of([Trace(i.to_bytes(8, "big"), h.tobytes(), {}) for i, h in enumerate([*base, *twins])]).alike()
    assert ((found[:300] == found[300:]) == (flips <= 15)).all() and len(set(found)) == 300 + (flips > 15).sum()


def test_the_facts_of_digits_are_told_by_plan(tiny_vit_folder, capsys):
    """Real handwriting: 1,797 digits of which none is another one."""
    argv = ["plan", "--model_name_or_path", tiny_vit_folder, "--dataset_name", "bundled:digits", "--strategy", "full"]
    assert main([*argv, "--expected_accuracy", "false", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["data_facts"]
    assert facts["splits"]["test"]["classes"]["8"] == 35 and facts["splits"]["train"]["sizes"]["width"] == [8.0] * 4
    assert not facts["leaks"] and facts["splits"]["train"]["duplicates"] == {"exact": 0, "near": 0}


@pytest.mark.slow
def test_the_reviews_that_imdb_holds_twice():
    """96 of the 25,000, as its own page says."""
    from hf_transfer.data import bundled

    splits = bundled.load_dataset("bundled:imdb")
    data = make_data(splits, ("text",), "label", infer_labels(splits["train"], "label", None), DataArguments(), 0)
    _, facts = examine(data, TEXT, DataArguments(), 0)
    assert sum(s.duplicates["exact"] for s in facts.splits.values()) + sum(x.exact for x in facts.leaks) >= 96


def test_text_that_is_too_long_is_told(tiny_bert_folder, tmp_path, capsys):
    (tmp_path / "a.csv").write_text(
        "text,label\n" + "\n".join(f"{'w ' * (5 if i % 4 else 30)}{i},{'xy'[i % 2]}" for i in range(40))
    )
    assert main(["plan", "--model_name_or_path", tiny_bert_folder, "--train_file", f"{tmp_path}/a.csv"]) == 0
    out = capsys.readouterr().out
    assert "Data (" in out and "exceed the maximum length of 16 tokens and are truncated" in out


def test_nothing_is_looked_at_where_nobody_wants_it(tiny_bert_folder, tmp_path, capsys):
    (tmp_path / "a.csv").write_text("text,label\n" + "\n".join(f"same,{'xy'[i % 2]}" for i in range(40)))
    argv = ["plan", "--model_name_or_path", tiny_bert_folder, "--train_file", f"{tmp_path}/a.csv"]
    assert main(argv) == 0 and "duplicates in train: 31 exact" in capsys.readouterr().out
    assert main([*argv, "--data_facts", "false"]) == 0 and "duplicates" not in capsys.readouterr().out


def test_dropping_everything_is_refused():
    args = DataArguments(drop_leaks=True)
    data = data_of(("text", "label"), args, train=[("a", "x"), ("b", "y")], validation=[("a", "x"), ("b", "y")])
    with pytest.raises(UserError, match="No examples are left in the train split"):
        examine(data, TEXT, args, 0)
