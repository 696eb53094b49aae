"""The boundary cache in whole runs of every kind of model: several boundaries, texts of several lengths, accumulation,
replayed evaluations, and a resumption within an epoch. `features/test_replay.py` tests every single boundary."""

from __future__ import annotations

import pytest
import torch
import transformers

from hf_transfer import TransferTrainer, layer_groups
from hf_transfer.features.examples import TRAINING, VALIDATION
from tests import architectures
from tests.features.test_replay import IMAGES, TEXTS, TIMM, alive, slow
from tests.helpers import arguments, changed, copy_state, pad

QUICK = ("DebertaV2",)
# At 0.01 the loss rises to 200, and what two ways of adding differ by grows with it.
RATES = {"EfficientNet": 1e-3}


def model_of(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    if name in TIMM:
        config = transformers.TimmWrapperConfig(architecture=name, num_labels=2)
        return alive(transformers.TimmWrapperForImageClassification(config))
    kind = "Sequence" if name in TEXTS else "Image"
    return alive(architectures.hugging_face(f"{name}For{kind}Classification"))


def data_of(name: str, model: transformers.PreTrainedModel, count: int = 12) -> list[dict[str, object]]:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (count,), generator=g).tolist()
    if name in TEXTS:
        lengths = [3 + 7 * i % 9 for i in range(count)]
        ids = [torch.randint(3, 40, (n,), generator=g).tolist() for n in lengths]
        return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]
    size = (3, 96, 96) if name in TIMM else tuple(architectures.inputs_of(model)["pixel_values"][0].shape)
    size = (3, 160, 160) if name == "test_vit" else size
    return [{"pixel_values": torch.randn(size, generator=g) + y, "labels": y} for y in labels]


def train(folder, name: str, cache: str, resumed: str | None = None) -> TransferTrainer:
    """Three stages: the head, half of the groups, all but the first; four batches of three in two steps per epoch."""
    model = model_of(name)
    names = [group.name for group in layer_groups(model)]
    stages = [{"epochs": 1, "train": names[-n:]} for n in (1, len(names) // 2 + 1, len(names) - 1)]
    args = arguments(
        folder,
        stages=stages,
        boundary_cache=cache,
        optim="sgd",
        learning_rate=RATES.get(name, 0.01),
        per_device_train_batch_size=3,
        per_device_eval_batch_size=5,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=3,
    )
    data = data_of(name, model)
    trainer = TransferTrainer(
        model, args, train_dataset=data, eval_dataset=data[:7], data_collator=pad if name in TEXTS else None
    )
    trainer.train(resume_from_checkpoint=resumed)
    return trainer


def logged(trainer: TransferTrainer, key: str) -> list[float]:
    return [log[key] for log in trainer.state.log_history if key in log]


@pytest.mark.parametrize("name", [n if n in QUICK else slow([n])[0] for n in (*TEXTS, *IMAGES, *TIMM)])
def test_a_run_is_the_same_and_is_resumed_to_the_bit(name, tmp_path):
    without, found = train(tmp_path / "off", name, "off"), train(tmp_path / "memory", name, "memory")
    assert [(e.why, e.steps) for e in found.boundary.entries] == [("", 4)] * 3
    assert all(e.verified == {TRAINING, VALIDATION} for e in found.boundary.entries), "evaluations are replayed, too"
    for key in ("loss", "eval_loss"):
        assert logged(found, key) == pytest.approx(logged(without, key), rel=1e-4), key
    assert len(set(logged(found, "eval_loss"))) == 6
    theirs = copy_state(without.model)
    for n, value in copy_state(found.model).items():
        if value.is_floating_point():
            assert (value - theirs[n]).norm() <= 1e-4 * max(float(theirs[n].norm()), 1e-2), n
    again = train(tmp_path / "memory", name, "memory", str(tmp_path / "memory" / "checkpoint-3"))
    assert again.resumed_at == 3 and not changed(copy_state(found.model), copy_state(again.model))
    assert [entry.steps for entry in again.boundary.entries] == [0, 2, 4]
