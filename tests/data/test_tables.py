"""CSV, TSV, JSON and Parquet files: every cell as it is written, every row where it stands, or an error."""

from __future__ import annotations

import csv
import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_transfer import UserError
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data import tables
from hf_transfer.data.load import load_splits
from hf_transfer.data.raw import BadExample
from hf_transfer.data.rows import BadRow, read_rows
from hf_transfer.data.streaming import beginning


def load(path, **keys):
    return load_splits(DataArguments(train_file=str(path), **keys))


def written(tmp_path, content, name="t.csv"):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


CELLS = [
    "01",
    "1",
    "1.10",
    "1E2",
    "9007199254740993",
    "00199",
    "true",
    "NA",
    "None",
    "null",
    "nan",
    "N/A",
    " x ",
    "-",
    "é",
]


@pytest.mark.parametrize("late", [False, True])
def test_every_cell_is_the_text_that_stands_there(late, tmp_path):
    """Also where the rows before it, or the other files, look like numbers."""
    before = "".join(f"{i},{i}\n" for i in range(tables.CHUNK + 5)) if late else ""
    file = written(tmp_path, "text,label\n" + before + "".join(f"{c},{c}\n" for c in CELLS))
    train = load(file)["train"]
    assert train["text"][-len(CELLS) :] == CELLS == train["label"][-len(CELLS) :]
    assert [row["text"] for row in read_rows(file)][-len(CELLS) :] == CELLS, "as `predict` reads it"


def test_parts_have_one_type(tmp_path):
    written(tmp_path, "text,label\na,1\nb,2\n", "part-0.csv")
    written(tmp_path, "label,text\nx,c\n01,d\n", "part-1.csv")
    splits = load(tmp_path / "part-*.csv")
    assert splits["train"].to_dict() == {"text": ["a", "b", "c", "d"], "label": ["1", "2", "x", "01"]}
    assert "The train split has 2 files: part-0.csv, part-1.csv." in splits.notes


def test_an_empty_cell_is_missing_and_a_quoted_line_end_is_text(tmp_path):
    file = written(tmp_path, 'text,label\n"two\nlines, one cell",x\n,y\n"say ""no""",z\n\n')
    assert load(file)["train"].to_dict() == {
        "text": ["two\nlines, one cell", None, 'say "no"'],
        "label": ["x", "y", "z"],
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("text,label\na,x\ngood, but long,y\n", r"t.csv line 3: it has 3 cells, and the header has 2; a cell that"),
        ("text,label\na,x\nb\n", r"t.csv line 3: it has 1 cell, and the header has 2; a cell is missing"),
        ('text,label\n"two\nlines",x\nb,y,z\n', r"t.csv line 4: it has 3 cells"),
        ("text,label\na,x\ntext,label\nb,y\n", r"t.csv line 3: it repeats the header"),
        ('text,label\n"a" b,x\nc,y\n', r"t.csv line 2: a quote is not closed or not doubled"),
        ('text,label\n"a,x\nb,y\n', r"t.csv line 2: a quote is not closed or not doubled"),
        ("text,label,text\na,x,b\n", r"has several columns called 'text'"),
        ("fine film,1\npoor film,0\n", r"looks like data, not like column names \('1' is a number\)"),
        ("a very good film,pos\na very bad one,neg\nso so and so,pos\nwhat a lovely film,neg\nand more,pos\n" * 2,
         r"looks like data, .*'pos' also occurs below"),
        ("", "is empty"),
        ("text,label\n", "has no examples"),
        (b"PK\x03\x04rest", "is a zip archive or a spreadsheet"),
        (b"PAR1rest", "is a Parquet file. Rename it"),
        ("text,label\na,x\n".encode("utf-16-le"), "UTF-16 without a byte order mark.*iconv -f utf-16le"),
        ("text,label\ncaf\xe9,x\n".encode("cp1252"), "is not text in UTF-8.*iconv -f cp1252"),
    ],
    ids=range(15),
)  # fmt: skip
def test_a_table_that_cannot_be_read_as_it_stands(content, said, tmp_path):
    with pytest.raises(UserError, match=said):
        load(written(tmp_path, content))


def test_rows_that_do_not_fit_are_left_out_and_named_on_request(tmp_path):
    file = written(tmp_path, "text,label\na,x\nb,c,y\nc\nd,y\n")
    with pytest.raises(UserError, match=r"\(2 such rows: t.csv line 3, t.csv line 4\)"):
        load(file)
    splits = load(file, on_bad_example="skip")
    assert splits["train"]["text"][:] == ["a", "d"]
    assert [(b.split, b.example) for b in splits.bad] == [("train", "t.csv line 3"), ("train", "t.csv line 4")]
    assert [r.place for r in read_rows(file) if isinstance(r, BadRow)] == ["t.csv line 3", "t.csv line 4"]


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("t.csv", "text;label\na, or b;x\nc;y\n", "separated by semicolons"),
        ("t.csv", "text\tlabel\na, or b\tx\nc\ty\n", "separated by tabs"),
        ("t.csv", "sep=;\ntext;label\na, or b;x\nc;y\n", ""),
        ("t.tsv", "text\tlabel\na, or b\tx\nc\ty\n", ""),
        ("t.tsv", 'text\tlabel\n"a, or b"\tx\nc\ty\n', "the quotes around 1 cells were removed"),
        ("t.csv", "\ufefftext,label\n\"a, or b\",x\nc,y\n", ""),
        ("t.csv", "text,label\n\"a, or b\",x\nc,y\n".encode("utf-16"), "read as UTF-16"),
        ("t.csv.gz", gzip.compress(b'text,label\n"a, or b",x\nc,y\n'), ""),
        ("t.jsonl.gz", gzip.compress(b'{"text": "a, or b", "label": "x"}\n{"text": "c", "label": "y"}\n'), ""),
        ("t.csv", 'text, label\n"a, or b", x\nc, y\n', "the space after each delimiter belongs to no cell"),
        ("T.CSV", 'text,label\r\n"a, or b",x\r\nc,y\r\n', ""),
    ],
    ids=range(11),
)  # fmt: skip
def test_dialects(name, content, note, tmp_path):
    splits = load(written(tmp_path, content, name))
    assert splits["train"].to_dict() == {"text": ["a, or b", "c"], "label": ["x", "y"]}
    assert (note in splits.notes[0]) if note else not splits.notes
    assert [r["text"] for r in read_rows(tmp_path / name)] == ["a, or b", "c"]


def test_tabs_in_a_csv_whose_quotes_enclose_line_ends(tmp_path):
    splits = load(written(tmp_path, 'text\tlabel\n"a\nb"\tx\n"c, d\n"\ty\n'))
    assert splits["train"].to_dict() == {"text": ["a\nb", "c, d\n"], "label": ["x", "y"]}
    assert splits.notes == ["t.csv: the cells are separated by tabs."]


def test_a_comma_in_a_quoted_column_name_is_no_delimiter(tmp_path):
    train = load(written(tmp_path, '"text, whole";label\na, or b;x\nc;y\n'))["train"]
    assert train.to_dict() == {"text, whole": ["a, or b", "c"], "label": ["x", "y"]}


def test_a_quote_at_the_start_of_a_tsv_cell_merges_no_lines(tmp_path):
    lines = [f"{q}film {i}\t{'ab'[i % 2]}" for i, q in enumerate(['"', "", '"', '""', "", '"half" of it '])]
    train = load(written(tmp_path, "sentence\tlabel\n" + "\n".join(lines), "t.tsv"))["train"]
    assert train["sentence"][:] == [line.split("\t")[0] for line in lines]


def test_a_tsv_in_which_quotes_enclose_tabs_and_line_ends(tmp_path):
    rows = [("tab\there", "x"), ("line\nend", "y"), ('say "no"', "x"), ("plain", "y")]
    with (tmp_path / "t.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("text", "label"), *rows])
    assert load(tmp_path / "t.tsv")["train"]["text"][:] == [text for text, _ in rows]


def test_files_with_different_columns_are_no_parts_of_one_split(tmp_path):
    written(tmp_path, "text,label\na,x\n", "part-0.csv")
    written(tmp_path, "text,score\nb,1\n", "part-1.csv")
    with pytest.raises(UserError, match=r"different columns: 'part-1.csv' has not 'label', unlike 'part-0.csv'"):
        load(tmp_path / "part-*.csv")


def test_held_out_files_may_have_other_columns_and_types(tmp_path):
    written(tmp_path, "id,text,label\n1,a,x\n2,b,1\n", "train.csv")
    (tmp_path / "test.jsonl").write_text('{"text": "a", "label": 1}\n')
    splits = load_splits(DataArguments(dataset_name=str(tmp_path)))
    assert splits["train"].column_names == ["id", "text", "label"] and splits["test"]["label"][:] == [1]


# ---- JSON and Parquet ----


def test_json_keeps_its_own_types(tmp_path):
    rows = [{"text": "2024-01-01", "label": 1}, {"text": "12", "label": 2.5}, {"text": None}]
    for name, content in (("t.json", json.dumps(rows)), ("t.jsonl", "\n".join(map(json.dumps, rows)))):
        train = load(written(tmp_path, content, name))["train"]
        assert train.to_dict() == {"text": ["2024-01-01", "12", None], "label": [1.0, 2.5, None]}


@pytest.mark.parametrize("late", [False, True])
def test_a_json_column_of_several_kinds_is_text(late, tmp_path):
    first = [{"label": 1}] * (tables.CHUNK + 1 if late else 1)
    rows = [*first, {"label": "1"}, {"label": True}, {"label": 2**70}, {"label": 1.5}]
    splits = load(written(tmp_path, "\n".join(map(json.dumps, rows)), "t.jsonl"))
    assert splits["train"]["label"][-5:] == ["1", "1", "true", str(2**70), "1.5"]
    assert splits.notes == ["Column 'label' holds several kinds of values; all are read as text."]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"a": [1]}', '{"a": 1}'], "column 'a' of .* mixes lists or objects with other values"),
        (['{"a": 1}', '{"a": 1, "a": 2}'], "t.jsonl line 2: it is not valid JSON .the name 'a' occurs twice"),
        (['{"a": 1}', "[2]"], r"t.jsonl line 2: \[2\] is not an object"),
        (['{"a": 1}', '{"a": '], "t.jsonl line 2: it is not valid JSON"),
        (["{", '"a": [1]}'], "is one JSON object, not a list"),
        (['{"data": [{"a": 1}, {"a": 2}]}'], "is one JSON object, not a list"),
        (['{"a": {"0": 1, "1": 2}}'], r"frame.to_json\(path, orient=\"records\", lines=True\)"),
        ([json.dumps({"a": list(range(20))})], "is one JSON object, not a list"),
    ],
)
def test_json_that_is_no_table(lines, said, tmp_path):
    with pytest.raises(UserError, match=said):
        load(written(tmp_path, "\n".join(lines), "t.jsonl"))


def test_parquet_parts_and_categories(tmp_path):
    one = pa.table({"text": ["a"], "label": pa.array(["x"]).dictionary_encode(), "n": pa.array([1], pa.int32())})
    two = pa.table({"text": ["b"], "label": ["y"], "n": pa.array([2], pa.int64())})
    pq.write_table(one, tmp_path / "p0.parquet")
    pq.write_table(two.replace_schema_metadata(None), tmp_path / "p1.parquet")
    assert load(tmp_path / "p0.parquet")["train"]["label"][:] == ["x"]
    train = load(tmp_path / "p*.parquet")["train"]
    assert train["label"][:] == ["x", "y"] and train["n"][:] == [1, 2]


def test_parquet_views_and_repeated_columns(tmp_path):
    pq.write_table(pa.table({"text": pa.array(["a"], pa.string_view()), "label": [1]}), tmp_path / "v.parquet")
    assert load(tmp_path / "v.parquet")["train"].features["text"].dtype == "string"
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], names=["text", "label", "label"])
    pq.write_table(twice, tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t.parquet' has several columns called 'label'. Rename them"):
        load(tmp_path / "t.parquet")


def test_a_file_of_which_no_row_fits(tmp_path):
    with pytest.raises(UserError, match=r"has no row that fits \(t.csv line 2: it has 3 cells"):
        load(written(tmp_path, "text,label\na,b,c\n"), on_bad_example="skip")


# ---- large files ----


def test_a_large_file_is_converted_once_and_known_by_its_content(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_IN_MEMORY", 0)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [(f"text {i}", str(i % 3)) for i in range(2 * tables.CHUNK + 7)]
    body = "text,label\n" + "".join(f"{a},{b}\n" for a, b in rows)
    file = written(tmp_path, body)
    train = load(file)["train"]
    assert train["text"][:] == [a for a, _ in rows] and train.cache_files
    (arrow,) = (tmp_path / "cache" / "hf_transfer").glob("*.arrow")
    stamp = arrow.stat().st_mtime_ns
    assert load(file)["train"]["label"][:] == [b for _, b in rows] and arrow.stat().st_mtime_ns == stamp
    before = file.stat()
    file.write_text(body.replace("text 5,", "text X,"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load(file)["train"]["text"][5] == "text X", "same name, size and time, other content"
    assert not list((tmp_path / "cache" / "hf_transfer").glob("*.part"))


# ---- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "json"])
def test_bytes_that_are_no_text_are_no_part_of_a_name(form, tmp_path):
    """In a label, too: `caf\ufffd` would be a class. The replacement character itself may stand in a text."""
    rows = [{"text": "one \ufffd", "label": "a"}, {"text": "two", "label": "caf\xe9"}, {"text": "three", "label": "b"}]
    lines = {
        "csv": ["text,label", *(f"{r['text']},{r['label']}" for r in rows)],
        "tsv": ["text\tlabel", *(f"{r['text']}\t{r['label']}" for r in rows)],
        "jsonl": [json.dumps(r, ensure_ascii=False) for r in rows],
        "json": [json.dumps(rows, ensure_ascii=False)],
    }[form]
    file = tmp_path / f"t.{form}"
    file.write_bytes("\n".join(lines).encode().replace("\xe9".encode(), b"\xe9"))
    with pytest.raises(UserError, match="is not text in UTF-8"):
        load_splits(DataArguments(train_file=str(file)))
    for streaming in (False, True):
        args = DataArguments(train_file=str(file), on_bad_example="skip", streaming=streaming, max_eval_samples=1)
        splits = (beginning if streaming else load_splits)(args)
        assert splits["train"].to_list() == [rows[0], rows[2]]
        place = {"json": "entry 2", "jsonl": "line 2"}.get(form, "line 3")
        assert splits.bad == [BadExample("train", f"t.{form} {place}", "not valid UTF-8")]


@pytest.mark.parametrize("column", ["text", "label"])
def test_half_a_character_is_a_row_that_does_not_fit(column, tmp_path):
    rows = [{"text": f"text {i} \U0001f600", "label": "ab"[i % 2]} for i in range(4)]
    rows[2][column] = "half \ud83d"
    file = tmp_path / "t.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"t.jsonl line 3: not valid Unicode \(half a character\)"):
        load_splits(DataArguments(train_file=str(file)))
    splits = load_splits(DataArguments(train_file=str(file), on_bad_example="skip"))
    assert splits["train"].to_list() == [*rows[:2], rows[3]] and len(splits.bad) == 1


def test_a_header_and_a_parquet_file_that_are_no_text(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"text,caf\xe9\na,b\n")
    with pytest.raises(UserError, match=r"the header of .*t.csv' is not text in UTF-8. `iconv"):
        load_splits(DataArguments(train_file=f"{tmp_path}/t.csv", on_bad_example="skip"))
    texts = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"]).buffers())
    pq.write_table(pa.table({"text": texts, "label": [1]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t.parquet' cannot be read .*UTF8"):
        load_splits(DataArguments(train_file=f"{tmp_path}/t.parquet"))
