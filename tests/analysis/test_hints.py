"""Advice before training: only where it is due, with the numbers it states."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import AutoModelForImageClassification, SwinConfig

from hf_transfer.analysis import hints
from hf_transfer.cli.program import main
from hf_transfer.plan.plan import Plan, Stage
from tests.helpers import tiny_vit


def plan(layers=0.0, head=1e-3):
    """A head stage, then everything."""
    groups, both = (("a", 10), ("head", 2)), ("a", "head")
    first = Stage("head", 1, ("head",), (head,), (), 2, start=0)
    stages = (first, Stage("all", 1, both, (layers, head), (), 12, start=5)) if layers else (first,)
    return Plan("gradual", groups, stages, 2)


@pytest.mark.parametrize(
    ("rates", "optim", "is_new", "said"),
    [
        ((1e3,), "adamw_torch_fused", False, ["1e+03 for pretrained layers"]),
        ((1e3, 1e3), "adamw_torch", False, ["1e+03 for the head", "1e+03 for pretrained layers"]),
        ((0.02,), "paged_adamw_8bit", False, ["0.02 for pretrained layers"]),
        ((1e-3,), "adamw_torch", False, []),
        ((0.02,), "adamw_torch", True, []),
        ((5.0,), "adamw_torch", True, ["5 for new layers"]),
        ((0.0, 0.5), "adamw_torch", False, []),
        ((0.0, 5.0), "adamw_torch", False, ["5 for the head"]),
        ((0.1, 30.0), "sgd", False, []),
        ((3.0,), "sgd", False, ["3 for pretrained layers"]),
        ((5e-3,), "lion_32bit", False, ["0.005 for pretrained layers"]),
        ((1e6,), "adafactor", False, []),
        ((1e-12, 1e-10), "adamw_torch", False, ["nothing will be learned"]),
        ((1e-12, 1e-10), "sgd", False, []),
    ],
)
def test_rates_that_cannot_work(rates, optim, is_new, said):
    found = list(hints.rate_hints(plan(*rates), optim, is_new, steps=1000))
    assert len(found) == len(said) and all(part in line for part, line in zip(said, found, strict=True))


def test_shorter_texts_are_worth_a_line_where_they_save():
    lengths = torch.cat([torch.full((60,), 120), torch.full((40,), 512)])
    line = hints.length_hint(lengths, 20, False, 606.0)
    assert line == (
        "The median text has 606 characters (120 tokens), the longest 512 tokens: --max_seq_length 128 would compute "
        "4.0 times fewer tokens, padding included, and truncate 40% of the texts."
    )
    # In batches of similar length only the long texts cost: (60 * 120 + 40 * 512) / (60 * 120 + 40 * 128).
    gain = re.search(r"compute ([\d.]+) times", hints.length_hint(lengths, 20, True, None))
    assert gain and float(gain[1]) == pytest.approx(2.2, abs=0.051)
    assert hints.length_hint(torch.full((50,), 512), 8, False, None) == ""
    assert hints.length_hint(torch.tensor([100] * 90 + [130] * 10), 10, False, None) == ""
    assert hints.length_hint(torch.tensor([], dtype=torch.long), 8, False, None) == ""


def test_smaller_pictures_are_worth_a_line_where_the_model_reads_them():
    config = tiny_vit().config
    config.image_size = 224
    build = AutoModelForImageClassification.from_config
    sizes = {"width": (20, 60, 90, 300), "height": (20, 60, 96, 300)}
    line = hints.image_size_hint(sizes, config, build)
    assert "at most 96 px a side and are enlarged to 224: --image_size 96 would compute 5.4 times fewer" in line
    assert hints.image_size_hint({**sizes, "width": (1, 100, 200, 300)}, config, build) == ""
    assert "--image_size 64" in hints.image_size_hint({"width": (8,) * 4, "height": (8,) * 4}, config, build)
    assert hints.image_size_hint({"characters": (1, 2, 3, 4)}, config, build) == ""
    swin = SwinConfig(image_size=224, embed_dim=12, depths=[1, 1], num_heads=[1, 2], window_size=7)
    said = hints.image_size_hint(sizes, swin, build)  # where it is said, the model can be built
    assert said == "" or "--image_size 96" in said


def test_the_plan_as_json_has_them(tmp_path, tiny_bert_folder, capsys):
    rows = [f"{'a' if i % 3 else 'a b c d e f g h i j k l m n'},{'xy'[i % 2]}" for i in range(40)]
    (tmp_path / "t.csv").write_text("\n".join(["text,label", *rows]))
    keys = ["--strategy", "full", "--learning_rate", "1000", "--length_bucketing", "false", "--preflight", "false"]
    assert main(["plan", tiny_bert_folder, str(tmp_path / "t.csv"), "--json", *keys]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert [line.split(" for ")[0] for line in planned["warnings"]] == ["a learning rate of 1e+03"] * 2
    assert planned["hints"] == []
