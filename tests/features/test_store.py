"""Rows of tensors that outlive a run: by every bit, after a kill, within a budget, shared by ranks."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from hf_transfer import UserError
from hf_transfer.features import budget, store, store_files
from hf_transfer.features.budget import make_room
from hf_transfer.features.slots import Slot, nbytes
from hf_transfer.features.store import Store
from hf_transfer.features.store_files import NoRoom
from tests import warm

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LENGTHS = [3, 0, 5, 1]
SLOTS = [
    Slot("hidden", (4,), F32, True, F32),
    Slot("mask", (), torch.bool, True, torch.bool),
    Slot("ids", (), torch.int64, True, torch.int64),
    Slot("brain", (2, 3), BF16, False, BF16),
    Slot("half", (5,), F16, False, F16),
    Slot("scalar", (), F32, False, F32),
    Slot("rounded", (7,), F32, False, BF16),
    Slot("halved", (2,), F32, True, F16),
]
RESERVE = store_files.reserve
ODD = torch.tensor([-0.0, float("nan"), float("inf"), -1e-42])


def example(row: int, slot: Slot, length: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(row)
    shape = (length, *slot.shape) if slot.ragged else slot.shape
    if not slot.dtype.is_floating_point:
        return torch.randint(0, 2 if slot.dtype == torch.bool else 2**40, shape, generator=g).to(slot.dtype)
    value = torch.randn(shape, generator=g)
    if row:
        value.view(-1)[:4] = ODD[: value.numel()]
    return value.to(slot.dtype)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def fill(kept: Store, rows: list[int]) -> None:
    for row in rows:
        for slot in SLOTS:
            kept.put(row, slot.name, example(row, slot, LENGTHS[row]))


def check(kept: Store, rows: list[int]) -> None:
    """What is read is what was written, in another order too."""
    for slot in SLOTS:
        for row, found in zip(rows, kept.get(rows, slot.name), strict=True):
            expected = example(row, slot, LENGTHS[row]).to(slot.kept)
            assert found.dtype == slot.kept and found.shape == expected.shape
            assert bits(found) == bits(expected), (slot.name, row)


def of_numbers(folder: Path | None, rows: int = 4, width: int = 1, **keys) -> Store:
    return Store([Slot("x", (width,), F32, False, F32)], None, rows, folder, **keys)


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_read_is_what_was_written(on_disk, tmp_path):
    folder = tmp_path / "all" / "key" if on_disk else None
    kept = Store(SLOTS, LENGTHS, 4, folder)
    # 9 ragged rows: 16 + 1 + 8 + 4 bytes; 4 examples: 12 + 10 + 4 + 14
    assert kept.nbytes == nbytes(SLOTS, LENGTHS, 4) == 9 * (16 + 1 + 8 + 4) + 4 * (12 + 10 + 4 + 14)
    fill(kept, [2, 0, 1])
    kept.mark([2])
    kept.mark([0, 1])
    assert kept.missing() == [3]
    check(kept, [1, 2, 0, 2])
    batch = torch.stack([example(row, SLOTS[3], 0) for row in (3, 1)])
    kept.put([3, 1], "brain", batch)
    kept.put([3], "hidden", [example(3, SLOTS[0], 1)])
    assert bits(kept.get([3, 1], "brain")) == bits(batch)
    assert bits(kept.get([3], "hidden")[0]) == bits(example(3, SLOTS[0], 1))
    with kept.lock_recording() as alone:
        assert alone
    kept.close()
    if on_disk:
        with_rest = Store(SLOTS, LENGTHS, 4, folder)
        assert with_rest.missing() == [3]
        check(with_rest, [0, 1, 2])
        other = Store(SLOTS, LENGTHS, 4, folder, main=False)
        fill(with_rest, [3])
        with_rest.mark([3])
        check(other, [3])
        assert other.missing() == []


def test_nothing_is_rounded_or_repeated_in_silence():
    kept = Store(SLOTS, LENGTHS, 4)
    for slot, value in [
        ("hidden", torch.zeros(1, 4)),
        ("hidden", torch.zeros(4)),
        ("hidden", torch.zeros(3, 4, dtype=torch.float64)),
        ("half", torch.zeros(1, dtype=F16)),
        ("scalar", torch.zeros(1)),
    ]:
        with pytest.raises(ValueError, match=f"slot {slot} wants"):
            kept.put(0, slot, value)
    with pytest.raises(ValueError, match="wants"):
        kept.put([0, 1], "half", torch.zeros(1, 5, dtype=F16))
    with pytest.raises(UserError, match="the largest float16 is 65504, and halved has"):
        kept.put(3, "halved", torch.tensor([[1.0, 66000.0]]))
    kept.put(3, "halved", torch.tensor([[float("inf"), 65504.0]]))
    for row in (-1, 4):
        with pytest.raises(IndexError):
            kept.put(row, "scalar", torch.zeros(()))
    with pytest.raises(ValueError, match="ragged"):
        Store(SLOTS, None, 4)


def test_what_is_not_the_same_is_made_anew(tmp_path):
    """Other slots, rows or lengths, and damage."""
    folder = tmp_path / "key"
    slots, lengths = [Slot("x", (2,), F32, True, F32)], [1, 2, 3]

    def again(slots=slots, lengths=lengths) -> list[int]:
        kept = Store(slots, lengths, len(lengths), folder)
        missing = kept.missing()
        kept.mark(range(len(lengths)))
        kept.close()
        return missing

    assert again() == [0, 1, 2]
    assert again() == []
    assert again(lengths=[2, 1, 3]) == [0, 1, 2]
    assert again([Slot("x", (2,), F32, True, F16)], [2, 1, 3]) == [0, 1, 2]
    assert again([Slot("y", (2,), F32, True, F32)], [2, 1, 3]) == [0, 1, 2]
    assert again([*slots, Slot("y", (), F32, False, F32)], [2, 1, 3]) == [0, 1, 2]
    assert again(lengths=[1, 2]) == [0, 1]
    assert again() == [0, 1, 2]
    for damage in (
        lambda: (folder / "manifest.json").write_text("{"),
        lambda: (folder / "manifest.json").write_text("[]"),
        lambda: (folder / "manifest.json").unlink(),
        lambda: os.truncate(folder / "0.bin", 8),
        lambda: (folder / "done").unlink(),
    ):
        damage()
        with pytest.raises(NoRoom, match="holds another store"):
            Store(slots, lengths, 3, folder, main=False)
        assert again() == [0, 1, 2]
        assert again() == []


def test_after_a_crash_of_the_machine_only_what_was_flushed_counts(tmp_path, monkeypatch):
    kept = of_numbers(tmp_path / "key")
    kept.mark([1])
    kept.flush()
    kept.mark([2])
    assert of_numbers(tmp_path / "key").missing() == [0, 3]
    monkeypatch.setattr(store_files, "boot_id", lambda: "another")
    kept._locks.clear()
    assert of_numbers(tmp_path / "key").missing() == [0, 2, 3]
    assert of_numbers(tmp_path / "key").missing() == [0, 2, 3]


def test_what_does_not_fit_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(NoRoom):
        of_numbers(tmp_path / "key", rows=2**20, width=2**40)
    assert list(tmp_path.iterdir()) == []
    reserved = []

    def full(path: Path, size: int) -> None:
        """The disk has place for the first file only."""
        if reserved:
            raise OSError(errno.ENOSPC, "No space left on device")
        reserved.append(RESERVE(path, size))

    monkeypatch.setattr(store_files, "reserve", full)
    with pytest.raises(NoRoom, match="No space left on device"):
        of_numbers(tmp_path / "key")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(NoRoom, match="cannot be used"):
        of_numbers(tmp_path / "file" / "key")
    with pytest.raises(NoRoom, match="cannot allocate"):
        of_numbers(None, rows=2**20, width=2**40)


def test_what_is_incomplete_can_be_discarded_unless_another_uses_it(tmp_path):
    kept, other = of_numbers(tmp_path / "key"), of_numbers(tmp_path / "key")
    kept.mark([1])
    kept.discard()
    assert (tmp_path / "key" / "manifest.json").is_file() and other.missing() == [0, 2, 3]
    other.discard()
    assert list(tmp_path.iterdir()) == []
    whole = of_numbers(tmp_path / "key")
    whole.mark(range(4))
    whole.discard()
    assert of_numbers(tmp_path / "key").missing() == []
    of_numbers(None).discard()


def test_the_least_recently_used_makes_room(tmp_path):
    for age, name in enumerate(["new", "old", "used", "oldest"]):
        of_numbers(tmp_path / name, rows=1000).close()  # 4000 + 1000 bytes
        os.utime(tmp_path / name / "manifest.json", (1e9 - age, 1e9 - age))
    used = of_numbers(tmp_path / "used", rows=1000)
    os.utime(tmp_path / "used" / "manifest.json", (1, 1))
    each = budget._size(tmp_path / "new")
    assert 5000 < each < 5500
    names = lambda: sorted(path.name for path in tmp_path.iterdir())  # noqa: E731
    make_room(tmp_path, 0, 4 * each)
    assert len(names()) == 4
    with pytest.raises(NoRoom, match="in use"):
        make_room(tmp_path, 4 * each, 4.5 * each)
    with pytest.raises(NoRoom, match="are needed"):
        make_room(tmp_path, 5 * each, 4.5 * each)
    assert len(names()) == 4
    (tmp_path / ".removed-1").mkdir()
    make_room(tmp_path, each, 4.5 * each)
    assert names() == ["new", "old", "used"]
    make_room(tmp_path, 2 * each, 4 * each, own=tmp_path / "old")  # may stay, and is not counted
    assert names() == ["new", "old", "used"]
    of_numbers(tmp_path / "old", rows=1000).close()  # opening is using
    make_room(tmp_path, each, 3 * each)
    assert names() == ["old", "used"]
    used.close()
    make_room(tmp_path, 3 * each, 3 * each)
    assert names() == []
    make_room(tmp_path / "nowhere", 1, 1)


def test_budgets(tmp_path, monkeypatch):
    folder = tmp_path / "of" / "all"
    assert budget.disk_budget(folder) > 0
    monkeypatch.setattr(budget.shutil, "disk_usage", lambda place: SimpleNamespace(free=1001 if place.exists() else 0))
    assert budget.disk_budget(folder) == 500
    of_numbers(folder / "key", rows=1000).close()
    assert 5500 <= budget.disk_budget(folder) == 500 + budget._size(folder / "key")
    assert budget.memory_budget(4) <= budget.memory_budget(1) // 2
    for version, group in enumerate(["memory", "."]):
        root = tmp_path / f"groups{version}"
        names = [("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")]
        most, used, total = names[1 - version]
        (root / group / "a" / "b").mkdir(parents=True)
        for place, limit in [("a/b", "max" if version else str(2**62)), ("a", "1000")]:
            (root / group / place / most).write_text(f"{limit}\n")
            (root / group / place / used).write_text("700\n")
            (root / group / place / "memory.stat").write_text(f"cache 5\n{total}inactive_file 100\n")
        (root / "own").write_text("0::/a/b\n" if version else "3:cpu:/\n4:memory:/a/b\n")
        assert min(budget._group_limits(root, root / "own")) == 400
    assert budget._group_limits(tmp_path, tmp_path / "none") == []


# ---- several processes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> tuple[Path, dict]:
    """All that wants processes, in forks of a fork, which has no threads."""
    folder = tmp_path_factory.mktemp("processes")
    done = warm.fork(lambda: main(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_marked_rows_survive_a_kill_and_others_are_missing(processes):
    folder, seen = processes
    assert seen["killed"] == -signal.SIGKILL
    kept = Store(SLOTS, LENGTHS, 4, folder / "killed")
    assert kept.missing() == [1, 3]
    check(kept, [0, 2])
    with kept.lock_recording() as alone:  # the lock went with the process
        assert alone


def test_only_one_run_records(processes):
    _, seen = processes
    assert seen["second while making"] == "another run is creating"
    assert seen["second while recording"] == [False, [0, 2]]
    assert seen["second afterwards"] == [True, []]
    assert seen["removed while in use"] == "are in use"


def test_ranks_share_what_each_recorded(processes):
    folder, seen = processes
    assert seen["shared"] == [0, 0]
    for rank in range(2):
        end = torch.load(folder / f"shared-{rank}.pt")
        assert end["before"] == [[1, 3], [0, 3]][rank]
        assert end["after"] == [3]
        for slot in SLOTS:
            for row in range(3):
                expected = example(row, slot, LENGTHS[row]).to(slot.kept)
                assert bits(end[slot.name][row]) == bits(expected), (slot.name, row)


def _fork(function, *arguments) -> int:
    process = os.fork()
    if process == 0:
        code = 1
        try:
            function(*arguments)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        os._exit(code)
    return process


def _ended(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.005)


def _record_and_die(folder: Path) -> None:
    kept = Store(SLOTS, LENGTHS, 4, folder)
    with kept.lock_recording():
        fill(kept, [0, 2, 3])
        kept.mark([2, 0])
        kept.put(1, "scalar", torch.tensor(1.0))
        os.kill(os.getpid(), signal.SIGKILL)


def _record_slowly(folder: Path) -> None:
    kept = of_numbers(folder / "key")
    with kept.lock_recording():
        kept.mark([1, 3])
        (folder / "recording").touch()
        _wait_for(folder / "go on")
        kept.mark([0, 2])


def _make_slowly(folder: Path) -> None:
    def slow(path: Path, size: int) -> None:
        (folder / "making").touch()
        _wait_for(folder / "go on")
        RESERVE(path, size)

    store_files.reserve = slow
    of_numbers(folder / "key")


def _share(folder: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    store._CHUNK = 64  # several chunks
    kept = Store(SLOTS, LENGTHS, 4)
    for words in kept._words.values():
        words.fill_(0x55)  # memory is not empty
    rows = [[0, 2], [1, 2]][rank]  # row 2 twice, as samplers repeat
    fill(kept, rows)
    kept.mark(rows)
    before = kept.missing()
    kept.share("cpu")
    values = {slot.name: [v.clone() for v in kept.get(range(3), slot.name)] for slot in SLOTS}
    torch.save({"before": before, "after": kept.missing(), **values}, folder / f"shared-{rank}.pt")
    dist.destroy_process_group()


def main(folder: Path) -> None:
    seen = {"killed": _ended(_fork(_record_and_die, folder / "killed"))}
    making, recording = folder / "making", folder / "recording"
    for place in (making, recording):
        place.mkdir()
    other = _fork(_make_slowly, making)
    _wait_for(making / "making")
    try:
        of_numbers(making / "key")
    except NoRoom as error:
        seen["second while making"] = str(error).partition(" /")[0]
    (making / "go on").touch()
    assert _ended(other) == 0

    other = _fork(_record_slowly, recording)
    _wait_for(recording / "recording")
    second = of_numbers(recording / "key")
    with second.lock_recording() as alone:
        seen["second while recording"] = [alone, second.missing()]
    second.close()
    try:
        make_room(recording, 10, 20)
    except NoRoom as error:
        seen["removed while in use"] = str(error)[-10:]
    (recording / "go on").touch()
    assert _ended(other) == 0
    second = of_numbers(recording / "key")
    with second.lock_recording() as alone:
        seen["second afterwards"] = [alone, second.missing()]

    ranks = [_fork(_share, folder, rank) for rank in range(2)]
    seen["shared"] = [_ended(rank) for rank in ranks]
    print(json.dumps(seen))
