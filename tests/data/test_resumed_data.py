"""A resumed run sees the examples that it would have seen, and is refused where its keys would make others."""

from __future__ import annotations

import multiprocessing
import shutil

import pytest
import torch
from safetensors.torch import load_file

from hf_transfer import UserError, fine_tune
from hf_transfer.run_folder import RESULTS

KEYS = dict(
    max_train_samples=48,
    max_eval_samples=10,
    max_predict_samples=10,
    num_train_epochs=2,
    strategy="full",
    save_strategy="steps",
    save_total_limit=None,
    save_steps=3,  # 6 steps make an epoch: within the first, at its end, within the second
    augmentation="strong",
    mixup_alpha=0.2,
    cutmix_alpha=0.5,
    random_erasing=0.5,
    log_level="error",
)


def run(model, folder, **keys):
    return fine_tune(model, "bundled:digits", output_dir=str(folder), **{**KEYS, **keys})


@pytest.mark.parametrize(("workers", "steps"), [(0, (3, 6, 9)), (2, (9,))])
def test_pictures_are_changed_and_mixed_as_if_the_run_had_not_stopped(workers, steps, tiny_vit_folder, tmp_path):
    """Weights bit for bit, from a checkpoint within an epoch, at its end and within the next, also in workers."""
    keys = {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
    run(tiny_vit_folder, tmp_path / "whole", **keys)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    for step in steps:
        place = tmp_path / f"from{step}"
        (place).mkdir()
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", place / f"checkpoint-{step}")
        again = run(tiny_vit_folder, place, resume_from_checkpoint="auto", **keys)
        assert again.trainer.resumed_at == step
        assert not multiprocessing.active_children()  # the run has ended its workers
        resumed = load_file(place / "model.safetensors")
        assert all(torch.equal(whole[k], resumed[k]) for k in whole), step
    if workers:
        return
    other = run(tiny_vit_folder, tmp_path / "other", **keys, seed=43)
    assert other.results["seed"] == 43
    assert not all(torch.equal(v, load_file(tmp_path / "other" / "model.safetensors")[k]) for k, v in whole.items())


def test_keys_that_would_make_other_examples_are_refused_with_the_difference(tiny_vit_folder, tmp_path):
    run(tiny_vit_folder, tmp_path, save_steps=6, num_train_epochs=1)
    (tmp_path / RESULTS).unlink()
    keys = {"save_steps": 6, "num_train_epochs": 1, "resume_from_checkpoint": "auto"}
    for changed, said in (
        ({"augmentation": "basic"}, "augmentation: 'strong' then, 'basic' now"),
        ({"mixup_alpha": 0.4, "augmented_views": 2}, "augmented_views: None then, 2 now; mixup_alpha: 0.2 then, 0.4"),
        (
            {"random_erasing": None, "horizontal_flip": 0.0},
            "horizontal_flip: 0.5 then, 0.0 now; random_erasing: 0.5 then",
        ),
    ):
        with pytest.raises(UserError, match=said):
            run(tiny_vit_folder, tmp_path, **{**keys, **changed})
    run(tiny_vit_folder, tmp_path, **keys, per_device_eval_batch_size=5)  # what changes no example is no reason
