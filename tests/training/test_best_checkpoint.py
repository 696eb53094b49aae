"""A run may move: its best checkpoint is found by its step, and one that is gone is not passed over in silence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hf_transfer import TransferTrainer, UserError
from hf_transfer.training import checkpoints
from tests.helpers import arguments, changed, copy_state, texts, tiny_bert

QUALITY = {4: 0.7, 8: 0.9, 12: 0.8, 16: 0.5}


def trained(folder, resumed=None, model=None, callbacks=(), **keys):
    keys = {"strategy": "full", "num_train_epochs": 4, "save_strategy": "epoch", "eval_strategy": "epoch", **keys}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "quality", "greater_is_better": True}
    trainer = TransferTrainer(
        model or tiny_bert(layers=1), arguments(folder, **{**best, **keys}), train_dataset=texts(16),
        eval_dataset=texts(8), compute_metrics=lambda _: {"quality": QUALITY[trainer.state.global_step]},
        callbacks=list(callbacks),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resumed)
    return trainer


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """(a run whose best checkpoint is the second of four, the weights that it kept)."""
    folder = tmp_path_factory.mktemp("run") / "out"
    return folder, copy_state(trained(folder).model)


def cut(original, place, at=12):
    """A copy of the run as it was at a step."""
    shutil.copytree(original, place)
    for folder in checkpoints.checkpoints(place):
        if int(folder.name.split("-")[1]) > at:
            shutil.rmtree(folder)


@pytest.mark.parametrize("is_moved", [True, False])
def test_a_moved_or_copied_run_keeps_its_best(is_moved, original, tmp_path, monkeypatch):
    """After a move the recorded path leads nowhere; after a copy, to a folder that is another run by now."""
    folder, best = original
    cut(folder, tmp_path / "first")
    cut(tmp_path / "first", tmp_path / "second")
    for file in (tmp_path / "second").glob("*/trainer_state.json"):  # as if written in `first`
        state = json.loads(file.read_text())
        if state["best_model_checkpoint"]:
            state["best_model_checkpoint"] = str(tmp_path / "first" / "checkpoint-8")
            file.write_text(json.dumps(state))
            (file.parent / checkpoints.MANIFEST).unlink()
            checkpoints.seal(file.parent)
    if is_moved:
        shutil.rmtree(tmp_path / "first")
    else:
        weights = tmp_path / "first" / "checkpoint-8" / "model.safetensors"
        save_file({n: t * 0 for n, t in load_file(weights).items()}, weights, {"format": "pt"})
    trainer = trained(tmp_path / "second", resumed="auto")
    assert trainer.resumed_at == 12 and not changed(best, copy_state(trainer.model))
    assert Path(trainer.state.best_model_checkpoint) == tmp_path / "second" / "checkpoint-8"


def test_a_run_that_goes_on_in_another_folder_takes_its_best_along(original, tmp_path):
    folder, best = original
    cut(folder, tmp_path / "first")
    trainer = trained(tmp_path / "second", resumed=str(tmp_path / "first" / "checkpoint-12"), save_total_limit=2)
    assert not changed(best, copy_state(trainer.model))
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "second")] == ["checkpoint-16", "checkpoint-8"]
    shutil.rmtree(tmp_path / "first")
    shutil.rmtree(tmp_path / "second" / "checkpoint-16")
    assert checkpoints.problem(tmp_path / "second" / "checkpoint-8") is None


@pytest.mark.parametrize(
    ("gone", "kept", "said"),
    [
        ([8], 12, "Of those that are left, checkpoint-12 is the best (0.8)"),
        ([8, 4], 12, "checkpoint-12 is the best"),
    ],
)
def test_a_best_checkpoint_that_is_gone_is_told(gone, kept, said, original, tmp_path, capsys):
    cut(original[0], tmp_path / "run")
    for step in gone:
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    trainer = trained(tmp_path / "run", resumed="auto")
    told = capsys.readouterr().err
    assert (
        "checkpoint-8, the best of the run (eval_quality 0.9), is damaged or not there any more" in told
        and said in told
    )
    assert trainer.state.best_global_step == kept
    weights = load_file(tmp_path / "run" / f"checkpoint-{kept}" / "model.safetensors")
    assert not changed({n: weights[n] for n in weights}, {n: copy_state(trainer.model)[n] for n in weights})


def test_a_best_checkpoint_that_vanishes_in_training_is_told(tmp_path, capsys):
    class Vanish(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 15:
                for folder in checkpoints.checkpoints(tmp_path):
                    shutil.rmtree(folder)

    trainer = trained(tmp_path, callbacks=[Vanish()], save_strategy="epoch")
    assert "checkpoint-16 is the best (0.5)" in capsys.readouterr().err
    assert trainer.state.best_global_step == 16


def test_a_damaged_best_checkpoint_is_not_loaded(original, tmp_path, capsys):
    cut(original[0], tmp_path / "run")
    with (tmp_path / "run" / "checkpoint-8" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert trained(tmp_path / "run", resumed="auto").state.best_global_step == 12
    assert "is damaged or not there any more" in capsys.readouterr().err


# ---- what a checkpoint holds ---------------------------------------------------------------------------------------


def without(*names):
    def damage(folder):
        for name in names:
            (folder / name).unlink()

    return damage


@pytest.mark.parametrize(
    ("damage", "said", "is_renamed"),
    [
        (without("manifest.json"), "manifest.json is missing", True),
        (without("manifest.json", "transfer_state.json", "model.safetensors"), "it holds no weights", True),
        (without("manifest.json", "transfer_state.json", "optimizer.pt"), "it holds no optimizer", False),
        (without("manifest.json", "transfer_state.json", "scheduler.pt"), "scheduler.pt is missing", True),
    ],
)
def test_a_checkpoint_with_a_part_missing_is_passed_over(damage, said, is_renamed, original, tmp_path, capsys):
    cut(original[0], tmp_path / "run")
    damage(tmp_path / "run" / "checkpoint-12")
    with pytest.raises(UserError, match=said):
        trained(tmp_path / "run", resumed=str(tmp_path / "run" / "checkpoint-12"))
    trainer = trained(tmp_path / "run", resumed="auto")
    assert trainer.resumed_at == 8 and not changed(original[1], copy_state(trainer.model))
    told = capsys.readouterr().err
    assert said in told and (tmp_path / "run" / "broken-checkpoint-12").exists() == is_renamed


def test_weights_alone_are_no_checkpoint_to_resume(tmp_path, capsys):
    keys = {"load_best_model_at_end": False, "num_train_epochs": 2}
    trained(tmp_path, save_only_model=True, **keys)
    for resumed in ("auto", str(tmp_path / "checkpoint-4")):
        with pytest.raises(UserError, match=r"holds no optimizer.*save_only_model.*model_name_or_path"):
            trained(tmp_path, resumed=resumed, **keys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-8"]


def test_best_weights_alone_are_loaded(tmp_path):
    trainer = trained(tmp_path, save_only_model=True)
    assert trainer.state.best_global_step == 8
    weights, own = load_file(tmp_path / "checkpoint-8" / "model.safetensors"), copy_state(trainer.model)
    assert not changed(weights, {n: own[n] for n in weights})


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state, name: state.pop(name), "missing: "),
        (lambda state, name: state.update(more=state[name].clone()), "unexpected: more"),
        (lambda state, name: state.update({name: state[name][:1].clone()}), "(of another shape|size mismatch)"),
    ],
)
def test_weights_are_loaded_whole_or_not_at_all(adapter, change, said, tmp_path):
    keys = {"adapter": adapter, "num_train_epochs": 2, "load_best_model_at_end": False}
    trained(tmp_path, **keys)
    folder = tmp_path / "checkpoint-4"
    path = folder / ("model.safetensors" if adapter == "none" else "adapter_model.safetensors")
    state = load_file(path)
    change(state, next(n for n in sorted(state) if "query" in n))
    save_file(state, path, {"format": "pt"})
    (folder / checkpoints.MANIFEST).unlink()
    checkpoints.seal(folder)
    with pytest.raises(UserError, match=said):
        trained(tmp_path, resumed=str(folder), **keys)
