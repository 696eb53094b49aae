"""Labels given as 0/1 vectors: several labels with the right names, or an error that says where."""

from __future__ import annotations

import csv
import json

import pytest
from datasets import Dataset

from hf_transfer import UserError
from hf_transfer.cli.program import main
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.label_columns import find_labels
from hf_transfer.data.labels import Labels, bad_labels, encode, infer_labels
from hf_transfer.data.load import load_splits
from hf_transfer.data.raw import RawSplits
from hf_transfer.run_folder import RUN_FILE

MULTI = "multi_label_classification"
VECTORS = [[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 0]]
RUN = ["--strategy", "full", "--num_train_epochs", "1", "--save_strategy", "no", "--preflight", "false"]


def read(cells, checkpoint=(), **keys):
    """(labels, encoded labels) of a label column before training."""
    train = Dataset.from_dict({"text": [f"t{i}" for i in range(len(cells))], "label": cells})
    found = find_labels(RawSplits({"train": train}), ("text",), DataArguments(**keys), checkpoint=lambda: checkpoint)
    skips = keys.get("on_bad_example") == "skip"
    labels = infer_labels(found.splits["train"], found.name, keys.get("problem_type"), skips, found.entries)
    bad = bad_labels(found.splits["train"], "train", found.name, labels)
    usable = found.splits["train"].select([i for i in range(len(cells)) if i not in bad])
    return labels, encode(usable, "train", found.name, labels)["labels"][:], bad


@pytest.mark.parametrize(
    "form",
    [
        list,
        str,
        json.dumps,
        lambda v: "[" + " ".join(map(str, v)) + "]",  # NumPy
        lambda v: [float(x) for x in v],
        lambda v: [bool(x) for x in v],
        *(lambda v, d=d: d.join(map(str, v)) for d in (" ", ";", ", ", "|")),
    ],
)
def test_vectors_are_several_labels_in_every_form(form):
    labels, encoded, bad = read([form(v) for v in VECTORS])
    assert labels == Labels(MULTI, ("0", "1", "2")) and encoded == VECTORS and not bad


def test_their_names():
    names, own = ("joy", "anger", "fear"), ("x", "y", "z")
    assert read(VECTORS, checkpoint=own)[0].names == own
    assert read(VECTORS, checkpoint=("only", "two"))[0].names == ("0", "1", "2")
    assert read(VECTORS, checkpoint=own, label_vector_names=list(names))[0].names == names
    never = [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert read(never)[:2] == (Labels(MULTI, ("0", "1", "2")), never), "a label that no example has keeps its place"
    with pytest.raises(UserError, match="vectors of 3 entries, and there are 2 label_vector_names"):
        read(VECTORS, label_vector_names=["a", "b"])
    with pytest.raises(UserError, match="does not hold 0/1 vectors"):
        read(["a", "b"] * 5, label_vector_names=["a", "b"])


def test_numbers_of_labels_are_no_vectors():
    lists = [[0], [1], [0, 1], [0, 2]]
    labels, encoded, _ = read(lists)
    assert labels.names == ("0", "1", "2") and encoded == [[1, 0, 0], [0, 1, 0], [1, 1, 0], [1, 0, 1]]
    assert read([[5, 5, 7], [7], [5]])[0].names == ("5", "7")


@pytest.mark.parametrize("bad", ["[1, 0]", "[1, 0, 2]", "x"])
def test_what_does_not_fit_is_named_with_its_line(tmp_path, bad):
    file = tmp_path / "t.csv"
    rows = [("two\nlines", str(VECTORS[0])), *((f"t{i}", str(v)) for i, v in enumerate(VECTORS)), ("t", bad)]
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([("text", "label"), *rows])
    args = DataArguments(train_file=str(file))
    with pytest.raises(UserError, match=r"t\.csv line 8: the label .*" + (r"\[1, 0" if bad != "x" else "'x' is not a")):
        find_labels(load_splits(args), ("text",), args)


def test_vectors_that_do_not_fit_are_left_out_on_demand():
    labels, encoded, bad = read([*VECTORS, [1, 0]], on_bad_example="skip")
    assert labels.names == ("0", "1", "2") and encoded == VECTORS and bad == {4: "unknown label '[1, 0]'"}


def test_a_model_reads_other_data_as_it_was_trained():
    known, args = Labels(MULTI, ("joy", "anger")), DataArguments(label_vector_names=["joy", "anger"])
    for cells, encoded, wrong in (
        ([[0, 1]], [[0, 1]], {}),
        (["[0, 1]", "x"], [[0, 1]], {1: "unknown label 'x'"}),
        (["[0, 1]", "x", "[1]"], [[0, 1]], {1: "unknown label 'x'", 2: "unknown label '[1]'"}),
        (["['joy']", "['anger', 'joy']"], [[1, 0], [1, 1]], {}),
        ([[0, 1, 1], [1, 1]], [[1, 1]], {0: "unknown label '[0, 1, 1]'"}),
    ):
        data = Dataset.from_dict({"text": ["t"] * len(cells), "label": cells})
        found = find_labels(RawSplits({"test": data}), ("text",), args, known)
        bad = bad_labels(found.splits["test"], "test", "label", known)
        usable = found.splits["test"].select([i for i in range(len(cells)) if i not in bad])
        assert (encode(usable, "test", "label", known)["labels"][:], bad) == (encoded, wrong)
    with pytest.raises(UserError, match="vectors of 3 entries, and there are 2 labels of the model"):
        find_labels(
            RawSplits({"test": Dataset.from_dict({"text": ["t"], "label": [[0, 1, 1]]})}),
            ("text",),
            DataArguments(),
            known,
        )


@pytest.mark.parametrize(
    ("cells", "keys", "names"),
    [
        ([str(v) for v in VECTORS], ["--label_vector_names", "[joy, anger, fear]"], ["joy", "anger", "fear"]),
        (["joy, anger", "joy", "anger, fear", "fear"], ["--label_delimiter", ","], ["anger", "fear", "joy"]),
        (["joy|no", "no", "joy"], ["--problem_type", "single_label_classification"], ["joy", "joy|no", "no"]),
    ],
)
def test_train_evaluate_and_predict_read_them_alike(tiny_bert_folder, tmp_path, capsys, cells, keys, names):
    file, out = tmp_path / "t.csv", str(tmp_path / "out")
    with file.open("w", newline="") as table:
        rows = [(f"text number {i}", cells[i % len(cells)]) for i in range(24)]
        csv.writer(table).writerows([("text", "label"), *rows])
    command = ["train", "--model_name_or_path", tiny_bert_folder, "--train_file", str(file), "--output_dir", out, *RUN]
    if not keys[0].endswith("vector_names"):
        assert main(command) == 2
        assert f"{keys[0][2:]}: {keys[1]}".replace(": ,", ": ','") in capsys.readouterr().err, "the error names the key"
    assert main([*command, *keys]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [config["id2label"][str(i)] for i in range(len(names))] == names
    assert keys[0][2:] in (tmp_path / "out" / RUN_FILE).read_text()
    capsys.readouterr()
    assert main(["evaluate", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_examples"] == 5
    assert main(["predict", out, str(file)]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 24 and list(answers[0]["scores"]) == names
