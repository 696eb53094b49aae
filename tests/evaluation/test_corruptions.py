"""What corruptions do to pictures and texts."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image as Pixels

from hf_transfer.evaluation.corruptions import IMAGES, TEXTS, chance_of

TEXT = "The quick brown Fox jumps over 13 lazy dogs, and nobody seems to mind at all. " * 30


def picture(mode="RGB", side=64):
    y, x = np.mgrid[:side, :side]
    pixels = np.stack([128 + 90 * np.sin(x / 5), 100 + 80 * np.cos(y / 3), (x * y) % 256], -1).astype(np.uint8)
    return Pixels.fromarray(pixels).convert(mode)


def array(image):
    return np.asarray(image, dtype=np.float64)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", IMAGES)
def test_pictures_get_worse_with_severity_and_keep_their_form(name, mode):
    change, strengths = IMAGES[name]
    image, errors = picture(mode), []
    for severity, strength in enumerate(strengths, 1):
        one = change(image, strength, chance_of(7, name, severity, 0))
        assert (one.size, one.mode) == (image.size, image.mode)
        assert one.tobytes() == change(image, strength, chance_of(7, name, severity, 0)).tobytes()
        errors.append(np.abs(array(one) - array(image)).mean())
    assert 0 < errors[0] < errors[1] < errors[2]


def test_the_size_of_each_corruption():
    flat = Pixels.new("RGB", (200, 200), (100, 110, 120))
    change, (strength, *_) = IMAGES["gaussian_noise"]
    assert (array(change(flat, strength, chance_of(0, "n", 1, 0))) - array(flat)).std() == pytest.approx(20.4, rel=0.02)
    chance = chance_of(0, "n", 1, 1)
    assert array(IMAGES["contrast"][0](picture(), 0.2, chance)).std((0, 1)) == pytest.approx(
        0.2 * array(picture()).std((0, 1)), rel=0.02
    )
    brighter = array(IMAGES["brightness"][0](flat, 0.1, chance))[0, 0]
    assert brighter.max() == round(120 + 25.5) and brighter / brighter.max() == pytest.approx(
        np.array([100, 110, 120]) / 120, abs=0.01
    )
    black = IMAGES["brightness"][0](Pixels.new("RGB", (4, 4)), 0.1, chance)
    assert array(black)[0, 0].tolist() == [26, 26, 26]
    coarse = array(IMAGES["pixelate"][0](picture(side=64), 0.25, chance))
    assert len(np.unique(coarse.reshape(-1, 3), axis=0)) <= 16 * 16
    tiny = Pixels.new("L", (1, 1), 9)
    assert all(change(tiny, strengths[2], chance).size == (1, 1) for change, strengths in IMAGES.values())


def test_chance_belongs_to_the_example():
    change, (strength, *_) = TEXTS["swap"]
    drawn = {
        change(TEXT, strength, chance_of(*key)) for key in ((0, "swap", 1, 0), (1, "swap", 1, 0), (0, "swap", 1, 1))
    }
    assert len(drawn) == 3 and change(TEXT, strength, chance_of(0, "swap", 1, 0)) in drawn


def test_typos_come_at_their_rates():
    letters = sum(c.isalpha() for c in TEXT)
    for rate in TEXTS["drop"][1]:
        chance = chance_of(0, "x", 1, 0)
        dropped = TEXTS["drop"][0](TEXT, rate, chance)
        assert (len(TEXT) - len(dropped)) / letters == pytest.approx(rate, rel=0.3)
        near = TEXTS["neighbor"][0](TEXT, rate, chance)
        changed = [(a, b) for a, b in zip(TEXT, near, strict=True) if a != b]
        assert len(changed) / letters == pytest.approx(rate, rel=0.3)
        assert all(a.isupper() == b.isupper() and a.isalpha() and b.isalpha() for a, b in changed)
        swapped = TEXTS["swap"][0](TEXT, rate, chance)
        assert sorted(swapped) == sorted(TEXT) and swapped != TEXT
        assert [len(w) for w in swapped.split()] == [len(w) for w in TEXT.split()]


def test_texts_that_cannot_be_changed_stay():
    for name, (change, _) in TEXTS.items():
        chance = chance_of(0, name, 1, 0)
        assert change("", 0.9, chance) == "" and change("12 — 34!", 1.0, chance) == "12 — 34!"
    assert TEXTS["drop"][0]("ab", 1.0, chance_of(0, "drop", 1, 0)) == "ab"  # an empty text cannot be classified
    assert TEXTS["neighbor"][0]("дом", 1.0, chance_of(0, "n", 1, 0)) == "дом"
    assert len(TEXTS["swap"][0]("дом", 1.0, chance_of(0, "n", 1, 0))) == 3
