"""Orientation, depth and range of pixels: the same for an image in every form, whatever its own maximum is."""

from __future__ import annotations

import io
import json

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageColumn
from PIL import Image as Pixels

from hf_transfer import Predictor, UserError, fine_tune
from hf_transfer.cli.program import main
from hf_transfer.data.images import num_beyond, open_image, to_channels
from hf_transfer.data.in_memory import splits_of
from hf_transfer.data.pixel_range import checked_range, decide_range, deep_extremes, num_clipped

HUSH = dict(num_train_epochs=1, save_strategy="no", strategy="full", log_level="error", report_to="none")


def content(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def gray(array, pixel_range=None):
    """The 8-bit levels of an array, as a model receives them."""
    return np.asarray(to_channels(open_image(array), 1, pixel_range))


# ---- orientation ----


def turned(path, orientation=6):
    """A wide image with a flag that says it is to be rotated."""
    exif = Pixels.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:4, :, 0] = 250
    Pixels.fromarray(pixels).save(path, exif=exif, quality=95)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_form_of_an_image_is_rotated_alike(orientation, tmp_path):
    path = turned(tmp_path / "a.jpg", orientation)
    data = path.read_bytes()
    frame = pd.DataFrame({"image": [Pixels.open(path).copy(), Pixels.open(path)], "label": ["a", "b"]})
    forms = [
        data,
        bytearray(data),
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(path)},
        Pixels.open(path),
        Pixels.open(io.BytesIO(data)).copy(),
        Pixels.open(path).convert("RGB"),
        *Dataset.from_dict({"image": [str(path)]}).cast_column("image", ImageColumn())["image"],
        *splits_of(frame)["train"]["image"],
    ]
    expected = np.asarray(open_image(path))
    assert expected.shape == ((16, 8, 3) if orientation > 4 else (8, 16, 3))
    for form in forms:
        np.testing.assert_array_equal(np.asarray(open_image(form)), expected)
        np.testing.assert_array_equal(np.asarray(open_image(open_image(form))), expected)  # once is enough


def test_images_that_a_dataset_has_encoded_without_their_rotation_are_counted(tmp_path):
    """`datasets` writes PIL images without a file anew; images with a file or of their bytes keep what they say."""
    images = [Pixels.open(io.BytesIO(turned(tmp_path / f"{i}.jpg").read_bytes())) for i in range(3)]
    plain = Pixels.new("RGB", (4, 4))
    made = splits_of(Dataset.from_dict({"image": [*images, plain], "label": list("abab")}))
    assert len(made.notes) == 1 and made.notes[0].startswith("Column 'image': 3 of 4 images looked at are JPEGs")
    files = [{"bytes": (tmp_path / f"{i}.jpg").read_bytes(), "path": None} for i in range(3)]
    features = Features({"image": ImageColumn()})
    for cells in (files, [Pixels.open(tmp_path / f"{i}.jpg") for i in range(3)], [None, plain]):
        assert splits_of(Dataset.from_dict({"image": cells}, features=features)).notes == []
    assert splits_of(pd.DataFrame({"image": images})).notes == []


# ---- depth ----


@pytest.mark.parametrize("top", [200, 255, 256, 4095, 65535])
@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM", "array", "big-endian", "PIL"])
def test_16_bits_are_scaled_by_65535_whatever_the_maximum(top, form):
    array = np.array([[0, 100], [200, top]], np.uint16)
    image = Pixels.fromarray(array)
    value = {"array": array, "big-endian": array.astype(">u2"), "PIL": image}.get(form)
    value = content(image, form) if value is None else value
    np.testing.assert_array_equal(gray(value), (array / 257.0).round().astype(np.uint8))


def test_arrays():
    color = np.full((2, 2, 3), 30000, np.uint16)
    assert np.asarray(open_image(color)).tolist() == np.full((2, 2, 3), 117).tolist()
    assert open_image(np.zeros((3, 4, 1), np.uint8)).size == (4, 3)
    assert gray(np.array([[0, 255]])).tolist() == [[0, 255]]  # 64-bit integers
    assert gray(np.array([[0.0, 0.5, 1.0]], np.float16)).tolist() == [[0, 128, 255]]
    for wrong in (np.zeros((2, 2, 3)), np.array([[2**40]]), np.array([[np.nan]]), [[1, 2]], 3):
        with pytest.raises(ValueError, match="cannot be read as an image"):
            open_image(wrong)


# ---- range ----


def test_a_range_is_the_same_for_every_image():
    for array in (np.array([[0.0, 1.0, 2.0]]), np.array([[0.0, 1.0, 4.0]])):
        assert gray(array.astype(np.float32), (0, 4))[0, 1] == 64
    beyond = open_image(np.array([[-1.0, 0.5, 1.0, 1.01]], np.float32))
    assert gray(beyond).tolist() == [[0, 128, 255, 255]] and num_beyond(beyond, None) == 2
    assert gray(np.array([[-1000, 0, 3000]], np.int32), (-1000, 3000)).tolist() == [[0, 64, 255]]
    assert num_beyond(open_image(np.array([[300]], np.uint16)), (0, 1)) == 0  # 16 bits have their own


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ([], None),
        ([(0, 1)], (0, 1)),
        ([(0.1, 0.3), (0.2, 0.98)], (0, 1)),
        ([(0, 0.01)], (0, 0.01)),
        ([(0, 200), (3, 17)], (0, 255)),
        ([(0, 1.01)], (0, 1.01)),
        ([(-1, 1)], (-1, 1)),
        ([(-1000, 3000), (0, 10)], (-1000, 3000)),
        ([(7, 7)], (0, 7)),
        ([(0, 0)], (0, 1)),
    ],
)
def test_how_a_range_is_decided(measured, expected):
    assert decide_range(np.array(measured, float).reshape(-1, 2)) == expected


def test_only_deep_images_are_measured(tmp_path):
    deep = Pixels.fromarray(np.array([[-2.0, 7.0]], np.float32))
    whole = Pixels.fromarray(np.array([[0, 70000]], np.int32))
    flat = Pixels.new("RGB", (2, 2))
    (tmp_path / "a.tif").write_bytes(content(deep, "TIFF"))
    cells = [content(flat, "PNG"), content(whole, "TIFF"), content(flat, "TIFF"), b"no image", b"", None]
    sixteen = content(Pixels.fromarray(np.array([[9]], np.uint16)), "TIFF")
    cells = [{"bytes": c, "path": None} for c in [*cells, sixteen]] + [{"bytes": None, "path": str(tmp_path / "a.tif")}]
    split = Dataset.from_dict({"image": cells}).cast_column("image", ImageColumn())
    measured = deep_extremes(split, "image")
    assert measured.tolist() == [[0, 70000], [-2, 7]] and num_clipped(measured, (0, 7)) == 2


@pytest.mark.parametrize("wrong", [[1], [1, 1], [2, 1], [0, float("inf")], [0, "a"], [True, 2], [0, 1, 2]])
def test_a_wrong_pixel_range(wrong):
    with pytest.raises(UserError, match="pixel_range: expected two numbers"):
        checked_range(wrong)


def floats(split, number, top, seed=0):
    """TIFF files of two classes with values from -1 to `top`."""
    rng = np.random.default_rng(seed)
    for i in range(number):
        array = rng.uniform(-1, top, (32, 32)).astype(np.float32)
        array[0, :2] = -1, top
        (split / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Pixels.fromarray(array).save(split / "ab"[i % 2] / f"{i}.tif")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_vit_folder):
    """Trained on values from -1 to 3; one of the 4 test images has values up to 5."""
    root = tmp_path_factory.mktemp("floats")
    floats(root / "d" / "train", 16, 3)
    floats(root / "d" / "val", 4, 2.5, seed=1)
    floats(root / "d" / "test", 4, 3, seed=2)
    array = np.full((32, 32), 5, np.float32)
    array[:, :16] = 1
    Pixels.fromarray(array).save(root / "d" / "test" / "a" / "9.tif")
    result = fine_tune(tiny_vit_folder, str(root / "d"), output_dir=str(root / "o"), data_facts=False, **HUSH)
    return result, root


def test_the_range_of_a_run_is_saved_and_used_by_evaluate_and_predict(run, capsys):
    result, root = run
    pixels = result.results["data_facts"]["pixels"]
    assert pixels["range"] == (-1, 3) and pixels["deep"] == {"train": 16, "validation": 4, "test": 5}
    assert pixels["clipped"] == {"train": 0, "validation": 0, "test": 1}
    assert "pixel_range" in (root / "o" / "run.yaml").read_text()
    again = Predictor.load(root / "o")
    measured = again.evaluate()
    assert measured["metrics"] == result.metrics and measured["clipped_images"] == 1
    path = root / "d" / "test" / "a" / "9.tif"
    (answer,) = again.predict(path)
    assert answer["clipped_pixels"] == 512 and "pixel_range" not in answer
    whole = np.array(Pixels.open(path))
    limited = again.predict(whole.clip(-1, 3))[0]
    assert limited["scores"] == answer["scores"] and "clipped_pixels" not in limited
    assert again.predict(whole / 2)[0]["scores"] != answer["scores"]
    assert main(["evaluate", str(root / "o")]) == 0
    assert "beyond the training range, which were clipped: 1" in capsys.readouterr().out
    assert main(["predict", str(root / "o"), str(path), "--pixel_range", "[-1, 5]"]) == 0
    assert "clipped_pixels" not in json.loads(capsys.readouterr().out)


def test_a_model_without_its_run_keeps_the_range(run, tmp_path):
    """As on the hub: `config.json` says it."""
    result, root = run
    result.predictor.save_merged(tmp_path / "plain")
    assert not (tmp_path / "plain" / "run.yaml").exists()
    path = root / "d" / "test" / "a" / "9.tif"
    (answer,), (expected,) = Predictor.load(tmp_path / "plain").predict(path), result.predict(path)
    assert answer == expected and answer["clipped_pixels"] == 512


def test_a_range_that_no_model_knows_is_said(run, tiny_vit_folder, tmp_path):
    _, root = run
    data = {
        "image": [Pixels.fromarray(np.full((32, 32), 20 * i, np.uint8)) for i in range(10)],
        "label": ["a", "b"] * 5,
    }
    plain = fine_tune(tiny_vit_folder, pd.DataFrame(data), output_dir=str(tmp_path / "o"), **HUSH)
    assert plain.results["data_facts"]["pixels"] is None
    (answer,) = plain.predict(np.full((32, 32), 0.5))
    assert answer["pixel_range"] == "unknown to the model, 0 to 1 assumed" and "clipped_pixels" not in answer
    with pytest.raises(UserError, match="pixel_range: the data has float or 32-bit images, and the model does not say"):
        plain.predictor.evaluate(plain.predictor.other_data(dataset_name=str(root / "d")))
    given = Predictor.load(plain.output_dir, pixel_range=[0, 4])
    assert given.evaluate(given.other_data(dataset_name=str(root / "d")))["clipped_images"] == 5


def test_the_facts_say_the_range(run, tiny_vit_folder, capsys):
    _, root = run
    argv = ["plan", "--model_name_or_path", tiny_vit_folder, "--dataset_name", str(root / "d")]
    assert main([*argv, "--pixel_range", "[0, 3]"]) == 0
    said = capsys.readouterr().out
    assert "0 to 3 in float and 32-bit images (train 16, validation 4, test 5), for every image alike" in said
    assert "values beyond 0 to 3, which are clipped: train 16, validation 4, test 5" in said
    assert main([*argv, "--pixel_range", "[3, 0]"]) == 2
    assert "pixel_range: expected two numbers, the lowest and the highest value, got [3, 0]" in capsys.readouterr().err
