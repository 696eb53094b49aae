"""Keys of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_transfer.config.fields import key


@dataclass
class DataArguments:
    """Which data, and how it is read."""

    task: str | None = key(None, "image-classification or text-classification (default: seen from the data)")
    problem_type: str | None = key(
        None,
        "default: seen from the labels",
        choices=("single_label_classification", "multi_label_classification", "regression"),
    )
    dataset_name: str | None = key(
        None, "hub id, image folder, CSV/JSON/Parquet file or folder, save_to_disk folder, or bundled:<name>"
    )
    dataset_config_name: str | None = key(None, "the hub data set's configuration")
    train_file: str | None = key(None, "CSV, JSON or Parquet file to train on")
    validation_file: str | None = key(None, "file to validate on")
    test_file: str | None = key(None, "file to test on; never used for selection")
    text_column_name: str | list[str] | None = key(None, "text column, or two for a pair (default: the only one)")
    image_column_name: str | None = key(None, "image column (default: the only one)")
    label_column_name: str | list[str] | None = key(
        None, "label column, or several of 0 and 1, one per label (default: label, labels, or the only class column)"
    )
    label_delimiter: str | None = key(None, "what stands between the labels of an example that may have several")
    on_bad_example: str = key(
        "error",
        "what to do where an input cannot be read or is empty, or a label is missing or not learnt",
        choices=("error", "skip"),
    )
    max_bad_fraction: float = key(0.05, "share of examples up to which on_bad_example: skip goes on")
    data_facts: bool = key(True, "look for duplicates, leaks and broken inputs before training")
    drop_leaks: bool = key(False, "remove examples from training that are in a held-out split too")
    train_val_split: float = key(0.1, "share of the training set that validates where there is no validation split")
    max_train_samples: int | None = key(None, "examples to train on, drawn by class")
    max_eval_samples: int | None = key(None, "examples to validate on, drawn by class")
    max_predict_samples: int | None = key(None, "examples to test on, drawn by class")
    max_seq_length: int | None = key(None, "tokens kept of a text (default: what the model can read)")
    truncation_side: str | None = key(
        None, "end at which a text that is too long is cut (default: the tokenizer's own)", choices=("right", "left")
    )
    image_size: int | None = key(None, "pixels of the square input (default: the checkpoint's own)")
    overwrite_output_dir: bool = key(False, "write into an output_dir that holds a finished run")
    augmentation: str = key(
        "none",
        "random changes of training images",
        choices=("none", "basic", "strong", "randaugment", "trivialaugment"),
    )
    horizontal_flip: float = key(0.5, "probability that augmentation mirrors an image; 0 where left and right matter")
    random_erasing: float | None = key(
        None, "probability that a rectangle of a training image is blanked (default: 0.25 with strong, else 0)"
    )
    augmented_views: int | None = key(
        None,
        "augmented views of each training image that are drawn once and reused, one per epoch (default: each epoch "
        "draws anew)",
    )
    mixup_alpha: float = key(0.0, "training images are blended in pairs, by a share from Beta(alpha, alpha); 0: not")
    cutmix_alpha: float = key(0.0, "a rectangle of one training image is put into another; 0: not")
    token_masking: float = key(0.0, "share of a training text's tokens that are masked at random")
    streaming: bool = key(False, "read the training set as it comes, from the hub or from files, and never hold it")
    shuffle_buffer_size: int = key(
        1000, "streaming: examples of which the next one is drawn; 0: in the order they come"
    )
    card_examples: int = key(3, "held-out texts that the model card shows as examples to try; 0: none")
    in_memory: Any = key(None, "splits as Python objects, from `fine_tune`")
