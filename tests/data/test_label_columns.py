"""Which column is what, and what its cells mean: read as they were meant, or refused with both readings."""

from __future__ import annotations

import datetime
import decimal

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import BertConfig

from hf_transfer import UserError
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.columns import Columns, unread
from hf_transfer.data.label_cells import Notation, are_shares, delimiter_of, notation, number, several
from hf_transfer.data.label_columns import find_labels, label_column
from hf_transfer.data.label_variants import variant_key, variant_notes
from hf_transfer.data.labels import Labels, encode, infer_labels
from hf_transfer.data.load import load_splits
from hf_transfer.data.raw import RawSplits
from hf_transfer.errors import from_command_line
from hf_transfer.tasks import choose_task

SINGLE, MULTI, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)


def read(cells, written=True, **keys):
    """(labels, notes, encoded labels) of a CSV's label column, each cell repeated five times."""
    cells = [c for c in cells for _ in range(5)]
    train = Dataset.from_dict({"text": [f"t{i}" for i in range(len(cells))], "label": cells})
    found = find_labels(
        RawSplits({"train": train}, written=["label"] if written else ()), ("text",), DataArguments(**keys)
    )
    labels = infer_labels(found.splits["train"], found.name, keys.get("problem_type"))
    return labels, found.splits.notes, encode(found.splits["train"], "train", found.name, labels)["labels"][::5]


# ---- cells ----


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["0", "1", "-3"], Notation.WHOLE),
        (["0", str(2**70)], Notation.NAMES),
        (["1", "2.5", "1e-05", "1e+40"], Notation.DECIMAL),
        (["1.10", "2.20", "3.00"], Notation.DECIMAL),
        (["1.10", "1.1"], Notation.LOOSE),
        (["01", "1", "2"], Notation.LOOSE),
        (["1E2", "2E5"], Notation.LOOSE),
        (["+1", "-1"], Notation.LOOSE),
        (["3,5", "4", "-0,25"], Notation.COMMA),
        (["35.5%", "7%"], Notation.UNIT),
        (["$3.50", "$12"], Notation.UNIT),
        (["3 €", "4,5 €"], Notation.UNIT),
        (["0.5", "inf"], Notation.DECIMAL),
        (["1.0", "2.0"], Notation.DECIMAL),
        (["1", "1.0", "2"], Notation.LOOSE),
        (["1", "1.0", "2.5"], Notation.DECIMAL),
        (["1", "nan", "2"], Notation.DECIMAL),
        (["nan", "inf"], Notation.LOOSE),
        (["good", "1"], Notation.NAMES),
        (["2024-01-01", "2024-01-02"], Notation.NAMES),
        (["True", "False"], Notation.NAMES),
    ],
)
def test_how_labels_are_written(cells, kind):
    assert notation(cells) is kind


def test_a_comma_before_three_digits_has_two_readings():
    with pytest.raises(UserError, match=r"the label '1,234' has two readings: 1.234 .* or 1234 with a thousands"):
        notation(["1,234", "20,000", "7"])
    assert notation(["1,234", "0,5"]) is Notation.COMMA, "0,5 decides"
    for cells in (["3,5", "3.5"], ["$3", "3 €"], ["50%", "0.5"]):
        with pytest.raises(UserError, match="numbers in different notations"):
            notation(cells)


@pytest.mark.parametrize(
    "cells", [["1 0 0", "0 1 0"], ["[0, 1]"], ["0.5", "0.25"], ["v0.5 v1.2"], ["3.5 mm", "0.5 mm"], ["0.5 2.5"], []]
)
def test_what_is_no_soft_label(cells):
    assert not are_shares(cells)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("3,5", 3.5), ("35.5%", 35.5), ("$3.50", 3.5), (" 2 ", 2.0), ("1e3", 1000.0), (True, 1.0), ("x", None), ("", None),
     ("1,2,3", None), (decimal.Decimal("1.5"), 1.5), (None, None), ([1], None)],
)  # fmt: skip
def test_number(value, expected):
    assert number(value) == expected


@pytest.mark.parametrize(
    ("cell", "expected"),
    [("['joy', 'anger']", ["joy", "anger"]), ('["joy"]', ["joy"]), ("[1, 0, 0]", [1, 0, 0]), ("[1 0 0]", [1, 0, 0]),
     ("('a',)", ["a"]), ("{'b', 'a'}", ["a", "b"]), ("[]", []), ("[0.9 0.1]", [0.9, 0.1]), ("[joy, anger]", None),
     ("joy", None), ("{'a': 1}", None), ("[", None), (None, None)],
)  # fmt: skip
def test_several(cell, expected):
    assert several(cell) == expected


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["joy", "joy|anger", "fear|joy", "anger"], "|"),
        (["a; b", "a; c", "b; c"], ";"),
        (["joy, anger", "joy", "anger, fear", "fear"], ","),
        (["New York, NY", "Los Angeles, CA", "Albany, NY", "Oakland, CA"], None),
        (["rock & roll", "jazz"], None),
        (["and/or", "and", "or"], None),
    ],
)
def test_delimiters(cells, expected):
    assert delimiter_of(cells) == expected


# ---- columns ----


@pytest.mark.parametrize(
    ("cells", "kind", "names", "first"),
    [
        (["2", "10", "1"], SINGLE, ("1", "2", "10"), 1),
        (["01", "1", "001"], SINGLE, ("001", "01", "1"), 1),
        (["1.10", "1.1", "1.2"], SINGLE, ("1.1", "1.10", "1.2"), 1),
        (["NA", "None", "nan"], SINGLE, ("NA", "None", "nan"), 0),
        (["0.5", "1.5", "2.5"], REGRESSION, ("label",), 0.5),
        (["1.10", "1.20", "1.35"], REGRESSION, ("label",), 1.1),
        (["3,5", "4,5", "1"], REGRESSION, ("label",), 3.5),
        (["1.0", "2.0"], SINGLE, ("1", "2"), 0),
        (["['a', 'b']", "['b']", "[]"], MULTI, ("a", "b"), [1.0, 1.0]),
    ],
)
def test_labels_of_a_csv(cells, kind, names, first):
    labels, _, encoded = read(cells)
    assert (labels.problem_type, labels.names) == (kind, names) and encoded[0] == pytest.approx(first)


def test_the_problem_type_decides_what_a_number_is():
    assert read(["1.10", "1.1"], problem_type=REGRESSION)[2] == pytest.approx([1.1, 1.1])
    labels, _, _ = read(["0.5", "1.5"], problem_type=SINGLE)
    assert labels.names == ("0.5", "1.5")
    assert read(["a|b", "a", "b"], problem_type=MULTI)[0].names == ("a", "b")
    assert read(["a|b", "a", "b"], problem_type=SINGLE)[0].names == ("a", "a|b", "b")
    with pytest.raises(UserError, match=r"two readings|two ways: 'a\|b' is one class, or the labels 'a' and 'b'"):
        read(["a|b", "a", "b"])


@pytest.mark.parametrize("cells", [["2", "10", "1"], ["1.0", "2.0"], ["01", "1"], ["1.10", "1.1"], ["a", "b"]])
def test_a_run_that_is_repeated_from_its_file_has_the_same_classes(cells):
    """`run.yaml` names the problem type that was inferred."""
    assert read(cells)[0] == read(cells, problem_type=SINGLE)[0]


def test_text_of_a_typed_file_stays_a_name():
    """In JSON and Parquet a string is a string."""
    assert read(["0.5", "1.5"], written=False)[0].names == ("0.5", "1.5")


@pytest.mark.parametrize(
    ("cells", "keys", "said"),
    [
        (["0.5", "inf", "1.5"], {}, r"row 5 of the train split: its label inf is not a finite number"),
        (["0.5", "1e+40", "1.5"], {}, r"row 5 of the train split: its label 1e\+40 is not a finite number"),
        (["0.5", "x"], {"problem_type": REGRESSION}, "regression expects numbers, but column 'label' contains 'x'"),
        (["-100", "1"], {}, "the label -100, which stands for `no label`"),
        (["a", "a"], {}, "only one class"),
        (["[0.9, 0.1]", "[0.2, 0.8]"], {}, r"fractions for several classes, such as \[0.9, 0.1\]: soft labels"),
        (["0.9 0.1", "0 1"], {}, "soft labels"),
        (["0.9;0.1", "1.0;0.0"], {"label_delimiter": ";"}, "soft labels"),
        (["{'pos': 0.9, 'neg': 0.1}", "{'pos': 1, 'neg': 0}"], {}, "soft labels"),
        (['{"pos": 1e-05, "neg": 0.99999}'], {}, "soft labels"),
        (["pos:0.9 neg:.1", "pos:.5 neg:.5"], {}, "soft labels"),
        (["1 ", "2 "], {}, "label_column_name: .* such as '1 ', '2 '. Write all of them alike and without spaces"),
        ([f"value {i}" for i in range(4)], {}, None),
    ],
)
def test_labels_that_cannot_be_meant(cells, keys, said):
    if said is None:
        assert len(read(cells)[0].names) == 4
        return
    with pytest.raises(UserError, match=said):
        read(cells, **keys)


def test_a_class_per_row_is_no_classification():
    rows = {"text": ["x"] * 40, "label": [f"id{i}" for i in range(40)]}
    with pytest.raises(UserError, match="40 different values in 40 rows, such as 'id0', 'id1', 'id2'"):
        infer_labels(Dataset.from_dict(rows), "label", None)
    assert len(infer_labels(Dataset.from_dict(rows), "label", SINGLE).names) == 40


def test_a_class_that_only_the_feature_knows_is_not_enough():
    features = Features({"label": ClassLabel(names=["a", "b"])})
    with pytest.raises(UserError, match=r"only one class \(b\) in the training split"):
        infer_labels(Dataset.from_dict({"label": [1, 1]}, features=features), "label", None)
    lists = Features({"label": List(ClassLabel(names=["a", "b"]))})
    with pytest.raises(UserError, match=r"only one class \(a\)"):
        infer_labels(Dataset.from_dict({"label": [[0], [0]]}, features=lists), "label", None)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([{"pos": 0.2, "neg": 0.8}, {"pos": 1.0, "neg": 0.0}], "soft labels"),
        ([[0.2, 0.8], [1.0, 0.0]], "soft labels"),
        ([{"name": "a"}, {"name": "b"}], "expects one class per example, but column 'label' contains {'name': 'a'}"),
    ],
)
def test_lists_and_objects_that_are_no_labels(values, said):
    with pytest.raises(UserError, match=said):
        infer_labels(Dataset.from_dict({"label": values}), "label", None)


def test_names_that_a_parquet_file_holds_as_bytes():
    labels = infer_labels(Dataset.from_dict({"label": [b"pos", "caf\xe9".encode(), b"pos"]}), "label", None)
    assert labels.names == ("caf\xe9", "pos")
    with pytest.raises(UserError, match="1 training examples have no label"):
        infer_labels(Dataset.from_dict({"label": [b"pos", b"", b"neg"]}), "label", None)


def test_a_column_with_the_name_of_the_encoded_labels():
    """Beside one column per label it is not used; an input column would be replaced by the labels."""
    rows = {"text": ["a", "b"], "spam": ["0", "1"], "rude": ["1", "1"], "labels": ["x", "y"]}
    raw = RawSplits({"train": Dataset.from_dict(rows)}, written=rows)
    found = find_labels(raw, ("text",), DataArguments(label_column_name=["spam", "rude"]))
    assert found.splits["train"]["labels"][:] == [[1], [0, 1]]
    with pytest.raises(UserError, match="the input column is called 'labels'"):
        find_labels(raw, ("labels",), DataArguments(label_column_name="spam"))


def test_typed_labels():
    day = datetime.date(2024, 1, 1)
    assert infer_labels(Dataset.from_dict({"label": [day, day + datetime.timedelta(1)]}), "label", None).names == (
        "2024-01-01",
        "2024-01-02",
    )
    cents = Dataset.from_dict({"label": [decimal.Decimal("1.50"), decimal.Decimal("2.25")]})
    assert infer_labels(cents, "label", None).problem_type == REGRESSION
    many = Dataset.from_dict({"label": [float(i) for i in range(40)] * 2 + [None]})
    assert infer_labels(many, "label", None, skip_missing=True).problem_type == SINGLE, "integers beside a missing one"
    assert infer_labels(many.select(range(80)), "label", None).problem_type == REGRESSION


def test_a_held_out_split_alone_is_read_as_the_model_needs_it():
    """Whatever its own cells look like."""
    known = Labels(SINGLE, ("01", "1", "x"))
    split = Dataset.from_dict({"text": ["a", "b"], "label": ["1", "01"]})
    found = find_labels(
        RawSplits({"test": split}, written=["label"]), ("text",), DataArguments(problem_type=SINGLE), known
    )
    assert encode(found.splits["test"], "test", "label", known)["labels"][:] == [1, 0]
    floats = Dataset.from_dict({"label": [1.0, 2.0]})
    assert encode(floats, "test", "label", Labels(SINGLE, ("1", "2")))["labels"][:] == [0, 1]
    generic = encode(Dataset.from_dict({"label": ["1", "0"]}), "test", "label", Labels(SINGLE, ("LABEL_0", "LABEL_1")))
    assert generic["labels"][:] == [1, 0]
    text = Dataset.from_dict({"label": ["1.0", "2"]})
    assert encode(text, "test", "label", Labels(SINGLE, ("1", "2")))["labels"][:] == [0, 1]


@pytest.mark.parametrize("variant", ["pos\u200b", "\ufeffpos", "po\u00ads", "pos\u00a0", "\uff30\uff2f\uff33", " pos"])
def test_what_cannot_be_seen_makes_no_other_label(variant):
    assert variant_key(variant) == variant_key("pos") != variant_key("po s")


def test_variants_of_a_label_are_named_and_merged_on_request():
    cells = ["Pos", "pos", "pos", "neg", "neg ", "cafe\u0301", "café"]
    labels, notes, _ = read(cells)
    assert len(labels.names) == 6 and not notes
    train = Dataset.from_dict({"text": cells, "label": cells})
    assert variant_notes(RawSplits({"train": train}), "label", labels)[0].startswith(
        "Labels that differ in case, spaces or Unicode form alone: 'pos' 2, 'Pos' 1."
    )
    labels, notes, encoded = read(cells, merge_label_variants=True)
    assert labels.names == ("café", "neg", "pos") or len(labels.names) == 3
    assert encoded[0] == encoded[1] == encoded[2] and "Labels merged into 'pos': 'pos' 10, 'Pos' 5." in notes
    test = find_labels({"test": train}, ("text",), DataArguments(merge_label_variants=True), labels).splits["test"]
    assert encode(test, "test", "label", labels)["labels"][:] == encoded
    named = Features({"text": Value("string"), "label": ClassLabel(names=["Cat", "cat"])})
    found = find_labels(
        {"train": Dataset.from_dict({"text": list("xyz"), "label": [0, 1, 1]}, features=named)},
        ("text",),
        DataArguments(merge_label_variants=True),
    )
    assert found.splits["train"]["label"][:] == ["cat"] * 3


def test_a_checkpoint_with_generic_names_keeps_its_order():
    generic = BertConfig(num_labels=3)
    numbers = Labels(SINGLE, ("0", "1", "2"))
    assert numbers.generic(generic) and numbers.in_order_of(generic).names == ("0", "1", "2")
    assert not Labels(SINGLE, ("0", "1")).generic(generic) and not Labels(SINGLE, ("a", "b", "c")).generic(generic)


# ---- roles ----

LONG = [f"a rather long text about film number {i} and its makers" for i in range(30)]
FEW = ["pos", "neg", "neg"] * 10
NAMES = [f"Ada B. {c}{d}erson" for c in "PKMFDT" for d in "aeiou"]
PAGES = [f"https://example.org/films/a-rather-long-name-{i}" for i in range(30)]
HASHES = [f"{i:040x}" for i in range(30)]
DATES = [f"3 March {1990 + i}, 12:00:{i:02}" for i in range(30)]
CHINESE = [f"这部电影非常好看，演员的表演也很出色，而且还会推荐给所有的朋友们。第{i}次" for i in range(30)]
IDS = [f"r{i:03d}" for i in range(30)]
NUMBERS = [str(1990 + i % 7) for i in range(30)]


def roles(columns, **keys):
    """(inputs, label column, notes on the others) of a CSV file."""
    split = Dataset.from_dict(columns)
    features = Columns(split, frozenset(columns), keys.get("text_column_name"))
    _, inputs = choose_task(features, DataArguments(**keys))
    found = find_labels(RawSplits({"train": split}, written=columns), inputs, DataArguments(**keys))
    return inputs, found.name, unread(features, inputs, (found.name,))


@pytest.mark.parametrize(
    ("columns", "inputs", "label"),
    [
        ({"review": LONG, "sentiment": FEW}, ("review",), "sentiment"),
        ({"sentiment": FEW, "review": LONG}, ("review",), "sentiment"),
        ({"id": IDS, "review": LONG, "sentiment": FEW, "year": NUMBERS, "label": FEW}, ("review",), "label"),
        ({"id": IDS, "review": LONG, "sentiment": FEW}, ("review",), "sentiment"),
        ({"question": LONG, "sentence": LONG, "label": FEW}, ("question", "sentence"), "label"),
        ({"sentence1": LONG, "sentence2": LONG, "label": FEW}, ("sentence1", "sentence2"), "label"),
        ({"text": LONG, "text_pair": LONG, "label": FEW}, ("text", "text_pair"), "label"),
        ({"title": LONG, "text": LONG, "label": FEW}, ("title", "text"), "label"),
        ({"author": NAMES, "review": LONG, "label": FEW}, ("review",), "label"),
        ({"url": PAGES, "key": HASHES, "when": DATES, "body": LONG, "label": FEW}, ("body",), "label"),
        ({"url": PAGES, "body": CHINESE, "label": FEW}, ("body",), "label"),
        ({"text": NUMBERS, "label": FEW}, ("text",), "label"),
        ({"text": FEW, "label": FEW}, ("text",), "label"),
    ],
)
def test_roles(columns, inputs, label):
    assert roles(columns)[:2] == (inputs, label)


def test_columns_that_are_not_used_are_named():
    _, _, notes = roles({"id": IDS, "text": LONG, "summary": LONG[::-1], "label": FEW})
    assert notes == [
        "Not read, although it looks like text: column 'summary' (text_column_name=['text', 'summary'] reads both).",
        "Not used: column 'id'.",
    ]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"body": LONG, "summary": LONG, "label": FEW},
            r"be the text: body, summary. Name one, .*\n  text_column_name='body' {16}11 words each, such as 'a rather",
        ),
        ({"review": LONG, "stars": FEW, "mood": FEW}, "Name one of stars, mood"),
        (
            {"a": FEW, "b": FEW},
            r"several columns may be the text: a, b[^$]*text_column_name=\['a', 'b'\]   both of them$",
        ),
        ({"a": NAMES, "b": NAMES[::-1], "label": FEW}, "several columns may be the text: a, b"),
        ({"question": LONG, "passage": [3 * text for text in LONG], "label": FEW}, "be the text: question, passage"),
    ],
)
def test_two_readings_stop_and_show_both(columns, said):
    with pytest.raises(UserError, match=said):
        roles(columns)


def test_one_0_1_column_per_label_of_a_csv(tmp_path):
    (tmp_path / "t.csv").write_text("text,spam,rude\na,1,0\nb,0.0,TRUE\nc,,0\n")
    splits = load_splits(DataArguments(train_file=f"{tmp_path}/t.csv"))
    found = find_labels(splits, ("text",), DataArguments(label_column_name=["spam", "rude"]))
    assert found.splits["train"]["labels"][:] == [[0], [1], None]
    assert Value("int64") != found.splits["train"].features["labels"]


def test_candidates_are_shown_with_what_they_hold_and_the_key_to_copy():
    rows = {"review": LONG, "mood of it": ["a" * 200, "b"] * (len(LONG) // 2), "stars": FEW}
    with pytest.raises(UserError) as error, from_command_line():
        label_column(Dataset.from_dict(rows), ("review",), DataArguments())
    text = str(error.value)
    assert "--label_column_name stars    " in text and "--label_column_name 'mood of it'    2 values: aaa" in text
    assert "a" * 61 not in text and "…" in text
