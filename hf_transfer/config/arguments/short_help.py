"""The keys that most runs need, which `--help` of a run shows, and examples of values; `--help-all` shows every key."""

from __future__ import annotations

# Heading to keys.
SHORT: dict[str, tuple[str, ...]] = {
    "data": (
        "text_column_name",
        "label_column_name",
        "validation_file",
        "test_file",
        "max_train_samples",
        "max_seq_length",
        "image_size",
        "augmentation",
    ),
    "training": (
        "effort",
        "strategy",
        "num_train_epochs",
        "learning_rate",
        "per_device_train_batch_size",
        "class_weights",
        "bf16",
        "seed",
    ),
    "checkpoints": ("load_best_model_at_end", "resume_from_checkpoint"),
}
# Values of keys, as YAML, where the default says too little.
EXAMPLES = {
    "stages": "[{epochs: 1, train: head}, {epochs: 2, train: all}]",
    "text_column_name": "review",
    "label_column_name": "stars",
    "image_column_name": "photo",
    "validation_file": "validation.csv",
    "test_file": "test.csv",
    "train_file": "train.csv",
    "dataset_name": "reviews.csv",
    "model_name_or_path": "bundled:minilm-l6",
    "output_dir": "out",
    "resume_from_checkpoint": "auto",
    "max_train_samples": "1000",
    "max_seq_length": "128",
    "image_size": "224",
    "learning_rate": "3e-5",
    "head_learning_rate": "1e-3",
    "layer_lr_decay": "0.9",
    "num_train_epochs": "5",
    "freeze": "[stem, blocks.0-7]",
    "class_weights": "auto",
    "warmup_steps": "0.1",
    "layer_rules": "[[embeddings, stem]]",
    "metric_for_best_model": "accuracy",
    "early_stopping_patience": "3",
    "unfreeze_until": "layer.4",
    "l2_sp_alpha": "0.1",
    "ewc_lambda": "1000",
    "ewc_dataset_name": "earlier.csv",
    "ewc_fisher_file": "earlier-run/fisher.safetensors",
    "distillation_alpha": "0.5",
    "teacher_model_name_or_path": "earlier-run",
    "replay_dataset_name": "earlier.csv",
    "hub_model_id": "owner/name",
}
