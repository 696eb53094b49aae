"""What a device costs."""

from __future__ import annotations

import pytest

from hf_transfer.analysis.prices import Gpu, Prices, read_prices
from hf_transfer.errors import UserError
from hf_transfer.runs.ending import _budget
from hf_transfer.runs.pricing import gpu_of, with_price
from hf_transfer.settings import Config


@pytest.mark.parametrize(
    ("device", "memory", "name"),
    [
        ("Tesla T4", 15.8, "T4"),
        ("NVIDIA L4", 23.6, "L4"),
        ("NVIDIA A10G", 23.7, "A10G"),
        ("Tesla V100-SXM2-16GB", 16.9, "V100"),
        ("NVIDIA A100-SXM4-40GB", 42.4, "A100-40"),
        ("NVIDIA A100 80GB PCIe", 85.0, "A100-80"),
        ("NVIDIA H100 80GB HBM3", 85.0, "H100"),
        ("NVIDIA L40S", 47.7, None),
        ("NVIDIA H200", 150.0, None),
    ],
)
def test_a_device_is_found_in_the_price_table(device, memory, name):
    gpu = gpu_of(device, memory, read_prices())
    assert (gpu and gpu.name) == name


def test_names_of_several_words_in_a_table_of_ones_own():
    prices = Prices("2026", (Gpu("RTX 4090", 24, 330, 0.7, 0.3), Gpu("RTX 4090 Ti", 24, 400, 0.9, 0.4)))
    assert gpu_of("NVIDIA GeForce RTX 4090", 25.4, prices).price == 0.7
    assert gpu_of("NVIDIA GeForce RTX 4090 Ti", 25.4, prices).price == 0.9


def config(tmp_path, **keys):
    given = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": str(tmp_path), "use_cpu": True, **keys}
    return Config.from_sources({}, given)


def test_dollars_on_a_device_without_a_price(tmp_path):
    with pytest.raises(UserError, match=r"max_usd: the price file has no price for this CPU; .*usd_per_hour"):
        with_price(config(tmp_path, max_usd=1.0))
    priced = config(tmp_path, max_usd=1.0, usd_per_hour=0.25)
    assert with_price(priced) is priced
    assert with_price(config(tmp_path, max_hours=1.0)).values["usd_per_hour"] is None


def test_the_line_at_the_end():
    budget = {
        "max_hours": 0.05, "max_usd": None, "seconds": 180.0, "steps": 412, "planned_steps": 700,
        "preparation_seconds": 8.0,
    }  # fmt: skip
    results = {"train_seconds": 175.0, "kept": None, "time_budget": budget}
    said = "max_hours 0.05: ended after 2 min 55 s of 3 min, 412 of 700 steps planned (preparation: 8.0 s)"
    assert list(_budget(results)) == [said]
    budget["steps"] = 700
    assert "all 700 planned steps" not in said and "all 700 steps planned" in next(_budget(results))
    assert list(_budget({"time_budget": None})) == [] == list(_budget({}))
