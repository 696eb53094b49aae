"""Many tasks on one backbone in memory: an adapter, a head and labels for each."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper

from hf_transfer.adapters.attach import is_adapted
from hf_transfer.errors import UserError, nearest, option
from hf_transfer.inference.bank_files import save_tasks, saved_tasks
from hf_transfer.inference.given import items_of
from hf_transfer.inference.predictor import Predictor
from hf_transfer.models.shared import SharedBackbone, sharing

Answers = list[dict[str, Any]]


class HeadBank:
    """One backbone, many named tasks.

        bank = HeadBank()
        bank.add("emotion", "out/emotion")        # a run's folder or a hub id
        bank.add("topic", "me/topic-lora")
        bank.predict(["a text", "another"], task="topic")
        bank.predict(["a text", "another"], task=["emotion", "topic"])  # both of each
        bank.predict(["a text", "another"], task_per_input=["emotion", "topic"])
        bank.save("bank")
        HeadBank.load("bank")

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
        return {name: predictor.labels.names for name, predictor in self.predictors.items()}

    @property
    def predictors(self) -> dict[str, Predictor]:
        """The model of each task. A tokenizer serves one thread at a time: call them from one, or use `predict`."""
        return {name: predictor for name, (predictor, _) in self._tasks.items()}

    def predict(
        self,
        inputs: Any,
        task: str | Sequence[str] | None = None,
        top_k: int | None = None,
        *,
        task_per_input: Sequence[str] | None = None,
    ) -> Answers:
        """One element per input, in order.

        Args:
            inputs: as of `Predictor.predict`.
            task: the task that all inputs are for; or several of them, each for every input.
            top_k: only so many scores.
            task_per_input: instead, a task for each input.

        Returns:
            Of one task, answers as `Predictor.predict` gives them. Of several, `{task: answer}` for each input. With
            `task_per_input`, an answer for each input, with its `task`.
        """
        if (task is None) == (task_per_input is None):
            raise UserError(
                "task: give task or task_per_input.", f"The bank has {', '.join(self._tasks) or 'no task'}."
            )
        if task_per_input is not None:
            return self._predict_mixed(inputs, list(task_per_input), top_k)
        if isinstance(task, str):
            predictor, lock = self._task(task)
            with lock:  # a tokenizer serves one thread at a time
                return predictor.predict(inputs, top_k)
        names = list(task or ())
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(
                f"task: {twice!r} was given twice; a list of tasks is answered for every input.",
                "For one task per input, use task_per_input.",
            )
        for name in names:
            self._task(name)
        inputs = list(inputs) if isinstance(inputs, Iterator) else inputs
        every = [self.predict(inputs, name, top_k) for name in names]
        return [dict(zip(names, answers, strict=True)) for answers in zip(*every, strict=True)]

    def _predict_mixed(self, inputs: Any, tasks: Sequence[str], top_k: int | None) -> Answers:
        """An answer per input, each of its own task; inputs of one task share batches."""
        items = list(items_of(inputs, is_pair=False))
        if len(items) != len(tasks):
            raise UserError(
                f"task_per_input: {len(tasks)} tasks were given for {len(items)} inputs.", "Give one for each."
            )
        for name in dict.fromkeys(tasks):
            self._task(name)
        answers: Answers = [{}] * len(items)
        for name in dict.fromkeys(tasks):
            places = [i for i, wanted in enumerate(tasks) if wanted == name]
            given = self.predict([items[i] for i in places], name, top_k)
            if len(given) != len(places):
                raise UserError(
                    "task_per_input: a file or a folder among the inputs stands for several.", "Pass what it holds."
                )
            for i, answer in zip(places, given, strict=True):
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

    def save(self, folder: str | Path) -> Path:
        """Write the tasks into a folder: an adapter each, and the name of the backbone that they share.

        Args:
            folder: is made, and appears when it is whole.

        Raises:
            UserError: the bank is empty, or there is such a folder already.
        """
        with self._adding:
            tasks = dict(self._tasks)
        return save_tasks(tasks, self._backbone.name, Path(folder))

    @classmethod
    def load(cls, folder: str | Path, **changes: Any) -> HeadBank:
        """The bank that `save` wrote.

        Args:
            folder: where.
            **changes: as of `Predictor.load`, for all tasks.

        Raises:
            UserError: it is no such folder, or the backbone cannot be loaded.
        """
        bank = cls()
        for name, place, views in saved_tasks(Path(folder)):
            bank.add(name, place, **{**views, **changes})
        return bank

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, shared ones counted once."""
        models = [predictor.model for predictor in self.predictors.values()]
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
