"""Data that is read as it comes: the right examples, each once a pass, none that is held out."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pixels
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from hf_transfer import Predictor, UserError, fine_tune
from hf_transfer.cli.program import main
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data import stream_training as module
from hf_transfer.data.labels import Labels
from hf_transfer.data.load import load_splits
from hf_transfer.data.record import Record, content_of
from hf_transfer.data.stream_training import Reader, Stream, mark
from hf_transfer.data.streaming import open_streams
from hf_transfer.run_folder import EXAMPLES, PASSED
from hf_transfer.tasks import TASKS
from tests import warm

KEYS = dict(streaming=True, max_steps=6, max_eval_samples=10, strategy="full", save_strategy="no", log_level="error")
LABELS = Labels("single_label_classification", ("a", "b"))


def write(folder, files=3, rows=40, extra=()):
    """Tables of texts `f-i`, labels by turns."""
    folder.mkdir(exist_ok=True)
    for f in range(files):
        lines = [json.dumps({"text": f"text {f} {i}", "label": "ab"[i % 2]}) for i in range(rows)]
        (folder / f"part-{f}.jsonl").write_text("\n".join([*lines, *(extra if f == files - 1 else ())]))
    return f"{folder}/part-*.jsonl"


def stream(name, held=(), skip=False, buffer=16, seed=3, **keys):
    args = DataArguments(
        dataset_name=name, streaming=True, label_column_name="label", on_bad_example="skip" if skip else "error", **keys
    )
    source = open_streams(args)["train"]
    task = TASKS["text-classification"]
    keep = lambda batch: {"text": batch["text"], "labels": batch["labels"], "__row__": batch["__row__"]}  # noqa: E731
    reader = Reader(("text",), source.features, LABELS, args, frozenset(held), task.read, keep)
    return Stream(source, reader, seed, buffer)


def texts(examples):
    return [e["text"] for e in examples]


def test_a_pass_gives_each_example_once_and_the_next_one_another_order(tmp_path):
    made = list(islice(stream(write(tmp_path / "d")), 240))
    first, second = texts(made[:120]), texts(made[120:])
    assert len(set(first)) == 120 and set(first) == set(second) and first != second
    assert first != sorted(first) and texts(islice(stream(write(tmp_path / "d")), 120)) == first
    assert texts(islice(stream(write(tmp_path / "d"), seed=4), 120)) != first
    assert all(e["labels"] == int(e["text"].split()[-1]) % 2 for e in made)
    numbers = {(e["text"], i < 120): e["__row__"] for i, e in enumerate(made)}
    assert len(set(numbers.values())) == 240, "each pass changes an example otherwise"
    assert texts(islice(stream(write(tmp_path / "d"), buffer=0), 3)) == ["text 0 0", "text 0 1", "text 0 2"]


def test_what_is_held_out_is_never_given_also_by_workers(tmp_path):
    name = write(tmp_path / "d")
    held = {f"text {f} {i}" for f in range(3) for i in range(0, 40, 7)}
    for workers in (0, 2):
        source = stream(name, held={mark([text]) for text in held})
        loader = DataLoader(source, batch_size=None, num_workers=workers)
        found = Counter(texts(islice(loader, 2 * (120 - len(held)))))
        assert not held & set(found) and set(found) == {f"text {f} {i}" for f in range(3) for i in range(40)} - held
        assert workers or set(found.values()) == {2}


def test_groups_of_which_an_example_is_held_out_are_never_given(tmp_path):
    rows = [{"text": f"text {i}", "label": "ab"[i % 2], "user": i // 10} for i in range(40)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = stream(str(tmp_path / "d.jsonl"), split_group_column_name="user")
    made.read.held_groups = frozenset(("1", "3"))
    assert set(texts(islice(made, 40))) == {f"text {i}" for i in (*range(10), *range(20, 30))}
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "t", "label": "a", "user": None}))
    made = stream(str(tmp_path / "d.jsonl"), split_group_column_name="user")
    made.read.held_groups = frozenset(("1",))
    with pytest.raises(UserError, match="no value in the group column"):
        list(islice(made, 1))


def test_more_workers_than_files_end_by_themselves(tmp_path):
    loader = DataLoader(stream(write(tmp_path / "d", files=1)), batch_size=4, num_workers=3, collate_fn=list)
    assert len(texts([e for batch in islice(loader, 10) for e in batch])) == 40


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"text": "odd", "label": "c"}, "(part-2.jsonl row 41, 'odd'): unknown label 'c'"),
        ({"text": "odd", "label": None}, "(part-2.jsonl row 41, 'odd'): missing label"),
        ({"text": " ", "label": "a"}, "(part-2.jsonl row 41, ' '): empty text"),
        ({"text": None, "label": "a"}, "(part-2.jsonl row 41): no value"),
    ],
)
def test_examples_that_cannot_be_used(row, why, tmp_path, capsys):
    name = write(tmp_path / "d", extra=[json.dumps(row)])
    with pytest.raises(UserError, match=rf"Unusable example in the stream {re.escape(why)}"):
        list(islice(stream(name), 130))
    made = stream(name, skip=True)
    assert len(set(texts(islice(made, 120)))) == 120
    assert (made.read.bad, made.read.seen) in (
        (1, 121),
        (1, 120),
    ) and "skipped an unusable example" in capsys.readouterr().err


def test_too_many_of_them_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MIN_SEEN", 50)
    name = write(tmp_path / "d", extra=[json.dumps({"text": f"odd {i}", "label": "c"}) for i in range(20)])
    with pytest.raises(UserError, match=r"max_bad_fraction: \d+ of \d+ examples of the stream"):
        list(islice(stream(name, skip=True), 1000))
    assert len(list(islice(stream(name, skip=True, max_bad_fraction=0.5), 1000))) == 1000


# ---- runs ----------------------------------------------------------------------------------------------------------


def test_a_run_over_a_stream(tiny_bert_folder, tmp_path, capsys):
    name = write(tmp_path / "d")
    run = fine_tune(tiny_bert_folder, name, output_dir=str(tmp_path / "o"), **{**KEYS, "log_level": "warning"})
    said = capsys.readouterr().out
    assert "train a stream, examined in advance: 108" in said and "12 of 120 training examples are held out" in said
    assert run.results["num_train_examples"] == 48 and run.results["labels"] == ["a", "b"]
    assert run.trainer.state.global_step == 6 and run.results["train_samples_per_second"] > 0
    held = set(run.trainer.train_dataset.read.held)
    assert len(held) == 10
    again = Predictor.load(run.output_dir).evaluate()
    assert again["metrics"] == pytest.approx(run.metrics) and again["num_examples"] == 10
    assert Predictor.load(run.output_dir).evaluate(Predictor.load(run.output_dir).other_data(dataset_name=name))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_stream_trained_on_is_recorded(workers, tiny_bert_folder, tmp_path):
    """Six batches of eight, and what was read ahead: a batch, or what two workers prefetch."""
    name = write(tmp_path / "d", rows=100)
    run = fine_tune(
        tiny_bert_folder, name, output_dir=str(tmp_path / "o"), shuffle_buffer_size=0, dataloader_num_workers=workers,
        **KEYS,
    )  # fmt: skip
    record = Record.load(run.output_dir / EXAMPLES)
    texts = [f"text {f} {i}" for f in range(3) for i in range(100)]
    passed = [t for t, h in zip(texts, content_of(Dataset.from_dict({"text": texts}), ("text",)), strict=True)
              if h in record.streamed]  # fmt: skip
    held = set(run.predictor._held_out(None, "validation").examples["text"])
    assert not held & set(passed) and not (run.output_dir / PASSED).exists()
    assert len(passed) == 56 if workers == 0 else 48 <= len(passed) <= 48 + 8 * 2 * 4
    if workers == 0:
        assert passed == [t for t in texts if t not in held][:56]
    found = run.evaluate()
    assert found["metrics"] == run.metrics and found["notes"] == []
    part = tmp_path / "d" / "part-0.jsonl"
    lines = part.read_text().splitlines()
    part.write_text("\n".join([json.dumps({"text": f"new {i}", "label": "ab"[i % 2]}) for i in range(30)] + lines))
    again = run.predictor._held_out(None, "validation")
    assert set(again.examples["text"]) == held, "the examples that were held out are recognized"
    other = run.predictor.evaluate(run.predictor.other_data(test_file=str(part)))
    assert other["left_out"] == {"trained_on": sum(t.startswith("text 0") for t in passed)}


@pytest.mark.parametrize(
    ("header", "cells", "keys"),
    [
        ("label", ['"[1, 0]"', '"[0, 1]"', '"[1, 1]"', '"[0, 0]"'], {"label_vector_names": ["x", "y"]}),
        ("labels", ["x", "y", "x;y", '""'], {"label_delimiter": ";"}),
        ("x,y", ["1,0", "0,1", "1,1", "0,0"], {"label_column_name": ["x", "y"]}),
        ("labels", ["\"['x']\"", "\"['y']\"", "\"['x', 'y']\"", '"[]"'], {}),
    ],
)
def test_several_labels_in_a_stream(header, cells, keys, tmp_path, capsys):
    """In every form, and what does not fit is one bad example, named with its file and row."""
    file = tmp_path / "t.csv"
    file.write_text("\n".join([f"text,{header}", *(f"t {i},{cells[i % 4]}" for i in range(20)), f"odd,{cells[0]}"]))
    labels = Labels("multi_label_classification", ("x", "y"))
    args = DataArguments(**{"label_column_name": header, "on_bad_example": "skip", **keys, "streaming": True},
                         train_file=str(file))  # fmt: skip
    source = open_streams(args)["train"]
    keep = lambda batch: {"labels": batch["labels"], "text": batch["text"]}  # noqa: E731
    read = Reader(("text",), source.features, labels, args, frozenset([mark(["odd"])]), str, keep)
    made = list(islice(iter(Stream(source, read, 0, 0)), 20))
    assert [e["labels"] for e in made] == [[1, 0], [0, 1], [1, 1], [0, 0]] * 5
    odd = {"x,y": "1,"}.get(header, "zzz" if "label_delimiter" in keys else '"[1, 0, 1]"')
    file.write_text(file.read_text().replace("t 7," + cells[3], "t 7," + odd))
    assert len(list(islice(iter(Stream(source, read, 0, 0)), 19))) == 19
    assert "stream (t.csv row 8, 't 7')" in capsys.readouterr().err


def test_numbers_of_a_stream_are_typed_by_its_beginning(tmp_path, monkeypatch, capsys):
    file = tmp_path / "t.csv"
    file.write_text("\n".join(["x,label", *(f"{i}.50,{'ab'[i % 2]}" for i in range(20)), "seven,a", "1e3,b"]))
    args = DataArguments(train_file=str(file), streaming=True, label_column_name="label", max_eval_samples=2)
    source, same = open_streams(args)["train"], lambda batch: {n: batch[n] for n in ("x", "labels")}
    held = frozenset([mark([3.5])])
    read = Reader(("x",), source.features, LABELS, args, held, float, same, numbers=frozenset("x"))
    given = iter(Stream(source, read, 0, 0))
    with pytest.raises(UserError, match=r"t\.csv row 21.*: column 'x' contains 'seven', which is not a number"):
        list(islice(given, 60))
    read.args = replace(args, on_bad_example="skip")
    numbers = [e["x"] for e in islice(iter(Stream(source, read, 0, 0)), 20)]
    assert numbers == [*(i + 0.5 for i in range(20) if i != 3), 1000.0], "3.5 is held out, however it is written"
    assert "skipped an unusable example in the stream (t.csv row 21" in capsys.readouterr().err


def test_what_a_stream_trains_on_is_what_a_data_set_trains_on(tiny_bert_folder, tmp_path):
    """In the order they come, with the validation split's own file: the same weights as without streaming."""
    name = write(tmp_path / "d", files=1, rows=48)
    (tmp_path / "v.jsonl").write_text(
        "\n".join(json.dumps({"text": f"held {i}", "label": "ab"[i % 2]}) for i in range(9))
    )
    keys = dict(train_file=name, validation_file=f"{tmp_path}/v.jsonl", max_eval_samples=9, max_steps=6)
    common = dict(strategy="full", save_strategy="no", log_level="error", train_sampling_strategy="sequential")
    streamed = fine_tune(
        tiny_bert_folder, **common, **keys, streaming=True, shuffle_buffer_size=0, output_dir=str(tmp_path / "a")
    )
    whole = fine_tune(tiny_bert_folder, **common, **keys, output_dir=str(tmp_path / "b"))
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in "ab")
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert streamed.metrics == pytest.approx(whole.metrics)


def test_a_resumed_stream_goes_on_where_it_was_also_in_a_later_pass(tiny_bert_folder, tmp_path):
    """A pass has 30 batches less those held out; the checkpoints are in the first and in the second."""
    keys = {
        **KEYS, "max_steps": 24, "save_strategy": "steps", "save_steps": 8, "save_total_limit": None,
        "max_eval_samples": 4, "token_masking": 0.2,
    }  # fmt: skip
    name = write(tmp_path / "d", rows=35)
    fine_tune(tiny_bert_folder, name, output_dir=str(tmp_path / "whole"), **keys)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    passed = Record.load(tmp_path / "whole" / EXAMPLES).streamed
    for step in (8, 16):
        place = tmp_path / f"from{step}"
        place.mkdir()
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", place / f"checkpoint-{step}")
        fine_tune(tiny_bert_folder, name, output_dir=str(place), resume_from_checkpoint="auto", **keys)
        resumed = load_file(place / "model.safetensors")
        assert all(torch.equal(whole[k], resumed[k]) for k in whole), step
        assert np.array_equal(Record.load(place / EXAMPLES).streamed, passed), "it is read again from its start"
    place = tmp_path / "other"
    place.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-8", place / "checkpoint-8")
    for changed, said in (
        ({"shuffle_buffer_size": 5}, "shuffle_buffer_size: 1000 then, 5 now"),
        ({"train_val_split": 0.5}, "train_val_split: 0.1 then, 0.5 now"),
    ):
        with pytest.raises(UserError, match=said):
            fine_tune(
                tiny_bert_folder, name, output_dir=str(place), resume_from_checkpoint="auto", **{**keys, **changed}
            )


@pytest.mark.parametrize("has_record", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_stream_that_is_resumed_at_its_last_step_ends(has_record, tiny_bert_folder, tmp_path):
    """As after a run that was killed while it evaluated; what was trained on is what was known of it."""
    name, place = write(tmp_path / "d", rows=35), tmp_path / "o"
    keys = {**KEYS, "output_dir": str(place), "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    fine_tune(tiny_bert_folder, name, **keys)
    weights, before = load_file(place / "model.safetensors"), Record.load(place / EXAMPLES)
    (place / "results.json").unlink()
    if not has_record:
        replace(before, streamed=None).save(place / EXAMPLES)
    run = fine_tune(tiny_bert_folder, name, resume_from_checkpoint="auto", **keys)
    again = load_file(place / "model.safetensors")
    assert run.trainer.state.global_step == 2 and all(torch.equal(weights[k], again[k]) for k in weights)
    record = Record.load(place / EXAMPLES)
    assert np.array_equal(record.streamed, before.streamed) if has_record else record.streamed is None


@pytest.mark.slow
def test_a_resumed_stream_that_skips_nothing_does_not_know_what_it_trained_on(tiny_bert_folder, tmp_path):
    name, place = write(tmp_path / "d", rows=35), tmp_path / "o"
    keys = {**KEYS, "max_steps": 4, "save_strategy": "steps", "save_steps": 3, "save_total_limit": None}
    fine_tune(tiny_bert_folder, name, output_dir=str(tmp_path / "w"), **keys)
    shutil.copytree(tmp_path / "w" / "checkpoint-3", place / "checkpoint-3")
    run = fine_tune(
        tiny_bert_folder, name, output_dir=str(place), resume_from_checkpoint="auto", ignore_data_skip=True, **keys
    )
    assert Record.load(place / EXAMPLES).streamed is None
    assert "Examples that were trained on are not recognized" in run.evaluate()["notes"][0]


# ---- several processes ---------------------------------------------------------------------------------------------


def run_of_ranks(model, name, folder, processes, workers):
    keys = {**KEYS, "dataloader_num_workers": workers, "use_cpu": True, "max_steps": 4, "shuffle_buffer_size": 16}
    fine_tune(
        model, name, output_dir=str(folder), per_device_train_batch_size=8 // processes, optim="sgd",
        learning_rate=0.5, max_grad_norm=0, preflight=False, **keys,
    )  # fmt: skip
    return 0


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_several_processes_read_a_stream_as_one_does(workers, tiny_bert_folder, tmp_path):
    """Each takes its share of every batch: the same weights, and the same record of what was trained on."""
    name, log = write(tmp_path / "d", rows=35), tmp_path / "log.txt"
    for processes in (1, 2):
        run = partial(run_of_ranks, tiny_bert_folder, name, tmp_path / str(processes), processes, workers)
        codes = warm.ranks(processes, run, log) if processes > 1 else {0: run()}.values()
        assert set(codes) == {0}, log.read_text()[-8000:]
    one, two = (load_file(tmp_path / str(n) / "model.safetensors") for n in (1, 2))
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=1e-6, rtol=1e-5)
    passed, again = (Record.load(tmp_path / str(n) / EXAMPLES).streamed for n in (1, 2))
    assert not (tmp_path / "2" / PASSED).exists()
    assert len(passed) >= 32 and (workers or np.array_equal(passed, again)), "workers read ahead as far as they get"


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_stream_of_images_with_everything(workers, tiny_vit_folder, tmp_path):
    rng = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
    for part in range(2):
        cells = [Pixels.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)) for _ in range(30)]
        rows = {"image": cells, "label": [0, 1] * 15}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"train-{part}.parquet")
    run = fine_tune(
        tiny_vit_folder, f"{tmp_path}/train-*.parquet", output_dir=str(tmp_path / "o"), augmentation="strong",
        mixup_alpha=0.2, dataloader_num_workers=workers, **KEYS,
    )  # fmt: skip
    assert run.results["labels"] == ["cat", "dog"] and np.isfinite(run.metrics["loss"])
    facts = run.results["data_facts"]["splits"]
    assert facts["validation"]["examples"] == 6 and facts["train"]["sizes"]["width"][0] == 24
    assert Predictor.load(run.output_dir).evaluate()["metrics"] == pytest.approx(run.metrics)


def test_an_image_folder_is_streamed(tmp_path):
    for i in range(6):
        place = tmp_path / ("cat", "dog")[i % 2]
        place.mkdir(exist_ok=True)
        Pixels.new("RGB", (4, 4), (i, 0, 0)).save(place / f"{i}.png")
    args = DataArguments(dataset_name=str(tmp_path), streaming=True, max_eval_samples=2)
    streams = open_streams(args)
    whole = load_splits(DataArguments(dataset_name=str(tmp_path)))["train"]
    assert streams["train"].features["label"] == whole.features["label"]
    task = TASKS["image-classification"]
    pixels = [task.read(row["image"]).getpixel((0, 0))[0] for row in streams["train"]]
    assert sorted(pixels) == list(range(6))


# ---- keys ----------------------------------------------------------------------------------------------------------


def test_what_a_stream_cannot_do_is_said_at_once(tiny_bert_folder, tmp_path, capsys):
    words = ["--model_name_or_path", tiny_bert_folder, "--dataset_name", write(tmp_path / "d")]
    words += ["--output_dir", f"{tmp_path}/o", "--streaming", "true"]
    assert main(["train", *words, "--drop_leaks", "true", "--class_weights", "auto", "--max_train_samples", "5"]) == 2
    said = capsys.readouterr().err
    for part in (
        "max_steps must say how long",
        "max_eval_samples must say",
        "drop_leaks",
        "class_weights: auto",
        "max_train",
    ):
        assert part in said, part
    limits = ["--max_steps", "4", "--max_eval_samples", "4"]
    assert main(["train", *words, *limits, "--strategy", "gradual", "--quiet"]) == 2
    assert "The training set has no length" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bundled:digits", "saved", "table"])
def test_what_is_here_already_is_not_streamed(name, tmp_path):
    if name == "saved":
        name = str(tmp_path / "s")
        Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(name)
    elif name == "table":
        Pixels.new("RGB", (4, 4)).save(tmp_path / "a.png")
        (tmp_path / "t.csv").write_text("image,label\na.png,x\n")
        name = str(tmp_path / "t.csv")
    with pytest.raises(UserError, match=r"streaming: .* already"):
        open_streams(DataArguments(dataset_name=name, streaming=True, max_eval_samples=1))


def test_files_of_a_stream_that_differ(tmp_path):
    """The dialect of the beginning is said, and a column that is missing later is not taken for empty cells."""
    for i, content in enumerate(("text;label\na;x\nb;y\n", "label;text\nx;c\n", "text\nd\n")):
        (tmp_path / f"{i}.csv").write_text(content)
    streams = open_streams(DataArguments(dataset_name=f"{tmp_path}/*.csv", streaming=True, max_eval_samples=1))
    assert streams.notes == ["0.csv: the cells are separated by semicolons."]
    rows = list(streams["train"])
    assert [row["text"] for row in rows] == ["a", "b", "c", "d"] and [row["__reason__"] for row in rows[:3]] == [
        None
    ] * 3
    assert rows[3]["__reason__"] == "it has no column 'label', which the beginning of the data has"


def test_a_label_of_another_kind_far_into_a_file(tmp_path):
    """The beginning decides what a column holds; what is of another kind ends in a sentence."""
    rows = "\n".join(f"t{i},{i % 2}" for i in range(10_000))  # as many as are read at a time
    (tmp_path / "t.csv").write_text(f"text,label\n{rows}\nt,odd\n")
    made = stream(f"{tmp_path}/t.csv", buffer=0)
    made.read.labels = Labels("single_label_classification", ("0", "1"))
    assert len(list(islice(made, 9_900))) == 9_900
    with pytest.raises(UserError, match=r"\(t.csv row 10001, 't'\): unknown label 'odd'"):
        list(islice(made, 10_001))
