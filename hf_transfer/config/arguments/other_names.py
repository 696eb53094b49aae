"""What other programs call our keys, and the verbs: for the hint that an unknown name gets.

fastai, AutoGluon, Ultralytics, timm's `train.py`, the example scripts of transformers, transformers 4, Keras. None of
these names is taken silently: what is typed is what stands in `run.yaml`.
"""

from __future__ import annotations

# Names that mean exactly what our key means.
_SYNONYMS = {
    "model_name_or_path": "model model_name model_id model_path arch architecture backbone checkpoint pretrained_model "
    "pretrained_model_name_or_path base_model initial_checkpoint weights",
    "dataset_name": "data dataset data_dir dataset_dir data_path dataset_path data_root",
    "dataset_config_name": "dataset_config subset",
    "train_file": "train train_dir train_data train_path train_folder training_file training_data training_dir",
    "validation_file": "validation_dir valid_file val_file dev_file eval_file eval_dir valid_dir val_dir dev_dir "
    "val_data tuning_data validation_data eval_data val_path validation_path valid_folder val_folder",
    "test_file": "test_dir test_data test_path predict_file test_folder",
    "output_dir": "output out out_dir output_path save_dir save_path result_dir results_dir",
    "overwrite_output_dir": "overwrite exist_ok overwrite_output",
    "text_column_name": "text_column text_col text_cols text_columns text_field text_name text sentence_column x_col",
    "image_column_name": "image_column image_col image_field images_column fn_col",
    "label_column_name": "target targets target_column target_col label_column label_col label_cols label_field label "
    "labels y y_col class_column target_name label_name answer_column",
    "label_delimiter": "label_delim delimiter label_separator",
    "split_group_column_name": "group groups group_column group_col groups_column",
    "problem_type": "label_type target_type",
    "train_val_split": "valid_pct val_split valid_split validation_split holdout_frac test_size val_size "
    "validation_size eval_size val_fraction validation_fraction validation_ratio",
    "max_train_samples": "num_train_samples train_samples max_train_examples max_samples",
    "max_eval_samples": "max_val_samples max_validation_samples num_eval_samples max_eval_examples",
    "max_predict_samples": "max_test_samples",
    "max_seq_length": "max_length max_len maxlen max_seq_len seq_len seq_length max_source_length max_tokens "
    "model_max_length block_size",
    "image_size": "imgsz img_size input_size resolution crop_size size img_sz",
    "task": "task_type",
    "num_train_epochs": "epochs num_epochs n_epochs n_epoch epoch nb_epochs max_epochs num_epoch train_epochs "
    "training_epochs total_epochs",
    "max_steps": "num_steps steps train_steps num_train_steps max_train_steps total_steps training_steps iterations",
    "per_device_train_batch_size": "batch_size bs batch train_batch_size per_gpu_train_batch_size "
    "per_device_batch_size per_gpu_batch_size batchsize",
    "per_device_eval_batch_size": "eval_batch_size validation_batch_size val_batch_size valid_batch_size "
    "per_gpu_eval_batch_size test_batch_size",
    "gradient_accumulation_steps": "grad_accum_steps accumulate grad_accumulation_steps accumulation_steps "
    "accumulate_grad_batches grad_accum gradient_accumulation n_acc",
    "learning_rate": "lr lr0 lr_max base_lr max_lr peak_lr eta learning_rate_backbone backbone_lr base_learning_rate "
    "backbone_learning_rate encoder_lr",
    "head_learning_rate": "learning_rate_head head_lr lr_head classifier_lr fc_lr head_learning_rates "
    "classifier_learning_rate",
    "layer_lr_decay": "layer_decay layerwise_lr_decay llrd layer_wise_lr_decay layerwise_decay lr_layer_decay "
    "layerwise_learning_rate_decay",
    "layer_learning_rates": "layer_lrs layer_lr lr_mult lr_groups param_groups",
    "lr_scheduler_type": "sched scheduler lr_scheduler lr_schedule schedule lr_scheduler_name",
    "lr_scheduler_kwargs": "sched_kwargs scheduler_kwargs",
    "warmup_steps": "num_warmup_steps warmup lr_warmup_steps warmup_iters n_warmup_steps",
    "weight_decay": "wd l2",
    "max_grad_norm": "clip_grad grad_clip gradient_clip_val clip_grad_norm gradient_clipping grad_norm clip_norm",
    "optim": "opt optimizer opt_func optimiser",
    "optim_args": "opt_args opt_kwargs optimizer_args",
    "adam_epsilon": "opt_eps adam_eps eps epsilon",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "ema_decay": "model_ema_decay ema_momentum polyak_decay",
    "label_smoothing_factor": "label_smoothing smoothing label_smooth",
    "head_epochs": "freeze_epochs epochs_head frozen_epochs warmup_head_epochs head_only_epochs",
    "head_dropout": "dropout drop classifier_dropout drop_rate ps",
    "head_hidden_size": "hidden_size hidden_dim head_hidden head_dim lin_ftrs",
    "freeze": "freeze_layers frozen_layers frozen freeze_modules",
    "unfrozen_groups": "unfreeze_layers num_unfrozen trainable_layers n_unfrozen unfreeze_last_n num_unfrozen_layers",
    "from_scratch": "random_init no_pretrained",
    "model_revision": "revision",
    "augmentation": "aug augment auto_augment aa augs data_augmentation aug_transforms batch_tfms",
    "horizontal_flip": "hflip fliplr flip random_flip",
    "random_erasing": "reprob erasing random_erase",
    "mixup_alpha": "mixup",
    "cutmix_alpha": "cutmix",
    "class_weights": "class_weight sample_weight loss_weights class_weighting",
    "focal_gamma": "focal focal_loss",
    "logit_adjustment": "logit_adjust logit_adjusted prior_correction threshold_moving tune_threshold",
    "balanced_sampling": "balanced oversample oversampling weighted_sampler balance balance_classes",
    "metric_for_best_model": "eval_metric monitor best_metric metric selection_metric",
    "eval_strategy": "evaluation_strategy",
    "activation_checkpointing": "gradient_checkpointing grad_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
    "torch_compile": "torchcompile compile use_compile",
    "use_cpu": "no_cuda cpu",
    "dataloader_num_workers": "workers num_workers n_workers preprocessing_num_workers dataloader_workers num_proc",
    "dataloader_pin_memory": "pin_memory pin_mem",
    "logging_steps": "log_interval log_every log_steps log_every_n_steps",
    "save_total_limit": "checkpoint_hist keep_checkpoints max_checkpoints",
    "save_steps": "checkpointing_steps save_period save_interval",
    "report_to": "tracker trackers logger with_tracking",
    "resume_from_checkpoint": "resume resume_from",
    "seed": "random_seed random_state manual_seed rng_seed",
    "full_determinism": "deterministic determinism",
    "lora_r": "lora_rank rank",
    "lora_target_modules": "target_modules",
    "adapter": "peft peft_method use_peft adapter_type",
    "length_bucketing": "group_by_length bucketing",
    "hub_model_id": "push_to_hub_model_id repo_id hub_repo",
    "tta": "test_time_augmentation",
}
SYNONYMS = {word: ours for ours, words in _SYNONYMS.items() for word in words.split()}

# Secrets, for all commands.
SECRETS = dict.fromkeys(
    ("hub_token", "token", "push_to_hub_token", "use_auth_token", "api_key"),
    "set HF_TOKEN, or run `hf auth login`, so that it ends up in no file.",
)
# Names whose meaning is another one, or that need no key, and what to do instead.
_NOTES: tuple[tuple[str, str], ...] = (
    (
        "do_train do_eval do_predict do_test mode eval_only val evaluate",
        "leave it out: `train` trains and evaluates, `evaluate` and `predict` are commands of their own.",
    ),
    (
        "patience early_stopping early_stop early_stopping_rounds",
        "write early_stopping_patience: 3, the number of evaluations without improvement of metric_for_best_model; "
        "unfreeze_patience is about strategy: gradual.",
    ),
    (
        "warmup_ratio warmup_proportion warmup_fraction pct_start warmup_pct",
        "write it as warmup_steps: a number below 1 is a fraction of all steps, for example warmup_steps: 0.1.",
    ),
    (
        "save_safetensors verbose_eval use_fast_tokenizer use_fast",
        "leave it out: it is always so.",
    ),
    (
        "warmup_epochs epochs_warmup",
        "warmup_steps counts optimizer steps; a number below 1 is a fraction of all steps: 1 warmup epoch of 10 "
        "is warmup_steps: 0.1.",
    ),
    (
        "freeze_backbone freeze_encoder freeze_base freeze_base_model feature_extraction linear_probe "
        "train_head_only head_only freeze_feature_extractor",
        "the head alone trains with strategy: linear-probe; `freeze` names single layer groups.",
    ),
    (
        "fine_tune finetune gradual_unfreezing unfreeze freeze_then_unfreeze",
        "the head first, then everything, is strategy: two-phase; from the top down, group by group, strategy: "
        "gradual.",
    ),
    (
        "lora use_lora",
        "write strategy: lora, with lora_r for the rank.",
    ),
    (
        "amp half precision fp16_backend half_precision_backend to_fp16",
        "write fp16: true, or bf16: true where the GPU has it.",
    ),
    (
        "cos_lr use_cosine",
        "write lr_scheduler_type: cosine.",
    ),
    (
        "min_lr lrf lr_min final_lr",
        "write lr_scheduler_type: cosine_with_min_lr and lr_scheduler_kwargs: {min_lr: 1e-6}.",
    ),
    (
        "fit_one_cycle one_cycle onecycle",
        "write lr_scheduler_type: one_cycle.",
    ),
    (
        "early_stopping_metric save_best save_best_only restore_best_weights load_best",
        "write load_best_model_at_end: true; metric_for_best_model says which epoch is best.",
    ),
    (
        "acc accuracy metrics f1 metric_name compute_metrics",
        "every metric that fits the labels is reported; metric_for_best_model says which one selects the best epoch.",
    ),
    (
        "num_classes num_labels n_classes n_labels nc classes class_names id2label",
        "leave it out: the classes are those of the data.",
    ),
    (
        "device gpu gpus num_gpus devices local_rank use_mps_device accelerator",
        "leave it out: an accelerator is used if there is one. CUDA_VISIBLE_DEVICES chooses, use_cpu: true uses "
        "none, `accelerate launch` starts several processes.",
    ),
    (
        "pretrained ignore_mismatched_sizes",
        "leave it out: models are pretrained and get a head for the classes of the data; from_scratch: true "
        "starts from random weights.",
    ),
    (
        "presets preset quality",
        "write effort: quick, normal or best.",
    ),
    (
        "time_limit time",
        "a run is not limited by time: num_train_epochs or max_steps say how long it is, max_train_samples how much "
        "it sees.",
    ),
    (
        "pad_to_max_length padding",
        "leave it out: a batch is padded to its longest text.",
    ),
    (
        "truncation",
        "leave it out: texts are truncated at max_seq_length, on truncation_side.",
    ),
    (
        "do_regression regression is_regression",
        "write problem_type: regression.",
    ),
    (
        "multi_label multilabel is_multi_label",
        "write problem_type: multi_label_classification; label_delimiter separates the labels of an example.",
    ),
    (
        "tokenizer tokenizer_name config_name image_processor_name feature_extractor",
        "leave it out: tokenizer, image processor and configuration are those of model_name_or_path.",
    ),
    (
        "cache_dir",
        "set HF_HOME, which moves all caches.",
    ),
    (
        "logging_dir tensorboard_dir",
        "leave it out: logs are written to output_dir.",
    ),
    (
        "task_name",
        "write dataset_name: nyu-mll/glue and dataset_config_name for the task of GLUE.",
    ),
    (
        "path",
        "write dataset_name for the data, or output_dir for the folder of the run.",
    ),
    (
        "momentum",
        "write optim: sgd and optim_args: momentum=0.9.",
    ),
    (
        "opt_betas betas adam_betas moms",
        "write adam_beta1 and adam_beta2.",
    ),
    (
        "adafactor",
        "write optim: adafactor.",
    ),
    (
        "ema model_ema use_ema ema_model",
        "write ema_decay: 0.999, the fraction of the average that each step keeps.",
    ),
    (
        "swa use_swa swa_start swa_lr",
        "write ema_decay: 0.999 for an average of the weights while they train, or average checkpoints afterwards with "
        "`hf-transfer soup RUN`.",
    ),
    (
        "slice lr_slice discriminative_lr layerwise_lr",
        "write layer_lr_decay: 0.9, or layer_learning_rates for single groups, head_learning_rate for the head.",
    ),
    (
        "split train_split val_split_name train_split_name validation_split_name",
        "leave it out: splits are found by their names (train, validation, test).",
    ),
    (
        "shuffle shuffle_train_dataset",
        "leave it out: training examples are shuffled; seed says how.",
    ),
    (
        "name run exp_name experiment experiment_name",
        "write output_dir for the folder, run_name for the name in a tracker.",
    ),
    (
        "dropout_rate drop_path drop_path_rate",
        "the backbone's dropout is the checkpoint's; head: mlp has a head_dropout.",
    ),
)
NOTES = {word: note for words, note in _NOTES for word in words.split()}
# What other programs call our commands.
VERB_NAMES = {
    "train": "fit fine_tune finetune fine-tune tune fit_one_cycle run",
    "evaluate": "val eval validate test score metrics",
    "predict": "infer inference classify pred prediction",
    "push": "upload publish push_to_hub",
    "doctor": "check diagnose env info checks",
    "find-lr": "find_lr lr_find lr-find lrfind findlr lr_finder lr-finder range_test range-test",
    "plan": "dry_run dry-run preview show summary",
}
VERBS_ELSEWHERE = {word: ours for ours, words in VERB_NAMES.items() for word in words.split()}
