"""An adapter on its backbone: which one it is, that all of its tensors arrive, and that a folder holds one model."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

from hf_transfer import HeadBank, Predictor, UserError, fine_tune, merge
from hf_transfer.adapters import backbone
from hf_transfer.layers.identity import differences, identity_of
from hf_transfer.run_folder import BACKBONE
from tests.helpers import TOKENS, small_tokenizer

TEXTS = ["word1 of yes", "word2 of no and more"]
QUICK = dict(num_train_epochs=1, save_strategy="no", learning_rate=0.02, train_val_split=0.25, log_level="error")
QUICK |= dict(preflight=False, expected_accuracy=False, label_issues=False, strategy="full")


def write_base(folder: Path, seed: int = 0, **sizes) -> Path:
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=2) | sizes
    BertModel(BertConfig(**sizes, vocab_size=TOKENS, max_position_embeddings=64)).save_pretrained(folder)
    small_tokenizer(64).save_pretrained(folder)
    return folder


def table(path: Path, labels, rows: int = 24) -> str:
    lines = [f"word{i} of {labels[i % len(labels)]},{labels[i % len(labels)]}" for i in range(rows)]
    path.write_text("text,label\n" + "\n".join(lines) + "\n")
    return str(path)


def answers(run) -> list[dict]:
    return Predictor.load(run).predict(TEXTS)


def changed(folder: Path, change) -> None:
    """Rewrite an adapter's tensors by a function from name and tensor to (name, tensor) or None."""
    path = folder / "adapter_model.safetensors"
    pairs = [change(name, tensor) for name, tensor in load_file(path).items()]
    save_file(dict(pair for pair in pairs if pair), path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return fine_tune(
        str(base), table(folder / "a.csv", ("no", "yes")), output_dir=str(folder / "out"), adapter="lora", **QUICK
    )


@pytest.fixture
def copied(run, base, tmp_path):
    """(an adapter, its backbone), both copies: the adapter names its backbone by a path relative to its own folder."""
    out, own = tmp_path / "out", tmp_path / "base"
    shutil.copytree(run.output_dir, out)
    shutil.copytree(base, own)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "../base"}))
    return out, own


# ---- identity ----


def test_the_identity_is_that_of_the_plain_backbone(run, base):
    fresh = ["classifier.weight", "classifier.bias"]
    plain = identity_of(AutoModelForSequenceClassification.from_pretrained(base), fresh)
    for model in (run.trainer.model, Predictor.load(run.output_dir).model):
        own = identity_of(model)
        assert own["tensors"] == plain["tensors"] and own["configuration"] == plain["configuration"]
    recorded = json.loads((run.output_dir / BACKBONE).read_text())
    assert recorded["weights"] == plain["weights"] == run.results["backbone"]["weights"]
    assert str(base) not in (run.output_dir / BACKBONE).read_text()


def test_what_an_adapter_saves_does_not_count(base):
    from hf_transfer.adapters.attach import attach
    from hf_transfer.training.arguments import TransferArguments

    model = AutoModelForSequenceClassification.from_pretrained(base)
    before = identity_of(model, ["classifier.weight", "classifier.bias"])
    wanted = {"peft_type": "LORA", "bias": "all", "modules_to_save": ["word_embeddings"]}
    adapted = attach(model, TransferArguments(output_dir="x", adapter=wanted))
    after = identity_of(adapted)
    left = set(before["tensors"]) - set(after["tensors"])
    assert left == {n for n in before["tensors"] if n.endswith(".bias") or "word_embeddings" in n}
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.add_(1)
            elif "position_embeddings" in name:
                parameter[0, 0] += 1e-3
    assert differences(after, identity_of(adapted)) == ["bert.embeddings.position_embeddings.weight"]


@pytest.mark.parametrize(
    ("seed", "sizes", "what"),
    [
        (1, {}, "tensors differ"),
        (0, {"intermediate_size": 24}, "bert.encoder.layer.0.intermediate.dense.bias, "),
        (0, {"num_hidden_layers": 1}, "bert.encoder.layer.1.attention.output.LayerNorm.bias, "),
    ],
    ids=["weights", "width", "depth"],
)
def test_another_backbone_is_refused(copied, seed, sizes, what):
    out, own = copied
    before = answers(out)
    write_base(own, seed, **sizes)
    calls = [lambda: answers(out), lambda: merge(out, out.parent / "m"), lambda: HeadBank().add("a", out)]
    calls += [lambda: fine_tune(str(out), {"text": TEXTS * 8, "label": ["a", "b"] * 8}, output_dir=str(out) + "2")]
    for call in calls:
        with pytest.raises(UserError, match=r"is not the one that the adapter in .* was trained on") as error:
            call()
        assert what in error.value.problem
    write_base(own)
    assert answers(out) == before


def test_an_adapter_without_a_record_is_loaded_and_gets_one_when_it_is_saved_again(copied):
    out, _ = copied
    before = answers(out)
    recorded = json.loads((out / BACKBONE).read_text())
    (out / BACKBONE).unlink()
    assert answers(out) == before
    backbone.write(Predictor.load(out).model, out)
    assert json.loads((out / BACKBONE).read_text())["tensors"] == recorded["tensors"]
    (out / BACKBONE).write_text("{}")
    with pytest.raises(UserError, match=r"backbone.json .* cannot be read"):
        answers(out)


def test_a_relative_backbone_counts_from_the_adapters_folder(copied, monkeypatch):
    out, own = copied
    before = answers(out)
    monkeypatch.chdir(out.parent)
    assert answers("out") == before
    shutil.move(own, out.parent / "elsewhere")
    monkeypatch.chdir(out)
    with pytest.raises(UserError, match="relative to the adapter's folder"):
        answers(out)


def test_an_adapter_on_itself_or_on_an_adapter_is_refused(copied):
    out, own = copied
    path = out / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": str(out)}))
    with pytest.raises(UserError, match="names its own folder"):
        answers(out)
    shutil.copytree(out, out.parent / "other")
    path.write_text(json.dumps({**config, "base_model_name_or_path": str(out.parent / "other")}))
    (out.parent / "other" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(own)})
    )
    with pytest.raises(UserError, match="holds an adapter itself"):
        answers(out)


def test_plain_peft_loads_what_was_saved(run, base):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model = PeftModel.from_pretrained(model, run.output_dir).eval()
    batch = run.predictor.processor(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        ours = Predictor.load(run.output_dir).model(**batch).logits
        assert torch.equal(model(**batch).logits, ours)


# ---- tensors ----


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda n, t: None if "layer.1." in n else (n, t), "it lacks bert.encoder.layer.1.attention"),
        (lambda n, t: None if "classifier" in n else (n, t), "it lacks classifier.bias, classifier.weight"),
        (lambda n, t: (n.replace("query", "q_proj"), t), "the model has no bert.encoder.layer.0.attention.self.q_proj"),
        (lambda n, t: (n, t[:4].clone() if "0.attention.self.query.lora_A" in n else t), "(4, 16) instead of (8, 16)"),
    ],
    ids=["layer", "head", "renamed", "rank"],
)
def test_tensors_that_do_not_fit_are_named(copied, change, what):
    changed(copied[0], change)
    with pytest.raises(UserError, match="does not fit its adapter_config") as error:
        answers(copied[0])
    assert what in error.value.problem


class Opens:
    def __reduce__(self):
        return open, (str(Path(__file__).parent / "ran"), "w")


def test_a_pickle_is_read_only_if_allowed_and_never_run(copied):
    out, _ = copied
    before, path = answers(out), out / "adapter_model.bin"
    torch.save(load_file(out / "adapter_model.safetensors"), path)
    (out / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="has its weights in a pickle"):
        answers(out)
    assert Predictor.load(out, allow_pickle=True).predict(TEXTS) == before
    path.write_bytes(pickle.dumps({"x": Opens()}))
    with pytest.raises(UserError, match="holds more than tensors"):
        Predictor.load(out, allow_pickle=True)
    assert not (Path(__file__).parent / "ran").exists()


# ---- folders ----


def test_a_folder_holds_one_model(run, copied, tmp_path):
    out, own = copied
    data = table(tmp_path / "b.csv", ("no", "yes"))
    with pytest.raises(UserError, match="holds the model that the run starts from"):
        fine_tune(str(out), data, output_dir=str(out), overwrite_output_dir=True, **QUICK)
    with pytest.raises(UserError, match="holds the backbone of the adapter"):
        fine_tune(str(out), data, output_dir=str(own), overwrite_output_dir=True, **QUICK)
    with pytest.raises(UserError, match="holds a model that no run wrote"):
        fine_tune(str(out), data, output_dir=str(write_base(tmp_path / "third")), **QUICK)
    for write in (lambda: merge(run.output_dir, out), lambda: run.save(out), lambda: run.save(own, merged=True)):
        with pytest.raises(UserError, match="holds a model already"):
            write()
    full = fine_tune(str(own), data, output_dir=str(out), overwrite_output_dir=True, **QUICK)
    assert not [path for path in out.iterdir() if path.name.startswith(("adapter_", "backbone"))]
    assert answers(out) == full.predict(TEXTS)
    again = fine_tune(str(own), data, output_dir=str(out), overwrite_output_dir=True, adapter="ia3", **QUICK)
    assert not (out / "model.safetensors").exists() and answers(out) == again.predict(TEXTS)


# ---- banks ----


def test_no_task_of_a_bank_depends_on_the_others(run, tmp_path):
    """On a backbone that is fine-tuned for two labels itself."""
    own = merge(run.output_dir, tmp_path / "base")
    many = tmp_path / "many.csv"
    many.write_text("text,label\n" + "\n".join(f"word{i},{('x|y', 'y', 'x')[i % 3]}" for i in range(24)) + "\n")
    kinds = {
        "two": (table(tmp_path / "2.csv", ("no", "yes")), {"adapter": "lora"}),
        "three": (table(tmp_path / "3.csv", ("a", "b", "c")), {"adapter": "ia3", "head": "mlp", "head_hidden_size": 4}),
        "many": (str(many), {"adapter": "lora", "label_delimiter": "|", "tune_thresholds": True}),
    }
    runs = {}
    for name, (data, keys) in kinds.items():
        runs[name] = fine_tune(str(own), data, output_dir=str(tmp_path / name), **QUICK, **keys).output_dir
    assert json.loads((runs["many"] / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]
    loaded = {name: Predictor.load(folder) for name, folder in runs.items()}
    alone = {name: predictor.predict(TEXTS) for name, predictor in loaded.items()}
    for order in itertools.permutations(runs):
        bank = HeadBank()
        for name in order:
            bank.add(name, runs[name])
        for name in order:
            assert bank.predict(TEXTS, name) == alone[name]
    for name in runs:  # of the last order
        assert bank.evaluate(name) == loaded[name].evaluate()
