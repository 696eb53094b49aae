"""A run with a target: how it is read, what is said of it, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from PIL import Image
from transformers import AutoModelForSequenceClassification, set_seed

from hf_transfer import UserError, fine_tune
from hf_transfer.errors import UserErrors
from hf_transfer.runs.prepare import make_trainer, prepare, prepare_splits
from hf_transfer.settings import Config

KEYS = dict(
    strategy="full",
    domain_adaptation="dann",
    num_train_epochs=1,
    report_to="none",
    preflight=False,
    label_issues=False,
    pooling="cls",
    calibrate=False,
    save_strategy="no",
    use_cpu=True,
)
WORDS = ("good fine great warm", "bad poor awful cold")


def write_texts(path, count, name="text", seed=0, **columns):
    rng = np.random.default_rng(seed)
    rows = [{name: " ".join(rng.permutation(WORDS[i % 2].split())) + f" {seed} {i}"} for i in range(count)]
    for i, row in enumerate(rows):
        row |= {column: value(i) for column, value in columns.items()}
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def label(i):
    return ("yes", "no")[i % 2]


def draw_images(folder, count, seed=0):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{seed}-{i}.png")


@pytest.fixture
def text_source(tmp_path):
    return write_texts(tmp_path / "source.jsonl", 20, label=label)


@pytest.fixture
def photos(tmp_path):
    """Two classes of one camera, and photos of another without classes."""
    for i, name in enumerate(("cat", "dog")):
        draw_images(tmp_path / "source" / name, 8, seed=i)
    draw_images(tmp_path / "target", 7, seed=5)
    return str(tmp_path / "source"), str(tmp_path / "target")


def prepared(model, source, target, tmp_path, **keys):
    given = {**KEYS, "model_name_or_path": model, "dataset_name": source, "target_dataset_name": target}
    return prepare(Config.from_sources({}, {**given, "output_dir": str(tmp_path / "out"), **keys}))


def test_a_run_with_texts_leaves_a_plain_model_and_says_what_it_did(text_source, tiny_bert_folder, tmp_path, capsys):
    target = write_texts(tmp_path / "target.jsonl", 9, seed=3, label=lambda i: "unknown")
    test = write_texts(tmp_path / "test.jsonl", 6, seed=4, label=label)
    result = fine_tune(
        tiny_bert_folder, text_source, target_dataset_name=target, test_file=test, output_dir=tmp_path / "out", **KEYS
    )
    said = capsys.readouterr()
    told = said.out + said.err
    assert "Target: 9 examples of" in told and "Target: 'label' ignored, because only its inputs are used" in told
    assert "Domain adaptation: dann on what the head reads, weight 1, growing from 0; one of 9 target examples" in told
    assert "callback" not in told
    assert "accuracy" in result.metrics and result.results["metrics_split"] == "test"
    values = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    assert (values["domain_adaptation"], values["target_dataset_name"]) == ("dann", target)
    total = sum(p.numel() for p in result.model.parameters())
    assert result.results["trainable_parameters"] == result.results["total_parameters"] == total
    card = (tmp_path / "out" / "README.md").read_text()
    assert "domain_adaptation" in card
    found = result.results["domain_adaptation"]
    logged = [log["penalty/dann"] for log in result.trainer.state.log_history if "penalty/dann" in log]
    assert found["target"] == {"name": target, "examples": 9, "labeled": 0} and found["layer"] == "head"
    assert found["penalty"] == sum(logged) / len(logged)  # one epoch
    ending = "Domain adaptation: dann on what the head reads, weight 1, grown from 0"
    assert ending in told and ending in card and target not in card
    assert "says nothing about the target" not in told  # the test file is of the target
    assert "Domain distance: not measured, because one of the domains has fewer than 10 examples." in told
    assert "domain_distance.png" not in told


@pytest.mark.parametrize("method", ["mmd", "dann", "pseudo-label"])
def test_a_preflight_passes_and_leaves_no_trace(method, text_source, tiny_bert_folder, tmp_path):
    """It tries a text alone, without the target example that training pairs it with."""
    target = write_texts(tmp_path / "target.jsonl", 12, seed=3)
    keys = {**KEYS, "domain_adaptation": method, "num_train_epochs": 2, "target_dataset_name": target}
    one, other = (
        fine_tune(tiny_bert_folder, text_source, output_dir=tmp_path / str(tried), **{**keys, "preflight": tried})
        for tried in (True, False)
    )
    assert any(check.startswith("a training step") for check in one.results["preflight"]["checks"])
    others = other.model.state_dict()
    assert all(torch.equal(value, others[name]) for name, value in one.model.state_dict().items())


@pytest.mark.parametrize("keys", [{}, {"augmentation": "basic", "mixup_alpha": 0.2}], ids=["plain", "mixed"])
def test_a_flat_folder_of_photos_is_a_target(photos, tiny_vit_folder, keys, tmp_path):
    ready = prepared(tiny_vit_folder, *photos, tmp_path, domain_adaptation="coral", **keys)
    splits = prepare_splits(ready)
    trainer = make_trainer(ready, splits["train"], splits["validation"])
    assert len(trainer.target_dataset) == 7
    batch = next(iter(trainer.get_train_dataloader()))
    rows = len(batch["labels"])
    assert batch["pixel_values"].shape[0] == 2 * rows and batch["domain"].tolist() == [0] * rows + [1] * rows
    assert batch["labels"].ndim == (2 if keys else 1)  # of the source alone, mixed among themselves
    trainer.train()


def test_mixup_leaves_the_target_alone(photos, tiny_vit_folder, tmp_path):
    ready = prepared(tiny_vit_folder, *photos, tmp_path, mixup_alpha=0.4)
    trainer = make_trainer(ready, *(prepare_splits(ready)[name] for name in ("train", "validation")))
    batch = next(iter(trainer.get_train_dataloader()))
    given = [trainer.target_dataset[i]["pixel_values"] for i in range(7)]
    for row in batch["pixel_values"][len(batch["labels"]) :]:
        assert any(row.equal(one) for one in given)


def test_photos_are_labeled_as_they_are_and_trained_on_augmented(photos, tiny_vit_folder, tmp_path):
    result = fine_tune(
        tiny_vit_folder,
        photos[0],
        target_dataset_name=photos[1],
        output_dir=tmp_path / "out",
        **{**KEYS, "domain_adaptation": "pseudo-label", "num_train_epochs": 2},
        augmentation="basic",
        mixup_alpha=0.2,
    )
    trainer = result.trainer
    plain = trainer.self_training.plain
    assert len(plain) == 7 and torch.equal(plain[0]["pixel_values"], plain[0]["pixel_values"])
    assert not torch.equal(trainer.target_dataset[0]["pixel_values"], plain[0]["pixel_values"])
    found = result.results["domain_adaptation"]
    (done,) = found["rounds"]
    assert set(done["labeled"]) == {"cat", "dog"} and sum(done["answered"].values()) == 7
    assert found["threshold"] == "per-class" and "weight" not in found
    scores = found["validators"]
    assert 0 <= scores["information"] <= np.log(2) and 0 <= scores["source_accuracy"] <= 1
    assert scores["deep_embedded"] is not None and scores["neighborhood_density"] > 0


def test_class_folders_of_a_target_are_ignored_with_a_notice(photos, tiny_vit_folder, tmp_path):
    for name in ("cat", "fish"):
        draw_images(tmp_path / "sorted" / name, 3, seed=len(name))
    ready = prepared(tiny_vit_folder, photos[0], str(tmp_path / "sorted"), tmp_path)
    assert len(ready.target.examples) == 6
    assert any("2 folders are ignored" in note for note in ready.notes)


def test_an_input_of_another_name_is_read_with_a_note(text_source, tiny_bert_folder, tmp_path):
    target = write_texts(tmp_path / "target.jsonl", 9, name="review", seed=3, stars=lambda i: i)
    ready = prepared(tiny_bert_folder, text_source, target, tmp_path)
    assert "Target: its column 'review' is read as 'text' of the source." in ready.notes


def test_python_objects_are_targets_too(text_source, tiny_bert_folder, tmp_path):
    rows = {"text": [f"{WORDS[i % 2]} {i}" for i in range(5)]}
    result = fine_tune(tiny_bert_folder, text_source, target_dataset=rows, output_dir=tmp_path / "out", **KEYS)
    assert len(result.trainer.target_dataset) == 5
    with pytest.raises(UserError, match="contradict each other"):
        fine_tune(tiny_bert_folder, text_source, target_dataset=rows, target_dataset_name="x.csv", **KEYS)


def test_the_distance_of_the_domains_is_measured_before_and_after(text_source, tiny_bert_folder, tmp_path, capsys):
    """Of the aligned layer, by the model as it is then."""
    target = {"text": [f"slow play of {i} acts" for i in range(12)]}
    keys = {**KEYS, "domain_adaptation": "coral", "domain_adaptation_layer": "layer.0", "output_dir": tmp_path / "out"}
    result = fine_tune(tiny_bert_folder, text_source, target_dataset=target, **keys)
    found = result.results["domain_adaptation"]["distance"]
    assert (found["layer"], found["examples"], found["aligned"]) == ("the mean output of layer.0", 12, False)
    assert found["before"]["proxy_a_distance"] == 2.0 and found["after"]["mmd"] != found["before"]["mmd"]
    said = capsys.readouterr().out
    assert "proxy A-distance 2.00 of 2" in said and "proxy A-distance 2.00 before, " in said
    assert (tmp_path / "out" / "domain_distance.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", ["none", "pseudo-label"])
def test_it_is_measured_where_no_layer_is_aligned(method, text_source, tiny_bert_folder, tmp_path):
    """A head that pools reads no single vector; the distance is then that of the layer below it."""
    target = {"text": [f"slow play of {i} acts" for i in range(12)]}
    keys = {**KEYS, "domain_adaptation": method, "pooling": "mean", "num_train_epochs": 2}
    if method == "none":
        keys |= {"target_label_column_name": "label"}
        target["label"] = ["yes", "no", *[""] * 10]
    result = fine_tune(tiny_bert_folder, text_source, target_dataset=target, output_dir=tmp_path / "out", **keys)
    found = result.results["domain_adaptation"]["distance"]
    assert found["layer"] == "the mean output of layer.1" and found["before"]["proxy_a_distance"] == 2.0
    assert (tmp_path / "out" / "domain_distance.png").exists()


def test_frozen_features_are_aligned_and_plain_transformers_reads_the_head(
    text_source, tiny_bert_folder, tmp_path, capsys
):
    target, out = {"text": [f"slow play of {i} acts" for i in range(12)]}, tmp_path / "out"
    keys = {
        **KEYS,
        "domain_adaptation": "coral",
        "strategy": "linear-probe",
        "probe_solver": "lbfgs",
        "output_dir": out,
    }
    keys |= {"calibrate": "auto", "train_val_split": 0.5}
    result = fine_tune(
        tiny_bert_folder,
        {"text": [f"good {i}" for i in range(25)] + [f"bad {i}" for i in range(25)], "label": [0] * 25 + [1] * 25},
        target_dataset=target,
        **keys,
    )
    found, said = result.results["domain_adaptation"]["distance"], capsys.readouterr().out
    assert found["aligned"] and found["after"]["mmd"] < found["before"]["mmd"]
    assert "calibrate: off: its head is for the features of the target" in said
    plain = AutoModelForSequenceClassification.from_pretrained(out).state_dict()
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert_folder).state_dict()
    assert {n for n in plain if not plain[n].equal(base[n])} == {"classifier.weight", "classifier.bias"}
    assert all(plain[n].equal(tensor) for n, tensor in result.model.state_dict().items())


def test_a_few_labels_of_the_target_are_trained_on(text_source, tiny_bert_folder, tmp_path, capsys):
    """Blank ones are not; each class is repeated to an equal part of a fifth of the training examples."""
    given = {0: "yes", 3: "yes", 4: "no"}
    target = write_texts(tmp_path / "target.jsonl", 9, seed=3, opinion=lambda i: given.get(i, ""))
    ready = prepared(tiny_bert_folder, text_source, target, tmp_path, target_label_column_name="opinion")
    assert any("Target: 3 labeled examples are trained on, 1 to 2 of each of 2 classes." in n for n in ready.notes)
    splits, count = prepare_splits(ready), len(ready.data.train)
    assert count == 16 and len(splits["train"]) == 20 and len(ready.target.examples) == 9
    joined = ready.target.joined(ready.data.train, ready.loaded.labels)
    names = [ready.loaded.labels.names[i] for i in joined["labels"][count:]]
    assert sorted(names) == ["no", "no", "yes", "yes"] and len(set(joined["__row__"][:])) == 20
    assert {joined["text"][i] for i in range(count, 20)} == {ready.target.examples[i]["text"] for i in given}
    trainer = make_trainer(ready, splits["train"], splits["validation"])
    assert trainer.labeled_targets == 4 and len(trainer.target_dataset) == 9
    trainer.train()


def test_without_a_method_the_labels_alone_are_trained_on(text_source, tiny_bert_folder, tmp_path, capsys):
    """Next to the source's, in an ordinary training set: the model's own loss of it, to the bit."""
    given = {0: "yes", 3: "yes", 4: "no"}
    target = write_texts(tmp_path / "target.jsonl", 12, seed=3, opinion=lambda i: given.get(i, ""))
    keys = {**KEYS, "target_dataset_name": target, "target_label_column_name": "opinion", "logging_steps": 1}
    del keys["domain_adaptation"]
    result = fine_tune(tiny_bert_folder, text_source, output_dir=tmp_path / "out", **keys)
    trainer, found = result.trainer, result.results["domain_adaptation"]
    assert trainer.targets is None and trainer.target_dataset is None and len(trainer.train_dataset) == 20
    assert (found["method"], found["target"]["labeled"], found["distance"]["examples"]) == ("none", 3, 12)
    told = capsys.readouterr().out
    assert "3 labeled examples are trained on" in told and "its other examples are not trained on" in told
    assert "none, trained on the source and labels of the target; 12 target examples, 3 of them labeled" in told
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["target_dataset_name"] == target
    ready = prepared(tiny_bert_folder, text_source, target, tmp_path / "as", **keys | {"domain_adaptation": "none"})
    rows = ready.target.joined(ready.data.train, ready.loaded.labels)
    names = [ready.loaded.labels.names[i] for i in rows["labels"]]
    plain = {k: v for k, v in keys.items() if not k.startswith("target_")}
    source = DatasetDict(
        train=Dataset.from_dict({"text": rows["text"][:], "label": names}),
        validation=ready.data.validation.select_columns(["text"]).add_column("label", ["yes"] * 4),
    )
    oracle = fine_tune(tiny_bert_folder, source, output_dir=tmp_path / "plain", **plain)
    losses = [[log["loss"] for log in one.trainer.state.log_history if "loss" in log] for one in (result, oracle)]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_what_is_asked_of_a_target_are_examples_whose_labels_were_not_trained_on(
    text_source, tiny_bert_folder, tmp_path
):
    target = write_texts(tmp_path / "target.jsonl", 9, seed=3, opinion=lambda i: label(i) if i in (2, 5) else "")
    found = prepared(tiny_bert_folder, text_source, target, tmp_path, target_label_column_name="opinion").target
    assert found.count == 2 and found.unseen().examples["__row__"][:] == [0, 1, 3, 4, 6, 7, 8]
    every = replace(found, labeled=found.examples)
    assert every.unseen() is every, "rather those than none"


def test_views_of_labeled_examples_are_replayed(photos, tiny_vit_folder, tmp_path):
    """Each repetition has views of its own."""
    draw_images(tmp_path / "target" / "dog", 2, seed=8)
    keys = {"target_label_column_name": "label", "domain_adaptation": "none", "strategy": "linear-probe"}
    keys |= {"augmentation": "basic", "augmented_views": 2, "logging_steps": 1, "num_train_epochs": 2}
    losses = []
    for cache in ("off", "memory"):
        set_seed(0)
        ready = prepared(tiny_vit_folder, *photos, tmp_path, boundary_cache=cache, **keys)
        splits = prepare_splits(ready)
        trainer = make_trainer(ready, splits["train"], splits["validation"])
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert trainer.boundary.entries[0].kept == "memory" and losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_class_folders_of_a_target_are_labels_where_they_are_asked_for(photos, tiny_vit_folder, tmp_path):
    """Images outside of them, and of folders of other names, are unlabeled."""
    draw_images(tmp_path / "target" / "dog", 2, seed=8)
    draw_images(tmp_path / "target" / "later", 3, seed=9)
    keys = {"target_label_column_name": "label", "augmentation": "basic", "mixup_alpha": 0.2}
    ready = prepared(tiny_vit_folder, *photos, tmp_path, **keys)
    assert len(ready.target.examples) == 12 and len(ready.target.labeled) == 2
    assert any("none of the classes are read as unlabeled: later" in note for note in ready.notes)
    assert any(
        "2 labeled examples are trained on, 2 of each of 1 classes; 1 of the classes have none" in n
        for n in ready.notes
    )
    splits = prepare_splits(ready)
    make_trainer(ready, splits["train"], splits["validation"]).train()


@pytest.mark.parametrize(
    ("keys", "column", "said"),
    [
        ({}, lambda i: "maybe", "target_label_column_name: The target split has 9 examples with unknown label 'maybe'"),
        ({}, lambda i: "", "no example of the target has a label in 'opinion'"),
        ({"target_label_column_name": "opinoin"}, label, "the target has no column 'opinoin'.*opinion"),
    ],
    ids=["other labels", "none", "no column"],
)
def test_labels_of_a_target_that_cannot_be_trained_on(keys, column, said, text_source, tiny_bert_folder, tmp_path):
    target = write_texts(tmp_path / "target.jsonl", 9, seed=3, opinion=column)
    with pytest.raises(UserError, match=said):
        prepared(tiny_bert_folder, text_source, target, tmp_path, **{"target_label_column_name": "opinion", **keys})


def test_strategy_auto_trains_an_adapter_from_the_first_epoch(text_source, tiny_bert_folder, tmp_path):
    """Without an epoch of the head alone, which would be all of this run."""
    target = write_texts(tmp_path / "target.jsonl", 9, seed=3)
    keys = {**KEYS, "strategy": "auto", "adapter": "lora"}
    result = fine_tune(tiny_bert_folder, text_source, target_dataset_name=target, output_dir=tmp_path / "out", **keys)
    assert result.results["strategy"] == "full" and result.results["domain_adaptation"]["penalty"] > 0


def test_strategy_auto_trains_more_than_the_head(text_source, tiny_bert_folder, tmp_path):
    """On 16 examples it would train the head alone, whose features no penalty can change."""
    target = write_texts(tmp_path / "target.jsonl", 9, seed=3)
    result = fine_tune(
        tiny_bert_folder,
        text_source,
        target_dataset_name=target,
        output_dir=tmp_path / "out",
        **{**KEYS, "strategy": "auto", "pooling": "mean"},
    )
    assert result.results["strategy"] == "two-phase"
    groups = [group.name for group in result.trainer.layer_groups]
    assert result.trainer.aligned_layer == groups[-2], "the head pools by itself: what it reads are all positions"


# ---- refused -------------------------------------------------------------------------------------------------------


def copied(tmp_path):
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "source.jsonl").read_bytes())
    return str(tmp_path / "copy.jsonl")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (copied, "same examples as the source, so there is nothing to adapt to"),
        (lambda folder: str(folder / "no.jsonl"), "target_dataset_name: the target: .*no.jsonl"),
        (lambda folder: write_texts(folder / "e.jsonl", 0), "target_dataset_name"),
        (lambda folder: write_texts(folder / "n.jsonl", 9, name="n"), "is read as"),
        (lambda folder: [draw_images(folder / "t", 4), str(folder / "t")][1], "the target: .*no column 'text'"),
        (
            lambda folder: write_texts(folder / "two.jsonl", 9, name="a", b=lambda i: f"{WORDS[0]} {i}"),
            "target_dataset_name: the target",
        ),
    ],
    ids=["a copy", "missing", "empty", "other name", "images", "two texts"],
)
def test_a_target_that_does_not_fit(target, said, text_source, tiny_bert_folder, tmp_path):
    if said == "is read as":
        assert any(said in note for note in prepared(tiny_bert_folder, text_source, target(tmp_path), tmp_path).notes)
        return
    with pytest.raises(UserError, match=said):
        prepared(tiny_bert_folder, text_source, target(tmp_path), tmp_path)


def test_bad_examples_of_a_target(photos, tiny_vit_folder, tmp_path):
    (tmp_path / "target" / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="target_dataset_name: the target: 1 of 8 examples are unusable"):
        prepared(tiny_vit_folder, *photos, tmp_path)
    ready = prepared(tiny_vit_folder, *photos, tmp_path, on_bad_example="skip", max_bad_fraction=0.2)
    assert len(ready.target.examples) == 7 and any("1 unusable ones left out" in note for note in ready.notes)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"domain_adaptation": "dann"}, "dann needs target_dataset_name"),
        ({"target_dataset_name": "t.csv"}, "has no effect without domain_adaptation.*or target_label_column_name"),
        ({"target_dataset_name": "d.csv", "target_label_column_name": "y"}, "is the source itself"),
        (
            {"target_dataset_name": "t.csv", "target_label_column_name": "y", "streaming": True, "max_steps": 5},
            "adds examples to a training set, which streaming does not hold",
        ),
        ({"target_label_column_name": "y"}, "target_label_column_name: 'y' has no effect without target_dataset_name"),
        ({"domain_adaptation": "dann", "target_dataset_name": "d.csv"}, "is the source itself"),
        (
            {"domain_adaptation": "mmd", "target_dataset_name": "t.csv", "streaming": True, "max_steps": 5},
            "a stream does not have",
        ),
        ({"domain_adaptation": "mmd", "target_dataset_name": "t.csv", "learning_rate": "auto"}, "learning_rate: auto"),
        ({"domain_adaptation": "mmd", "target_dataset_name": "t.csv", "effort": "quick"}, "effort: quick freezes them"),
        ({"domain_adaptation": "coral", "target_dataset_name": "t.csv", "strategy": "linear-probe"}, "linear-probe"),
    ],
)
def test_keys_that_contradict_each_other(keys, said, tmp_path):
    given = {"model_name_or_path": "m", "dataset_name": "d.csv", "output_dir": str(tmp_path), **keys}
    with pytest.raises(UserErrors, match=said):
        Config.from_sources({}, given)
