"""The preview: augmented pictures with their labels, de-normalised."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image as Pixels

from hf_transfer.cli.program import main
from hf_transfer.data.augment import statistics
from hf_transfer.data.labels import Labels
from hf_transfer.data.preview import caption

NAMES = ("cat", "dog", "fox")


@pytest.mark.parametrize(
    ("kind", "label", "said"),
    [
        ("single_label_classification", torch.tensor(1), "dog"),
        ("single_label_classification", torch.tensor([0.25, 0.0, 0.75]), "fox 75%, cat 25%"),
        ("multi_label_classification", torch.tensor([1.0, 0.0, 1.0]), "fox, cat"),
        ("multi_label_classification", torch.tensor([0.0, 0.0, 0.0]), "none"),
        ("multi_label_classification", torch.tensor([1.0, 0.3, 0.0]), "cat 100%, dog 30%"),
        ("regression", torch.tensor(1.23456), "1.23"),
    ],
)
def test_captions(kind, label, said):
    assert caption(label, Labels(kind, NAMES)) == said


def colours(path, tmp_path):
    argv = ["--model_name_or_path", path, "--dataset_name", str(tmp_path / "d"), "--augmentation", "basic"]
    assert main(["plan", *argv, "--preview", str(tmp_path / "grid.png"), "--quiet"]) == 0
    drawn = np.asarray(Pixels.open(tmp_path / "grid.png").convert("RGB")).reshape(-1, 3)
    return {tuple(c) for c in np.unique(drawn, axis=0).tolist()}


@pytest.mark.parametrize("kind", ["tiny_vit_folder", "gray_vit_folder"])
def test_colours_are_the_pictures_own(kind, request, tmp_path, capsys):
    """Plain pictures stay plain whatever is cropped: their colours must be in the drawing again."""
    wanted = {"a": (200, 40, 10), "b": (20, 60, 220)}
    for name, colour in wanted.items():
        (tmp_path / "d" / name).mkdir(parents=True)
        for i in range(6):
            Pixels.new("RGB", (40, 40), colour).save(tmp_path / "d" / name / f"{i}.png")
    found = colours(request.getfixturevalue(kind), tmp_path)
    for colour in wanted.values():
        grey = (Pixels.new("RGB", (1, 1), colour).convert("L").getpixel((0, 0)),) * 3
        expected = grey if kind.startswith("gray") else colour
        assert any(max(abs(a - b) for a, b in zip(expected, c, strict=True)) <= 1 for c in found)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--preview", "grid.txt"], "unsupported file extension"),
        (["--preview", "/none/grid.png"], "folder '/none' does not exist"),
        (["--preview", "grid.png"], "there is no data to draw"),
        (["--preview", "grid.png", "--dataset_name", "bundled:rotten-tomatoes"], "the data contains no images"),
    ],
)
def test_what_cannot_be_drawn(argv, said, tiny_bert_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--model_name_or_path", tiny_bert_folder, "--max_train_samples", "20", *argv]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_statistics_of_a_processor_that_does_not_normalise():
    class Plain:
        do_normalize, image_mean, image_std = False, [0.5], [0.5]

    mean, std = statistics(Plain())
    assert mean.item() == 0 and std.item() == 1
