"""Many tasks on one backbone in memory: an adapter, a head and labels for each."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper

from hf_transfer.adapters.attach import is_adapted
from hf_transfer.errors import UserError, nearest, option
from hf_transfer.inference.predictor import Predictor
from hf_transfer.models.shared import SharedBackbone, sharing

Answers = list[dict[str, Any]]


class HeadBank:
    """One backbone, many named tasks.

        bank = HeadBank()
        bank.add("emotion", "out/emotion")        # a run's folder or a hub id
        bank.add("topic", "me/topic-lora")
        bank.predict(["a text", "another"], task="topic")
        bank.predict(["a text", "another"], task=["emotion", "topic"])

    Every task has modules of its own around the backbone's tensors, which are shared, so that nothing is switched.
    Tasks may be of different adapters, problem types and numbers of labels, a new one costs the memory of its adapter
    and its head, and threads may ask for different tasks at once.

    Raises:
        UserError: of `add`: the run has no adapter, or another backbone than the bank; of all: no such task.
    """

    def __init__(self) -> None:
        self._backbone = SharedBackbone()
        self._tasks: dict[str, tuple[Predictor, threading.Lock]] = {}
        self._adding = threading.Lock()

    def add(self, name: str, run: str | Path, **changes: Any) -> HeadBank:
        """Add a task, or replace the one of this name.

        Args:
            name: what `predict` calls it.
            run: a run's folder or a hub id, with an adapter.
            **changes: as of `Predictor.load`.
        """
        with self._adding, sharing(self._backbone):
            predictor = Predictor.load(run, **changes)
            if not is_adapted(predictor.model):
                raise UserError(
                    f"bank: {str(run)!r} is a whole model, not an adapter on a backbone that others can share.",
                    f"Train it with an adapter, for example {option('adapter', 'lora')}.",
                )
            for module in predictor.model.modules():  # the untrained copy of what was trained whole
                if isinstance(module, AuxiliaryTrainingWrapper):
                    module.original_module = module.modules_to_save[module.active_adapters[0]]
            for parameter in predictor.model.parameters():
                parameter.requires_grad_(False)
            self._tasks[name] = predictor, threading.Lock()
        return self

    def remove(self, name: str) -> None:
        """Forget a task; with the last one goes the backbone."""
        self._task(name)
        with self._adding:
            self._tasks.pop(name, None)
            if not self._tasks:
                self._backbone = SharedBackbone()

    def list(self) -> dict[str, tuple[str, ...]]:
        """The labels of each task, in the order of the outputs."""
        return {name: predictor.labels.names for name, (predictor, _) in self._tasks.items()}

    def predict(self, inputs: Any, task: str | Sequence[str], top_k: int | None = None) -> Answers:
        """An answer per input, in order, as `Predictor.predict` gives it.

        Args:
            inputs: what the task reads: texts, images; or one of them.
            task: of all inputs, or one per input.
            top_k: only so many scores.
        """
        if isinstance(task, str):
            predictor, lock = self._task(task)
            with lock:  # a tokenizer serves one thread at a time
                return predictor.predict(inputs, top_k)
        items = list(inputs) if not isinstance(inputs, str) else [inputs]
        if len(items) != len(task):
            raise UserError(
                f"task: {len(task)} tasks were given for {len(items)} inputs.", "Give one for each, or one."
            )
        for name in dict.fromkeys(task):
            self._task(name)
        answers: Answers = [{}] * len(items)
        for name in dict.fromkeys(task):
            places = [i for i, wanted in enumerate(task) if wanted == name]
            for i, answer in zip(places, self.predict([items[i] for i in places], name, top_k), strict=True):
                answers[i] = {**answer, "task": name}
        return answers

    def evaluate(
        self, task: str, data: Any = None, split: str | None = None, max_examples: int | None = None, **keys: Any
    ) -> dict[str, Any]:
        """Metrics of a task, as `Predictor.evaluate` gives them: by default on what its run held out.

        Args:
            task: its name.
            data: as there, like the others.
            split: likewise.
            max_examples: likewise.
            **keys: likewise.
        """
        predictor, lock = self._task(task)
        with lock:
            return predictor.evaluate(data, split, max_examples, **keys)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, shared ones counted once."""
        models = [predictor.model for predictor, _ in self._tasks.values()]
        tensors = [t for m in models for t in (*m.parameters(), *m.buffers())]
        storages: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage
        return sum(s.nbytes() for s in storages.values())

    def __contains__(self, name: str) -> bool:
        return name in self._tasks

    def __len__(self) -> int:
        return len(self._tasks)

    def __repr__(self) -> str:
        return f"HeadBank({self._backbone.name or 'empty'}: {', '.join(self._tasks) or 'no task'})"

    def _task(self, name: str) -> tuple[Predictor, threading.Lock]:
        try:
            return self._tasks[name]
        except KeyError:
            raise UserError(
                f"task: the bank has no {name!r}.",
                f"It has {', '.join(self._tasks) or 'none'}.{nearest(name, self._tasks)}",
            ) from None
