"""`compare`: several runs from one call of Python."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_transfer.errors import UserError
from hf_transfer.runs.configured import configured
from hf_transfer.settings import Config
from hf_transfer.studies.answering import answer
from hf_transfer.studies.combining import OBJECT
from hf_transfer.studies.question import MAX_CELLS, Question

_FIRST_SEED = 42  # of a run that is given none
_DATA = ("dataset_name", "eval_dataset", "test_dataset", "target_dataset")


def compare(
    model_name_or_path: str | None = None,
    dataset_name: Any = None,
    *,
    output_dir: str | Path,
    grid: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]] | None = None,
    seeds: Sequence[int] = (_FIRST_SEED,),
    against: Sequence[str] | Mapping[str, Any] = (),
    search: Mapping[str, Any] | str | None = None,
    trials: int | None = None,
    prune: bool = True,
    metric: str | None = None,
    combine: str | None = None,
    max_cells: int = MAX_CELLS,
    skip_contradictions: bool = False,
    estimate: bool = True,
    overwrite_output_dir: bool = False,
    talks: bool = True,
    **keys: Any,
) -> Any:
    """Fine-tune with every combination of values and every seed, and compare.

    Runs go one after another to `output_dir/cells`; finished ones are kept, and the same call goes on where it was
    interrupted. A run that fails is a reason in its row. The test split is measured once, for the row that is best on
    validation.

    Args:
        model_name_or_path: as of `fine_tune`; may vary instead.
        dataset_name: likewise; the data itself cannot vary.
        output_dir: of the comparison.
        grid: values by key, of which every combination is a row; or the rows, each a mapping of keys to values.
        seeds: of every row.
        against: `scratch`, `linear-probe`: the same budget from random weights or frozen features, to judge whether
            pretraining helped; a mapping gives a reference keys of its own.
        search: instead of a grid: by key a range (`[low, high]`, `[low, high, "log"]`, `[low, high, "int"]`) or a list
            of choices, from which optuna draws; `auto`: the keys that matter for the strategy.
        trials: of a search (default: 20), each with all seeds.
        prune: stop trials that are worse than the median of earlier ones after as many epochs.
        metric: of the validation split, that decides (default: accuracy, f1_micro or rmse, by problem type).
        combine: soup or ensemble of all runs, measured on validation.
        max_cells: most runs.
        skip_contradictions: leave out rows whose keys contradict each other, instead of refusing them.
        estimate: estimate the time before the start.
        overwrite_output_dir: remove an earlier comparison in `output_dir`.
        talks: print progress and the table.
        **keys: any key of `hf-transfer train`, for all runs; `eval_dataset`, `test_dataset` and `target_dataset` as of
            `fine_tune`.

    Returns:
        A pandas frame with a line per row: its values, `mean`, `low`, `high`, the paired `difference` to the first row
        with its interval, `p` and `p_holm`, time, trainable share, cost. `frame.attrs` has the folders of the runs, the
        chosen row, its test results, failures and notes.

    Raises:
        UserError: keys, values or the folder are not right, before anything is run.
    """
    given = {"model_name_or_path": model_name_or_path, "dataset_name": dataset_name, **keys}
    given = {name: value for name, value in given.items() if value is not None}
    if "log_level" not in given:
        given["log_level"] = "error"

    def make(changes: Mapping[str, Any], without: Collection[str] = ()) -> Config:
        merged = {name: value for name, value in given.items() if name not in without} | dict(changes)
        return configured(merged.pop("model_name_or_path", None), merged.pop("dataset_name", None), merged)

    if "seed" in keys:
        raise UserError("seed: give seeds, which every row is run with.")
    question = Question(
        given={name: OBJECT if _is_object(name, value) else value for name, value in given.items()},
        grid=grid or {},
        seeds=seeds,
        folder=Path(output_dir),
        against=against,
        search=search,
        trials=trials,
        prunes=prune,
        metric=metric,
        combine=combine,
        max_cells=max_cells,
        skips=skip_contradictions,
        expects=estimate,
        starts_over=overwrite_output_dir,
    )
    return answer(question, make, talks).frame()


def _is_object(name: str, value: Any) -> bool:
    """Whether a key is given data itself, not its name."""
    return name in _DATA and not isinstance(value, str | Path)
