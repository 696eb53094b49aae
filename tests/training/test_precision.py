"""`mixed_precision`: what devices do well, and what they would emulate."""

from __future__ import annotations

import pytest
import torch

from hf_transfer import TransferArguments, UserError
from hf_transfer.runs.configured import configured
from hf_transfer.training import precision
from hf_transfer.training.precision import best, emulates_bf16, line, refusal


@pytest.mark.parametrize(
    ("native", "capability", "expected"),
    [(True, (9, 0), "bf16"), (False, (7, 5), "fp16"), (False, (6, 1), "no")],
)
def test_gpus(native, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    assert best("cuda") == expected
    assert line("auto", "cuda").startswith(f"mixed_precision: auto: {expected} (A GPU ")
    assert bool(refusal("bf16", "cuda")) is not native and refusal("fp16", "cuda") == refusal(None, "cuda") == ""


def test_other_devices():
    assert (best("cpu"), best("mps"), best("xpu")) == ("no", "no", "bf16")
    assert line("auto", "cpu").startswith("mixed_precision: auto: no (float32 costs no accuracy")
    assert line("no", "cpu") == line(None, "cpu") == "", "a given one needs no explanation"


@pytest.mark.parametrize(
    ("machine", "has", "lacks"), [("x86_64", False, True), ("x86_64", True, False), ("arm64", False, False)]
)
def test_processors(machine, has, lacks, monkeypatch):
    monkeypatch.setattr(precision.platform, "machine", lambda: machine)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: has)
    assert bool(emulates_bf16("cpu")) is lacks


def test_the_arguments(tmp_path, monkeypatch):
    args = TransferArguments(str(tmp_path), mixed_precision="auto", use_cpu=True)
    assert not (args.bf16 or args.fp16) and args.mixed_precision == "no"
    monkeypatch.setattr(precision, "emulates_bf16", lambda device: "")
    assert TransferArguments(str(tmp_path), mixed_precision="bf16", use_cpu=True).bf16
    monkeypatch.setattr(precision, "emulates_bf16", lambda device: "this CPU has none")
    with pytest.raises(UserError, match="emulated, and slower than float32: this CPU has none"):
        TransferArguments(str(tmp_path), mixed_precision="bf16", use_cpu=True)


def test_a_run_records_what_it_came_to(monkeypatch):
    keys = {
        "model_name_or_path": "bundled:minilm-l6",
        "dataset_name": "bundled:digits",
        "output_dir": "out",
        "use_cpu": True,
    }
    monkeypatch.setattr(precision, "best", lambda device: "bf16")
    monkeypatch.setattr(precision, "emulates_bf16", lambda device: "")
    config = configured(None, None, {**keys, "mixed_precision": "auto"})
    assert config.values["bf16"] is config.training.bf16 is True and config.values["mixed_precision"] is None
    with pytest.raises(UserError, match="mixed_precision and bf16 contradict each other"):
        configured(None, None, {**keys, "mixed_precision": "auto", "bf16": True})
    with pytest.raises(UserError, match="'fp8' is not one of auto, no, fp16, bf16"):
        configured(None, None, {**keys, "mixed_precision": "fp8"})
