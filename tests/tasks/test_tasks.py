"""The contract of a task: a third one is a class and a line, and everything else works with it."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset, Value
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, default_data_collator
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_transfer import UserError, fine_tune
from hf_transfer.config.arguments.data import TASK_NAMES, DataArguments
from hf_transfer.models.load import Loaded
from hf_transfer.tasks import TASKS, choose_task
from hf_transfer.tasks.base import Task


class RowConfig(PreTrainedConfig):
    model_type = "toy_row"
    width: int = 3


class RowModel(PreTrainedModel):
    """Two blocks over a row of numbers, with a head outside the base model, as Hugging Face models have."""

    config_class = RowConfig
    base_model_prefix = "body"

    def __init__(self, config):
        super().__init__(config)
        self.body = nn.Module()
        self.body.embed = nn.Linear(config.width, 8)
        self.body.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.classifier = nn.Linear(8, config.num_labels)
        self.post_init()

    def forward(self, row, labels=None):
        x = self.body.embed(row)
        for layer in self.body.layers:
            x = torch.relu(layer(x))
        logits = self.classifier(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class RowClassification(Task):
    """The whole of a third task."""

    name = "row-classification"

    def input_columns(self, features, args):
        return tuple(n for n, f in features.items() if isinstance(f, Value) and f.dtype == "float64")

    def load(self, model_args, data_args, labels):
        return Loaded(RowModel(RowConfig(**labels.config_kwargs)), labels, (), ()), None

    def prepare(self, split, inputs, processor, args):
        return Dataset.from_dict({**self.encode([split[c] for c in inputs], processor), "labels": split["labels"]})

    def encode(self, columns, processor):
        return {"row": list(zip(*columns, strict=True))}

    def collator(self, processor):
        return default_data_collator


def test_a_third_task(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TASKS, "row-classification", RowClassification())
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 3, generator=g).double()
    lines = ["a,b,c,kind"] + [f"{a:.6f},{b:.6f},{c:.6f},{'up' if a + b > 0 else 'down'}" for a, b, c in rows.tolist()]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    result = fine_tune(
        "none",
        str(tmp_path / "rows.csv"),
        output_dir=str(tmp_path / "out"),
        strategy="gradual",
        num_train_epochs=12,
        learning_rate=1e-2,
        label_column_name="kind",
        save_strategy="no",
    )
    assert result.results["task"] == "row-classification"
    assert [s.name for s in result.plan.stages] == ["head", "top 1 group", "top 2 groups", "all groups"]
    assert result.metrics["accuracy"] > 0.85
    assert [a["label"] for a in result.predict([(2.0, 2.0, 0.0), (-2.0, -2.0, 0.0)])] == ["up", "down"]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["labels"] == ["down", "up"]


@pytest.mark.parametrize(
    ("features", "task", "columns"),
    [
        ({"text": Value("string"), "label": Value("int64")}, "text-classification", ("text",)),
        (
            {"premise": Value("string"), "hypothesis": Value("string"), "label": Value("int64")},
            "text-classification",
            ("premise", "hypothesis"),
        ),
        ({"review": Value("string"), "label": Value("string")}, "text-classification", ("review",)),
    ],
)
def test_the_task_is_seen_from_the_columns(features, task, columns):
    chosen, found = choose_task(features, DataArguments())
    assert (chosen.name, found) == (task, columns)


def test_columns_that_show_no_task_are_explained():
    with pytest.raises(UserError, match="cannot infer the task"):
        choose_task({"a": Value("int64"), "b": Value("bool"), "label": Value("int64")}, DataArguments())
    with pytest.raises(UserError, match="several columns may be the text: a, b"):
        choose_task({"a": Value("string"), "b": Value("string"), "label": Value("int64")}, DataArguments())


def test_the_names_that_are_checked_before_anything_is_imported():
    assert set(TASK_NAMES) == set(TASKS)
