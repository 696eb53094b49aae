"""Whether training fits the memory that is free, and what is chosen and said where it does not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import BertConfig, BertForSequenceClassification

from hf_transfer import fine_tune
from hf_transfer.analysis.budget_report import in_bytes
from hf_transfer.runs import room as rooms
from hf_transfer.runs.prepare import prepare
from hf_transfer.runs.preview import plan_only
from hf_transfer.runs.room import Room
from hf_transfer.settings import Config
from tests.runs.helpers import sentences
from tests.runs.test_choosing_given import QUIET
from tests.runs.test_preflight import words_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("room")
    torch.manual_seed(0)
    wide = BertConfig(
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=40,
        max_position_embeddings=16,
    )
    model = BertForSequenceClassification(wide)  # beside it, an adapter is small
    model.base_model.save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return str(folder), sentences(folder / "d.csv", 44), 4 * sum(p.numel() for p in model.parameters())


def config(files, **keys):
    given = dict(model_name_or_path=files[0], train_file=files[1], **{**QUIET, "expected_accuracy": False, **keys})
    return Config.from_sources({}, given)


def why(files, **keys):
    return rooms.no_room(prepare(config(files, **keys)))


def free(monkeypatch, count, holds_model=True):
    monkeypatch.setattr(rooms, "room", lambda args: Room("cpu" if holds_model else "cuda", count, holds_model))


def test_lora_is_chosen_where_all_layers_do_not_fit(files, monkeypatch):
    """AdamW keeps two states and a gradient per parameter: three times the parameters, besides the model itself."""
    free(monkeypatch, int(2.9 * files[2]))
    found = plan_only(config(files), talks=False)
    assert (found.chosen["strategy"]["value"], found.chosen["adapter"]["value"]) == ("full", "lora")
    assert found.chosen["learning_rate"]["value"] == 5e-4 and found.rule.startswith("short of memory")
    assert found.budget.memory[0].adapter > 0 and found.advice.rates == []
    assert "pooling" in found.chosen and found.chosen["pooling"]["value"] is None


def test_activations_of_one_example_count_where_they_decide(files, monkeypatch):
    size, asked, measure = files[2], [], rooms._of_one_example
    monkeypatch.setattr(rooms, "_of_one_example", lambda prepared: asked.append(measure(prepared)) or size)
    free(monkeypatch, int(3.5 * size))
    assert f"for one example, and {in_bytes(int(3.5 * size))} of this machine's memory are free" in why(files)
    assert asked[0] > 10 * 256 * 4, "some activations of every layer"
    asked.clear()
    free(monkeypatch, 7 * size)
    assert why(files) == "" and not asked, "less than half: not worth a forward pass"


def test_on_a_device_the_model_itself_counts(files, monkeypatch):
    free(monkeypatch, int(3.9 * files[2]), holds_model=False)
    assert f"takes {in_bytes(4 * files[2])[:3]}" in why(files)
    free(monkeypatch, int(1.1 * files[2]), holds_model=False)
    assert why(files) == "", "an adapter does not fit either"


@pytest.mark.parametrize("keys", [{"adapter": "none"}, {"pooling": "mean"}, {"from_scratch": True}])
def test_given_keys_win(files, monkeypatch, keys):
    free(monkeypatch, int(2.9 * files[2]))
    assert why(files, **keys) == ""


def test_a_given_strategy_that_does_not_fit_is_warned_of(files, monkeypatch):
    free(monkeypatch, int(2.9 * files[2]))
    found = plan_only(config(files, strategy="full"), talks=False)
    assert "adapter" not in found.chosen
    (warning,) = found.advice.rates
    assert "besides the model, activations not counted" in warning and "adapter: lora" in warning


def test_a_run_says_what_it_takes_and_where_the_rest_is_told(files, tmp_path, capsys):
    """AdamW, everything trains: weights, a gradient and two states of each parameter."""
    keys = {k: v for k, v in QUIET.items() if k not in ("output_dir", "log_level")}
    fine_tune(files[0], train_file=files[1], output_dir=str(tmp_path / "a"), max_steps=1, strategy="full", **keys)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Memory: ")]
    assert line.startswith(f"Memory: {in_bytes(4 * files[2])[:3]}") and "`hf-transfer plan`" in line
    solved = {"strategy": "linear-probe", "probe_solver": "lbfgs"}
    fine_tune(files[0], train_file=files[1], output_dir=str(tmp_path / "b"), **keys, **solved)
    assert "Memory:" not in capsys.readouterr().out, "nothing has a gradient"


def test_memory_of_this_machine(monkeypatch):
    monkeypatch.setattr(rooms, "available_memory", lambda: 1000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    on_cpu = SimpleNamespace(device=torch.device("cpu"))
    assert rooms.room(on_cpu) == Room("cpu", 500, holds_model=True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3_000_000_000, 9_000_000_000))
    assert rooms.room(SimpleNamespace(device=torch.device("cuda"))) == Room("cuda", 2_000_000_000, holds_model=False)
    assert rooms.room(SimpleNamespace(device=torch.device("mps"))).free is None


def test_a_run_with_lora_chosen_is_written_and_repeats(files, monkeypatch, tmp_path):
    free(monkeypatch, int(2.9 * files[2]))
    keys = {k: v for k, v in QUIET.items() if k != "output_dir"}
    run = fine_tune(files[0], train_file=files[1], output_dir=str(tmp_path / "a"), max_steps=2, **keys)
    assert run.results["adapter"] == "lora" and (tmp_path / "a" / "adapter_model.safetensors").exists()
    written = (tmp_path / "a" / "run.yaml").read_text()
    assert "adapter: lora" in written and "are free" in written
    free(monkeypatch, 100 * files[2])
    again = fine_tune(**{**_keys(tmp_path / "a" / "run.yaml"), "output_dir": str(tmp_path / "b")})
    assert again.results["adapter"] == "lora" and again.metrics == run.metrics


def _keys(file):
    return {name: value for name, value in yaml.safe_load(file.read_text()).items() if value is not None}
