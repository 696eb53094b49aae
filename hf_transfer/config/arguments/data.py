"""Keys of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_transfer.config.arguments.adaptation import TargetArguments
from hf_transfer.config.fields import setting

EFFORTS = ("quick", "normal", "best")  # `analysis.effort` says what they set
TASK_NAMES = ("image-classification", "text-classification")  # those of this package; tests compare `tasks.TASKS`


@dataclass
class DataArguments(TargetArguments):
    """Which data, and how it is read."""

    task: str | None = setting(
        None, "image-classification or text-classification (default: inferred from the data)", resume="fixed"
    )
    problem_type: str | None = setting(
        None,
        "kind of labels (default: inferred)",
        choices=("single_label_classification", "multi_label_classification", "regression"),
        resume="fixed",
    )
    dataset_name: str | None = setting(
        None,
        "hub id, image folder, CSV/JSON/Parquet file or folder, save_to_disk folder, or bundled:<name>",
        resume="free",
    )
    dataset_config_name: str | None = setting(None, "configuration of the hub dataset", resume="fixed")
    train_file: str | None = setting(
        None, "file, folder of files or image folder with the training data", resume="free"
    )
    validation_file: str | None = setting(None, "file or folder with the validation data", resume="free")
    test_file: str | None = setting(None, "file or folder with the test data; never used for selection", resume="free")
    text_column_name: str | list[str] | None = setting(
        None, "text column, or two for a pair (default: the only one)", resume="fixed"
    )
    image_column_name: str | None = setting(None, "image column (default: the only one)", resume="fixed")
    label_column_name: str | list[str] | None = setting(
        None,
        "label column, or several 0/1 columns, one per label (default: label, labels, or the only class column)",
        resume="fixed",
    )
    label_delimiter: str | None = setting(
        None, "separator between the labels of an example that has several", resume="fixed"
    )
    label_vector_names: list[str] | None = setting(
        None,
        "names of the entries of labels given as 0/1 vectors such as [1, 0, 0], in order (default: the checkpoint's "
        "class names if it has as many, else 0, 1, 2, …)",
        resume="fixed",
    )
    merge_label_variants: bool = setting(
        False, "make labels one that differ in case, spaces or Unicode form alone", resume="fixed"
    )
    on_bad_example: str = setting(
        "error",
        "what to do if an input is unreadable or empty, or a label is missing or unknown",
        choices=("error", "skip"),
        resume="fixed",
    )
    max_bad_fraction: float = setting(
        0.05, "on_bad_example: skip: largest fraction of bad examples to accept", minimum=0, maximum=1, resume="free"
    )
    data_facts: bool = setting(
        True, "look for duplicates, leakage and unreadable inputs before training", resume="free"
    )
    label_issues: bool = setting(
        True,
        "before training, look for labels that look wrong, and write them to label_issues.csv: one pass over at most "
        "5,000 training examples with the pretrained model",
        resume="free",
    )
    expected_accuracy: bool = setting(
        True,
        "predict the accuracy from the frozen features of at most 512 training examples; train does it only where "
        "label_issues has computed them",
        resume="free",
    )
    drop_leaks: bool = setting(False, "remove training examples that also occur in a held-out split", resume="fixed")
    train_val_split: float | None = setting(
        None,
        "fraction of the training set held out for validation if there is no validation split (default: 0.1; 0.2 "
        "below 500 examples)",
        above=0,
        below=1,
        resume="fixed",
    )
    split_group_column_name: str | None = setting(
        None,
        "column that says which examples belong together, such as a patient, user or document; a validation split that "
        "is held out divides no group",
        resume="fixed",
    )
    max_train_samples: int | None = setting(
        None,
        "maximum number of training examples (stratified sample that keeps every class)",
        above=0,
        resume="fixed",
        card="changed",
    )
    max_eval_samples: int | None = setting(
        None, "maximum number of validation examples (stratified sample)", above=0, resume="free"
    )
    max_predict_samples: int | None = setting(
        None, "maximum number of test examples (stratified sample)", above=0, resume="free"
    )
    max_seq_length: int | None = setting(
        None,
        "maximum length of a text in tokens (default: the model's limit)",
        above=0,
        resume="fixed",
        card="changed",
    )
    truncation_side: str | None = setting(
        None,
        "side on which long texts are truncated (default: the tokenizer's own)",
        choices=("right", "left"),
        resume="fixed",
        card="changed",
    )
    image_size: int | None = setting(
        None,
        "side of the square input in pixels (default: the checkpoint's own)",
        above=0,
        resume="fixed",
        card="changed",
    )
    pixel_range: list[float] | None = setting(
        None,
        "lowest and highest value of float and 32-bit images (default: those of the training split)",
        resume="fixed",
        card="changed",
    )
    effort: str = setting(
        "normal",
        "quick: only the best linear head; best: twice the epochs, and the weights of the best evaluation",
        choices=EFFORTS,
        topic="plan",
        resume="free",
    )
    overwrite_output_dir: bool = setting(
        False,
        "write into an output_dir that holds a run, which is kept until the new one is complete",
        topic="output",
        resume="free",
    )
    augmentation: str = setting(
        "none",
        "random augmentation of training images",
        choices=("none", "basic", "strong", "randaugment", "trivialaugment"),
        resume="fixed",
        card="changed",
    )
    horizontal_flip: float = setting(
        0.5,
        "probability of mirroring an augmented image; 0 if left and right matter",
        minimum=0,
        maximum=1,
        resume="fixed",
    )
    random_erasing: float | None = setting(
        None,
        "probability of erasing a rectangle of a training image (default: 0.25 with strong, else 0)",
        minimum=0,
        maximum=1,
        resume="fixed",
        card="changed",
    )
    augmented_views: int | None = setting(
        None,
        "augmented views of each training image that are drawn once and reused, one per epoch (default: a new one "
        "every epoch)",
        above=0,
        resume="fixed",
    )
    mixup_alpha: float = setting(
        0.0,
        "mixup: blend pairs of training images with a weight from Beta(alpha, alpha); 0: off",
        minimum=0,
        resume="fixed",
        card="changed",
    )
    cutmix_alpha: float = setting(
        0.0,
        "cutmix: paste a rectangle of one training image into another, its area from Beta(alpha, alpha); 0: off",
        minimum=0,
        resume="fixed",
        card="changed",
    )
    token_masking: float = setting(
        0.0,
        "fraction of a training text's tokens that are masked at random",
        minimum=0,
        maximum=1,
        resume="fixed",
        card="changed",
    )
    streaming: bool = setting(
        False, "read the training set as a stream, from the hub or from files, without holding it", resume="fixed"
    )
    shuffle_buffer_size: int = setting(
        1000,
        "streaming: number of examples in the shuffle buffer; 0: no shuffling",
        minimum=0,
        resume="free",
    )
    card_examples: int = setting(
        3, "number of held-out texts that the model card shows as examples; 0: none", minimum=0, resume="free"
    )
    in_memory: Any = setting(None, "splits as Python objects, from `fine_tune`", resume="free")
