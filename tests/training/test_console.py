"""What a `TransferTrainer` that is used in Python prints."""

from __future__ import annotations

import io
from types import SimpleNamespace

import datasets
import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from transformers import Trainer, logging
from transformers.trainer_callback import ProgressCallback

from hf_transfer import TransferTrainer, hub_client
from hf_transfer.runs.machine import quiet_libraries
from tests.helpers import arguments, texts, tiny_bert


def trained(tmp_path, **keys):
    data = texts(16)
    trainer = TransferTrainer(tiny_bert(), arguments(tmp_path, **keys), train_dataset=data, eval_dataset=data)
    trainer.train()
    return trainer


def test_the_plan_comes_first_and_a_line_of_rates_per_log(tmp_path, capsys):
    keys = dict(strategy="gradual", num_train_epochs=2, layer_lr_decay=0.5, logging_steps=4)
    trainer = trained(tmp_path, **keys)
    out = capsys.readouterr().out
    assert out.startswith(f"{trainer.plan}\n{{'loss'")  # resolved: the one that was executed
    assert "2 top 1 group  1 from step 4" in out and "learning_rate/" not in out
    first, second = (line for line in out.splitlines() if line.startswith("{'loss'"))
    assert "'learning_rate': 'head 6.25e-03'" in first and "'learning_rate': '" in second
    assert "learning_rate/layer.1" in trainer.state.log_history[0]
    trainer.train()
    assert capsys.readouterr().out.count("Plan: gradual") == 1


def test_a_solved_head_has_a_plan_too(tmp_path, capsys):
    trained(tmp_path, strategy="linear-probe", probe_solver="lbfgs")
    assert capsys.readouterr().out.count("Plan: linear-probe") == 1


@pytest.mark.parametrize("is_terminal", [False, True])
def test_errors_only(tmp_path, capsys, is_terminal):
    trained(tmp_path, strategy="gradual", log_level="error", disable_tqdm=not is_terminal)
    assert capsys.readouterr() == ("", "")
    logging.set_verbosity_warning()


def test_bars_are_short_and_those_of_the_caller_stay(tmp_path, capsys):
    class Mine(ProgressCallback):
        pass

    keys = dict(strategy="full", disable_tqdm=False, num_train_epochs=1, layer_lr_decay=0.5)
    trainer = TransferTrainer(tiny_bert(), arguments(tmp_path, **keys), train_dataset=texts(8), callbacks=[Mine()])
    trainer.train()
    out = capsys.readouterr().out
    assert sum(type(c) is Mine for c in trainer.callback_handler.callbacks) == 1
    assert any("head" in line and "learning_rate/" not in line for line in out.splitlines() if "'loss'" in line)


def test_without_a_plan_it_prints_what_trainer_prints(tmp_path, capsys):
    trained(tmp_path, num_train_epochs=1, skip_memory_metrics=True)
    ours = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{'loss'")]
    Trainer(tiny_bert(), arguments(tmp_path, num_train_epochs=1), train_dataset=texts(16)).train()
    assert ours == [line for line in capsys.readouterr().out.splitlines() if line.startswith("{'loss'")]


def test_only_a_download_that_takes_time_has_a_bar():
    shown = []
    for delay in (3600, 0):
        file, name = io.StringIO(), f"late {delay}"
        with type("Bar", (hub_client.LateBar,), {"DELAY": delay})(total=3, desc=name, file=file) as bar:
            bar.update()
            bar.set_description(f"{name} s")
        shown.append(f"{name} s: " in file.getvalue())
    assert shown == [False, True]


def test_a_silent_run_has_no_bars_of_libraries():
    before = logging.get_verbosity(), datasets.are_progress_bars_disabled(), are_progress_bars_disabled()
    with quiet_libraries(SimpleNamespace(log_level="error")):
        assert are_progress_bars_disabled() and datasets.are_progress_bars_disabled()
        assert logging.get_verbosity() == logging.ERROR
    with quiet_libraries(SimpleNamespace(log_level="passive")):
        assert logging.get_verbosity() == before[0] and datasets.are_progress_bars_disabled()
        assert not logging.is_progress_bar_enabled() and are_progress_bars_disabled() == before[2]  # of downloads
    assert before == (logging.get_verbosity(), datasets.are_progress_bars_disabled(), are_progress_bars_disabled())
