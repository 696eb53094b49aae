"""What is known about the fields that transformers' `TrainingArguments` brings: help with units, bounds, resuming.

A field that is not here (a newer version's) keeps transformers' help and counts as fixed when a run is resumed.
"""

from __future__ import annotations

from hf_transfer.config.fields import Setting

_SEED = 2**32 - 1

INHERITED: dict[str, Setting] = {
    "output_dir": Setting("folder that the run is written to", "free", topic="output"),
    "num_train_epochs": Setting("number of epochs; may be fractional", "plan", above=0, card="always"),
    "max_steps": Setting("number of optimizer steps, instead of num_train_epochs; -1: off", "plan", minimum=-1),
    "per_device_train_batch_size": Setting(
        "training examples per device and forward pass", "free", above=0, card="always"
    ),
    "per_device_eval_batch_size": Setting("evaluation examples per device and forward pass", "free", above=0),
    # A step's examples are compared as a whole, however they are divided.
    "gradient_accumulation_steps": Setting("batches per optimizer step", "free", above=0, card="changed"),
    "warmup_steps": Setting(
        "optimizer steps over which the learning rate rises from 0; below 1, a fraction of all steps",
        "plan",
        minimum=0,
        card="changed",
    ),
    "weight_decay": Setting("decoupled weight decay, relative to the learning rate", "plan", minimum=0, card="changed"),
    "max_grad_norm": Setting("maximum norm of the gradient; 0: no clipping", "plan", minimum=0, card="changed"),
    "label_smoothing_factor": Setting("label smoothing", "plan", minimum=0, below=1, card="changed"),
    "lr_scheduler_kwargs": Setting(resume="plan", card="changed"),
    "optim": Setting(resume="fixed", card="always"),
    "optim_args": Setting(resume="fixed", card="changed"),
    "seed": Setting("seed of initial weights, order and dropout", "fixed", minimum=0, maximum=_SEED, card="always"),
    "data_seed": Setting("seed of splits and order (default: seed)", "fixed", minimum=0, maximum=_SEED),
    "logging_steps": Setting("optimizer steps between logs; below 1, a fraction of all steps", "free", minimum=0),
    "eval_steps": Setting(
        "optimizer steps between evaluations with eval_strategy: steps; below 1, a fraction of all steps", "free"
    ),
    "eval_delay": Setting("epochs or steps (as eval_strategy counts) before the first evaluation", "free"),
    "save_steps": Setting(
        "optimizer steps between checkpoints with save_strategy: steps; below 1, a fraction of all steps", "free"
    ),
    "save_total_limit": Setting("number of checkpoints to keep; the oldest is removed first", "free"),
    "dataloader_num_workers": Setting(
        "data loading processes per training process; auto (-1): chosen for the machine", "free", minimum=-1, auto=-1
    ),
    "ddp_timeout": Setting("seconds to wait for the other processes", "free"),
    "push_to_hub": Setting("push the finished run to a hub, as HF_TOKEN or the logged-in user", "free"),
    "hub_model_id": Setting("owner/name to push to (default: the name of output_dir, under your own account)", "free"),
    "hub_private_repo": Setting("whether a new repository is private (default: true)", "free"),
    "hub_revision": Setting("branch to push to (default: main)", "free"),
    "log_level": Setting("debug, info, warning, error, critical, or passive; from error on, only errors", "free"),
}
INHERITED |= {
    name: Setting(resume="plan", card="changed")
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon", "fp16", "bf16", "neftune_noise_alpha")
}
INHERITED |= {name: Setting(resume="plan") for name in ("optim_target_modules", "average_tokens_across_devices")}
INHERITED |= {name: Setting(resume="fixed") for name in ("train_sampling_strategy", "dataloader_drop_last")}
_FREE = """
    bf16_full_eval fp16_full_eval tf32 activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
    gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode use_liger_kernel
    liger_kernel_config use_cache torch_empty_cache_steps auto_find_batch_size logging_strategy logging_first_step
    log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level_replica disable_tqdm
    run_name project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy prediction_loss_only
    eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics
    batch_eval_metrics save_only_model save_strategy save_on_each_node enable_jit_checkpoint hub_token hub_strategy
    hub_always_push load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism use_cpu accelerator_config parallelism_config
    dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    dataloader_in_order remove_unused_columns label_names length_column_name ddp_find_unused_parameters
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend fsdp fsdp_config deepspeed debug
    skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint local_rank
"""
# Speed, hardware, logging, evaluation, saving: nothing that decides which weights come out.
INHERITED |= {name: Setting(resume="free") for name in _FREE.split()}
INHERITED |= {
    "bf16": Setting("bfloat16 mixed precision, on hardware that has it", "plan", card="changed"),
    "fp16": Setting("float16 mixed precision with loss scaling", "plan", card="changed"),
    "report_to": Setting(
        "trackers that get losses, metrics, the learning rate of every layer group, throughput and memory: "
        "tensorboard, trackio, wandb, or others of transformers (default: none)",
        "free",
    ),
    "load_best_model_at_end": Setting("keep the weights of the best evaluation, by metric_for_best_model", "free"),
    "metric_for_best_model": Setting(
        "metric that says which evaluation is best, such as accuracy (default: loss)", "free"
    ),
    "resume_from_checkpoint": Setting("checkpoint folder to continue from; auto: the newest in output_dir", "free"),
}
