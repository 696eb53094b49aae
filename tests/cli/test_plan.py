"""`hf-transfer plan`: the budget in what is printed and in the JSON, whose keys are all documented."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from hf_transfer.analysis.prices import PRICES
from hf_transfer.cli.program import main
from hf_transfer.data.facts import Misfit, PixelFacts
from hf_transfer.data.groups import GroupLeak
from hf_transfer.data.raw import BadExample
from tests.runs.test_preflight import table, with_tokens, words_tokenizer

SCHEMA = Path(__file__).parents[2] / "docs" / "plan-schema.md"
# Mappings whose keys are names of the user's own.
NAMED = {"examples", "chosen", "data_facts.splits", "classes", "sizes", "learning_rates", "data_facts.dropped"}


@pytest.fixture(scope="module")
def argv(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    model, data = with_tokens(folder / "bert", words_tokenizer()), table(folder / "a.csv")
    return ["plan", model, data, "--strategy", "two-phase", "--num_train_epochs", "2", "--use_cpu", "true"]


def test_the_budget_is_printed(argv, capsys):
    assert main([*argv, "--gpus", "[t4, H100]", "--per_device_train_batch_size", "4"]) == 0
    said = capsys.readouterr().out.splitlines()
    lines = [line for line in said if not line.startswith("The process will take about ")]
    assert len(said) - len(lines) == (sys.platform == "linux"), "the kernel of Linux counts its memory"
    at = lines.index("Memory on one device, batches of 4 (activations: an estimate, from the longest example):")
    assert lines[at + 1].split() == ["stage", "model", "gradients", "optimizer", "activations", "total"]
    assert [line.split()[0] for line in lines[at + 2 : at + 4]] == ["1", "2"]
    assert [line.split()[0] for line in lines[at + 6 : at + 9]] == ["GPU", "T4", "H100"]
    assert lines[at + 4].startswith("On this machine (cpu, ")
    assert lines[at + 9].startswith("Cheapest: ")


def test_another_price_table_and_bad_ones(argv, tmp_path, capsys):
    values = yaml.safe_load(PRICES.read_text())
    values["gpus"] = {"Toy": dict(memory_gb=2, tflops=1, price=0.1, spot=0.05)}
    path = tmp_path / "prices.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main([*argv, "--prices_file", str(path), "--json"]) == 0
    (gpu,) = json.loads(capsys.readouterr().out)["budget"]["gpus"]
    assert gpu["name"] == "Toy" and gpu["is_estimate"] and gpu["cost"] == pytest.approx(gpu["hours"] * 0.1)
    del values["gpus"]["Toy"]["spot"]
    path.write_text(yaml.safe_dump(values))
    assert main([*argv, "--prices_file", str(path)]) == 2
    assert "Toy has no spot." in capsys.readouterr().err
    assert main([*argv, "--gpus", "A100"]) == 2
    assert "gpus: 'A100' is not in the price table. Did you mean 'A100-40' or 'A100-80'?" in capsys.readouterr().err


def keys_in(value, path="") -> set[str]:
    """Dotted keys of an object: `[]` for the items of a list, `*` for names of the user's own."""
    if isinstance(value, list):
        return {key for item in value for key in keys_in(item, f"{path}[]")}
    if not isinstance(value, dict):
        return set()
    found = set[str]()
    for name, inner in value.items():
        is_named = path in NAMED or path.rpartition(".")[2] in NAMED
        here = f"{path}.{'*' if is_named else name}".lstrip(".")
        found |= {here} | keys_in(inner, here)
    return found


def documented() -> set[str]:
    return set(re.findall(r"^\| `([\w.*\[\]]+)` \|", SCHEMA.read_text(), flags=re.MULTILINE))


def test_every_key_of_the_json_is_documented_and_no_other(argv, tmp_path, capsys):
    found = set[str]()
    duplicates = tmp_path / "duplicates.csv"
    texts = [*["the same film"] * 20, *(f"film {i} fine" for i in range(20))]
    duplicates.write_text("text,label\n" + "".join(f"{t},{'xy'[i % 2]}\n" for i, t in enumerate(texts)))
    few = ["plan", argv[1], str(duplicates), "--use_cpu", "true", "--train_val_split", "0.2", "--preflight", "false"]
    other = tmp_path / "other.csv"
    other.write_text("text\n" + "".join(f"play {i} dull\n" for i in range(12)))
    adapted = ["--strategy", "auto", "--domain_adaptation", "coral", "--target_dataset_name", str(other)]
    cached, uncached = ([*argv, "--boundary_cache", where] for where in ("memory", "off"))
    ranking = [*few[:1], few[2], "--use_cpu", "true", "--models", f"{argv[1]},./nothing"]
    for command in (cached, uncached, [*few, "--strategy", "auto"], [*few, *adapted], ranking):
        assert main([*command, "--json"]) == 0
        found |= keys_in(json.loads(capsys.readouterr().out))
    assert found - documented() == set(), "document them in docs/plan-schema.md"
    rare = {"bad[]": BadExample, "group_leaks[]": GroupLeak, "pixels": PixelFacts, "misfits[]": Misfit}
    found |= {f"data_facts.{at}.{field.name}" for at, cls in rare.items() for field in fields(cls)}
    found |= {"domain_distance.skipped"}
    found |= {f"data_facts.{at}.*" for at in ("dropped", "pixels.deep", "pixels.clipped")}
    assert documented() - found == set(), "these are no longer there"
