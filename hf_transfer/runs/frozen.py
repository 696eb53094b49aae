"""What the pretrained model says about a run's data before anything is trained: frozen features, and wrong labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_transfer.data.augment import EXAMPLE
from hf_transfer.errors import UserError
from hf_transfer.features import FeatureStore, FrozenFeatures, frozen_features
from hf_transfer.layers.groups import layer_groups
from hf_transfer.runs.configured import configured
from hf_transfer.runs.label_issues import Examples, LabelIssues, unsuited
from hf_transfer.runs.prepare import prepare


def frozen_splits(
    model_name_or_path: str,
    dataset_name: Any = None,
    *,
    layers: Sequence[str] | None = None,
    poolings: Sequence[str] | None = None,
    store: FeatureStore | None = None,
    **keys: Any,
) -> dict[str, FrozenFeatures]:
    """Frozen features of each split, {name: features}, without augmentation.

    Args:
        model_name_or_path: as in `fine_tune`.
        dataset_name: as in `fine_tune`.
        layers: as in `features.frozen_features`, like `poolings` and `store`.
        poolings: likewise.
        store: likewise.
        **keys: any key of `hf-transfer train` about the model and the data; `output_dir` is not needed.

    Raises:
        UserError: the keys, the model or the data are not right, or their features cannot be computed.
    """
    prepared = prepare(configured(model_name_or_path, dataset_name, keys, needs=("model", "data")))
    args, task, processor = prepared.config.training, prepared.task, prepared.processor
    model = prepared.loaded.model.to(args.device)
    groups = layer_groups(model, args.layer_rules or ())
    found = {}
    for name, split in prepared.data.splits.items():
        own = split.remove_columns([column for column in (EXAMPLE,) if column in split.column_names])
        found[name] = frozen_features(
            model,
            groups,
            task.prepare(own, prepared.inputs, processor, prepared.config.data),
            collate=task.collator(processor),
            layers=layers,
            poolings=poolings,
            store=store,
            batch_size=args.eval_batch_size,
            num_workers=args.dataloader_num_workers,
        )
    return found


def label_issues(
    model_name_or_path: str, dataset_name: Any = None, *, store: FeatureStore | None = None, **keys: Any
) -> LabelIssues:
    """Labels that look wrong, in all splits of a dataset; nothing is trained.

    Args:
        model_name_or_path: as in `fine_tune`; a pretrained backbone.
        dataset_name: as in `fine_tune`.
        store: keeps the frozen features between calls.
        **keys: any key of `hf-transfer train` about the model and the data; `output_dir` is not needed.

    Raises:
        UserError: the keys, the model or the data are not right; the labels are numbers; or there is nothing to compare
            labels with, because fewer than two classes have two examples.
    """
    prepared = prepare(configured(model_name_or_path, dataset_name, keys, needs=("model", "data")))
    if reason := unsuited(prepared):
        raise UserError(f"Labels that look wrong cannot be looked for: {reason}.")
    model = prepared.loaded.model.to(prepared.config.training.device)
    groups = layer_groups(model, prepared.config.training.layer_rules or ())
    examples = Examples(prepared, tuple(prepared.data.splits))
    return examples.judged(examples.features(model, groups, store))
