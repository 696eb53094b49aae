"""`find-lr` and `learning_rate: auto`: what they find, that they leave no trace, and what they refuse."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_transfer import TransferArguments, UserError, fine_tune
from hf_transfer.analysis.range_test import Curve, Sweep, rates_between
from hf_transfer.cli.program import main
from hf_transfer.runs import finding_rate, range_testing
from hf_transfer.runs.configured import configured
from hf_transfer.runs.finding_rate import find_rate
from hf_transfer.runs.prepare import make_trainer, prepare, prepare_splits
from hf_transfer.runs.range_testing import range_test
from tests.helpers import TOKENS, tiny_bert

WORDS = [
    "film",
    "story",
    "end",
    "cast",
    "man",
    "music",
    "plot",
    "love",
    "war",
    "day",
    "year",
    "place",
    "song",
    "part",
    "world",
    "life",
]
KEPT = ("config.json", "model.safetensors")


@pytest.fixture(scope="module")
def keys(tiny_bert_folder, tmp_path_factory):
    """Of a run of a small model with dropout, whose loss a range test lowers."""
    folder = tmp_path_factory.mktemp("rate") / "bert"
    table = folder.with_name("train.csv")
    shutil.copytree(tiny_bert_folder, folder)
    tiny_bert(vocab_size=TOKENS, dropout=0.1).save_pretrained(folder)
    rows = [f"{'good' if i % 2 else 'bad'} {word},{i % 2}" for i in range(4) for word in WORDS]
    table.write_text("\n".join(["text,label", *rows, ""]))
    return dict(
        model_name_or_path=str(folder),
        train_file=str(table),
        train_val_split=0.25,
        strategy="full",
        num_train_epochs=2,
        log_level="error",
        preflight=False,
        calibrate=False,
    )


def made(keys, folder, **more):
    """(run, trainer, splits), ready for a test."""
    prepared = prepare(configured(None, None, {**keys, "output_dir": str(folder), **more}))
    splits = prepare_splits(prepared)
    return prepared, make_trainer(prepared, splits["train"], splits["validation"]), splits


@pytest.fixture(scope="module")
def ready(keys, tmp_path_factory):
    return made(keys, tmp_path_factory.mktemp("ready"))


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(finding_rate, "Sweep", lambda: Sweep(steps=30, start=1e-5))


def state(trainer):
    """Everything that decides how the trainer goes on."""
    model = trainer.model
    order = [batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    return values, flags, {name: m.training for name, m in model.named_modules()}, order


def test_a_range_test_leaves_no_trace(ready):
    before, drawn = state(ready[1]), torch.random.get_rng_state()
    curve = range_test(*ready, Sweep(steps=30))
    assert torch.equal(drawn, torch.random.get_rng_state())
    torch.random.set_rng_state(drawn)
    after = state(ready[1])
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:3] == after[1:3] and sorted(map(str, before[3])) != before[3]
    assert ready[1].optimizer is None and all(p.grad is None for p in ready[1].model.parameters())
    assert curve.rates[0] == 1e-7 and len(curve.losses) == len(curve.rates) <= 30


def test_a_first_loss_that_is_not_finite(ready, monkeypatch):
    loss = torch.tensor(float("nan"), requires_grad=True)
    monkeypatch.setattr(ready[1], "compute_loss", lambda *_, **__: loss * 1)
    with pytest.raises(UserError, match="the loss is nan at the first step already"):
        range_test(*ready, Sweep())


def test_the_steps_are_those_of_the_run(keys, tmp_path, monkeypatch):
    """At a learning rate that stays, they have the losses of the run: its batches, ratios, accumulation, clipping."""
    more = dict(optim="sgd", lr_scheduler_type="constant", logging_steps=1, layer_lr_decay=0.5, learning_rate=0.1)
    more |= dict(gradient_accumulation_steps=4, head_learning_rate=0.2, num_train_epochs=3, eval_strategy="no")
    folder = tmp_path / "bert"
    tiny_bert(vocab_size=TOKENS).save_pretrained(folder)  # without dropout
    shutil.copytree(keys["model_name_or_path"], folder, dirs_exist_ok=True, ignore=lambda *_: KEPT)
    run = made(keys | {"model_name_or_path": str(folder), "save_strategy": "no"}, tmp_path / "out", **more)
    monkeypatch.setattr(range_testing, "rates_between", lambda start, end, steps: [0.1] * steps)
    curve = range_test(*run, Sweep(steps=20))
    run[1].train()
    losses = [log["loss"] for log in run[1].state.log_history if "loss" in log]
    assert len(losses) == 6  # 2 steps of up to 4 batches in each epoch
    assert curve.losses[:6] == pytest.approx(losses, rel=1e-5)


def test_auto(keys, tmp_path, short, monkeypatch):
    """A run with `auto`, one with the number that it found, and one that is resumed, are the same, bit for bit."""
    folder = tmp_path / "auto"
    found = fine_tune(**keys, learning_rate="auto", save_strategy="epoch", output_dir=str(folder))
    chosen = found.results["auto"]["learning_rate"]
    assert "range test of stage 'all groups'" in chosen["why"]
    assert found.results["plan"][0]["learning_rates"]["head"] == chosen["value"] != 5e-5
    assert yaml.safe_load((folder / "run.yaml").read_text())["learning_rate"] == chosen["value"]
    with (folder / "find_lr.csv").open() as file:
        assert float(next(csv.DictReader(file))["learning_rate"]) == 1e-5
    assert (folder / "find_lr.png").read_bytes().startswith(b"\x89PNG")
    ours = load_file(folder / "model.safetensors")

    (folder / "results.json").unlink()
    monkeypatch.setattr(finding_rate, "range_test", lambda *_: pytest.fail("searched again"))
    first = min(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    more = {"save_strategy": "epoch", "output_dir": str(folder), "resume_from_checkpoint": str(first)}
    resumed = fine_tune(**keys, learning_rate="auto", **more)
    given = fine_tune(**keys, learning_rate=chosen["value"], save_strategy="no", output_dir=str(tmp_path / "given"))
    assert resumed.results["auto"]["learning_rate"]["value"] == chosen["value"]
    for other in (resumed, given):
        theirs = load_file(other.output_dir / "model.safetensors")
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def curve_with(smoothed):
    return lambda *_: Curve(tuple(rates_between(1e-7, 1.0, len(smoothed))), tuple(smoothed))


def test_what_the_run_chose_keeps_its_ratio(ready, monkeypatch):
    """`strategy: auto` chooses a learning rate for the head too."""
    monkeypatch.setattr(finding_rate, "range_test", curve_with([2.0] * 50 + [2.0 - 0.05 * i for i in range(50)]))
    prepared, trainer, splits = ready
    monkeypatch.setattr(trainer.args, "learning_rate", 1e-4)
    monkeypatch.setattr(trainer.args, "head_learning_rate", 3e-4)
    searching = replace(prepared, config=replace(prepared.config, finds_rate=True))
    run, found = find_rate(searching, trainer, splits, None)
    chosen = {name: choice.value for name, choice in run.chosen.keys.items()}
    assert found is not None and chosen["head_learning_rate"] == pytest.approx(3 * chosen["learning_rate"], rel=0.02)
    assert trainer.plan.stages[0].rate("head", "") == chosen["head_learning_rate"]
    assert trainer.plan.stages[0].rate("layer.0", "") == chosen["learning_rate"] == trainer.args.learning_rate


def test_the_default_stays_where_nothing_lowers_the_loss(ready, monkeypatch):
    monkeypatch.setattr(finding_rate, "range_test", curve_with([2.0, 2.1] * 30))
    prepared, trainer, splits = ready
    before = trainer.args.learning_rate
    searching = replace(prepared, config=replace(prepared.config, finds_rate=True))
    run, _ = find_rate(searching, trainer, splits, None)
    assert run.chosen.keys["learning_rate"].value == before
    assert "no learning rate clearly lowers the loss" in run.chosen.keys["learning_rate"].why


def test_the_verb_prints_the_keys_to_copy(keys, tmp_path, capsys):
    words = [f"--{name}={value}" for name, value in keys.items() if name != "log_level"]
    assert (
        main(
            [
                "find-lr",
                *words,
                "--output_dir",
                str(tmp_path / "out"),
                "--head_learning_rate",
                "1e-3",
                "--num_steps",
                "40",
            ]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    (valley,) = [line.split() for line in lines if line.startswith("  valley")]
    rate, head = float(valley[-3]), float(valley[-1])
    assert valley[-4] == "--learning_rate" and valley[-2] == "--head_learning_rate"
    assert head / rate == pytest.approx(20, rel=0.05)  # 1e-3 to 5e-5, rounded
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["find_lr.csv", "find_lr.png"]


def test_all_rates_of_stages_are_swept_together():
    args = TransferArguments(
        "out",
        stages=[{"epochs": 1, "train": "head", "learning_rate": 1e-3}, {"epochs": 1, "train": "all"}],
        learning_rate=1e-4,
        layer_learning_rates={"layer.0": 1e-5},
        report_to="none",
    )
    found = finding_rate._keys_at(args, 2e-4)
    assert found["learning_rate"] == 2e-4 and found["layer_learning_rates"] == {"layer.0": 2e-5}
    assert found["stages"] == [{"epochs": 1, "train": "head", "learning_rate": 2e-3}, {"epochs": 1, "train": "all"}]


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"strategy": "linear-probe", "probe_solver": "lbfgs"}, "there is none to find"),
        ({"streaming": True, "max_steps": 4}, "auto: streaming"),
        ({"contrastive_epochs": 1}, "auto: the contrastive stage"),
        ({"strategy": None}, "without a strategy"),
        ({"head_learning_rate": 1e-3}, "head_learning_rate gives one"),
        ({"layer_learning_rates": {"head": 1e-3}}, "layer_learning_rates gives one"),
        (
            {"strategy": "auto", "stages": [{"epochs": 2, "train": "all", "learning_rate": 1e-3}]},
            r"stages\[0\].learning_rate gives one",
        ),
    ],
)
def test_auto_is_refused(more, said, keys):
    with pytest.raises(UserError, match=said):
        configured(None, None, keys | {"learning_rate": "auto", "output_dir": "out"} | more)


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        (Sweep(steps=5), "num_steps: a range test of 5 steps is too short"),
        (Sweep(start=1.0, end=0.1), "start_learning_rate: the learning rate must rise"),
        (Sweep(stage=4), "stage: there is no stage 5. The stages are 1 "),
    ],
)
def test_sweeps_that_say_nothing(sweep, said, ready):
    with pytest.raises(UserError, match=said):
        range_test(*ready, sweep)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"probe_solver": "lbfgs"}, "takes no steps"),
        ({"contrastive_epochs": 1}, "contrastive_epochs: the range test"),
        ({"learning_rate": 0.0}, "learning_rate: 0 has no ratio"),
    ],
)
def test_runs_without_a_learning_rate_to_find(more, said, ready, monkeypatch):
    for name, value in more.items():
        monkeypatch.setattr(ready[1].args, name, value)
    with pytest.raises(UserError, match=said):
        range_test(*ready, Sweep())


def test_a_loss_that_diverges_at_once(keys, tmp_path):
    config = configured(None, None, {**keys, "output_dir": str(tmp_path / "out"), "optim": "sgd"})
    with pytest.raises(UserError, match="diverges at once"):
        finding_rate.find_lr(config, Sweep(start=1e6, end=1e9, steps=20), talks=False)


@pytest.mark.parametrize("value", ["fast", "1e-3x"])
def test_words_that_are_no_learning_rate(value, keys):
    with pytest.raises(UserError, match=f"'{value}' is not a number. Use one, or auto"):
        configured(None, None, {**keys, "learning_rate": value})
    with pytest.raises(UserError, match=f"'{value}' is not a number"):
        TransferArguments("out", learning_rate=value)


def test_numbers_as_text_are_numbers(keys):
    assert configured(None, None, {**keys, "learning_rate": "1e-3"}).training.learning_rate == 1e-3
