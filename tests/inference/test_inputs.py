"""The files of a folder that `predict` is given."""

from __future__ import annotations

import gzip

from PIL import Image

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.inference.inputs import read_inputs
from hf_transfer.tasks import TASKS


def test_a_folder_is_read_as_training_reads_it(tmp_path):
    for name in ("a/1.png", "a/2.jfif", "b/3.TGA", "b/.hidden.png", ".ipynb_checkpoints/4.png", "__MACOSX/5.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name, format="JPEG" if "jfif" in name else None)
    (tmp_path / "b" / "6.heic").touch()
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    answers = list(read_inputs([str(tmp_path)], TASKS["image-classification"], DataArguments()))
    shown = [answer.shown.removeprefix(f"{tmp_path}/") for answer in answers]
    assert shown == ["a/1.png", "a/2.jfif", "b/3.TGA", "b/6.heic", "linked/1.png", "linked/2.jfif"]
    assert [bool(answer.error) for answer in answers] == [False, False, False, True, False, False]
    assert "heif-convert" in answers[3].error


def test_a_folder_of_texts_has_the_same_rules(tmp_path):
    (tmp_path / "1.txt").write_text("one\ntwo\n")
    (tmp_path / ".2.txt").write_text("hidden\n")
    (tmp_path / "3.csv.gz").write_bytes(gzip.compress(b"text\nthree\n"))
    (tmp_path / "4.tar.gz").write_bytes(gzip.compress(b"no table"))
    answers = read_inputs([str(tmp_path)], TASKS["text-classification"], DataArguments())
    assert [answer.shown for answer in answers] == ["one", "two", "three"]


def test_paths_in_a_table_that_were_written_on_windows(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "1.png")
    (tmp_path / "t.csv").write_text("image\na\\1.png\n")
    (answer,) = read_inputs([f"{tmp_path}/t.csv"], TASKS["image-classification"], DataArguments())
    assert answer.shown == f"{tmp_path}/a/1.png" and not answer.error
