"""What trackers get, how a run shows itself in a notebook, and that nothing is tracked unless it is asked for."""

from __future__ import annotations

import importlib.util

import pytest
from transformers.integrations import integration_utils
from transformers.trainer_callback import ProgressCallback, TrainerCallback

from hf_transfer import TransferTrainer, UserError, fine_tune
from hf_transfer.config.arguments import tracking
from hf_transfer.runs import announce
from hf_transfer.training.progress import Bars, History, Lines, Meter
from tests.helpers import arguments, texts, tiny_bert
from tests.runs.helpers import sentences

KEYS = dict(
    strategy="gradual", num_train_epochs=2, logging_steps=2, save_strategy="no", preflight=False, label_issues=False
)


class Fake(TrainerCallback):
    """A tracker that keeps what it is told."""

    told: list[tuple[int, dict]] = []  # noqa: RUF012 - of the one instance

    def on_log(self, args, state, control, logs=None, **_):
        self.told.append((state.global_step, dict(logs)))


@pytest.fixture
def data(tmp_path):
    return sentences(tmp_path / "d.csv", 24)


def test_a_tracker_gets_the_rate_of_every_group(tiny_bert_folder, data, tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.TRACKERS, "trackio", (("json",), ""))
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Fake)
    Fake.told.clear()
    result = fine_tune(tiny_bert_folder, data, output_dir=str(tmp_path / "o"), report_to="trackio", **KEYS)
    losses = [(step, logs) for step, logs in Fake.told if "loss" in logs]
    history = result.history[result.history["loss"].notna()]
    assert [step for step, _ in losses] == history["step"].tolist() and len(losses) > 2
    for (_, logs), (_, line) in zip(losses, history.iterrows(), strict=True):
        rates = {
            name.removeprefix("learning_rate/"): r for name, r in logs.items() if name.startswith("learning_rate/")
        }
        assert rates == {name: line[f"learning_rate.{name}"] for name in rates}
        assert set(rates) == {"embeddings", "layer.0", "layer.1", "head"} - set(result.plan.never_thawed)
        assert logs["samples_per_second"] == line["samples_per_second"] > 0 and logs["memory_bytes"] > 1e6
        assert logs["stage"] == line["stage"]
    assert any("eval_accuracy" in logs for _, logs in Fake.told)


def test_nothing_is_tracked_unless_it_is_asked_for(tiny_bert_folder, data, tmp_path):
    result = fine_tune(tiny_bert_folder, data, output_dir=str(tmp_path / "o"), **KEYS | dict(log_level="error"))
    known = tuple(integration_utils.INTEGRATION_TO_CALLBACK.values())
    assert result.trainer.args.report_to == []
    assert not [c for c in result.trainer.callback_handler.callbacks if isinstance(c, known)]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard(tiny_bert_folder, data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fine_tune(tiny_bert_folder, data, output_dir=str(tmp_path / "o"), report_to="tensorboard", **KEYS)
    names = set()
    for file in (tmp_path / "o").rglob("events.out.*"):
        read = EventAccumulator(str(file))
        read.Reload()
        names |= set(read.Tags()["scalars"])
    wanted = {"train/loss", "train/learning_rate/layer.1", "train/samples_per_second", "train/stage", "eval/accuracy"}
    assert wanted <= names, names


def test_a_notebook_has_bars_and_lines(tmp_path, monkeypatch):
    class Table(TrainerCallback):
        """As transformers shows in a notebook."""

    args = arguments(tmp_path, strategy="full", disable_tqdm=False)
    trainer = TransferTrainer(tiny_bert(), args, train_dataset=texts(8))
    trainer.add_callback(Table())
    monkeypatch.setattr(announce, "DEFAULT_PROGRESS_CALLBACK", Table)
    monkeypatch.setattr(announce, "is_in_notebook", lambda: True)
    announce.replace_progress(trainer, tmp_path, talks=True)
    callbacks = trainer.callback_handler.callbacks
    assert isinstance(callbacks[0], Meter) and not any(isinstance(c, Table) for c in callbacks)
    assert [type(c) for c in callbacks if isinstance(c, ProgressCallback | Lines | History)] == [Bars, Lines, History]
    args.disable_tqdm = True
    announce.replace_progress(trainer, tmp_path, talks=True)
    assert not any(isinstance(c, ProgressCallback) for c in trainer.callback_handler.callbacks)


def test_a_tracker_that_is_missing_or_misspelt(tiny_bert_folder, data, monkeypatch):
    monkeypatch.setitem(tracking.TRACKERS, "trackio", (("no_such_package",), "pip install it"))
    for given, said in (("trackio", "report_to: no_such_package is not installed"), (["wandbb"], "mean 'wandb'")):
        with pytest.raises(UserError, match=said):
            fine_tune(tiny_bert_folder, data, report_to=given)
