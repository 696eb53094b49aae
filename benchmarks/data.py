"""What data costs: memory over a whole epoch, input time against step time, the look at the data, decoders.

    python benchmarks/data.py [--quick] [--only memory,loading,facts,decoding]

Memory: resident memory (without mapped files) of the training process and its workers while an epoch is loaded, of a
million short texts (tokenised, and streamed) and of 100,000 JPEG files. Loading: what a batch takes from the loader
against what a step takes, and the share of training that waits for input. Facts: seconds of the look at the data.
Decoding: PIL against torchvision within the whole way to the model. Texts and images are generated. Writes
benchmarks/results/data.json and .md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers
from PIL import Image

from hf_transfer.data.augment import Augmentation, Chance
from hf_transfer.models import bundled as bundled_models
from hf_transfer.runs.machine import quiet_libraries
from hf_transfer.runs.prepare import make_trainer, prepare, prepare_splits
from hf_transfer.settings import Config

RESULTS = Path(__file__).parent / "results"
WORDS = [f"word{i}" for i in range(2000)]
POINTS = 10
MB = 1e6


# ---- generated data ------------------------------------------------------------------------------------------------


def write_texts(folder: Path, rows: int) -> str:
    """Tables of 20 random words a row, 100,000 rows a file."""
    rng = np.random.default_rng(0)
    for part in range(0, rows, 100_000):
        words = rng.integers(0, len(WORDS), (min(100_000, rows - part), 20))
        with (folder / f"part-{part:08}.csv").open("w") as file:
            file.write("text,label\n")
            file.writelines(f"{' '.join(WORDS[i] for i in row)},{'ab'[row[0] % 2]}\n" for row in words.tolist())
    return f"{folder}/part-*.csv"


def picture(rng: Any, size: tuple[int, int]) -> Image.Image:
    """A smooth image with noise, as a photograph compresses."""
    width, height = size
    rough = rng.integers(0, 255, (max(2, height // 12), max(2, width // 12), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray((smooth + rng.integers(-12, 12, smooth.shape)).clip(0, 255).astype(np.uint8))


def write_images(folder: Path, number: int, size: tuple[int, int]) -> str:
    """A folder of JPEGs in two classes."""
    rng = np.random.default_rng(0)
    for i in range(number):
        place = folder / "ab"[i % 2]
        place.mkdir(exist_ok=True)
        picture(rng, size).save(place / f"{i:06}.jpg", quality=90)
    return str(folder)


def save_models(folder: Path) -> dict[str, str]:
    """A small text model and a small image model, with random weights."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        bundled_models.model_path("bundled:minilm-l6"), model_max_length=64
    )
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=len(tokenizer)
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    for side in (32, 224):
        vit = transformers.ViTConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=side,
            patch_size=side // 4,
        )  # fmt: skip
        transformers.ViTForImageClassification(vit).save_pretrained(folder / f"image{side}")
        transformers.ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(folder / f"image{side}")
    return {path.name: str(path) for path in folder.iterdir()}


def trainer_of(model: str, data: str, folder: Path, **keys: Any) -> Any:
    given = {"model_name_or_path": model, "dataset_name": data, "output_dir": str(folder), "log_level": "error"}
    config = Config.from_sources(
        {}, {**given, "strategy": "full", "save_strategy": "no", "eval_strategy": "no", **keys}
    )
    with quiet_libraries(config.training):
        prepared = prepare(config)
        return make_trainer(prepared, prepare_splits(prepared)["train"], None)


# ---- memory --------------------------------------------------------------------------------------------------------


def resident() -> float:
    """Megabytes of this process and of its workers, without mapped files, which the system drops as it needs room."""
    me = psutil.Process()
    seen = (p.memory_info() for p in (me, *me.children(recursive=True)))
    return sum(m.rss - m.shared for m in seen) / MB


def memory(model: str, data: str, folder: Path, batches: int | None, keys: dict[str, Any]) -> dict[str, Any]:
    """Resident memory at ten points of an epoch; in a process of its own."""
    torch.set_num_threads(1)
    started, began = resident(), time.perf_counter()
    trainer = trainer_of(model, data, folder, data_facts=False, **keys)
    loader, prepared = trainer.get_train_dataloader(), time.perf_counter() - began
    count = batches or len(loader)
    before, seen = resident(), []
    for i, _ in enumerate(loader, 1):
        if i % max(1, count // POINTS) == 0:
            seen.append(round(resident()))
        if i == count:
            break
    seconds = time.perf_counter() - began - prepared
    return {
        "started": round(started),
        "prepared": round(before),
        "epoch": seen,
        "prepare_s": prepared,
        "epoch_s": seconds,
    }


def measure_memory(models: dict[str, str], folder: Path, quick: bool) -> dict[str, Any]:
    rows, files, batch = (20_000, 2_000, 50) if quick else (1_000_000, 100_000, 100)
    (folder / "texts").mkdir()
    (folder / "images").mkdir()
    texts = write_texts(folder / "texts", rows)
    images = write_images(folder / "images", files, (48, 36))
    common: dict[str, Any] = {"per_device_train_batch_size": batch, "train_val_split": 0.01}
    streamed = {**common, "streaming": True, "max_steps": 10, "max_eval_samples": 100}
    strong = {**common, "augmentation": "strong", "max_train_samples": files // 5}
    found = {}
    for name, (model, data, batches, keys) in {
        f"{rows:,} texts": (models["text"], texts, None, common),
        f"{rows:,} texts, streamed": (models["text"], texts, rows // batch, streamed),
        f"{files:,} images": (models["image32"], images, None, common),
        f"{files // 5:,} images, augmented, 1 worker": (
            models["image32"], images, None, {**strong, "dataloader_num_workers": 1},
        ),
    }.items():  # fmt: skip
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found[name] = pool.submit(memory, model, data, folder / "out", batches, keys).result()
        print(name, found[name], flush=True)
    return found


# ---- loading -------------------------------------------------------------------------------------------------------


def measure_loading(models: dict[str, str], folder: Path, quick: bool) -> dict[str, Any]:
    """The loader alone, a step alone, and the two together: the share of time that waits for input."""
    (folder / "photos").mkdir()
    data, found = write_images(folder / "photos", 200 if quick else 800, (500, 375)), {}
    names = ["image224"] if quick else ["image224", "bundled:efficientnet-lite0"]
    for name in names:
        for workers in (0, 1):
            for augmentation in ("none", "strong"):
                keys = {"dataloader_num_workers": workers, "augmentation": augmentation, "data_facts": False}
                trainer = trainer_of(models.get(name, name), data, folder / "out", **keys, dataloader_drop_last=True)
                found[f"{name}, {augmentation}, {workers} workers"] = _one_loading(trainer)
                print(name, keys, found[f"{name}, {augmentation}, {workers} workers"], flush=True)
    return found


def _one_loading(trainer: Any, most: int = 12) -> dict[str, float]:
    model = trainer.model.train()
    loader = trainer.get_train_dataloader()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    batches = iter(loader)
    first = next(batches)
    alone = _seconds(lambda: next(batches), most)
    step = _seconds(lambda: _step(model, optimizer, first), most)
    waits, began, batches = 0.0, time.perf_counter(), iter(loader)
    for _ in range(most):
        asked = time.perf_counter()
        batch = next(batches)
        waits += time.perf_counter() - asked
        _step(model, optimizer, batch)
    total = time.perf_counter() - began
    return {"input_ms": 1000 * alone, "step_ms": 1000 * step, "waits": waits / total}


def _step(model: Any, optimizer: Any, batch: dict[str, Any]) -> None:
    loss = model(pixel_values=batch["pixel_values"], labels=batch["labels"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss.item()  # waits for the device


def _seconds(work: Callable[[], Any], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times


# ---- facts ---------------------------------------------------------------------------------------------------------


def measure_facts(models: dict[str, str], folder: Path, quick: bool) -> dict[str, Any]:
    """Seconds of the look at the data, for each 100,000 examples."""
    rows, files = (5_000, 200) if quick else (50_000, 2_000)
    (folder / "t").mkdir()
    (folder / "i").mkdir()
    texts, images = write_texts(folder / "t", rows), write_images(folder / "i", files, (500, 375))
    found = {}
    for name, model, data, number in (
        ("texts of 20 words", models["text"], texts, rows),
        ("JPEGs of 500 × 375 pixels", models["image224"], images, files),
    ):
        given = {"model_name_or_path": model, "dataset_name": data, "output_dir": str(folder / "out")}
        config = Config.from_sources({}, {**given, "log_level": "error", "strategy": "full"})
        with quiet_libraries(config.training):
            seconds = prepare(config).facts.seconds
        found[name] = {"examples": number, "seconds": seconds, "per_100k_s": seconds * 100_000 / number}
        print(name, found[name], flush=True)
    return found


# ---- decoding ------------------------------------------------------------------------------------------------------


def measure_decoding(models: dict[str, str], folder: Path, quick: bool) -> dict[str, Any]:
    """Images per second from bytes to what the model reads, in one thread."""
    from torchvision.io import ImageReadMode, decode_image

    from hf_transfer.config.arguments.data import DataArguments
    from hf_transfer.data.images import open_image

    (folder / "d").mkdir()
    files = sorted(Path(write_images(folder / "d", 24, (500, 375))).rglob("*.jpg"))
    contents = [path.read_bytes() for path in files]
    processor = transformers.AutoImageProcessor.from_pretrained(models["image224"])

    def torchvision(content: bytes) -> torch.Tensor:
        whole = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return decode_image(whole, ImageReadMode.RGB, apply_exif_orientation=True)

    def plain(images: Any) -> Any:
        return processor(images, return_tensors="pt")["pixel_values"]

    threads, found = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    for kind in ("none", "basic", "strong", "randaugment", "trivialaugment"):
        augment = Augmentation(DataArguments(augmentation=kind, random_erasing=0.0), processor, Chance(0))
        best = dict.fromkeys(("PIL", "torchvision"), float("inf"))
        for _ in range(2 if quick else 8):  # the best of several: other work on the machine only slows
            for name, decode in (("PIL", open_image), ("torchvision", torchvision)):
                began = time.perf_counter()
                for i, content in enumerate(contents):
                    augment([decode(content)], [i], plain)
                best[name] = min(best[name], (time.perf_counter() - began) / len(contents))
        found[kind] = {name: 1 / seconds for name, seconds in best.items()}
    difference = (plain([open_image(contents[0])]) - plain([torchvision(contents[0])])).abs().max()
    torch.set_num_threads(threads)
    return {**found, "largest_difference": float(difference)}


# ---- results -------------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> Iterator[str]:
    if found := results.get("memory"):
        yield from ("", "## Resident memory over an epoch, MB", "")
        yield from ("| | after preparing | at each tenth of the epoch | seconds |", "|---|---|---|---|")
        for name, r in found.items():
            points = ", ".join(f"{m:,}" for m in r["epoch"])
            yield f"| {name} | {r['prepared']:,} | {points} | {r['prepare_s']:.0f} + {r['epoch_s']:.0f} |"
    if found := results.get("loading"):
        yield from ("", "## Input against step, batches of 8 JPEGs of 500 × 375 pixels", "")
        yield from ("| | input, ms | step, ms | of training waits |", "|---|---|---|---|")
        yield from (f"| {n} | {r['input_ms']:.0f} | {r['step_ms']:.0f} | {r['waits']:.1%} |" for n, r in found.items())
    if found := results.get("facts"):
        yield from ("", "## The look at the data", "", "| | per 100,000 |", "|---|---|")
        yield from (f"| {name} | {r['per_100k_s']:.0f} s |" for name, r in found.items())
    if found := results.get("decoding"):
        yield from ("", "## From a JPEG to what the model reads, images/s in one thread", "")
        yield from ("| augmentation | PIL | torchvision |", "|---|---|---|")
        kinds = {k: r for k, r in found.items() if isinstance(r, dict)}
        yield from (f"| {kind} | {r['PIL']:.0f} | {r['torchvision']:.0f} |" for kind, r in kinds.items())
        yield from ("", f"Largest difference without augmentation: {found['largest_difference']:g}.")


MEASURES = {
    "memory": measure_memory,
    "loading": measure_loading,
    "facts": measure_facts,
    "decoding": measure_decoding,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing is written")
    parser.add_argument("--only", default=",".join(MEASURES))
    options = parser.parse_args()
    path = RESULTS / "data.json"
    results = json.loads(path.read_text())["results"] if path.is_file() and not options.quick else {}
    for name in options.only.split(","):
        with tempfile.TemporaryDirectory() as folder:
            models = Path(folder, "models")
            models.mkdir()
            results[name] = MEASURES[name](save_models(models), Path(folder), options.quick)
    where = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "cores": psutil.cpu_count(),
        "machine": platform.machine(),
        **{p: version(p) for p in ("torch", "torchvision", "transformers", "datasets", "pillow")},
    }
    lines = ["# Data", "", f"`python benchmarks/data.py`: {', '.join(f'{k} {v}' for k, v in where.items())}."]
    lines += list(table({name: results[name] for name in MEASURES if name in results}))
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps({"where": where, "results": results}, indent=2) + "\n")
        path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
