"""Training examples, changed at random: the same change for the same seed, epoch and example, whatever the order, the
number of workers or a resume. With a number of views, an example has only so many changes, one after the other.

Pictures go through torchvision's `transforms.v2` in the workers, before the checkpoint's own normalisation; mixup and
cutmix mix a batch in the collator, and its labels with it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.labels import LABELS, SINGLE_LABEL, Labels
from hf_transfer.data.splits import ROW

EXAMPLE = ROW  # what an example is known by
_STRONG_ERASING = 0.25
_NOT_FIXED = -1


def _hashed(*what: int | str) -> int:
    """A number of 64 bits."""
    text = " ".join(str(one) for one in what)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Chance:
    """The source of every random change: seed, epoch, and what is asked for.

    Epoch and fixed view lie in memory that workers share, so that ones which live through all epochs see them change.

    Args:
        seed: of all changes.
        views: how many changes of its own an example has; None for another one in each epoch. View v is the change
            that an epoch v without views would draw.
    """

    def __init__(self, seed: int, views: int | None = None):
        self.seed, self.views = seed, views
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._fixed = torch.full((1,), _NOT_FIXED, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch.fill_(value)

    @property
    def fixed(self) -> int | None:
        """The view that all examples show, whatever the epoch; None for the one whose turn it is."""
        value = int(self._fixed)
        return None if value == _NOT_FIXED else value

    @fixed.setter
    def fixed(self, view: int | None) -> None:
        if view is not None and not 0 <= view < (self.views or 0):
            raise ValueError(f"There is no view {view} of {self.views}.")
        self._fixed.fill_(_NOT_FIXED if view is None else view)

    def view(self, example: int) -> int:
        """Which view an example shows in this epoch: each in turn, begun with one of its own; 0 without views."""
        if self.views is None:
            return 0
        if (fixed := self.fixed) is not None:
            return fixed
        return (_hashed(self.seed, "view", int(example)) + self.epoch) % self.views

    def of(self, example: int, *more: int) -> contextlib.AbstractContextManager[None]:
        """Within, torch's random numbers depend on seed, the example, its view (without views: the epoch) and `more`
        alone; outside, they are not touched."""
        turn = self.epoch if self.views is None else self.view(example)
        return self._drawing(turn, example, *more)

    def of_batch(self, *numbers: int) -> contextlib.AbstractContextManager[None]:
        """The same for what is drawn anew in each epoch, whatever views the examples show."""
        return self._drawing(self.epoch, *numbers)

    @contextlib.contextmanager
    def _drawing(self, turn: int, *numbers: int) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_hashed(self.seed, turn, *(int(n) for n in numbers)) >> 1)
            yield

    def __deepcopy__(self, memo: Any) -> Chance:
        return self  # `datasets` copies what a transform holds


class Epochs(TrainerCallback):
    """Tells a `Chance` the epoch, before the loader is asked for its first batch."""

    def __init__(self, chance: Chance):
        self.chance = chance

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.chance.epoch = int(state.epoch or 0)


# ---- pictures ------------------------------------------------------------------------------------------------------


class Augmentation:
    """PIL pictures to (examples, channels, height, width) tensors as the model reads them, changed at random.

    Args:
        args: `augmentation`, `horizontal_flip`, `random_erasing`.
        processor: the checkpoint's, whose size, interpolation and statistics are used.
        chance: the source of randomness.
    """

    def __init__(self, args: DataArguments, processor: Any, chance: Chance):
        from torchvision.transforms import v2

        self.processor, self.chance = processor, chance
        self.change = _change(args, *_size_of(processor))
        erasing = args.random_erasing
        if erasing is None:
            erasing = _STRONG_ERASING if args.augmentation == "strong" else 0.0
        self.erase = v2.RandomErasing(erasing) if erasing else None

    def __call__(self, images: Sequence[Any], examples: Sequence[int], plain: Callable[[Sequence[Any]], Any]) -> Any:
        """Changed and normalised pictures; `plain` normalises and resizes what is not changed."""
        if self.change is None:
            pixels = plain(images)
        else:
            changed = []
            for image, example in zip(images, examples, strict=True):
                with self.chance.of(example):
                    changed.append(self.change(image))
            pixels = _normalised(changed, self.processor)
        if self.erase is not None:
            for i, example in enumerate(examples):
                with self.chance.of(example, 1):
                    pixels[i] = self.erase(pixels[i])
        return pixels

    @staticmethod
    def wanted(args: DataArguments) -> bool:
        return args.augmentation != "none" or bool(args.random_erasing)


def _change(args: DataArguments, size: tuple[int, int], interpolation: Any) -> Any:
    """From a picture to one of the model's size, by the value of `augmentation`."""
    from torchvision.transforms import v2

    if args.augmentation == "none":
        return None
    least = 0.35 if args.augmentation == "strong" else 0.6
    crop = [v2.RandomResizedCrop(size, scale=(least, 1.0), interpolation=interpolation, antialias=True)]
    flip = [v2.RandomHorizontalFlip(args.horizontal_flip)] if args.horizontal_flip else []
    more: dict[str, list[Any]] = {
        "basic": [],
        "strong": [
            v2.RandomRotation(15, interpolation=v2.InterpolationMode.BILINEAR),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            v2.RandomGrayscale(0.1),
            v2.RandomApply([v2.GaussianBlur(5, (0.1, 2.0))], 0.2),
        ],
        "randaugment": [v2.RandAugment(num_ops=2, magnitude=9)],
        "trivialaugment": [v2.TrivialAugmentWide()],
    }
    return v2.Compose([*crop, *flip, *more[args.augmentation]])


def _size_of(processor: Any) -> tuple[tuple[int, int], Any]:
    """((height, width), interpolation) of what the checkpoint's processor gives the model."""
    from PIL import Image
    from torchvision.transforms import v2

    modes = {mode.value: mode for mode in v2.InterpolationMode}
    if hasattr(processor, "data_config"):  # timm's
        config = processor.data_config
        return (config["input_size"][1], config["input_size"][2]), modes.get(config["interpolation"], modes["bilinear"])
    crop = getattr(processor, "do_center_crop", None) and processor.crop_size
    size = dict(crop or processor.size)
    side = int(size.get("shortest_edge") or 0)
    named = Image.Resampling(getattr(processor, "resample", None) or Image.Resampling.BILINEAR).name.lower()
    return (int(size.get("height") or side), int(size.get("width") or side)), modes.get(named, modes["bilinear"])


def _normalised(images: Sequence[Any], processor: Any) -> torch.Tensor:
    """Pictures of the model's size, through the checkpoint's processor without its resizing and cropping."""
    if hasattr(processor, "val_transforms"):  # timm's
        steps = [t for t in processor.val_transforms.transforms if not _resizes(t)]
        tensors = []
        for image in images:
            for step in steps:
                image = step(image)
            tensors.append(image)
        return torch.stack(tensors)
    return processor(list(images), do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]


def _resizes(transform: Any) -> bool:
    return any(word in type(transform).__name__ for word in ("Resize", "Crop", "Pad"))


def statistics(processor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, standard deviation), each (channels, 1, 1), that a processor normalises with."""
    if hasattr(processor, "data_config"):
        mean, std = processor.data_config["mean"], processor.data_config["std"]
    elif getattr(processor, "do_normalize", True) and getattr(processor, "image_mean", None):
        mean, std = processor.image_mean, processor.image_std
    else:
        mean, std = [0.0], [1.0]
    return torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)


# ---- batches -------------------------------------------------------------------------------------------------------


class Mixed:
    """A collator that mixes training batches by mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019).

    Labels become (examples, labels) shares; where both are asked for, each batch gets one of them by lot. Examples
    without `EXAMPLE`, those of an evaluation, are not mixed. What is mixed, and how, differs in each epoch, also where
    the pictures themselves show views that come again.
    """

    def __init__(
        self,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        args: DataArguments,
        labels: Labels,
        chance: Chance,
    ):
        from torchvision.transforms import v2

        self.collate, self.chance, self.labels = collate, chance, labels
        count = len(labels.names)
        kinds = ((v2.MixUp, args.mixup_alpha), (v2.CutMix, args.cutmix_alpha))
        self.ways = [kind(alpha=alpha, num_classes=count) for kind, alpha in kinds if alpha]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        known = [e[EXAMPLE] for e in examples if EXAMPLE in e]
        batch = self.collate(examples)
        batch.pop(EXAMPLE, None)
        if not known or not self.ways:
            return batch
        targets = batch[LABELS]
        if self.labels.problem_type == SINGLE_LABEL:  # also of a batch of one, so that all of an accumulation are alike
            targets = batch[LABELS] = torch.nn.functional.one_hot(targets, len(self.labels.names)).float()
        if len(examples) < 2:
            return batch
        with self.chance.of_batch(2, *known):
            way = self.ways[int(torch.randint(len(self.ways), ()))]
            batch["pixel_values"], batch[LABELS] = way(batch["pixel_values"], targets)
        return batch

    @staticmethod
    def wanted(args: DataArguments) -> bool:
        return bool(args.mixup_alpha or args.cutmix_alpha)


# ---- texts ---------------------------------------------------------------------------------------------------------


def mask_tokens(ids: Sequence[int], share: float, mask: int, special: frozenset[int]) -> list[int]:
    """`ids` with each that is not special replaced by `mask` with probability `share`."""
    drawn = torch.rand(len(ids)).tolist()
    return [mask if r < share and i not in special else i for i, r in zip(ids, drawn, strict=True)]
