"""Adapters that go on: from a finished run, from a checkpoint, or replaced by another one."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from hf_transfer import Predictor, TransferArguments, UserError, fine_tune
from hf_transfer.adapters.attach import attach
from hf_transfer.adapters.continued import train_head
from hf_transfer.config.arguments.plan import PlanArguments
from hf_transfer.layers.wrappers import plain_names
from hf_transfer.models.load import load_model
from hf_transfer.runs import preflight_saving
from hf_transfer.training import adapter_state, adalora
from tests.adapters.test_adapter_runs import QUICK, STILL, base, data, table
from tests.helpers import tiny_bert

__all__ = ["base", "data"]
P_TUNING = {"peft_type": "P_TUNING", "num_virtual_tokens": 3, "encoder_hidden_size": 8}
TEXTS = ["word1 of yes", "a much longer line, of no"]
LONG = {**QUICK, "num_train_epochs": 3, "save_strategy": "epoch", "save_total_limit": 9}


def tuned(model, data, folder, **keys):
    return fine_tune(model, data, output_dir=str(folder), **{**QUICK, "preflight": False, **keys})


def scores(run):
    return [list(one["scores"].values()) for one in run.predict(TEXTS)]


def weights(run):
    return load_file(run.output_dir / "adapter_model.safetensors")


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["adalora", P_TUNING], ids=["adalora", "p_tuning"])
def test_a_resumed_run_equals_the_whole_one(adapter, base, data, tmp_path):
    """Though peft's files hold less than these adapters train: bit for bit."""
    whole = tuned(base, data, tmp_path / "a", adapter=adapter, **LONG)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "results.json").unlink()
    for last in sorted((tmp_path / "b").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))[2:]:
        shutil.rmtree(last)
    again = tuned(base, data, tmp_path / "b", adapter=adapter, resume_from_checkpoint="auto", **LONG)
    ours, theirs = weights(whole), weights(again)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    configs = [json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in "ab"]
    assert configs[0].get("rank_pattern") == configs[1].get("rank_pattern")


@pytest.mark.parametrize("adapter", ["adalora", P_TUNING], ids=["adalora", "p_tuning"])
def test_the_best_model_is_the_one_that_was_evaluated(adapter, base, data, tmp_path):
    """The worst by loss, so that it is not the last; every checkpoint answers as its model did."""
    keys = dict(eval_strategy="epoch", metric_for_best_model="loss", greater_is_better=True, load_best_model_at_end=True)
    run = tuned(base, data, tmp_path / "a", adapter=adapter, learning_rate=0.05, **{**LONG, **keys} | {"seed": 3})
    history = [json.loads(line) for line in (tmp_path / "a" / "history.jsonl").read_text().splitlines()]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert run.evaluate()["metrics"] == run.metrics
    assert run.metrics["loss"] == pytest.approx(max(losses), abs=1e-6)
    assert scores(Predictor.load(tmp_path / "a")) == scores(run)
