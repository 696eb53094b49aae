"""The studies that ship as recipes: every one is a comparison that can be asked for, with its figures."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_transfer import layer_groups, make_plan
from hf_transfer.adapters.attach import attach
from hf_transfer.cli import compare as verb
from hf_transfer.config.values import read_config_file
from hf_transfer.models.timm_names import timm_config
from hf_transfer.settings import Config
from hf_transfer.studies import grid as cells
from hf_transfer.studies.grid import possible, read_rows
from recipes.studies import digits

ROOT = Path(__file__).parents[2]
STUDIES = sorted(ROOT.glob("recipes/studies/*.yaml"))
PAGE = (ROOT / "docs" / "studies.md").read_text()


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    """A folder in which the digits of the adversarial study lie, three of each kind."""
    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(digits, "COUNTS", dict.fromkeys(digits.COUNTS, 3))
        digits.main()
    return folder


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_can_be_asked_for(path, domains, monkeypatch):
    monkeypatch.chdir(domains)
    file = read_config_file(str(path))
    own = {name: file.pop(name) for name in ("grid", "seeds", "against") if name in file}
    assert set(own) <= set(verb.keys()) and str(file["output_dir"]).startswith("out/studies/")
    rows = read_rows(own["grid"], file if isinstance(own["grid"], dict) else ())

    def make(changes, without=()):
        return Config.from_sources({name: value for name, value in file.items() if name not in changes}, dict(changes))

    # What the page on the study says is for those who have the second model installed.
    monkeypatch.setattr(cells, "check_places", lambda values: SimpleNamespace())
    assert possible(rows, make, 0, skips=False) == (rows, [])


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_says_how_it_is_run_and_what_it_takes(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    said = {key: value.strip() for key, _, value in (line[2:].partition(":") for line in header)}
    assert said["Command"] == f"hf-transfer compare --config recipes/studies/{path.name}"
    assert ("core" if "bundled:" in path.read_text() else "GPU") in said["Hardware"]
    is_run = "not measured here" not in said["Time"]
    assert not is_run or re.search(r"\d+ (s|min)", said["Time"])
    assert f"`{path.stem}.yaml`" in PAGE and (f"## `{path.stem}.yaml`" in PAGE) == is_run


def test_the_domains_have_no_digit_in_common(domains):
    pictures = [path.read_bytes() for path in (domains / "out" / "studies" / "digits").rglob("*.png")]
    assert len(pictures) == 9 == len(set(pictures))


def test_the_dry_run_of_lora_counts_what_the_page_says():
    """The model in its real size, without its weights."""
    file = read_config_file(str(ROOT / "recipes" / "studies" / "lora_vit.yaml"))
    rows, _ = file.pop("grid"), file.pop("seeds")
    config = timm_config(file["model_name_or_path"].removeprefix("timm/"))
    config.num_labels = 100
    for row in rows:
        made = Config.from_sources({**file, **row}, {})
        with torch.device("meta"):
            model = attach(AutoModelForImageClassification.from_config(config), made.training)
        trained = make_plan(made.training, layer_groups(model)).resolve(100).stages[-1].num_trainable
        assert f"| {trained:,} |" in PAGE, row
