"""The machinery of the benchmarks against other ways to train; the scripts themselves, in small, run with the slow."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hf_transfer.analysis.validators import Scores
from tests.helpers import texts, tiny_bert

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = (
    "bucketing",
    "fastai_timm",
    "frozen_image",
    "frozen_text",
    "gradual",
    "partial",
    "probe",
    "stored_views",
)


@pytest.fixture(autouse=True)
def _on_path(monkeypatch):
    """As for a script: its own folder is looked in first. What was imported from there is forgotten again."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in [n for n in sys.modules if n.partition(".")[0] == "peers"]:
        del sys.modules[name]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made_race(calls, ours=2.0, **keys):
    """Ours takes 2 s, a peer 20 + seed, a slow one 100; accuracies 0.8 and 0.79 + seed / 100."""
    from peers import race

    def side(name, seconds, accuracy):
        def run(seed, options):
            calls.append((name, seed, options.examples))
            return {"seconds": seconds(seed), "cpu_seconds": seconds(seed) / 2, "accuracy": accuracy(seed)}

        return run

    return race.Race(
        name="made",
        title="Made",
        about=("About.",),
        sides=(
            race.Side("ours", "Ours", side("ours", lambda s: ours, lambda s: 0.8)),
            race.Side("peer", "Peer", side("peer", lambda s: 20.0 + s, lambda s: 0.79 + s / 100)),
            race.Side("slow", "Slow", side("slow", lambda s: 100.0, lambda s: 0.8), slow=True),
            race.Side("absent", "Absent", side("absent", lambda s: 1.0, lambda s: 0.0), missing=lambda: "not here"),
        ),
        claims=(race.Claim("ours", "peer", 10, "12"), race.Claim("ours", "slow", 60), race.Claim("ours", "absent")),
        slow_seeds=(0,),
        **keys,
    )


def test_a_race_pairs_seeds_interleaves_and_judges(tmp_path, capsys):
    from peers import race

    calls: list = []
    page = race.main(made_race(calls), ["--seeds", "0,1,2", "--results", str(tmp_path)])
    warm, timed = calls[:3], calls[3:]
    assert sorted(c[0] for c in warm) == ["ours", "peer", "slow"] and {c[2] for c in warm} == {race.WARM_UP}
    assert [c[1] for c in timed] == sorted(c[1] for c in timed), "seed by seed"
    assert sorted(timed) == sorted(
        [(n, s, 512) for n in ("ours", "peer") for s in range(3)] + [("slow", 0, 512)]  # only at its own seed
    )
    assert "Absent: left out, not here" in capsys.readouterr().out
    rows = [line for line in page.splitlines() if line.startswith("| Ours | ")]
    # 20/2, 21/2, 22/2; differences 1, 0, -1 points: mean 0, standard deviation 1, t(0.975, 2) = 4.3027
    half = 4.302652729911275 / math.sqrt(3)
    assert rows[0] == (
        "| Ours | Peer | 3 | 2.0, 21.0 | 10.50 | 10.00 to 11.00 | 10.50 | 10 | 12 | 80.0, 80.0 "
        f"| +0.00 ({-half:+.2f} to {half:+.2f}) | yes |"
    )
    assert rows[1].split(" | ")[2:5] == ["1", "2.0, 100.0", "50.00"] and rows[1].endswith("| no |")
    assert rows[2] == "| Ours | 2.0, 2.0, 2.0 | 80.0, 80.0, 80.0 | – | – |", "nothing is claimed of what did not run"
    assert (tmp_path / "made.md").read_text() == page


def test_a_race_goes_on_and_keeps_other_settings_apart(tmp_path):
    from peers import race

    calls: list = []
    folder = ["--results", str(tmp_path)]
    race.main(made_race(calls), ["--seeds", "0", *folder])
    calls.clear()
    race.main(made_race(calls), ["--seeds", "0,1", "--peers", "peer", *folder])
    assert sorted(c for c in calls if c[2] == 512) == [("ours", 1, 512), ("peer", 1, 512)]
    calls.clear()
    race.main(made_race(calls), ["--seeds", "0,1", "--table", *folder])
    assert calls == []
    page = race.main(made_race(calls, ours=4.0), ["--seeds", "0", "--examples", "100", "--peers", "peer", *folder])
    assert "| 1 | 4.0, 20.0 | 5.00 |" in page and "| yes |" not in page, "no target at other sizes"
    rows = json.loads((tmp_path / "made.json").read_text())["rows"]
    assert sorted({r["settings"]["examples"] for r in rows}) == [100, 512] and len(rows) == 3 + 2 + 2
    calls.clear()
    race.main(made_race(calls, ours=4.0), ["--seeds", "0", "--again", "--peers", "peer", *folder])
    rows = json.loads((tmp_path / "made.json").read_text())["rows"]
    assert len(rows) == 7 and [c for c in calls if c[2] == 512], "run again, and in the place of the old one"
    with pytest.raises(SystemExit, match="there are ours, peer"):
        race.main(made_race(calls), ["--peers", "nobody", *folder])


def test_a_loss_of_accuracy_is_no_success(tmp_path):
    """0.5 points may go."""
    from peers import race

    for lost, reached in ((0.004, True), (0.006, False)):
        book = race.Book(tmp_path / f"{lost}.json", {})
        for side, seconds, accuracy in (("ours", 1.0, 0.8 - lost), ("peer", 20.0, 0.8)):
            book.add(side, 0, {"seconds": seconds, "cpu_seconds": seconds, "accuracy": accuracy})
        found = race.compare(made_race([]), book, race.Claim("ours", "peer", 10), [0, 1])
        assert found["ratio"] == 20 and found["reached"] is reached and found["interval"] == [-math.inf, math.inf]


def test_both_trainers_train_the_same_parameters_from_the_same_weights():
    """The clock's work itself: what a script freezes stays, ours and plain Trainer train the head alone."""
    from peers import text, trainers
    from transformers import default_data_collator

    options = argparse.Namespace(epochs=1)
    outcomes, heads = [], []
    for freeze, keys in ((text.freeze_encoder, {}), (None, {"strategy": "linear-probe", "boundary_cache": "memory"})):
        model = tiny_bert()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        prepared = (texts(8), default_data_collator)
        outcome = trainers.fit(model, lambda p=prepared: p, 0, options, 4, {"learning_rate": 1e-2, **keys}, freeze)
        moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
        assert moved == ["classifier.weight", "classifier.bias"]
        outcomes.append(outcome)
        heads.append(model.classifier.weight.detach())
    assert [o["trained"] for o in outcomes] == [18, 18] and [o["steps"] for o in outcomes] == [2, 2]
    assert all(o["seconds"] > 0 and o["cpu_seconds"] > 0 for o in outcomes)
    torch.testing.assert_close(*heads)  # without dropout they are the same run


def test_every_race_has_its_script_and_its_page():
    found = {p.stem for p in FOLDER.glob("*.py") if "race.main(RACE)" in p.read_text()}
    assert found == set(SCRIPTS)
    page = (FOLDER.parent / "docs" / "benchmarks.md").read_text()
    assert all(f"`{p.name}`" in page for p in FOLDER.glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_run(name, tmp_path):
    from peers import race

    made = script(name).RACE
    assert made.name == name
    sizes = ["--examples", "40", "--held_out", "20", "--epochs", "2", "--seeds", "0"]
    race.main(made, [*sizes, "--results", str(tmp_path)])
    rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
    assert {r["side"] for r in rows} == {s.key for s in made.sides if not s.missing()}
    assert all(0 <= r["outcome"]["accuracy"] <= 1 and r["outcome"]["seconds"] > 0 for r in rows)


def test_what_is_forgotten_is_judged_against_full_fine_tuning(tmp_path, capsys):
    """Two seeds; of three tasks, the first two are old and the last two are new."""
    made = script("forgetting")
    full = {"learned": [0.8, 0.8, 0.8], "ended": [0.4, 0.8, 0.8], "seconds": 10}
    ewc = {"learned": [0.8, 0.8, 0.79], "ended": [0.8, 0.76, 0.79], "seconds": 20}
    low = {"learned": [0.8, 0.7, 0.7], "ended": [0.8, 0.7, 0.7], "seconds": 30}
    cells = {
        f"three {side} {seed} train 400 test 500": cell
        for side, cell in (("full", full), ("ewc", ewc), ("low", low))
        for seed in (0, 1)
    }
    (tmp_path / "forgetting.json").write_text(json.dumps({"cells": cells, "machine": {"cores": 1}}))
    made.main(["--table", "--results", str(tmp_path)])
    page = (tmp_path / "forgetting.md").read_text()
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in page.splitlines() if line.startswith("| ")}
    assert rows["full fine-tuning"] == ["2", "80.0", "60.0", "75.0", "75.0", "80.0", "+0.0", "10", "no |"]
    # Learned 80.0 and 78.0 of 80; of the old ones, 80 and 76 of 80 and 80 are left.
    assert rows["`ewc_lambda: 1000`"] == [
        *("2", "80.0", "78.0", "97.5", "97.5", "79.5", "-0.5 (-0.5 to -0.5)", "20", "yes |")
    ]
    assert rows["a fifth of the learning rate"][-3:] == ["-10.0 (-10.0 to -10.0)", "30", "no |"]
    assert (tmp_path / "forgetting.png").stat().st_size > 1000 and "imdb" not in page
    with pytest.raises(SystemExit):
        made.main(["--sides", "nothing", "--results", str(tmp_path)])
    assert "there are full, low" in capsys.readouterr().err


def test_the_share_of_the_gap_that_adaptation_closes(tmp_path, monkeypatch, capsys):
    """Finished cells are kept, by all settings; auto of a network of one's own chooses among them, by its rule."""
    made, calls = script("domain_adaptation"), []
    accuracies = {"source": 0.5, "oracle": 0.9, "mmd": 0.6, "mmd+5": 0.7, "auto": 0.5}
    accuracies |= {"frozen": 0.3, "frozen-coral": 0.4, "frozen-oracle": 0.5}
    accuracies |= dict.fromkeys(("coral", "dann"), 0.4)

    def run(side, seed, options, keys):
        calls.append((side, seed, keys.get("domain_adaptation"), keys.get("strategy")))
        more = {"kept": ("none", "mmd")[seed]} if side == "auto" else {}
        if side == "auto":  # of a pretrained model, whose candidates are cells too
            more["others"] = {"dann": {"accuracy": 0.45, "seconds": 7.0}, "mmd": {"accuracy": 0.0, "seconds": 7.0}}
        scores = Scores(1.5 if side == "mmd" else 1.0, 0.5, None, None, 0.9, 0.01)
        return {"accuracy": accuracies[side] + seed / 100, "seconds": 10.0, "validators": scores.to_dict(), **more}

    cases = {"small": made.Case("Small", run, 1.0, is_pretrained=False), "large": made.Case("Large", run)}
    monkeypatch.setattr(made, "CASES", cases)
    sides = [side for side in accuracies if side not in ("coral", "dann")]
    words = ["--cases", "small,large", "--sides", ",".join(sides), "--seeds", "0,1", "--results", str(tmp_path)]
    page = made.main(words)
    assert len(calls) == 2 * (4 + 2 + 8), "two candidates of auto that were not asked for"
    assert ("mmd+5", 1, "mmd", None) in calls
    assert ("frozen-oracle", 0, None, "linear-probe") in calls and ("auto", 1, "auto", None) in calls
    assert ("frozen-coral", 0, "coral", "linear-probe") in calls and ("oracle", 0, None, None) in calls
    rows = {tuple(line.split(" | ")[:2]): line.split(" | ")[2:] for line in page.splitlines() if line[:5] != "|---|"}
    assert rows["| Large", "mmd"] == ["4,000", "20", "2", "60.5", "60.0", "+10.0 (+10.0 to +10.0)", "25%", "10 |"]
    assert rows["| Large", "dann"][3:] == ["45.0", "45.0", "-5.5 (-11.9 to +0.9)", "-14%", "7 |"]
    assert rows["| Large", "mmd+5"][6] == "50%" and rows["| Large", "auto (kept: none, mmd)"][6] == "0%"
    assert rows["| Small", "auto (kept: mmd, mmd)"][4:] == ["60.0", "+10.0 (+10.0 to +10.0)", "25%", "40 |"]
    frozen = ["4,000", "–", "2", "40.5", "40.0", "+10.0 (+10.0 to +10.0)", "50%", "10 |"]
    assert rows["| Large", "frozen-coral"] == frozen, "compared with a head that is solved for without the target"
    assert ("| Small", "frozen-coral") not in rows and rows["| Small", "oracle"][6] == "–"
    calls.clear()
    made.main([*words, "--domain_adaptation_weight", "0.1"])
    adapting = {"mmd", "mmd+5", "auto", "coral", "dann"}
    assert {call[0] for call in calls} == adapting, "the other sides do not adapt by a penalty"
    smaller = made.main([*words[:2], "--sides", "source,mmd", *words[4:], "--examples", "300", "--epochs", "5"])
    assert all(f"| Small | mmd | {size} | 2 |" in smaller for size in ("4,000 | 20", "300 | 5"))
    assert "| Large | mmd, domain_adaptation_weight 0.1 | 4,000 | 20 | 2 |" in smaller
    with pytest.raises(SystemExit):
        made.main(["--sides", "nothing", "--results", str(tmp_path)])
    assert "there are source, mmd" in capsys.readouterr().err


def test_the_parts_of_a_domain_share_no_example(monkeypatch):
    made = script("domain_adaptation")
    made.digits.cache_clear()
    monkeypatch.setattr(made, "MNIST", FOLDER / "nowhere")
    source, target, test = made.digits(0, 60, made.Target())
    assert source[0].shape == target[0].shape == test[0].shape == (60, 28, 28, 3)
    shifted = made.digits(0, 60, made.SHIFTED)
    assert (shifted[0][1] == source[1]).all() and (shifted[1][1] >= 5).mean() < 0.3 < (target[1] >= 5).mean()
    near = made.digits(0, 60, made.NEAR)
    assert (near[0][0] == source[0]).all() and (near[1][1] >= 3).mean() < 0.4 and near[1][0].mean() < target[0].mean()
    reviews = {"text": [f"s{i}" for i in range(60)], "label": [i % 2 for i in range(60)]}
    data = made.Dataset.from_dict({**reviews, "origin": [str(i // 3) for i in range(60)]})
    monkeypatch.setattr(
        made, "sentences", lambda name: data.cast_column("label", made.ClassLabel(names=["neg", "pos"]))
    )
    _, train, held = made.text_parts("a", "b", 0, 1000)
    groups = [{int(text[1:]) // 3 for text in part["text"]} for part in (train, held)]
    assert not groups[0] & groups[1] and len(groups[1]) == 6 and len(train) + len(held) == 60
    assert made.first_of_each([1, 0, 1, 1, 0], 2) == [0, 1, 2, 4]


@pytest.mark.slow
def test_a_small_network_adapts_in_small(tmp_path):
    page = script("domain_adaptation").main(["--quick", "--sides", "source,dann,mmd+5,oracle"])
    assert page.count("the paper's network") == 4


@pytest.mark.slow
def test_halves_of_the_classes_are_learned_one_after_the_other(tmp_path, monkeypatch):
    """Digits below and from 5: the head alone forgets nothing, replay knows all ten, and finished cells are kept."""
    made = script("forgetting")
    monkeypatch.setattr(made, "CHAINS", {"halves": ("digits animals", "digits others")})
    monkeypatch.setattr(made, "ANIMALS", ("0", "1", "2", "3", "4"))
    monkeypatch.setitem(made.KEYS["image"], "num_train_epochs", 1)
    words = ["--chains", "halves", "--seeds", "0", "--train", "40", "--held_out", "40", "--results", str(tmp_path)]
    made.main([*words, "--sides", "head,replay,interpolation"])
    cells = {k.split()[1]: c for k, c in json.loads((tmp_path / "forgetting.json").read_text())["cells"].items()}
    assert cells["head"]["ended"] == cells["head"]["learned"]
    assert cells["replay"]["old_heads"] != cells["replay"]["ended"][:-1], "measured by the head that knows all"
    assert len({cell["learned"][0] for cell in cells.values()}) == 1, "all from the same model"
    monkeypatch.setattr(made.Chain, "__init__", None)
    made.main([*words, "--sides", "head"])
    (split,) = {tuple(d.features["label"].names) for d in made.task("digits others", 40, 40, 0).values()}
    assert split == ("5", "6", "7", "8", "9")


@pytest.mark.slow
def test_memory_is_measured():
    """A partial run needs less than full fine-tuning, which keeps gradients and two moments of 22.7 million weights."""
    command = [sys.executable, str(FOLDER / "memory.py"), "--quick"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line.split("|") for line in ran.stdout.splitlines() if line.startswith("| ")][1:]
    peaks = {row[1].strip(): float(row[2]) for row in rows}
    assert peaks["Trainer, full fine-tuning"] - peaks["partial, cache"] > 300
    assert float(rows[3][4]) > 0


@pytest.mark.slow
def test_a_plan_of_this_machine_is_compared_with_a_run():
    """Each cell is a process; full fine-tuning holds parameters, gradients and two moments of 22.7 million weights."""
    made = {}
    for what in ("plan", "run"):
        asked = {"case": "text, full", "what": what, "keys": {"cpu_threads": 1}, "steps": 6}
        command = [sys.executable, str(FOLDER / "machine.py"), "--cell", json.dumps(asked)]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        made[what] = json.loads(ran.stdout.splitlines()[-1])
    assert made["plan"]["seconds"] > 0 and made["run"]["seconds"] > 0
    assert made["run"]["peak"] > 4 * 90_000_000 < made["plan"]["bytes"]


def test_outcomes_are_counted_wherever_a_run_said_what_it_expected(tmp_path):
    made = script("expected")
    said = {"accuracy": 0.8, "low": 0.7, "high": 0.9, "frozen": 0.75, "frozen_sd": 0.03, "examples": 100, "layer": "x"}
    said |= {"gain": 0.01, "split_examples": 400}
    own = {**said, "strategy": "two-phase", "outcome": 0.78}
    chosen = {"chosen": {"strategy": "linear-probe"}, "accuracy": 0.6, "expected": said}
    books = {
        "expected": {"imdb 64 0 test 500": own, "imdb 8 0 test 500": {"skipped": "few", "strategy": "x", "outcome": 1}},
        "low_data": {"messages 16 auto 0 test 1000": chosen, "messages 16 best 0 test 1000": chosen},
        "advice": {
            "digits 300 lite0 auto 1": {"accuracy": 0.85, "strategy": "two-phase", "expected": said},
            "digits 300 lite0 full 1": {"accuracy": 0.9, "strategy": "full"},
        },
    }
    for name, cells in books.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"cells": cells}))
    found = [(made.kind_of(one), one["data"], one["test"], one["outcome"]) for one in made.gathered(tmp_path)]
    assert found == [
        ("text", "imdb", 500, 0.78),
        ("head alone", "messages", 1000, 0.6),
        ("image", "digits", 400, 0.85),
    ]
    page = made.table(made.gathered(tmp_path))
    assert "| all layers | digits | 1 | 1 |" in page and "| head alone | messages | 1 | 0 |" in page
    assert "All: 2 of 3 outcomes held (67%)." in page
