"""A Trainer that loads a checkpoint's weights, or says why it cannot, and that finds its best checkpoint again.

What is overridden, and why that hook:

- `_load_from_checkpoint`, `_load_best_model`: weights that were saved under other names than the model's.
- `_issue_warnings_after_load`: Trainer leaves what a checkpoint lacks as it is, with a warning.
- `_init_training_state`, `_finalize_training`: Trainer looks for the best checkpoint at the path that was recorded.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from hf_transfer.errors import UserError, one_line
from hf_transfer.models.heads import class_with_head
from hf_transfer.training import adapter_state, best_checkpoint, checkpoint_contents, penalty_state
from hf_transfer.training.saving import Saving


class Restoring(Saving):
    """The weights of checkpoints; see `TransferMixin`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._resumes: Path | None = None  # the checkpoint
        self._loads_from = ""

    # ---- weights ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with self._strictly(resume_from_checkpoint):
            if not self._load_renamed(resume_from_checkpoint, self.model if model is None else model):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        penalty_state.restore(self.objective, resume_from_checkpoint)
        if self.self_training is not None:
            self.self_training.restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        with self._strictly(str(self.state.best_model_checkpoint)):
            if not self._load_renamed(str(self.state.best_model_checkpoint), self.model):
                super()._load_best_model()

    @contextlib.contextmanager
    def _strictly(self, folder: str) -> Iterator[None]:
        """Context in which weights are loaded.

        Raises:
            UserError: they do not fit the model.
        """
        checkpoint_contents.check_adapter(Path(folder), self.model)
        self._loads_from = folder
        try:
            yield
        except (UserError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, SafetensorError) as error:
            raise UserError(
                f"resume_from_checkpoint: the weights in {folder!r} do not fit this model ({one_line(error)}).",
                "Resume with the model and the keys of the run that wrote them.",
            ) from error

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse what Trainer only warns of, after it has tied the weights that are saved once."""
        super()._issue_warnings_after_load(load_result)
        state = self.model.state_dict()
        loaded = {state[n].data_ptr() for n in state if n not in load_result.missing_keys}
        gone = [n for n in load_result.missing_keys if n in state and state[n].data_ptr() not in loaded]
        ignored = getattr(self.model, "_keys_to_ignore_on_save", None) or ()
        gone = [name for name in gone if name not in ignored]
        checkpoint_contents.refuse_misfit(Path(self._loads_from), gone, list(load_result.unexpected_keys), [])

    def _load_renamed(self, folder: str, model: nn.Module) -> bool:
        """Load a checkpoint whose weights have other names than the model's, or more tensors; whether it was one.

        `save_pretrained` writes some models (ViT) under the names of their hub checkpoints. Trainer does not find
        these, and would continue from the current weights with a warning.
        """
        path = Path(folder) / SAFE_WEIGHTS_NAME
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not sharded and adapter_state.restore(model, folder):
            return True
        if sharded or not isinstance(model, PreTrainedModel) or not path.is_file():
            return False
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) <= set(model.state_dict()):
                return False
        cls = class_with_head(type(model), model.config)
        with torch.random.fork_rng(devices=[]):
            loaded, found = cls.from_pretrained(folder, config=model.config, output_loading_info=True)
        absent, extra, reshaped = (
            [str(one) for one in found[f"{kind}_keys"]] for kind in ("missing", "unexpected", "mismatched")
        )
        checkpoint_contents.refuse_misfit(Path(folder), absent, extra, reshaped)
        model.load_state_dict(loaded.state_dict())
        return True

    # ---- the best checkpoint ----

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        values = super()._init_training_state(*args, **kwargs)
        checkpoint = self._resumes
        if checkpoint is None:
            return values
        output_dir = Path(super()._get_output_dir(None))
        with self.args.main_process_first(desc="the best checkpoint"):
            self._settle_best([checkpoint.parent, output_dir])
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                best_checkpoint.adopt(self.state, output_dir, self.args.should_save)
        return values

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.load_best_model_at_end:
            places = [Path(super()._get_output_dir(None)), *([self._resumes.parent] if self._resumes else [])]
            self._settle_best(places)
        return super()._finalize_training(*args, **kwargs)

    def _settle_best(self, places: list[Path]) -> None:
        note = best_checkpoint.settle(self.state, self.args, places)
        if note and self.is_world_process_zero():
            sys.stderr.write(f"hf-transfer: {note}\n")
