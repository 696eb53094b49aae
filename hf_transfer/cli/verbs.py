"""The verbs. A verb's module is imported when its word is typed: `--help` and `doctor` start without torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_transfer.config.fields import Key


@dataclass(frozen=True)
class Verb:
    """One verb.

    Attributes:
        module: in this package; it has `parser()` and `keys()`, for help and completion, and `run(argv)`, to an exit
            code.
        summary: one line for the list of verbs.
    """

    module: str
    summary: str

    def parser(self) -> argparse.ArgumentParser:
        """The parser of its arguments."""
        return import_module(f"hf_transfer.cli.{self.module}").parser()

    def keys(self) -> dict[str, Key]:
        """Its keys, by name."""
        return import_module(f"hf_transfer.cli.{self.module}").keys()

    def run(self, argv: Sequence[str]) -> int:
        """Do it; returns the exit code."""
        return import_module(f"hf_transfer.cli.{self.module}").run(argv)


VERBS = {
    "train": Verb("train", "fine-tune a pretrained model on a dataset"),
    "plan": Verb("plan", "what a run would do to each layer, when and at what learning rate; trains nothing"),
    "find-lr": Verb("find_lr", "learning-rate range test: curve and suggestions; trains nothing"),
    "compare": Verb("compare", "fine-tune over a grid of keys and seeds, and compare: means, intervals, cost"),
    "predict": Verb("predict", "predict labels of texts, images, files and folders, as JSON lines"),
    "evaluate": Verb("evaluate", "metrics of a trained model on labeled data"),
    "report": Verb("report", "write a run's report.html again: curves, mistakes, calibration, cost"),
    "soup": Verb("soup", "average the weights of runs or checkpoints, or of a run and what it started from"),
    "export": Verb("export", "write a trained model as ONNX, checked against PyTorch; or for torch.export, OpenVINO"),
    "benchmark": Verb("benchmark", "size, latency, throughput and accuracy of a trained model's exported forms"),
    "serve": Verb("serve", "answer HTTP requests with a trained model, or a bank of tasks on one backbone"),
    "demo": Verb("demo", "a web page to try a trained model on, or the tasks of a bank"),
    "push": Verb("push", "push a run's model or adapter, labels and card to a hub"),
    "doctor": Verb("doctor", "check the installation: what is wrong, and how to fix it"),
}
