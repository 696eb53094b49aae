"""Folders of images: what is a split, what is a class, and that every file is accounted for."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest
from datasets import ClassLabel, Image
from PIL import Image as Pixels

from hf_transfer import UserError
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.image_folders import read_image_folder
from hf_transfer.data.image_paths import IMAGE_SUFFIXES, UNREADABLE_IMAGES
from hf_transfer.data.labels import infer_labels
from hf_transfer.data.load import load_held_out, load_splits
from hf_transfer.data.split_names import split_roles
from hf_transfer.data.splits import make_data
from hf_transfer.data.stream_order import interleaved


def fill(root, *patterns):
    """Empty files: `cat/#.png*3` is three of them; reading a folder opens none."""
    for pattern in patterns:
        path, _, number = pattern.partition("*")
        for i in range(int(number or 1)):
            file = root / path.replace("#", str(i))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    return root


def both(*places, n=2):
    """Folders `cat` and `dog` with `n` images each."""
    return [f"{place}/{name}/#.png*{n}" for place in places for name in ("cat", "dog")]


def read(root, **keys):
    return read_image_folder(root, DataArguments(dataset_name=str(root), **keys))


def classes(split):
    """Number of images by class name; by label where there are no class folders."""
    feature = split.features["label"]
    return dict(Counter(feature.int2str(v) if isinstance(feature, ClassLabel) else v for v in split["label"][:]))


def numbers(splits):
    return {name: len(split) for name, split in splits.items()}


# ---- splits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (both("."), {"train": 4}),
        ([*both("train", "val"), "__MACOSX/train/._0.png"], {"train": 4, "validation": 4}),
        ([*both("train", "val"), "annotations/#.xml*3", "README.md"], {"train": 4, "validation": 4}),
        (both("training_set", "test_set"), {"train": 4, "test": 4}),
        (both("train2017", "val2017", "test2017"), {"train": 4, "validation": 4, "test": 4}),
        (both("Train", "Evaluation"), {"train": 4, "validation": 4}),
        (both("trainset", "testset"), {"train": 4, "test": 4}),
        (both("birds_train", "birds_test"), {"train": 4, "test": 4}),
        (both("dataset/images/train", "dataset/images/dev"), {"train": 4, "validation": 4}),
        ([*both("seg_train/seg_train", "seg_test/seg_test"), "seg_pred/seg_pred/#.jpg*3"], {"train": 4, "test": 4}),
        ([f"{c}/{s}/#.png" for c in ("cat", "dog") for s in ("train", "val")], {"train": 2, "validation": 2}),
        (both("train", "val", "extra"), {"train": 4, "validation": 4}),
        (both("test"), {"test": 4}),
    ],
)
def test_folders_of_splits_are_recognized(files, expected, tmp_path):
    splits = read(fill(tmp_path, *files))
    assert numbers(splits) == expected
    assert all(set(classes(split)) == {"cat", "dog"} for split in splits.values())


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            ["cat/#.png*2", "dog/#.png*2", "test/#.png*2"],
            "test can be read as a split or as a class, because of cat, dog",
        ),
        ([*both("train", "val"), "masks/a/1.png", "masks/b/1.png"], "because of masks next to it"),
        (["train/1.png", "car/1.png"], "train can be read as a split or as a class"),
        (both("train", "val", "dev"), "folders 'dev' and 'val' both mean the validation split"),
        (["cat/train/1.png", "cat/val/1.png", "dog/train/1.png"], "contains 'cat/train', which is named like a split"),
        (both("a/train", "a/val", "b/train", "b/val"), "contains 'a/train', which is named like a split"),
        ([*both("a/train", "a/val"), "b/1.png"], "contains 'a/train', which is named like a split"),
        (both("train/train", "train/val", "test"), "contains 'train', which is named like a split"),
        (both("fold1", "fold2"), r"fold1, fold2 look like parts of the data with the same classes \(cat, dog\)"),
        (["cat/1.png", "dog/1.png", "logo.png"], r"contains 1 image \(such as 'logo.png'\) next to the class folders"),
        (["#.png*3"], "contains 3 images, but no class folders"),
        (["train/images/#.png*3", "train/labels/#.txt*3"], "images' contains 3 images, but no class folders"),
        (["cat/1.png", "more/dog/2.png"], "at different depths: 'cat/1.png', but 'more/dog/2.png'"),
        (["cat/1.png", "cat/old/2.png", "dog/1.png"], "at different depths: 'cat/1.png', but 'cat/old/2.png'"),
        (["cat/#.heic*3", "dog/1.png"], "cat' contains no image that can be read, only 3 .heic"),
        (
            ["cat/#.heic*3", "dog/1.NEF"],
            r"only images that cannot be read \(3 .heic, 1 .nef\).*heif-convert.*darktable",
        ),
        (["notes/1.txt"], r"unrecognized data in folder .*: 1 .txt"),
    ],
)
def test_what_is_not_clear_is_an_error_that_says_it(files, said, tmp_path):
    with pytest.raises(UserError, match=said):
        read(fill(tmp_path, *files))


def test_names_of_splits_and_names_that_only_contain_one():
    assert split_roles(["test_tube", "flask"]) == {}
    assert split_roles(["crash_test", "crash_train"]) == {"crash_test": "test", "crash_train": "train"}
    assert split_roles(["Training Images", "VALIDATION", "test1", "validation_test", "trainer"]) == {
        "Training Images": "train",
        "VALIDATION": "validation",
        "test1": "test",
    }


def test_a_folder_that_is_named_like_a_split_is_a_class_among_classes(tmp_path):
    splits = read(fill(tmp_path, "train/1.png", "car/1.png", "bus/1.png"))
    assert (
        classes(splits["train"]) == {"bus": 1, "car": 1, "train": 1} and "train is read as a class" in splits.notes[0]
    )


# ---- classes -------------------------------------------------------------------------------------------------------


def test_classes_are_sorted_and_every_name_is_one(tmp_path):
    names = ["__background__", "NA", "None", "nan", "null", "001", "10", "2", "Zebra", "a b", "Éclair"]
    splits = read(fill(tmp_path, *(f"{name}/1.png" for name in names)))
    assert splits["train"].features["label"].names == sorted(names) and splits["train"].features["image"] == Image(
        decode=False
    )
    paths = [cell["path"] for cell in splits["train"]["image"][:]]
    assert paths == [str(tmp_path / name / "1.png") for name in sorted(names)]


def test_the_uppermost_folder_is_the_class(tmp_path):
    splits = read(fill(tmp_path, *(f"{c}/{year}/#.png*2" for c in ("cat", "dog") for year in (2020, 2021))))
    assert classes(splits["train"]) == {"cat": 4, "dog": 4} and "(as in cat/2020)" in splits.notes[0]


def test_held_out_splits_with_other_classes_than_training(tmp_path):
    splits = read(fill(tmp_path, *both("train", n=9), "val/dog/#.png*2"))
    assert classes(splits["validation"]) == {"dog": 2} and splits["validation"].features["label"].names == [
        "cat",
        "dog",
    ]
    splits = read(fill(tmp_path, "test/ant/1.png", "test/dog/1.png"))
    labels = infer_labels(splits["train"], "label", None)
    with pytest.raises(UserError, match="The test split has 1 examples with unknown label 'ant'"):
        make_data(splits, ("image",), "label", labels, DataArguments(), 0)


def test_a_test_folder_without_classes_is_unlabeled(tmp_path):
    splits = read(fill(tmp_path, *both("train", n=9), "test/#.png*2"))
    labels = infer_labels(splits["train"], "label", None)
    made = make_data(splits, ("image",), "label", labels, DataArguments(), 0)
    assert made.test is None and re.match("The test split .*has no labels", made.notes[0])
    name, _ = load_held_out(DataArguments(dataset_name=str(tmp_path)), None)
    assert name == "test", "and it is not replaced by the training split where it was to be evaluated on"
    splits = read(fill(tmp_path, "val/#.png*2"))
    with pytest.raises(UserError, match="2 examples of the validation split have no label"):
        make_data(splits, ("image",), "label", labels, DataArguments(), 0)


# ---- every file is counted -----------------------------------------------------------------------------------------


def test_the_notes_account_for_every_file(tmp_path):
    fill(tmp_path, *both("train", n=12), *both("val"), "train/cat/1.heic", "train/dog/Thumbs.db", "train/list.txt")
    fill(tmp_path, "train/cat/.ipynb_checkpoints/#.png*2", "val/empty/.keep", "samples/#.jpg*3", "LICENSE")
    splits = read(tmp_path)
    assert splits.notes == [
        "Not used, because the name says no split: samples (3 images).",
        "validation: no class, because there is no image in it: empty.",
        "train: 29 files found, 24 read; left out: 3 hidden, 1 .heic, 1 .txt. Convert HEIC images with `heif-convert "
        "IMAGE IMAGE.jpg` (libheif).",
        "validation: 5 files found, 4 read; left out: 1 hidden.",
        "In no split: 4 files (3 images, 1 no suffix).",
    ]


def test_links_are_followed_and_circles_are_not(tmp_path):
    fill(tmp_path / "far", "dog/#.png*3")
    root = fill(tmp_path / "near", "cat/1.png")
    (root / "dog").symlink_to(tmp_path / "far" / "dog")
    (root / "circle").symlink_to(root)
    (root / "cat" / "broken.png").symlink_to("nowhere")
    splits = read(root)
    assert classes(splits["train"]) == {"cat": 2, "dog": 3}, "a broken link is an image that cannot be read"
    assert splits.notes == ["train: 6 files found, 5 read; left out: 1 link to an enclosing folder."]


def test_a_name_that_is_no_text(tmp_path):
    fill(tmp_path, "cat/1.png", "dog/1.png")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/cat/\xff.png")).touch()
    with pytest.raises(UserError, match=r"cat/\\udcff.png' is not valid UTF-8"):
        read(tmp_path)


def test_all_suffixes_are_those_that_pil_opens():
    Pixels.init()
    opened = {suffix for suffix, form in Pixels.registered_extensions().items() if form in Pixels.OPEN}
    left_out = {".bufr", ".emf", ".eps", ".grib", ".h5", ".hdf", ".mpeg", ".mpg", ".ps", ".wmf"}
    assert opened - left_out <= IMAGE_SUFFIXES <= opened | {".mpo"} and not IMAGE_SUFFIXES & set(UNREADABLE_IMAGES)


# ---- metadata ------------------------------------------------------------------------------------------------------


def table(root, column, *rows, name="metadata.csv"):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("\n".join([f"file_name,{column}", *rows]) + "\n")
    return root


def test_metadata_without_labels_joins_the_class_folders(tmp_path):
    fill(table(tmp_path, "camera", "cat/0.png,nikon", "dog/1.png,NA", "dog/0.png,"), "cat/#.png*2", "dog/#.png*2")
    splits = read(tmp_path)
    assert classes(splits["train"]) == {"cat": 2, "dog": 2}
    assert splits["train"]["camera"][:] == ["nikon", None, None, "NA"] and splits.written == {"camera"}
    assert (
        splits.notes[0].startswith("train: no camera for 1 image that") and "4 files found, 4 read" in splits.notes[1]
    )


@pytest.mark.parametrize("labels", [("001", "002"), ("None", "NA"), ("null", "nan"), ("1.50", "True")])
def test_labels_of_metadata_stay_as_they_are_written(labels, tmp_path):
    a, b = labels
    fill(table(tmp_path, "label", f"0.png,{a}", f"1.png,{b}"), "#.png*2")
    assert classes(load_splits(DataArguments(dataset_name=str(tmp_path)))["train"]) == {a: 1, b: 1}


def test_metadata_of_one_split_only(tmp_path):
    table(fill(tmp_path, *both("train", "val"), "test/1.png"), "label", "cat/0.png,cat", "cat/1.png,cat",
          "dog/0.png,dog", "dog/1.png,dog", name="train/metadata.csv")  # fmt: skip
    splits = read(tmp_path)
    assert [classes(splits[name]) for name in ("train", "validation")] == [{"cat": 2, "dog": 2}] * 2
    assert splits["test"]["label"][:] == [None]


def test_images_that_metadata_does_not_list(tmp_path):
    fill(table(tmp_path, "label", "cat/0.png,cat", "dog/0.png,dog"), "cat/#.png*3", "dog/0.png")
    with pytest.raises(UserError, match=r"2 of 4 images of the train split have no label.*such as '.*cat/1.png'"):
        read(tmp_path)
    splits = read(tmp_path, on_bad_example="skip")
    assert splits.notes == ["train: 4 files found, 2 read; left out: 2 not listed in the metadata."]


def test_a_label_in_the_metadata_that_is_not_the_folder(tmp_path):
    fill(table(tmp_path, "label", "cat/0.png,dog", "dog/0.png,dog"), "cat/0.png", "dog/0.png")
    with pytest.raises(
        UserError, match=r"disagree about 1 image: .*cat/0.png' is 'dog' in the table and in folder 'cat'"
    ):
        read(tmp_path)
    assert classes(read(tmp_path, label_column_name="label")["train"]) == {"dog": 2}
    splits = read(table(tmp_path, "label", "cat/0.png,old", "dog/0.png,new"))
    assert classes(splits["train"]) == {"old": 1, "new": 1} and "not the names of the folders" in splits.notes[0]


def test_metadata_lists_files_of_any_name_and_of_other_systems(tmp_path):
    fill(table(tmp_path, "label", "img\\1,a", "img/2.png,b"), "img/1", "img/2.png")
    assert classes(read(tmp_path)["train"]) == {"a": 1, "b": 1}


def test_the_splits_of_a_column(tmp_path):
    rows = ["0.png,a,train", "1.png,b,train", "2.png,a,val", "3.png,b,Testing"]
    splits = read(fill(table(tmp_path, "kind,split", *rows), "#.png*4"))
    assert numbers(splits) == {"train": 2, "validation": 1, "test": 1}
    assert splits["test"]["kind"][:] == ["b"] and splits["train"].column_names == ["image", "kind"]
    table(tmp_path, "kind,split", *rows[:3], "3.png,b,later")
    with pytest.raises(UserError, match="1 of 4 images have no train, validation or test in it"):
        read(tmp_path)
    table(tmp_path, "kind,split", *rows[:3], "3.png,b,dev")
    with pytest.raises(UserError, match="'dev' and 'val' both mean the validation split"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("file_name,label\n0.png,a\ngone.png,b\n", "lists 1 image missing on disk .*gone.png"),
        ("file_name,label\n0.png,a\n0.png,b\n", "lists '0.png' twice"),
        ("file_name,label\n0.png,a,b\n", "line 2.* has 3 cells"),
        ("name,label\n0.png,a\n", "has no column file_name with the paths of the images. Its columns: name, label"),
        ("file_name,label\n,a\n", "row 1 of .* has no file_name"),
        ("file_name,label,label\n0.png,a,b\n", "column.*'label'"),
        ("file_name,image\n0.png,a\n", "column 'image' of .* would hide the images"),
    ],
)
def test_metadata_that_does_not_fit(rows, said, tmp_path):
    (fill(tmp_path, "0.png") / "metadata.csv").write_text(rows)
    with pytest.raises(UserError, match=said):
        read(tmp_path)


def test_other_tables_next_to_class_folders(tmp_path):
    (fill(tmp_path, "cat/1.png", "dog/1.png") / "names.csv").write_text("id,name\n0,cat\n1,dog\n")
    args = DataArguments(dataset_name=str(tmp_path))
    with pytest.raises(UserError, match=r"folders of images \(cat, dog\) and a table \(names.csv\)"):
        load_splits(args)
    (tmp_path / "names.csv").write_text("file_name,label\ncat/1.png,cat\ndog/1.png,dog\n")
    assert classes(load_splits(args)["train"]) == {"cat": 1, "dog": 1}, "a table of images is what it says"


def test_columns_have_the_names_of_the_keys(tmp_path):
    """So that a run on a table can be evaluated on a folder."""
    splits = read(fill(tmp_path, *both("train", "val")), image_column_name="file", label_column_name="kind")
    assert splits["validation"].column_names == ["file", "kind"] and splits["train"].features["kind"].names == [
        "cat",
        "dog",
    ]


# ---- streams -------------------------------------------------------------------------------------------------------


def test_a_stream_begins_with_every_class_and_mixes_them_evenly(tmp_path):
    split = read(fill(tmp_path, "a/#.png*60", "b/#.png*30", "c/1.png"))["train"]
    stream = list(interleaved(split))
    labels = [row["label"] for row in stream]
    assert labels[:3] == [0, 1, 2] and Counter(labels) == {0: 60, 1: 30, 2: 1}
    assert all(abs(Counter(labels[:n])[1] - n / 3) < 2 for n in range(len(labels)))
    assert len({row["image"]["path"] for row in stream}) == 91
