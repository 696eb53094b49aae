"""A table of really broken inputs: each is decoded rightly, or named in an error, or skipped, counted and listed."""

from __future__ import annotations

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image as Pixels

from hf_transfer import Predictor, UserError, fine_tune
from hf_transfer.data.images import open_image, to_channels

RED = (200, 30, 40)
KEYS = dict(num_train_epochs=1, save_strategy="no", strategy="full", log_level="error", train_val_split=0.25)


def saved(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def left_right(mode="RGB"):
    """Red left, black right."""
    image = Pixels.new("RGB", (40, 20))
    image.paste(RED, (0, 0, 20, 20))
    return image.convert(mode)


def turned():
    """Stored upright with a flag that says: turn by 90 degrees."""
    exif = Pixels.Exif()
    exif[0x0112] = 6
    return saved(left_right(), "JPEG", exif=exif, quality=95)


def bomb():
    """A few bytes that say they are 30,000 × 30,000 pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


deep = Pixels.fromarray(np.full((20, 20), 200 * 257, np.uint16))
palette = left_right().quantize(4)
clear = left_right("RGBA").quantize(4)
frames = [left_right(), Pixels.new("RGB", (40, 20), (0, 255, 0))]

# name → (bytes, (column, row) → colour that a person sees there, within 10 levels)
RIGHT = {
    "wrong_extension.png": (saved(left_right(), "JPEG", quality=95), {(5, 5): RED, (30, 5): (0, 0, 0)}),
    "cmyk.jpg": (saved(left_right("CMYK"), "JPEG", quality=95), {(5, 5): RED, (30, 5): (0, 0, 0)}),
    "deep.png": (saved(deep, "PNG"), {(5, 5): (200, 200, 200)}),
    "deep.tif": (saved(deep, "TIFF"), {(5, 5): (200, 200, 200)}),
    "unit.tif": (saved(Pixels.fromarray(np.full((9, 9), 0.5, np.float32)), "TIFF"), {(5, 5): (128, 128, 128)}),
    "palette.png": (saved(palette, "PNG"), {(5, 5): RED, (30, 5): (0, 0, 0)}),
    "clear.png": (saved(clear, "PNG", transparency=1), {}),
    "grey_alpha.png": (saved(left_right("LA"), "PNG"), {(30, 5): (0, 0, 0)}),
    "animated.gif": (saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), {(5, 5): RED}),
    "animated.webp": (saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True), {(5, 5): RED}),
    "turned.jpg": (turned(), {(5, 5): RED, (15, 5): RED, (5, 30): (0, 0, 0)}),
    "one_pixel.png": (saved(Pixels.new("RGB", (1, 1), RED), "PNG"), {(0, 0): RED}),
    "one_bit.png": (saved(Pixels.new("1", (9, 9), 1), "PNG"), {(5, 5): (255, 255, 255)}),
}
JPEG = saved(left_right().resize((200, 200)), "JPEG")
BROKEN = {
    "truncated.jpg": JPEG[: len(JPEG) // 2],
    "truncated.png": saved(Pixels.effect_noise((64, 64), 50), "PNG")[:900],
    "no_bytes.jpg": b"",
    "text.jpg": b"this is no picture at all",
    "bomb.png": bomb(),
}


@pytest.mark.parametrize("name", RIGHT)
def test_odd_pictures_are_decoded_rightly(name):
    content, seen = RIGHT[name]
    image = to_channels(open_image(content), 3)
    assert image.mode == "RGB"
    for place, colour in seen.items():
        assert image.getpixel(place) == pytest.approx(colour, abs=10), place
    grey = to_channels(open_image(content), 1)
    assert grey.mode == "L" and grey.size == image.size


def folder(path, broken=()):
    """20 good pictures of two classes, all odd ones, and broken ones."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (path / name).mkdir(parents=True)
    for i in range(20):
        Pixels.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(
            path / ("cat", "dog")[i % 2] / f"{i}.png"
        )
    for name, (content, _) in RIGHT.items():
        (path / "cat" / name).write_bytes(content)
    for name in broken:
        (path / "dog" / name).write_bytes(BROKEN[name])
    return str(path)


def test_a_run_over_every_odd_picture(tiny_vit_folder, tmp_path):
    run = fine_tune(tiny_vit_folder, folder(tmp_path / "d"), output_dir=str(tmp_path / "o"), **KEYS)
    assert sum(s["examined"] for s in run.results["data_facts"]["splits"].values()) == 20 + len(RIGHT)
    assert run.results["data_facts"]["bad"] == [] and np.isfinite(run.metrics["loss"])


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_picture_is_named_before_training(name, tiny_vit_folder, tmp_path):
    with pytest.raises(UserError, match=rf"1 of 34 examples are unusable: .*{name} \(row \d+\): cannot be read"):
        fine_tune(tiny_vit_folder, folder(tmp_path / "d", [name]), output_dir=str(tmp_path / "o"), **KEYS)
    assert not (tmp_path / "o" / "run.yaml").exists()


def test_broken_pictures_are_skipped_counted_and_listed(tiny_vit_folder, tmp_path, capsys):
    place = folder(tmp_path / "d", BROKEN)
    keys = KEYS | {"on_bad_example": "skip", "log_level": "warning"}
    with pytest.raises(UserError, match=r"max_bad_fraction: 5 of 38 .* more than the allowed fraction of 0.05"):
        fine_tune(tiny_vit_folder, place, output_dir=str(tmp_path / "o"), **keys)
    run = fine_tune(tiny_vit_folder, place, output_dir=str(tmp_path / "o"), max_bad_fraction=0.2, **keys)
    bad = run.results["data_facts"]["bad"]
    assert {b["example"].split(" (")[0] for b in bad} == set(BROKEN)
    kept = {name: s["examples"] for name, s in run.results["data_facts"]["splits"].items()}
    assert sum(kept.values()) == 33 and run.results["num_train_examples"] == kept["train"]
    assert "Skipped 5 unusable examples" in capsys.readouterr().out
    again = Predictor.load(run.output_dir).evaluate()
    assert again["num_examples"] == kept["validation"] and again["metrics"] == pytest.approx(run.metrics)


# ---- texts ---------------------------------------------------------------------------------------------------------


def rows(*odd):
    good = [{"text": f"a good sentence {i}", "label": "ab"[i % 2]} for i in range(30)]
    return [*good, *({"text": text, "label": "a"} for text in odd)]


@pytest.mark.parametrize("text", ["", " \n\t", None])
def test_an_empty_text(text, tiny_bert_folder, tmp_path):
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows(text))))
    keys = {"train_file": f"{tmp_path}/t.jsonl", "output_dir": f"{tmp_path}/o", **KEYS}
    with pytest.raises(UserError, match="1 of 31 examples are unusable: train, row 30: empty text"):
        fine_tune(tiny_bert_folder, **keys | {"data_seed": 1})
    run = fine_tune(tiny_bert_folder, **keys, on_bad_example="skip")
    assert [b["example"] for b in run.results["data_facts"]["bad"]] == ["row 30"]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_bytes_that_are_no_utf8(form, tiny_bert_folder, tmp_path):
    """The row is named where it is skipped; the encoding, where it is an error."""
    lines = {
        "csv": ["text,label", *(f"{r['text']},{r['label']}" for r in rows("caf\xe9"))],
        "jsonl": [json.dumps(r, ensure_ascii=False) for r in rows("caf\xe9")],
    }[form]
    (tmp_path / f"t.{form}").write_bytes("\n".join(lines).encode("latin-1"))
    keys = {"train_file": f"{tmp_path}/t.{form}", "output_dir": f"{tmp_path}/o", **KEYS}
    with pytest.raises(UserError, match="is not text in UTF-8"):
        fine_tune(tiny_bert_folder, **keys)
    run = fine_tune(tiny_bert_folder, **keys, on_bad_example="skip")
    (bad,) = run.results["data_facts"]["bad"]
    assert bad == {
        "split": "train",
        "example": f"t.{form} line {32 if form == 'csv' else 31}",
        "reason": "not valid UTF-8",
    }


def test_a_text_of_ten_megabytes(tiny_bert_folder, tmp_path):
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows("long words " * 950_000))))
    run = fine_tune(tiny_bert_folder, train_file=f"{tmp_path}/t.jsonl", output_dir=f"{tmp_path}/o", **KEYS)
    longest = max(s["sizes"]["characters"][-1] for s in run.results["data_facts"]["splits"].values())
    assert longest == 11 * 950_000
