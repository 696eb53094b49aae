"""The diagonal of the Fisher information: how much each weight matters to what a model answers now.

F_i is the mean over examples x of (∂ log p(y | x) / ∂ w_i)², at the weights that the model has. The empirical one takes
the dataset's own y, the true one draws y from the model's prediction (Kunstner et al. 2019, equations 3 and 8).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.nn import functional

from hf_transfer.data.labels import MULTI_LABEL, REGRESSION
from hf_transfer.errors import UserError, listed, one_line
from hf_transfer.features.batches import Batch
from hf_transfer.files import write_bytes
from hf_transfer.layers.side_effects import untouched
from hf_transfer.run_folder import FISHER

_FORMAT = "hf_transfer.fisher"
_KEY = "ewc_fisher_file"


@dataclass(frozen=True)
class Fisher:
    """The diagonal of the Fisher information of a model.

    Attributes:
        values: of each weight, by plain name; fp32.
        tensors: {plain name: digest} of the weights at which it was computed; see `layers.identity`.
        about: what it was computed on: `kind`, `examples`, `dataset` (a digest) and `seed`.
    """

    values: Mapping[str, torch.Tensor]
    tensors: Mapping[str, str]
    about: Mapping[str, Any]

    def save(self, path: Path) -> None:
        """Write it as safetensors, beside `path` first."""
        metadata = {"format": _FORMAT, "tensors": json.dumps(dict(self.tensors)), "about": json.dumps(dict(self.about))}
        values = {name: value.cpu().contiguous() for name, value in self.values.items()}
        write_bytes(path, save(values, metadata))

    @classmethod
    def load(cls, path: Path, key: str = _KEY) -> Fisher:
        """Raises:
        UserError: there is no such file, or it holds something else.
        """
        if not path.is_file():
            raise UserError(f"no file {str(path)!r}.", f"A run with ewc_dataset_name writes a {FISHER}.", key=key)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise UserError(
                        f"{str(path)!r} holds no Fisher information.", f"Use the {FISHER} of an earlier run.", key=key
                    )
                values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{str(path)!r} cannot be read ({one_line(error)}).", f"Use the {FISHER} of an earlier run.", key=key
            ) from error
        return cls(values, json.loads(metadata["tensors"]), json.loads(metadata["about"]))

    def check(self, tensors: Mapping[str, str], names: Collection[str], key: str = _KEY) -> None:
        """Check that it belongs to a model.

        Args:
            tensors: {plain name: digest} of the model's weights, without a head that may be another one.
            names: plain names of those that it will be used for.
            key: for the message.

        Raises:
            UserError: the model has other weights, or none that it was computed for.
        """
        if not names:
            raise UserError(
                f"it holds none of the model's weights (it has {listed(sorted(self.values), 2)}).",
                "Use the file of a run from the same checkpoint.",
                key=key,
            )
        shared = self.tensors.keys() & tensors
        other = sorted(name for name in shared if tensors[name] != self.tensors[name])
        if other:
            raise UserError(
                f"it was computed for another model: {len(other)} of {len(shared)} weights differ "
                f"({listed(other, 2)}).",
                "Use the file of a run from the same checkpoint, or ewc_dataset_name to compute it again.",
                key=key,
            )


def estimate(
    model: nn.Module, examples: Iterable[Batch], kind: str, problem_type: str, seed: int
) -> dict[str, torch.Tensor]:
    """The diagonal for each parameter that requires a gradient, by name, in fp32; the model is left as it was.

    Args:
        model: with the head that answers for the examples; computed in eval mode, in its own precision.
        examples: batches of one example each, with `labels`, on the model's device.
        kind: `empirical` or `true`.
        problem_type: as in `transformers` configurations; the likelihood of a regression is a Gaussian of variance 1.
        seed: of the drawn labels.

    Raises:
        UserError: there is no example.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in named.items()}
    generator, count = torch.Generator().manual_seed(seed), 0
    with untouched(model):
        model.eval()
        for batch in examples:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            outputs = model(**inputs)
            logits = (outputs["logits"] if isinstance(outputs, dict) else outputs[0]).float()
            labels = batch["labels"] if kind == "empirical" else _drawn(logits, problem_type, generator)
            loss = _negative_log_likelihood(logits, labels, problem_type)
            gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient.float().square()
            count += 1
    if not count:
        raise UserError("the dataset has no example.", key="ewc_dataset_name")
    return {name: total / count for name, total in sums.items()}


def _drawn(logits: torch.Tensor, problem_type: str, generator: torch.Generator) -> torch.Tensor:
    """Labels from the model's own prediction; drawn on the CPU, so that every device draws the same."""
    own = logits.detach().cpu()
    if problem_type == REGRESSION:
        drawn = own + torch.randn(own.shape, generator=generator)
    elif problem_type == MULTI_LABEL:
        drawn = torch.bernoulli(own.sigmoid(), generator=generator)
    else:
        drawn = torch.multinomial(own.softmax(-1), 1, generator=generator)[:, 0]
    return drawn.to(logits.device)


def _negative_log_likelihood(logits: torch.Tensor, labels: torch.Tensor, problem_type: str) -> torch.Tensor:
    """-log p(labels), up to a constant."""
    if problem_type == REGRESSION:
        return (logits.reshape(labels.shape) - labels).square().sum() / 2
    if problem_type == MULTI_LABEL:
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="sum")
    return functional.cross_entropy(logits, labels, reduction="sum")
