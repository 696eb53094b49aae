"""Augmentation: the same for the same seed, epoch and example, whatever loads it; normalised for the checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pixels
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoTokenizer, TrainerState

from hf_transfer import UserError, fine_tune
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.augment import EXAMPLE, Augmentation, Chance, Epochs, Mixed, mask_tokens
from hf_transfer.data.labels import Labels
from hf_transfer.runs.prepare import prepare
from hf_transfer.settings import Config
from hf_transfer.tasks import TASKS

IMAGES = TASKS["image-classification"]
KINDS = ("basic", "strong", "randaugment", "trivialaugment")


@pytest.fixture
def processor(tiny_vit_folder):
    return AutoImageProcessor.from_pretrained(tiny_vit_folder)


def split(size=12, side=40):
    rng = np.random.default_rng(0)
    rows = {
        "image": [Pixels.fromarray(rng.integers(0, 255, (side, side + 8, 3), dtype=np.uint8)) for _ in range(size)],
        "labels": [i % 2 for i in range(size)],
        EXAMPLE: list(range(size)),
    }
    return Dataset.from_dict(rows, Features({"image": Image(), "labels": Value("int64"), EXAMPLE: Value("int64")}))


def pixels(data, rows=None):
    return {e[EXAMPLE]: e["pixel_values"] for e in (data[i] for i in rows or range(len(data)))}


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_depends_on_seed_epoch_and_example_alone(kind, processor):
    args, chance = DataArguments(augmentation=kind, random_erasing=0.5), Chance(7)
    data = IMAGES.prepare_training(split(), ("image",), processor, args, chance)
    first = pixels(data)
    assert all(v.shape == (3, 32, 32) and v.dtype == torch.float32 for v in first.values())
    torch.manual_seed(99)  # and nothing that was drawn before matters, nor the order, nor a batch
    before = torch.random.get_rng_state()
    backwards = pixels(data, list(reversed(range(12))))
    assert torch.equal(before, torch.random.get_rng_state()), "dropout would see augmentation's draws"
    assert all(torch.equal(first[i], backwards[i]) for i in first)
    batch = data[[3, 11, 5]]
    assert all(torch.equal(first[i], v) for i, v in zip((3, 11, 5), batch["pixel_values"], strict=True))
    chance.epoch = 1
    assert sum(torch.equal(first[i], v) for i, v in pixels(data).items()) < 6
    other = IMAGES.prepare_training(split(), ("image",), processor, args, Chance(8))
    assert sum(torch.equal(first[i], v) for i, v in pixels(other).items()) < 6


def test_workers_that_live_on_see_the_epoch_change(processor):
    """Two workers that persist, against none: the same pictures in both epochs, and others in the second."""
    args = DataArguments(augmentation="strong", mixup_alpha=0.4)
    labels = Labels("single_label_classification", ("a", "b"))

    def epochs(workers):
        chance = Chance(7)
        data = IMAGES.prepare_training(split(), ("image",), processor, args, chance)
        collate = Mixed(IMAGES.collator(processor), args, labels, chance)
        loader = DataLoader(data, 4, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0)
        found = []
        for epoch in (0, 1):
            chance.epoch = epoch
            found.append([(b["pixel_values"], b["labels"]) for b in loader])
        return found

    alone, together = epochs(0), epochs(2)
    for one, other in zip(alone, together, strict=True):
        for (x, y), (u, v) in zip(one, other, strict=True):
            assert torch.equal(x, u) and torch.equal(y, v)
    assert not torch.equal(alone[0][0][0], alone[1][0][0])


def test_what_workers_need_can_be_sent_to_them(processor, tiny_bert_folder):
    """Where workers are started anew (macOS, Windows) and not forked, they get data and collator as a pickle."""
    from multiprocessing.reduction import ForkingPickler

    args, chance = DataArguments(augmentation="strong", mixup_alpha=0.2), Chance(1)
    data = IMAGES.prepare_training(split(), ("image",), processor, args, chance)
    mixed = Mixed(IMAGES.collator(processor), args, Labels("single_label_classification", ("a", "b")), chance)
    again, collate = ForkingPickler.loads(ForkingPickler.dumps((data, mixed)))
    assert all(torch.equal(v, pixels(again)[i]) for i, v in pixels(data).items())
    assert torch.equal(collate([again[i] for i in range(4)])["labels"], mixed([data[i] for i in range(4)])["labels"])
    before, chance.epoch = again[0]["pixel_values"], 1
    assert not torch.equal(again[0]["pixel_values"], before), "the epoch is one for all processes"
    chance.epoch = 0
    plain = IMAGES.prepare(split(), ("image",), processor, args)
    assert torch.equal(ForkingPickler.loads(ForkingPickler.dumps(plain))[3]["pixel_values"], plain[3]["pixel_values"])
    tokenizer, texts = AutoTokenizer.from_pretrained(tiny_bert_folder), TASKS["text-classification"]
    change = texts.change(("text",), tokenizer, DataArguments(token_masking=0.5), chance)
    batch = {"text": ["a good film"] * 4, "labels": [0] * 4, EXAMPLE: [1, 2, 3, 4]}
    assert ForkingPickler.loads(ForkingPickler.dumps(change))(batch) == change(batch)


@pytest.mark.parametrize("name", ["vit", "timm"])
def test_pictures_are_normalised_as_the_checkpoint_wants(name, processor):
    """A change that changes nothing gives what the checkpoint's own processor gives, bit for bit."""
    if name == "timm":
        from transformers import TimmWrapperImageProcessor

        known = {"input_size": [3, 32, 32], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
        processor = TimmWrapperImageProcessor({**known, "crop_pct": 0.5}, architecture="resnet10t")
    image = split(1, side=32)[0]["image"].crop((0, 0, 32, 32))
    augment = Augmentation(DataArguments(augmentation="basic"), processor, Chance(0))
    augment.change = lambda same: same
    found = augment([image], [0], lambda _: None)[0]
    mean, std = (
        torch.tensor(v).view(3, 1, 1)
        for v in (([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]) if name == "timm" else ([0.5] * 3, [0.5] * 3))
    )
    plain = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    assert torch.allclose(found, (plain - mean) / std, atol=1e-6)


def test_no_augmentation_is_the_plain_preparation(processor):
    for args in (DataArguments(), DataArguments(mixup_alpha=0.2)):
        plain = IMAGES.prepare(split(), ("image",), processor, args)
        data = IMAGES.prepare_training(split(), ("image",), processor, args, Chance(0))
        assert all(torch.equal(plain[i]["pixel_values"], data[i]["pixel_values"]) for i in range(12))


def test_erasing_blanks_to_the_mean(processor):
    data = IMAGES.prepare_training(split(), ("image",), processor, DataArguments(random_erasing=1.0), Chance(0))
    plain = IMAGES.prepare(split(), ("image",), processor, DataArguments())
    for i in range(12):
        a, b = data[i]["pixel_values"], plain[i]["pixel_values"]
        assert (a[a != b] == 0).all() and 0.01 < (a != b).float().mean() < 0.4


# ---- views ---------------------------------------------------------------------------------------------------------


def test_views_come_again_and_each_is_used_as_often(processor):
    """Pixels of epoch e are those of e + 3 and of no epoch between; view v is what epoch v draws without views."""
    args = DataArguments(augmentation="strong", random_erasing=1.0)
    chance, live = Chance(7, views=3), Chance(7)
    data, drawn = (IMAGES.prepare_training(split(), ("image",), processor, args, c) for c in (chance, live))
    seen, turns, by_view = [], [], []
    for epoch in range(7):
        chance.epoch = live.epoch = epoch
        seen.append(pixels(data))
        turns.append([chance.view(i) for i in range(12)])
        if epoch < 3:
            by_view.append(pixels(drawn))
    for epoch in range(4):
        assert all(torch.equal(seen[epoch][i], seen[epoch + 3][i]) for i in range(12))
        assert all({turns[epoch + n][i] for n in range(3)} == {0, 1, 2} for i in range(12))
    for epoch in range(2):
        assert not any(torch.equal(seen[epoch][i], seen[n][i]) for i in range(12) for n in range(epoch + 1, 3))
        assert all(torch.equal(seen[epoch][i], by_view[turns[epoch][i]][i]) for i in range(12))
    assert set(turns[0]) == {0, 1, 2}, "examples begin with different views"
    assert turns[0] != [Chance(8, views=3).view(i) for i in range(12)], "which the seed decides"
    first = [Chance(7, views=4).view(i) for i in range(4000)]
    assert all(900 < first.count(v) < 1100 for v in range(4))
    assert Chance(7).view(3) == 0 and {Chance(7, views=1).view(i) for i in range(9)} == {0}


def test_a_view_can_be_asked_for_also_of_workers(processor):
    """Each view of all examples, from a worker that lives on, as a pass that records them reads; and then none."""
    args, chance = DataArguments(augmentation="basic"), Chance(7, views=2)
    data = IMAGES.prepare_training(split(), ("image",), processor, args, chance)
    loader = DataLoader(data, 4, collate_fn=lambda rows: rows, num_workers=1, persistent_workers=True)
    passes = []
    for view in (0, 1, None):
        chance.fixed = view
        assert chance.fixed == view and (view is None or {chance.view(i) for i in range(12)} == {view})
        passes.append({row[EXAMPLE]: row["pixel_values"] for batch in loader for row in batch})
    for epoch in range(2):
        chance.epoch = epoch
        own = pixels(data)
        assert all(torch.equal(own[i], passes[chance.view(i)][i]) for i in range(12))
        if not epoch:
            assert all(torch.equal(own[i], passes[2][i]) for i in range(12))
    for wrong in (2, -1):
        with pytest.raises(ValueError, match=f"View {wrong} does not exist"):
            chance.fixed = wrong
    with pytest.raises(ValueError, match="View 0 does not exist"):
        Chance(7).fixed = 0


def test_mixing_is_drawn_anew_where_views_come_again():
    labels = Labels("single_label_classification", ("a", "b", "c"))
    mixed, plain = (
        Mixed(IMAGES.collator(None), DataArguments(mixup_alpha=1.0), labels, c) for c in (Chance(2, views=1), Chance(2))
    )
    found = []
    for epoch in (0, 1):
        mixed.chance.epoch = plain.chance.epoch = epoch
        found.append(mixed(batch_of())["labels"])
        assert torch.equal(found[-1], plain(batch_of())["labels"])
    assert not torch.equal(*found)


def test_views_reach_a_run_and_what_they_cannot_do_is_said(tiny_vit_folder):
    values = {"model_name_or_path": tiny_vit_folder, "dataset_name": "bundled:digits", "output_dir": "o"}
    keys = {**values, "max_train_samples": 48, "augmentation": "basic", "data_facts": False, "augmented_views": 4}
    assert prepare(Config.from_sources({}, keys)).chance.views == 4
    Config.from_sources({}, {**keys, "augmentation": "none", "random_erasing": 0.5})
    stream = {"streaming": True, "max_steps": 3, "max_eval_samples": 3, "max_train_samples": None}
    for wrong, said in (
        ({"augmented_views": 0}, "augmented_views: expected a positive number, got 0"),
        ({"augmentation": "none"}, "augmented_views: 4 has no effect with augmentation: none"),
        ({"augmentation": "none", "mixup_alpha": 0.2}, "augmented_views: 4 has no effect"),
        (stream, "streaming: augmented_views are reused"),
    ):
        with pytest.raises(UserError, match=said):
            Config.from_sources({}, {**keys, **wrong})


# ---- mixing --------------------------------------------------------------------------------------------------------


def batch_of(size=6, several=False):
    g = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.randn(3, 8, 8, generator=g),
            "labels": [float(i % 2), 1.0, 0.0] if several else i % 3,
            EXAMPLE: i,
        }
        for i in range(size)
    ]


@pytest.mark.parametrize("several", [False, True])
def test_mixup_mixes_labels_as_it_mixes_pictures(several):
    kind = "multi_label_classification" if several else "single_label_classification"
    mixed = Mixed(IMAGES.collator(None), DataArguments(mixup_alpha=1.0), Labels(kind, ("a", "b", "c")), Chance(1))
    examples = batch_of(several=several)
    found, again = mixed(examples), mixed(examples)
    assert torch.equal(found["pixel_values"], again["pixel_values"]) and set(found) == {"pixel_values", "labels"}
    x = torch.stack([e["pixel_values"] for e in examples])
    y = torch.tensor([e["labels"] for e in examples])
    y = y if several else torch.nn.functional.one_hot(y, 3).float()
    share = ((found["pixel_values"] - x.roll(1, 0)) / (x - x.roll(1, 0))).median()
    assert torch.allclose(found["labels"], share * y + (1 - share) * y.roll(1, 0), atol=1e-5)
    mixed.chance.epoch = 1
    assert not torch.equal(mixed(examples)["labels"], found["labels"])


def test_cutmix_mixes_labels_by_area():
    labels = Labels("single_label_classification", ("a", "b", "c"))
    mixed = Mixed(IMAGES.collator(None), DataArguments(cutmix_alpha=1.0), labels, Chance(2))
    examples = batch_of()
    found = mixed(examples)
    x = torch.stack([e["pixel_values"] for e in examples])
    kept = (found["pixel_values"] == x).all(1).float().mean((1, 2))
    own = torch.tensor([e["labels"] for e in examples])
    assert torch.allclose(found["labels"][range(6), own], kept, atol=1e-6)


def test_what_is_evaluated_is_not_mixed():
    labels = Labels("single_label_classification", ("a", "b", "c"))
    mixed = Mixed(IMAGES.collator(None), DataArguments(mixup_alpha=1.0), labels, Chance(2))
    plain = [{k: v for k, v in e.items() if k != EXAMPLE} for e in batch_of()]
    assert mixed(plain)["labels"].tolist() == [0, 1, 2, 0, 1, 2]
    assert mixed(batch_of()[2:3])["labels"].tolist() == [[0, 0, 1]], "a batch of one is not mixed, but told alike"


# ---- texts ---------------------------------------------------------------------------------------------------------


def test_tokens_are_masked_but_for_special_ones(tiny_bert_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert_folder)
    data = Dataset.from_dict({"text": ["the quick brown fox jumps over the lazy dog"] * 50, "labels": [0, 1] * 25})
    data = data.add_column(EXAMPLE, list(range(50)))
    args, chance = DataArguments(token_masking=0.3), Chance(0)
    task = TASKS["text-classification"]
    masked = task.prepare_training(data, ("text",), tokenizer, args, chance)
    plain = task.prepare(data, ("text",), tokenizer, args)
    rows, before = masked[:]["input_ids"], plain[:]["input_ids"]
    assert set(masked[0]) == set(plain[0]) and masked[7]["input_ids"] == rows[7]
    assert all(r[0] == b[0] and r[-1] == b[-1] for r, b in zip(rows, before, strict=True))
    share = sum(i == tokenizer.mask_token_id for r in rows for i in r) / (50 * 9)
    assert 0.22 < share < 0.38 and all(
        i in (b, tokenizer.mask_token_id) for r, q in zip(rows, before, strict=True) for i, b in zip(r, q, strict=True)
    )
    chance.epoch = 1
    assert masked[:]["input_ids"] != rows
    assert mask_tokens([1, 2, 3], 0.0, 9, frozenset()) == [1, 2, 3]
    assert mask_tokens([1, 2, 3], 1.0, 9, frozenset((2,))) == [9, 2, 9]


@pytest.mark.parametrize("key", [{"augmentation": "strong"}, {"mixup_alpha": 0.2}, {"random_erasing": 0.1}])
def test_texts_are_not_changed_as_images_are(key, tiny_bert_folder, tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "\n".join(f"words {i},{'xy'[i % 2]}" for i in range(20)))
    keys = {"train_file": f"{tmp_path}/a.csv", "output_dir": f"{tmp_path}/o", "log_level": "error", **key}
    with pytest.raises(UserError, match=f"{next(iter(key))}: it applies to images only"):
        fine_tune(tiny_bert_folder, **keys)


def test_the_epoch_of_a_resumed_run():
    chance = Chance(0)
    for reached, epoch in ((None, 0), (1.0, 1), (1.5, 1), (2.0, 2)):
        state = TrainerState()
        state.epoch = reached
        Epochs(chance).on_epoch_begin(None, state, None)
        assert chance.epoch == epoch


def test_a_run_with_everything_is_the_same_with_workers(tiny_vit_folder, tmp_path):
    """Bit for bit, over two epochs, with workers that live through both."""
    keys = dict(
        model_name_or_path=tiny_vit_folder,
        dataset_name="bundled:digits",
        max_train_samples=48,
        max_eval_samples=10,
        max_predict_samples=10,
        num_train_epochs=2,
        strategy="full",
        augmentation="strong",
        mixup_alpha=0.2,
        cutmix_alpha=0.5,
        class_weights="auto",
        label_smoothing_factor=0.1,
        log_level="error",
        save_strategy="no",
    )
    whole = fine_tune(**keys, output_dir=str(tmp_path / "a"))
    fine_tune(**keys, output_dir=str(tmp_path / "b"), dataloader_num_workers=2, dataloader_persistent_workers=True)
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in "ab")
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert {"accuracy", "loss"} <= set(whole.metrics)


def test_the_end_of_a_long_text_is_kept_where_asked(tiny_bert_folder, tmp_path):
    """In training, in what is saved, and also where only the last of 10 MB are looked at."""
    from hf_transfer.config.arguments.model import ModelArguments

    task = TASKS["text-classification"]
    args = DataArguments(truncation_side="left")
    _, tokenizer = task.load(ModelArguments(tiny_bert_folder), args, Labels("single_label_classification", ("a", "b")))
    for text in (f"{'start ' * 30}end", f"{'start ' * 1_700_000}end"):
        ids = task.encode([[text]], tokenizer)["input_ids"][0]
        assert len(ids) == 16 and tokenizer.decode(ids[-2:-1]) == "end" and tokenizer.decode(ids[1:2]) == "start"
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).truncation_side == "left"
