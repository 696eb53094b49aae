"""fastai's `Learner` on a network of timm, with `Learner.fine_tune` in two parameter groups: body and head."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

RATE = 2e-3  # fastai's default


def missing() -> str | None:
    return None if importlib.util.find_spec("fastai") else 'fastai is not installed (`pip install -e ".[bench]"`)'


def learner(
    model: nn.Module,
    data: tuple[Callable[[int], Any], Sequence[str]],
    names: Sequence[str],
    config: dict[str, Any],
    batch: int,
    batch_transforms: Sequence[Any] = (),
    drop_last: bool = False,
) -> Any:
    """A learner that trains on all examples and validates on none.

    Args:
        model: a network of timm.
        data: (an image by its number, the class names of all).
        names: of the classes, in the order of the network's outputs.
        config: of timm's data: `input_size`, `crop_pct`, `mean`, `std`.
        batch: examples in a batch.
        batch_transforms: before the normalization.
        drop_last: whether an incomplete batch is left out, fastai's default.
    """
    import numpy as np
    from fastai.vision import all as fv
    from PIL.Image import Resampling

    class NoValidation(fv.Callback):
        """As on the other sides: accuracy is measured afterwards."""

        def before_validate(self) -> None:
            raise fv.CancelValidException

    read, labels = data
    size = config["input_size"][-1]
    crop = fv.CropPad(size)
    crop.order = fv.Resize.order + 1  # by itself it would come before, and pad a small picture
    block = fv.DataBlock(
        blocks=(fv.ImageBlock, fv.CategoryBlock(vocab=list(names))),
        get_x=lambda i: np.array(read(i).convert("RGB")),
        get_y=lambda i: labels[i],
        splitter=fv.IndexSplitter([0]),  # an index for fastai, which wants one; it trains on all the same
        item_tfms=[
            fv.Resize(int(size / config["crop_pct"]), method="squish", resamples=(Resampling.BICUBIC, 0)),
            crop,
        ],
        batch_tfms=[*batch_transforms, fv.Normalize.from_stats(config["mean"], config["std"], cuda=False)],
    )
    loaders = block.dataloaders([0, *range(len(labels))], bs=batch, num_workers=0, drop_last=drop_last, device="cpu")
    return fv.Learner(loaders, model, splitter=_body_and_head, cbs=[NoValidation()])


def _body_and_head(model: nn.Module) -> list[list[nn.Parameter]]:
    head = [id(p) for p in model.get_classifier().parameters()]
    parameters = list(model.parameters())
    return [[p for p in parameters if id(p) not in head], [p for p in parameters if id(p) in head]]
