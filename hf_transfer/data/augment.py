"""Data augmentation that is reproducible per example.

The random changes of an example depend only on the seed, the epoch and the example, not on the order, the number of
workers or a resume. With `augmented_views`, an example has a fixed number of augmented views, shown in turn.

Images go through torchvision's `transforms.v2` in the data loader workers, before the checkpoint's own normalization.
Mixup and cutmix mix images and labels of a batch in the collator.
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

EXAMPLE = ROW  # column that identifies an example
_STRONG_ERASING = 0.25
_NOT_FIXED = -1


def _hashed(*values: int | str) -> int:
    """64-bit hash of `values`."""
    text = " ".join(str(value) for value in values)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Chance:
    """Source of randomness for augmentation, a function of seed, epoch and example.

    The epoch and the fixed view are in shared memory, so that persistent data loader workers see them change.

    Args:
        seed: seed of all random changes.
        views: number of augmented views per example; None draws a new one in each epoch. View v is what epoch v would
            draw without views.
    """

    def __init__(self, seed: int, views: int | None = None):
        self.seed, self.views = seed, views
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._fixed = torch.full((1,), _NOT_FIXED, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The current epoch, counted from 0."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch.fill_(value)

    @property
    def fixed(self) -> int | None:
        """The view that all examples show in every epoch; None if the views take turns."""
        value = int(self._fixed)
        return None if value == _NOT_FIXED else value

    @fixed.setter
    def fixed(self, view: int | None) -> None:
        if view is not None and not 0 <= view < (self.views or 0):
            raise ValueError(f"View {view} does not exist; the number of views is {self.views}.")
        self._fixed.fill_(_NOT_FIXED if view is None else view)

    def view(self, example: int) -> int:
        """The view of an example in this epoch: all in turn, from an example-specific first one; 0 without views."""
        if self.views is None:
            return 0
        if (fixed := self.fixed) is not None:
            return fixed
        return (_hashed(self.seed, "view", int(example)) + self.epoch) % self.views

    def of(self, example: int, *more: int) -> contextlib.AbstractContextManager[None]:
        """Context in which torch's random numbers depend only on the seed, the example, its view and `more`.

        Without views, the epoch takes the place of the view. The global random state is restored afterwards.
        """
        turn = self.epoch if self.views is None else self.view(example)
        return self._seeded(turn, example, *more)

    def of_batch(self, *numbers: int) -> contextlib.AbstractContextManager[None]:
        """Context in which torch's random numbers depend only on the seed, the epoch and `numbers`, not on views."""
        return self._seeded(self.epoch, *numbers)

    def fixed_seed(self, *numbers: int) -> contextlib.AbstractContextManager[None]:
        """Context in which torch's random numbers depend only on the seed and `numbers`, the same in every epoch."""
        return self._seeded(*numbers)

    @contextlib.contextmanager
    def _seeded(self, turn: int, *numbers: int) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_hashed(self.seed, turn, *(int(n) for n in numbers)) >> 1)
            yield

    def __deepcopy__(self, memo: Any) -> Chance:
        return self  # `datasets` deep-copies the attributes of a transform


class Epochs(TrainerCallback):
    """Callback that sets the epoch of a `Chance` before the first batch of the epoch is loaded."""

    def __init__(self, chance: Chance):
        self.chance = chance

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.chance.epoch = int(state.epoch or 0)


# ---- images --------------------------------------------------------------------------------------------------------


class Augmentation:
    """Augments PIL images and turns them into model inputs, (examples, channels, height, width).

    Args:
        args: data keys; `augmentation`, `horizontal_flip` and `random_erasing` are used.
        processor: the checkpoint's image processor, whose size, interpolation, mean and standard deviation are used.
        chance: source of randomness.
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
        """Augmented and normalized images; `plain` preprocesses the images if only random erasing is used."""
        if self.change is None:
            pixels = plain(images)
        else:
            augmented = []
            for image, example in zip(images, examples, strict=True):
                with self.chance.of(example):
                    augmented.append(self.change(image))
            pixels = _normalized(augmented, self.processor)
        if self.erase is not None:
            for i, example in enumerate(examples):
                with self.chance.of(example, 1):
                    pixels[i] = self.erase(pixels[i])
        return pixels

    @staticmethod
    def wanted(args: DataArguments) -> bool:
        """Whether the keys enable image augmentation."""
        return args.augmentation != "none" or bool(args.random_erasing)


def _change(args: DataArguments, size: tuple[int, int], interpolation: Any) -> Any:
    """The transform selected by `augmentation`, from an image to one of the model's input size; None for `none`."""
    from torchvision.transforms import v2

    if args.augmentation == "none":
        return None
    min_area = 0.35 if args.augmentation == "strong" else 0.6
    crop = [v2.RandomResizedCrop(size, scale=(min_area, 1.0), interpolation=interpolation, antialias=True)]
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
    """((height, width) in pixels, interpolation mode) of the checkpoint's processor."""
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


def _normalized(images: Sequence[Any], processor: Any) -> torch.Tensor:
    """Images of the model's input size, normalized by the checkpoint's processor without resizing or cropping."""
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
    """(mean, standard deviation), each (channels, 1, 1), with which a processor normalizes images."""
    if hasattr(processor, "data_config"):
        mean, std = processor.data_config["mean"], processor.data_config["std"]
    elif getattr(processor, "do_normalize", True) and getattr(processor, "image_mean", None):
        mean, std = processor.image_mean, processor.image_std
    else:
        mean, std = [0.0], [1.0]
    return torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)


# ---- batches -------------------------------------------------------------------------------------------------------


class Mixed:
    """A collator that applies mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) to training batches.

    Labels become weights, (examples, classes). If both are enabled, one is drawn for each batch. Evaluation examples,
    which lack `EXAMPLE`, are not mixed. Mixing is drawn again in each epoch, even with a fixed number of views.
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

    def unmixed(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of the examples as they are."""
        batch = self.collate(examples)
        batch.pop(EXAMPLE, None)
        return batch

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        numbers = [e[EXAMPLE] for e in examples if EXAMPLE in e]
        batch = self.unmixed(examples)
        if not numbers or not self.ways:
            return batch
        targets = batch[LABELS]
        if self.labels.problem_type == SINGLE_LABEL:  # even for one example: all accumulated batches have soft labels
            targets = batch[LABELS] = torch.nn.functional.one_hot(targets, len(self.labels.names)).float()
        if len(examples) < 2:
            return batch
        with self.chance.of_batch(2, *numbers):
            way = self.ways[int(torch.randint(len(self.ways), ()))]
            batch["pixel_values"], batch[LABELS] = way(batch["pixel_values"], targets)
        return batch

    @staticmethod
    def wanted(args: DataArguments) -> bool:
        """Whether the keys enable mixup or cutmix."""
        return bool(args.mixup_alpha or args.cutmix_alpha)


# ---- texts ---------------------------------------------------------------------------------------------------------


def mask_tokens(ids: Sequence[int], share: float, mask: int, special: frozenset[int]) -> list[int]:
    """`ids` with each non-special token replaced by `mask` with probability `share`."""
    drawn = torch.rand(len(ids)).tolist()
    return [mask if r < share and i not in special else i for i, r in zip(ids, drawn, strict=True)]
