"""Real processes (gloo): the ranks stay bit-identical through every unfreeze, and equal one process."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import warm
from tests.helpers import changed, copy_state

from . import cases, fsdp2

ROOT = Path(__file__).parents[2]


def launch(processes: int, *module: str) -> None:
    """`accelerate launch` of a module with its arguments."""
    command = [
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
        "--config_file",
        "accelerate_configs/cpu_2proc.yaml",
        "--main_process_port",
        "0",
        "--num_processes",
        str(processes),
        "-m",
        *module,
    ]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-8000:]


def run_in_forks(processes: int, folder: Path) -> None:
    """The quick cases in warm forks, in the environments that a launch gives: it does not import everything thrice."""
    launch(processes, "tests.distributed.places", str(folder))
    found = sorted(folder.glob("place-*.json"))
    places = [json.loads(path.read_text()) for path in found]
    assert [place["RANK"] for place in places] == [str(rank) for rank in range(processes)]
    codes = warm.ranks(processes, partial(cases.main, folder, "quick"), folder / "log.txt", places)
    assert set(codes) == {0}, (folder / "log.txt").read_text()[-8000:]


class Seen:
    """What the cases gave on so many processes; those of a part run together, when the first of them is asked for."""

    def __init__(self, folder: Path, processes: int):
        self.folder, self.processes, self.parts = folder, processes, dict[str, dict[str, Any]]()

    def __getitem__(self, case: str) -> Any:
        part = "slow" if case in cases.SLOW else "quick"
        if part not in self.parts:
            if part == "quick":
                run_in_forks(self.processes, self.folder)
            else:
                launch(self.processes, "tests.distributed.cases", str(self.folder), part)
            self.parts[part] = json.loads((self.folder / f"{part}.json").read_text())
        return self.parts[part][case]

    def weights(self, case: str) -> dict[str, torch.Tensor]:
        """Rank 0's."""
        self[case]
        return torch.load(self.folder / f"{case}.pt", weights_only=True)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def seen(request, tmp_path_factory) -> Seen:
    return Seen(tmp_path_factory.mktemp(f"{request.param}"), request.param)


def marked(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow if name in cases.SLOW else ()) for name in names]


def test_any_two_choices_meet_in_a_quick_case():
    pairs = [
        {((i, choice[i]), (j, choice[j])) for choice in choices for i, j in itertools.combinations(range(4), 2)}
        for choices in (cases.QUICK, cases.PRODUCT.values())
    ]
    assert pairs[0] == pairs[1] and len(cases.SLOW) == 24 - len(cases.QUICK)


@pytest.mark.parametrize("case", marked([*cases.EXACT, *cases.LOOSE]))
def test_the_ranks_are_equal_by_every_bit(case, seen):
    assert seen[case]["processes"] == seen.processes
    assert seen[case]["ranks"] == 0.0
    stages = {
        "two-phase": 2,
        "gradual": 4,
        "stages": 3,
        "live": 3,
        "averaged": 2,
        "frozen": 4,
        "compiled": 2,
        "traversal": 2,
        "plateau": 3,
    }
    expected = next((n for name, n in stages.items() if name in case.split()), 4)
    assert seen[case]["stages"] == expected


def test_rank_0_decides_when_a_budget_ends(seen):
    """The clocks of the ranks differ, and each would end at another step."""
    assert 4 < seen["time budget"]["steps"] < 40


def test_a_flag_of_any_rank_is_seen_by_all(seen):
    assert seen["on any rank"] == [[True, True, True, False]] * seen.processes


@pytest.mark.parametrize("case", marked([*cases.EXACT, *(c for c in cases.LOOSE if "traversal" not in c)]))
def test_no_graph_is_walked_and_no_frozen_gradient_is_sent(case, seen):
    """Every byte that the reducer handles is of a parameter that has a gradient."""
    assert not seen[case]["walks"]
    assert seen[case]["surplus"] == 0
    assert seen["traversal on request"]["walks"]


@pytest.mark.parametrize("case", marked(cases.EXACT))
def test_several_processes_equal_one(case, seen, tmp_path):
    start = copy_state(cases.EXACT[case]["model"]())
    outcome, trainer = cases.run(case, tmp_path)
    assert outcome["processes"] == 1
    ours, theirs = copy_state(trainer.model), seen.weights(case)
    if case == "adapter":
        assert any("layer.0." in n and "lora_B" in n and value.any() for n, value in ours.items())
    else:
        first = [name for name in trainer.layer_groups[0].parameters if "mask" not in name and "bn" not in name]
        assert changed(start, ours) & set(first)  # it thawed, down to the input
    assert max((ours[k] - theirs[k]).abs().max().item() for k in ours if ours[k].is_floating_point()) < 1e-9


def test_batches_of_one_length_on_several_processes(seen, tmp_path):
    """At each step the ranks have the shares of what one process has; every text once an epoch. What is short at the
    end is filled up with its own, so that every rank has a full batch of that length."""
    ranks = seen["batches of one length"]["batches"]
    (alone,) = cases.run("batches of one length", tmp_path)[0]["batches"]
    together = [[text for batch in batches for text in batch] for batches in zip(*ranks, strict=True)]
    assert together == alone and len(ranks) == seen.processes
    texts = sorted(cases.EXACT["batches of one length"]["data"]()["input_ids"])
    for epoch in range(4):
        assert sorted(text for batch in alone[epoch * 12 : epoch * 12 + 12] for text in batch) == texts
    ranks = seen["short batch"]
    assert {len(batch) for batches in ranks for batch in batches} == {4}
    *whole, last = ({str(text) for batch in batches for text in batch} for batches in zip(*ranks, strict=True))
    size = 4 * seen.processes
    assert [len(batch) for batch in whole] == [size] * (42 // size) and len(last) == 42 % size
    assert len(set.union(*whole, last)) == 42


def test_every_batch_above_a_frozen_part_is_replayed_on_every_rank(seen):
    """Three stages of four steps, of two micro-batches where they are accumulated; in the last all trains."""
    assert seen["replayed from memory"]["replayed"] == [8, 8, 8, 0]
    assert seen["replayed from disk"]["replayed"] == [4, 4, 4, 0]
    assert len(list((seen.folder / "kept").iterdir())) == 3


def test_a_head_that_is_solved_for_is_the_same_on_all_ranks_and_that_of_one_process(seen, tmp_path):
    assert len(seen["solved"]) == seen.processes and all(head == seen["solved"][0] for head in seen["solved"])
    alone, trainer = cases.solved(tmp_path)
    assert trainer.solution is not None and alone == pytest.approx(seen["solved"][0], abs=1e-5)


def test_what_plain_trainer_does_with_a_naive_callback(seen):
    """The errors that this is here to prevent are real, and silent: exit code 0."""
    assert seen["naive"]["moved"] == 0.0  # Trainer's optimizer never heard of the backbone
    assert seen["naive, all in the optimizer"]["moved"] > 1e-3
    assert seen["naive, all in the optimizer"]["ranks"] > 1e-3  # each rank its own model


def test_gradual_unfreezing_under_fsdp_2(tmp_path):
    """The parameters are in shards; each stage moves what it should, and the losses are those of one process."""
    codes = warm.ranks(2, partial(fsdp2.in_shards, tmp_path), tmp_path / "log.txt")
    assert codes == [0, 0], (tmp_path / "log.txt").read_text()[-8000:]
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["kind"].startswith("FSDP")
    assert found["moved"] == [sorted(fsdp2.LAYERS[-k:]) for k in (1, 2, 3, 4)]
    alone = fsdp2.run(tmp_path, 8)
    assert not alone["kind"].startswith("FSDP") and found["moved"] == alone["moved"]
    assert found["losses"] == pytest.approx(alone["losses"], abs=1e-6)
    assert found["resumed"] == found["losses"]  # all of them: the checkpoint has the first half's
