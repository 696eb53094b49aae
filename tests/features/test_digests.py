"""Digests: another wherever the frozen part's results may be, the same for the same content."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from datasets import Array2D, Dataset, Features, Image, concatenate_datasets
from torch import nn
from torch.utils.data import Subset, TensorDataset
from transformers import AutoTokenizer, BertConfig, TimmWrapperImageProcessor, ViTImageProcessor
from transformers.trainer_utils import RemoveColumnsCollator

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.augment import Chance
from hf_transfer.features.column_digests import ColumnDigests
from hf_transfer.features.digests import (
    _package_sources,
    code_digest,
    dataset_digest,
    example_digests,
    weights_digest,
)
from hf_transfer.features.object_digests import collator_digest, object_digest
from hf_transfer.layers.hashing import key
from hf_transfer.tasks.image_classification import ImageClassification
from tests.helpers import PIXELS, texts, tiny_bert, tiny_timm_resnet, tiny_vit

ROWS = {
    "input_ids": [[5, 6, 7], [], [8], [9, 10], [11]],
    "text": ["one", "", None, "vier", "fünf"],
    "pair": [{"a": 1, "b": [True]}, None, {"a": None, "b": []}, {"a": 4, "b": [False, True]}, {"a": 5, "b": None}],
    "nested": [[[1.0], [2.0, 3.0]], [], [[]], None, [[4.0]]],
    "flag": [True, False, None, True, True],
    "labels": [0, 1, 0, 1, 1],
}


def rows(**changed) -> Dataset:
    return Dataset.from_dict({**ROWS, **changed})


def test_equal_content_has_one_digest_however_it_is_stored(tmp_path, monkeypatch):
    plain = rows()
    digest = dataset_digest(plain)
    assert digest is not None and len(digest) == 32
    twice = concatenate_datasets([plain, plain])
    plain.save_to_disk(str(tmp_path / "saved"))
    same = {
        "anew": rows(),
        "pieces": concatenate_datasets([plain.select(range(2)), plain.select([2]), plain.select([3, 4])]),
        "slice": twice.select(range(5, 10)),
        "indices": twice.select([5, 1, 7, 3, 9]),
        "shuffled back": plain.select([4, 2, 0, 1, 3]).select([2, 3, 1, 4, 0]),
        "files": Dataset.load_from_disk(str(tmp_path / "saved")),
        "columns": plain.select_columns(sorted(ROWS, reverse=True)),
        "renamed twice": plain.rename_column("text", "t").rename_column("t", "text"),
    }
    for name, data in same.items():
        assert dataset_digest(data) == digest, name
    monkeypatch.setattr("hf_transfer.features.digests._ROWS", 2)  # read at once
    for name, data in same.items():
        assert dataset_digest(data) == digest, name
    tables = plain.with_format("torch")
    assert dataset_digest(tables) == dataset_digest(same["pieces"].with_format("torch")) != digest


def test_other_content_has_another_digest():
    seen = {
        "plain": rows(),
        "order": rows().select([1, 0, 2, 3, 4]),
        "fewer": rows().select(range(4)),
        "more": concatenate_datasets([rows(), rows().select([0])]),
        "token": rows(input_ids=[[5, 6, 7], [], [8], [9, 12], [11]]),
        "border": rows(input_ids=[[5, 6], [7], [8], [9, 10], [11]]),
        "empty, not null": rows(text=["one", "", "", "vier", "fünf"]),
        "null, not empty": rows(text=["one", None, None, "vier", "fünf"]),
        "letters moved": rows(text=["on", "e", None, "vier", "fünf"]),
        "within": rows(pair=[*ROWS["pair"][:3], {"a": 4, "b": [True, True]}, {"a": 5, "b": None}]),
        "null within": rows(pair=[*ROWS["pair"][:4], {"a": 5, "b": []}]),
        "null moved": rows(pair=[ROWS["pair"][0], {"a": None, "b": []}, None, *ROWS["pair"][3:]]),
        "deeper": rows(nested=[[[1.0, 2.0], [3.0]], [], [[]], None, [[4.0]]]),
        "flag": rows(flag=[True, False, None, True, False]),
        "name": rows().rename_column("text", "words"),
        "columns": rows().remove_columns("text"),
        "chosen": rows().with_format(None, columns=["input_ids"]),
        "numpy": rows().with_format("numpy"),
        "torch": rows().with_format("torch"),
        "dtype": rows().with_format("torch", dtype=torch.float16),
    }
    digests = {name: dataset_digest(data) for name, data in seen.items()}
    assert None not in digests.values()
    assert len(set(digests.values())) == len(seen), digests


@pytest.mark.parametrize("column", list(ROWS))
def test_a_slice_is_what_it_shows(column):
    whole = ColumnDigests(texts_may_be_paths=False), ColumnDigests(texts_may_be_paths=False)
    array = pyarrow.array(ROWS[column])
    whole[0].add("x", array.slice(3, 2))
    whole[1].add("x", pyarrow.array(ROWS[column][3:], array.type))
    assert whole[0].digests() == whole[1].digests()


def test_fixed_shapes():
    def pixels(value: float) -> Dataset:
        cells = np.arange(24.0).reshape(6, 2, 2)
        cells[4, 1, 1] = value
        return Dataset.from_dict({"x": cells.tolist()}, features=Features({"x": Array2D((2, 2), "float32")}))

    one = dataset_digest(pixels(1.0))
    assert dataset_digest(pixels(1.0).select([0, 1, 2, 3, 4, 5])) == one is not None
    assert dataset_digest(pixels(2.0)) != one
    assert dataset_digest(pixels(2.0).select(range(4))) == dataset_digest(pixels(1.0).select(range(4)))


def test_the_tokeniser_shows_in_what_it_gave(tiny_bert_folder):
    words = Dataset.from_dict(
        {"text": ["a film that is", "not at all bad, and long enough to be cut at sixteen tokens"]}
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert_folder)

    def tokenised(**keys) -> str | None:
        encode = lambda row: tokenizer(row["text"], truncation=True, **keys)  # noqa: E731
        return dataset_digest(words.map(encode, remove_columns="text", load_from_cache_file=False))

    assert tokenised() == tokenised()
    assert len({tokenised(), tokenised(max_length=15), tokenised(add_special_tokens=False)}) == 3


# ---- pictures ------------------------------------------------------------------------------------------------------


def processor(size: int = PIXELS, **keys) -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": size, "width": size}, **keys)


def pictures(cells: list, reader=None) -> Dataset:
    data = Dataset.from_dict({"image": cells, "labels": [0] * len(cells)}).cast_column("image", Image())
    return ImageClassification().prepare(data, ("image",), reader or processor(), DataArguments())


def test_pictures(tmp_path):
    """What lies behind a path counts, not its size or time; how it is read counts too."""
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(f"picture {name}".encode())
    paths = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    by_path = dataset_digest(pictures(paths))
    assert by_path == dataset_digest(pictures(paths)) is not None
    within = [{"bytes": b"picture a", "path": None}, {"bytes": b"picture b", "path": None}]
    timm = partial(TimmWrapperImageProcessor, architecture="resnet10t")
    digests = {
        "paths": by_path,
        "order": dataset_digest(pictures(paths[::-1])),
        "bytes": dataset_digest(pictures(within)),
        "one of each": dataset_digest(pictures([within[0], {"bytes": None, "path": paths[1]}])),
        "size": dataset_digest(pictures(paths, processor(16))),
        "mean": dataset_digest(pictures(paths, processor(image_mean=[0.5, 0.5, 0.4]))),
        "timm": dataset_digest(pictures(paths, timm({"input_size": (3, 32, 32)}))),
        "timm's crop": dataset_digest(pictures(paths, timm({"input_size": (3, 32, 32), "crop_pct": 0.5}))),
        "no transform": dataset_digest(pictures(paths).with_format(None)),
    }
    changed_later = timm({"input_size": (3, 32, 32)})
    changed_later.val_transforms.transforms[0].size = 31
    digests["timm's transform"] = dataset_digest(pictures(paths, changed_later))
    plain = pictures(paths).with_format(None)
    before = Path(paths[0]).stat()
    Path(paths[0]).write_bytes(b"picture c")
    os.utime(paths[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    after = Path(paths[0]).stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    digests["content"] = dataset_digest(pictures(paths))
    digests["content, no transform"] = dataset_digest(plain)
    Path(paths[0]).unlink()
    digests["gone"] = dataset_digest(pictures(paths))
    assert None not in digests.values()
    assert len(set(digests.values())) == len(digests), digests
    assert dataset_digest(pictures(["https://there/a.png"])) is None
    assert dataset_digest(plain.with_transform(lambda batch: batch)) is None
    assert dataset_digest(plain.with_transform(partial(ImageClassification()._plain, "image", ours))) is None
    assert dataset_digest(plain.with_transform(ImageClassification().collator(None), columns=["labels"]))
    keys = DataArguments(augmentation="basic")
    live = ImageClassification().change(("image",), processor(), keys, Chance(0))
    assert dataset_digest(plain.with_transform(live)) is None


# ---- example by example --------------------------------------------------------------------------------------------


def test_an_example_has_a_digest_of_its_own(monkeypatch):
    """Whatever else is in the dataset, and however that is stored."""
    digests = example_digests(rows())
    assert digests is not None and len(set(digests)) == 5 and all(len(digest) == 16 for digest in digests)
    order = [3, 0, 0, 4, 2]
    for step in (4096, 2):
        monkeypatch.setattr("hf_transfer.features.digests._ROWS", step)
        assert example_digests(rows().select(order)) == [digests[i] for i in order]
        assert example_digests(concatenate_datasets([rows().select([2]), rows()])) == [digests[2], *digests]
    for column, values in {
        "input_ids": [[5, 6, 7], [], [0], [9, 10], [11]],
        "text": ["one", "", "", "vier", "fünf"],  # empty and missing differ
        "pair": [*ROWS["pair"][:2], {"a": 0, "b": []}, *ROWS["pair"][3:]],
        "nested": [*ROWS["nested"][:2], [[], []], *ROWS["nested"][3:]],
        "flag": [True, False, False, True, True],
        "labels": [0, 1, 2, 1, 1],
    }.items():
        changed = example_digests(rows(**{column: values}))
        assert [one == other for one, other in zip(changed, digests, strict=True)] == [True, True, False, True, True]
    no_labels = example_digests(rows(), frozenset({"labels"}))
    assert no_labels == example_digests(rows(labels=[7] * 5), frozenset({"labels"})) != digests
    assert set(example_digests(rows().with_format("torch"))).isdisjoint(digests)
    shifted = rows(input_ids=[[5, 6], [7], [8], [9, 10], [11]])  # the same numbers, cut elsewhere
    assert example_digests(shifted)[:2] != digests[:2] and example_digests(shifted)[2:] == digests[2:]


def test_pictures_one_by_one(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(f"picture {name}".encode())
    a, b, c = ({"bytes": None, "path": str(tmp_path / f"{name}.png")} for name in "abc")
    cells = [a, {"bytes": b"within", "path": None}, b]
    before = example_digests(pictures(cells))
    Path(b["path"]).write_bytes(b"picture d")
    after = example_digests(pictures(cells))
    assert after[:2] == before[:2] and after[2] != before[2]
    assert example_digests(pictures([b, c]))[0] == after[2]
    assert set(example_digests(pictures(cells, processor(16)))).isdisjoint(after)


def test_examples_of_any_dataset():
    assert example_digests(Squares())[2:] == example_digests(Subset(Squares(9), [2, 3]))
    assert example_digests(Squares(wrap=lambda x: object())) is None
    data = rows().select_columns(["labels"]).with_transform(ours)  # read, as nobody knows what the transform does
    assert example_digests(data) == example_digests(data) != example_digests(data.select([1, 0, 2, 3, 4]))
    assert example_digests(data.with_transform(lambda batch: {"x": [random.random() for _ in batch["labels"]]})) is None


def ours(batch):
    """A function whose code is known by no version."""
    return batch


class Squares:
    """A map-style data set."""

    def __init__(self, size: int = 4, noise=lambda: 0.0, wrap=lambda x: x):
        self.size, self.noise, self.wrap = size, noise, wrap

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict:
        return {"x": torch.tensor([i * i + self.noise()]), "name": str(i), "more": [np.float32(i), self.wrap((i,))]}


def test_other_data_sets_are_read_item_by_item():
    digest = dataset_digest(Squares())
    assert digest == dataset_digest(Subset(Squares(9), [0, 1, 2, 3]))
    assert None is not digest != dataset_digest(Squares(5))
    assert digest != dataset_digest(Subset(Squares(9), [0, 1, 3, 2]))
    assert digest != dataset_digest(Squares(noise=lambda: 1e-7))
    assert digest != dataset_digest(Squares(wrap=list))
    assert dataset_digest(Squares(wrap=lambda x: ours)) is None
    assert dataset_digest(Squares(wrap=lambda x: object())) is None
    assert dataset_digest(TensorDataset(torch.zeros(3))) != dataset_digest(TensorDataset(-torch.zeros(3)))
    assert dataset_digest(texts().to_iterable_dataset()) is None
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for draw in (lambda: torch.rand(()).item(), random.random, np.random.rand):
        assert dataset_digest(Squares(noise=draw)) is None
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


# ---- weights and code ----------------------------------------------------------------------------------------------


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.arange(6.0).view(2, 3))
        self.b = nn.Parameter(torch.arange(6.0, dtype=torch.bfloat16))
        self.tied = self.a
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("hidden", torch.zeros(4, dtype=torch.bool), persistent=False)


def test_weights():
    names = ["a", "b", "tied", "empty", "count", "hidden"]
    digest = weights_digest(Odd())
    assert weights_digest(Odd(), names) == weights_digest(Odd(), reversed(names)) == digest
    transposed = Odd()
    transposed.a.data = transposed.a.data.t().contiguous().t()
    assert weights_digest(transposed) == digest

    def after(change) -> str:
        model = Odd()
        with torch.no_grad():
            change(model)
        return weights_digest(model)

    digests = [
        digest,
        after(lambda m: m.a.view(torch.uint8)[1, 2].bitwise_xor_(1)),
        after(lambda m: m.b.view(torch.int16)[5].bitwise_xor_(1)),
        after(lambda m: m.b.neg_()[0].neg_()),
        after(lambda m: m.a[0, 0].neg_()),  # -0.0
        after(lambda m: m.count.add_(1)),
        after(lambda m: m.hidden[3].fill_(True)),
        after(lambda m: setattr(m.a, "data", m.a.view(3, 2))),
        after(lambda m: setattr(m.b, "data", m.b.float())),
        weights_digest(Odd(), names[:5]),
    ]
    assert len(set(digests)) == len(digests)
    with pytest.raises(KeyError):
        weights_digest(Odd(), ["c"])
    bert = tiny_bert()
    before = weights_digest(bert), weights_digest(bert, [n for n, _ in bert.named_parameters() if "layer.0" in n])
    with torch.no_grad():
        bert.bert.encoder.layer[1].output.dense.bias[0] += 1e-8
    assert weights_digest(bert) != before[0]
    assert weights_digest(bert, [n for n, _ in bert.named_parameters() if "layer.0" in n]) == before[1]


def test_code(monkeypatch, tmp_path):
    digests = [code_digest(), *(code_digest(m) for m in (tiny_bert(), tiny_vit(), tiny_timm_resnet()))]
    assert digests[1:] == [code_digest(m) for m in (tiny_bert(), tiny_vit(), tiny_timm_resnet())]
    digests += [code_digest(tiny_bert(layer_norm_eps=1e-6)), code_digest(tiny_bert(hidden_act="relu"))]
    monkeypatch.setattr("hf_transfer.features.digests._version", lambda name: "2" if name == "torch" else "1")
    digests.append(code_digest())
    path = tmp_path / "own_model.py"
    for activation in ("relu", "tanh"):
        text = (
            f"import torch\nclass Own(torch.nn.Module):\n    def forward(self, x):\n        return x.{activation}()\n"
        )
        path.write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        sys.modules.pop("own_model", None)
        digests.append(code_digest(nn.Sequential(__import__("own_model").Own())))
    assert None not in digests
    assert len(set(digests)) == len(digests)
    typed: dict = {"__name__": "typed"}
    exec("import torch\nclass Typed(torch.nn.Module): pass", typed)
    assert code_digest(nn.Sequential(typed["Typed"]())) is None


def test_the_code_of_the_whole_package_counts():
    """What the frozen part computes is decided by more than this folder: models, layers and data, too."""
    assert {"features/digests.py", "layers/frozen.py", "models/load.py", "data/augment.py"} <= set(_package_sources())


def test_key():
    assert len(key({"a": "1", "b": "2"})) == 32
    assert key({"a": "1", "b": "2"}) == key({"b": "2", "a": "1"}) != key({"a": "12", "b": ""})
    assert key({"ab": "1"}) != key({"a": "b1"})


def everything(tokenizer_folder: str) -> dict[str, str | None]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    fresh = object_digest(tokenizer)
    tokenizer("one", truncation=True, max_length=4, padding="max_length")
    assert object_digest(tokenizer) == fresh
    bytes_within = [{"bytes": b"picture", "path": "a.png"}]
    timm = TimmWrapperImageProcessor({"input_size": (3, 32, 32)}, architecture="resnet10t")
    return {
        "rows": dataset_digest(rows()),
        "torch": dataset_digest(rows().with_format("torch", dtype=torch.float16)),
        "pictures": dataset_digest(pictures(bytes_within)),
        "timm": dataset_digest(pictures(bytes_within, timm)),
        "items": dataset_digest(Squares(wrap=lambda x: {"a", "b", "c", str(x)})),
        "object": object_digest([BertConfig().to_dict(), Path("a"), slice(1), {"z", "y", "x"}, tokenizer]),
        "weights": weights_digest(tiny_bert()),
        "code": code_digest(tiny_bert()),
    }


def test_another_process_has_the_same(tiny_bert_folder):
    code = (
        "import json, sys\nfrom tests.features.test_digests import everything\n"
        "print(json.dumps(everything(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tiny_bert_folder],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1]) == everything(tiny_bert_folder)


def _batch_of_two(examples):
    return {"labels": torch.tensor([e["labels"] for e in examples[:2]])}


def _batch_of_three(examples):
    return {"labels": torch.tensor([e["labels"] for e in examples[:3]])}


def test_collators():
    """A function by its source, what is known by what it holds; what else decides cannot be seen."""
    two, three = (collator_digest(f) for f in (_batch_of_two, _batch_of_three))
    assert two is not None and three is not None and two != three
    names = [RemoveColumnsCollator(_batch_of_two, columns) for columns in (["labels"], ["labels", "input_ids"])]
    assert len({two, *map(collator_digest, names)}) == 3
    most = 4
    assert collator_digest(lambda examples: _batch_of_two(examples[:most])) is None
    assert collator_digest(RemoveColumnsCollator(lambda e: e[:most], ["labels"])) is None
