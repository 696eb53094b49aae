"""What plain Trainer does with freezing as people write it: the errors that are prevented here are real, and silent.

Those that take several processes are in `distributed/cases.py`. `docs/correctness.md` has the figures.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_transfer import TransferTrainer
from tests.helpers import arguments, changed, copy_state, images, texts, tiny_bert, tiny_timm_resnet


def plain(folder: Any, **keys: Any) -> TrainingArguments:
    keys = {"learning_rate": 0.05, "per_device_train_batch_size": 4, "save_strategy": "no", **keys}
    return TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, report_to="none", **keys)


class Thaw(TrainerCallback):
    """The usual callback."""

    def __init__(self, backbone: Any):
        self.backbone = backbone
        backbone.requires_grad_(False)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            self.backbone.requires_grad_(True)


def furthest(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    return max((after[k] - v).abs().max().item() for k, v in before.items() if v.is_floating_point())


def test_statistics_of_a_frozen_backbone_drift(tmp_path):
    def statistics(model: Any) -> dict[str, torch.Tensor]:
        return {k: v for k, v in copy_state(model).items() if "running" in k}

    model = tiny_timm_resnet()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("fc" in name)
    start = statistics(model)
    Trainer(model, plain(tmp_path, num_train_epochs=2), train_dataset=images(16)).train()
    assert furthest(start, statistics(model)) > 0.1
    ours = tiny_timm_resnet()
    args = arguments(tmp_path, strategy="linear-probe", num_train_epochs=2)
    TransferTrainer(ours, args, train_dataset=images(16)).train()
    assert not changed(start, statistics(ours))


def test_dropout_of_a_frozen_backbone_stays_live(tmp_path):
    """The same frozen features are others each time: the head learns from noise, and nothing can be stored."""

    def features(trainer_class: Any, args: Any, **keys: Any) -> float:
        model = tiny_bert(layers=1, dropout=0.3)
        model.bert.requires_grad_(False)
        seen: list[torch.Tensor] = []
        model.bert.register_forward_hook(lambda module, inputs, out: seen.append(out.pooler_output.detach()))
        trainer_class(model, args, train_dataset=texts(4), **keys).train()
        return (seen[0] - seen[1]).abs().max().item()

    same_order = {"train_sampling_strategy": "sequential", "num_train_epochs": 2}
    assert features(Trainer, plain(tmp_path, **same_order)) > 0.1
    assert features(TransferTrainer, arguments(tmp_path, strategy="linear-probe", **same_order)) == 0.0


def test_a_resumed_run_forgets_to_thaw(tmp_path):
    """The callback waits for step 4, which a run that is resumed at step 6 never has."""

    def train(folder: Any, resumed: str | None = None) -> Any:
        model = tiny_bert(layers=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        args = plain(folder, max_steps=12, save_strategy="steps", save_steps=6)
        trainer = Trainer(
            model, args, train_dataset=texts(48), optimizers=(optimizer, None), callbacks=[Thaw(model.bert)]
        )
        trainer.train(resume_from_checkpoint=resumed)
        return model

    whole = copy_state(train(tmp_path))
    resumed = train(tmp_path, str(tmp_path / "checkpoint-6"))
    assert not any(p.requires_grad for p in resumed.bert.parameters())
    assert furthest(whole, copy_state(resumed)) > 0.05
