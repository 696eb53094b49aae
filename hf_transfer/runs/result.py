"""`Result`: what a finished run offers in Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_transfer import run_folder
from hf_transfer.data.locate import in_words
from hf_transfer.data.record import Record
from hf_transfer.errors import WorkFailed
from hf_transfer.evaluation.measure import format_metrics
from hf_transfer.evaluation.mistakes import confusion_frame
from hf_transfer.hub import push
from hf_transfer.inference.predictor import Predictor
from hf_transfer.plan.plan import Plan
from hf_transfer.report import page
from hf_transfer.report import result_figures as report
from hf_transfer.report.run_files import RunFiles
from hf_transfer.runs.prepare import Prepared
from hf_transfer.runs.saving import probe, save_model
from hf_transfer.training.trainer import TransferTrainer


@dataclass
class Result:
    """A finished run.

    Attributes:
        output_dir: the folder with the model and the files of the run.
        results: what `results.json` holds.
        plan: the plan that was executed; None without a strategy.
        trainer: with the trained model.
        predictor: the trained model at work.
        push_error: why `push_to_hub: true` did not push; the run is whole all the same.
    """

    output_dir: Path
    results: dict[str, Any]
    plan: Plan | None
    trainer: TransferTrainer
    predictor: Predictor
    push_error: WorkFailed | None = None

    @classmethod
    def of(cls, prepared: Prepared, trainer: TransferTrainer, output_dir: Path, results: dict[str, Any]) -> Result:
        """What a run that has written its files offers.

        Args:
            prepared: the run's data.
            trainer: with the trained model.
            output_dir: the run's folder.
            results: what `results.json` holds.
        """
        config, args = prepared.config, prepared.config.training
        predictor = Predictor(
            task=prepared.task,
            model=trainer.model,
            processor=prepared.processor,
            labels=prepared.loaded.labels,
            data=config.data,
            batch_size=args.per_device_eval_batch_size,
            precision="bf16" if args.bf16 else "fp16" if args.fp16 else None,
            seed=config.split_seed,
            record=Record.load(output_dir / run_folder.EXAMPLES),
            folder=output_dir,
        )
        return cls(output_dir, results, trainer.plan, trainer, predictor)

    @property
    def metrics(self) -> dict[str, float]:
        """Of the test split where there is one, else of the validation split."""
        return self.results["metrics"]

    @property
    def model(self) -> Any:
        return self.trainer.model

    def predict(
        self,
        inputs: Any,
        top_k: int | None = None,
        features: bool = False,
        coverage: float | None = None,
        **views: Any,
    ) -> list[dict[str, Any]]:
        """An answer per input: see `Predictor.predict`.

        Args:
            inputs: as there, like `top_k` and `features`.
            top_k: likewise.
            features: likewise.
            coverage: answer with sets of labels: see `Predictor.abstaining`.
            **views: `tta`, `stride` and `pool` as in `Views`.
        """
        predictor = self.predictor.looking(**views)
        predictor = predictor if coverage is None else predictor.abstaining(coverage)
        return predictor.predict(inputs, top_k, features)

    def evaluate(
        self, dataset_name: Any = None, split: str | None = None, max_examples: int | None = None, **keys: Any
    ) -> dict[str, Any]:
        """Metrics on labelled data, by default on what the run held out: see `Predictor.evaluate`.

        Args:
            dataset_name: hub id, file, folder or `bundled:<name>`, or the data itself, as of `fine_tune`.
            split: which of its splits.
            max_examples: only so many of them, drawn by class.
            **keys: other data keys, for example `test_file` or `label_column_name`; `tta`, `stride` and `pool` as in
                `Views`; `by` and others as in `Examining`.

        Raises:
            UserError: there is no such data or key, or the labels are not the model's.
        """
        return self.predictor.evaluate(dataset_name, split, max_examples, **keys)

    def predict_proba(self, inputs: Any) -> Any:
        """(inputs, labels) probabilities in the order of `labels`: see `Predictor.predict_proba`."""
        return self.predictor.predict_proba(inputs)

    @property
    def labels(self) -> list[str]:
        """Names of the labels, in the order of the outputs."""
        return list(self.predictor.labels.names)

    @property
    def history(self) -> Any:
        """What was logged, as a pandas frame: see `Predictor.history`."""
        return self.predictor.history

    def confusion_matrix(self, dataset_name: Any = None, split: str | None = None, **keys: Any) -> Any:
        """Counts as a pandas frame, rows true classes and columns predicted ones: see `Predictor.confusion_matrix`.

        Args:
            dataset_name: as of `evaluate`; without any, of the split that the run was measured on.
            split: likewise.
            **keys: likewise.
        """
        if dataset_name is None and split is None and not keys:
            self.predictor.check_confusion()
            return confusion_frame(self.results["confusion"], self.labels)
        return self.predictor.confusion_matrix(dataset_name, split, **keys)

    def errors(self, dataset_name: Any = None, split: str | None = None, **keys: Any) -> Any:
        """The wrong answers as a pandas frame, the worst first: see `Predictor.errors`.

        Args:
            dataset_name: as of `evaluate`; without any, of the split that the run was measured on.
            split: likewise.
            **keys: likewise.
        """
        return self.predictor.errors(dataset_name, split, **keys)

    def plot_curves(self) -> Any:
        """A matplotlib figure of the losses and validation metrics by step."""
        return self.predictor.plot_curves()

    def plot_confusion(self, dataset_name: Any = None, split: str | None = None, **keys: Any) -> Any:
        """A matplotlib figure of the confusion matrix; of more than 20 classes, those of the most frequent errors.

        Args:
            dataset_name: as of `evaluate`; without any, of the split that the run was measured on.
            split: likewise.
            **keys: likewise.

        Raises:
            UserError: as of `evaluate`; or the model does not predict one of several classes.
        """
        counts = self.confusion_matrix(dataset_name, split, **keys).to_numpy().tolist()
        return report.confusion_figure(counts, self.labels)

    def plot_mistakes(self, most: int = 12) -> Any:
        """A matplotlib figure of the wrong answers with the highest loss, on the split that the run was measured on.

        Args:
            most: examples, at most 24; pictures where there are any, else the beginnings of texts.

        Raises:
            UserError: the run left no wrong answers.
        """
        return report.mistakes_figure(RunFiles.read(self.output_dir), most)

    def plot_plan(self) -> Any:
        """A matplotlib figure of the learning rates that each layer group had, by step; gray where it was frozen.

        Raises:
            UserError: nothing was logged by layer group.
        """
        return report.plan_figure(RunFiles.read(self.output_dir))

    def push_to_hub(
        self,
        hub_model_id: str | None = None,
        merged: bool = False,
        revision: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        with_report: bool = False,
    ) -> push.Pushed:
        """Push the run to a hub, after checking that what is pushed answers as the trained model.

        Args:
            hub_model_id: `owner/name`, or a name of the account's own (default: that of `output_dir`).
            merged: a plain model, the adapter in its weights.
            revision: branch (default: main).
            commit_message: of the commit.
            private: of a repository that is made (default: private).
            with_report: push the report too, and the other files that show the data: see `push.Target`.

        Raises:
            UserError: it is no id, or the adapter's backbone is a folder of this machine.
            WorkFailed: the hub or the connection failed; the run is as it was.
        """
        target = push.Target(hub_model_id, merged, revision, commit_message, private, with_report)
        return push.push(self.output_dir, target, self.predictor.model)

    def save(self, folder: str | Path, merged: bool = False) -> Path:
        """Write the model, with its tokenizer or image processor, to another folder, as `output_dir` holds it.

        Args:
            folder: is made.
            merged: put what an adapter learnt into the weights of its backbone: a plain model, for any library
                unless its head is an MLP.

        Raises:
            UserError: its kind of adapter cannot be merged, or the folder holds a model already.
            WorkFailed: the merged weights answer otherwise than the adapter.
        """
        if merged:
            return self.predictor.save_merged(folder, probe(self.trainer))
        if not run_folder.same_folder(Path(folder), self.output_dir):
            run_folder.refuse_model(Path(folder), "folder")
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_model(self.trainer, Path(folder))
        return Path(folder)

    def _repr_html_(self) -> str:
        """What a notebook shows: result, curves, confusion matrix and classes."""
        is_there = (self.output_dir / run_folder.RESULTS).is_file()  # the folder may have been moved since
        return page.fragment(RunFiles.read(self.output_dir) if is_there else RunFiles(self.output_dir, self.results))

    def __repr__(self) -> str:
        results = self.results
        metrics = format_metrics(self.metrics, results["intervals"])
        count = len(self.plan.stages) if self.plan is not None else 0
        stages = f", {count} stage{'' if count == 1 else 's'}" if count else ""
        return "\n".join(
            [
                f"Result of {results['model']} on {in_words(results['dataset'])} ({results['strategy']}{stages}, "
                f"{results['train_seconds']:.0f} s of training) in {self.output_dir}",
                f"{results['metrics_split']}:",
                *metrics,
            ]
        )
