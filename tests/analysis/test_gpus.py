"""The price table, and which GPU a run fits on, by hand."""

from __future__ import annotations

import pytest
import yaml

from hf_transfer import UserError
from hf_transfer.analysis.budget import OVERHEAD, Activations, StageMemory
from hf_transfer.analysis.budget_report import Budget, in_bytes
from hf_transfer.analysis.gpus import FULL, HALF, Work, cheapest, fastest, offers
from hf_transfer.analysis.prices import PRICES, read_prices

GB = 10**9


def stage(fixed_gb, per_example_gb, batch=16, name="all"):
    activations = None if per_example_gb is None else Activations(0, round(per_example_gb * GB))
    return StageMemory(name, round(fixed_gb * GB), 0, 0, 0, 0, activations, batch)


def budget(memory, work, prices=None, accumulation=1, device="cpu"):
    prices = prices or read_prices()
    return Budget(tuple(memory), accumulation, device, work, prices, tuple(offers(memory, work, prices, accumulation)))


def test_the_table_is_the_documented_one():
    """Memory, TFLOPS, price, spot price."""
    prices = read_prices()
    rows = {g.name: (g.memory_gb, g.tflops, g.price, g.spot) for g in prices.gpus}
    assert rows["T4"] == (16, 65, 0.53, 0.16) and rows["H100"] == (80, 990, 8.10, 2.85) and len(rows) == 7
    assert prices.date == "2025" and {g.name for g in prices.gpus if not g.bf16} == {"T4", "V100"}


def test_hours_and_dollars():
    """An hour of a T4 at 30% of its peak."""
    work = Work(65e12 * HALF * 3600, is_half=True, needs_bf16=False)
    found = {o.gpu.name: o for o in offers([stage(1, 0.1)], work, read_prices(), 1)}
    assert found["T4"].hours == pytest.approx(1) and found["T4"].cost == pytest.approx(0.53)
    assert found["H100"].hours == pytest.approx(65 / 990) and found["H100"].spot_cost == pytest.approx(2.85 * 65 / 990)
    assert cheapest(list(found.values())).gpu.name == "L4"
    assert (fastest(list(found.values())).gpu.name, FULL < HALF) == ("H100", True)


@pytest.mark.parametrize(
    ("per_example", "accumulation", "expected"),
    [(0.5, 1, (16, 1, 28)), (1.0, 1, (14, 2, 14)), (7.0, 1, (2, 8, 2)), (7.0, 3, (2, 24, 2)), (14.0, 1, (1, 16, 1))],
)
def test_accumulation_reaches_the_batch_that_was_asked_for(per_example, accumulation, expected):
    """16 GB, of which `OVERHEAD` and 1 GB of the model are taken."""
    assert OVERHEAD == GB
    (offer,) = offers([stage(1, per_example)], Work(1.0, True, False), read_prices(names=["t4"]), accumulation)
    assert (offer.batch, offer.accumulation, offer.largest_batch) == expected and not offer.why_not


def test_the_largest_stage_decides_and_bfloat16_is_needed():
    memory = [stage(1, 0.01, name="head"), stage(30, 1, name="all")]
    found = {o.gpu.name: o for o in offers(memory, Work(1.0, True, True), read_prices(), 1)}
    assert {name for name, o in found.items() if not o.why_not} == {"A100-40", "A100-80", "H100"}
    assert (
        found["L4"].why_not == "one example takes 31 GB, and 23 GB are left beside CUDA's own 1 GB"
        and found["L4"].hours is None
    )
    small = {o.gpu.name: o.why_not for o in offers([stage(1, 0.1)], Work(1.0, True, True), read_prices(), 1)}
    assert small["T4"] == small["V100"] == "no bfloat16" and not small["L4"]


def test_what_a_person_reads():
    lines = budget([stage(1, 0.5, batch=32)], Work(1e18, True, False)).lines()
    assert lines[0] == "Memory on one device, batches of 32 (activations: an estimate, from the longest example):"
    assert lines[2].split() == ["1", "all", "1", "GB", "0", "B", "0", "B", "16", "GB", "17", "GB"]
    assert "an estimate: at 30% of the half-precision peak, training steps only, prices of 2025" in lines[3]
    t4 = next(line for line in lines if line.split()[0] == "T4")
    assert t4.split() == ["T4", "16", "GB", "28", "x", "2", "14.2", "h", "$7.55", "$2.28"]
    assert lines[-1].startswith("Cheapest: L4. Fastest: H100. Spot (L4) saves 70%;")


def test_a_model_too_large_for_every_gpu():
    planned = budget([stage(500, 1)], Work(1e18, True, False))
    (last,) = planned.lines()[3:]
    assert last.startswith(
        "The run fits none of the GPUs (T4: one example takes 501 GB, and 15 GB are left beside CUDA's own 1 GB; "
    )
    told = planned.to_dict()
    assert (told["cheapest"], told["fastest"], told["cheapest_spot"]) == (None, None, None)
    assert not any(gpu["fits"] for gpu in told["gpus"])


def test_without_activations_no_time_is_told():
    lines = budget([stage(20, None)], Work(None, True, False), device="").lines()
    assert lines[0] == "Memory on one device, batches of 16 (without activations):" and "not known" in lines[2]
    assert lines[3] == "GPUs with room for this much, without activations: L4, A10G, A100-40, A100-80, H100."


def test_bytes_in_words():
    assert [in_bytes(n) for n in (0, 999, 1500, 90_900_000, 1.5e9, 1.234e12)] == [
        *("0 B", "999 B", "1.5 KB", "90.9 MB", "1.5 GB", "1,234.0 GB")
    ]


# ---- a table of the user's own -------------------------------------------------------------------------------------


def written(folder, change):
    values = yaml.safe_load(PRICES.read_text())
    change(values)
    path = folder / "prices.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_a_table_of_the_users_own(tmp_path):
    path = written(tmp_path, lambda v: v["gpus"].update(B200=dict(memory_gb=180, tflops=2250, price=9, spot=4)))
    prices = read_prices(path, ["b200", "T4", "B200"])
    assert [(g.name, g.price) for g in prices.gpus] == [("B200", 9), ("T4", 0.53)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v["gpus"]["T4"].pop("spot"), "T4 has no spot"),
        (lambda v: v["gpus"]["L4"].update(price="cheap"), "L4: price must be a positive number, got 'cheap'"),
        (lambda v: v["gpus"]["L4"].update(price=-1), "L4: price must be a positive number, got -1"),
        (lambda v: v["gpus"]["L4"].update(tflops=float("nan")), "L4: tflops must be a positive number, got nan"),
        (lambda v: v["gpus"]["L4"].update(memory_gb=True), "L4: memory_gb must be a positive number, got True"),
        (lambda v: v["gpus"]["L4"].update(memroy_gb=3), "bf16. Did you mean 'memory_gb'?"),
        (lambda v: v["gpus"]["L4"].update(bf16="yes"), "L4: bf16 must be true or false, got 'yes'"),
        (lambda v: v["gpus"].update(L4=24), "L4 is not a mapping of memory_gb, tflops, price, spot"),
        (lambda v: v.pop("date"), "`date` is missing"),
        (lambda v: v.pop("gpus"), "needs `date` and `gpus`"),
        (lambda v: v.update(gpus=[]), "needs `date` and `gpus`"),
    ],
)
def test_a_bad_table_is_told(change, said, tmp_path):
    with pytest.raises(UserError) as caught:
        read_prices(written(tmp_path, change))
    assert said in str(caught.value) and "prices_file: " in str(caught.value)


def test_a_table_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"prices_file: .*cannot be read"):
        read_prices(str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("gpus: [")
    with pytest.raises(UserError, match=r"prices_file: .*is not YAML"):
        read_prices(str(tmp_path / "bad.yaml"))
    (tmp_path / "text.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="prices_file: "):
        read_prices(str(tmp_path / "text.yaml"))


NEAR = {
    "A100": "'A100-40' or 'A100-80'",
    "H200": "'H100'",
    "nvidia h100": "'H100'",
    "A10": "'A10G' or 'A100-40' or 'A100-80'",
}


@pytest.mark.parametrize(("name", "near"), NEAR.items())
def test_an_unknown_gpu(name, near):
    with pytest.raises(UserError) as caught:
        read_prices(names=[name])
    assert f"gpus: {name!r} is not in the price table. Did you mean {near}?" in str(caught.value)
    assert "It has T4, L4, A10G, V100, A100-40, A100-80, H100" in str(caught.value)
