"""Runs with adapters end to end: what they leave, that it loads anywhere, and that it can be gone on from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
)

from hf_transfer import Predictor, UserError, fine_tune, merge
from hf_transfer.cli.program import main
from hf_transfer.data import bundled
from hf_transfer.models import bundled as bundled_models
from hf_transfer.training.trainer import TransferTrainer
from tests.adapters.test_attach import timm_checkpoint
from tests.helpers import CHECKPOINTING, TOKENS, small_tokenizer

QUICK = dict(num_train_epochs=2, save_strategy="no", learning_rate=0.02, train_val_split=0.25)


def table(path, labels, rows=32):
    lines = [f"word{i} of {labels[i % len(labels)]} {i % 5},{labels[i % len(labels)]}" for i in range(rows)]
    path.write_text("text,label\n" + "\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A masked-language model: no head and no pooler."""
    folder = tmp_path_factory.mktemp("base")
    sizes = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=2)
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**sizes, vocab_size=TOKENS, max_position_embeddings=64)).save_pretrained(folder)
    small_tokenizer(64).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return table(tmp_path_factory.mktemp("data") / "a.csv", ("no", "yes"))


@pytest.fixture(scope="module")
def run(base, data, tmp_path_factory):
    return fine_tune(base, data, output_dir=str(tmp_path_factory.mktemp("run") / "out"), strategy="lora", **QUICK)


def test_what_a_run_leaves(run, base):
    names = {p.name for p in run.output_dir.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json", "run.yaml"} <= names
    assert "model.safetensors" not in names
    saved = json.loads((run.output_dir / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == base and {"classifier", "bert.pooler"} <= set(saved["modules_to_save"])
    config = json.loads((run.output_dir / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes"}
    assert config["architectures"] == ["BertForSequenceClassification"]
    results = run.results
    assert (results["adapter"], results["strategy"]) == ("lora", "lora")
    assert results["trainable_parameters"] == sum(
        t.numel() for t in load_file(run.output_dir / "adapter_model.safetensors").values()
    )


PLAIN = """
import sys
class Blocked:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "hf_transfer":
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import json, torch, transformers, peft
folder, kind, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
torch.manual_seed(1234)
base = peft.PeftConfig.from_pretrained(folder).base_model_name_or_path
config = transformers.AutoConfig.from_pretrained(folder)
model = getattr(transformers, kind).from_pretrained(base, config=config)
for p in model.parameters():
    p.data = p.data.clone()
model = peft.PeftModel.from_pretrained(model, folder).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
print(json.dumps([logits.tolist(), model.config.id2label[0]]))
"""


def test_a_run_loads_with_plain_peft_in_a_fresh_process(run):
    """Which cannot import this package: the same logits to rounding."""
    texts = ["word1 of yes", "a much longer line, of no"]
    argv = [sys.executable, "-c", PLAIN, str(run.output_dir), "AutoModelForSequenceClassification", json.dumps(texts)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    logits, label = json.loads(done.stdout.splitlines()[-1])
    tokenizer = AutoTokenizer.from_pretrained(run.output_dir)
    with torch.no_grad():
        ours = run.model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    assert torch.allclose(torch.tensor(logits), ours, rtol=1e-6, atol=1e-6) and label == "no"


def test_predict_and_evaluate_a_saved_run(run, capsys):
    texts = ["word1 of yes", "word2 of no"]
    again = Predictor.load(run.output_dir)
    assert again.predict(texts) == run.predict(texts)
    assert again.evaluate()["metrics"] == run.metrics == run.evaluate()["metrics"]
    assert main(["predict", str(run.output_dir), "word1 of yes", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["label"] in ("no", "yes")


def test_merged(run, tmp_path):
    texts = ["word1 of yes", "word2 of no"]
    for folder in (run.save(tmp_path / "a", merged=True), merge(run.output_dir, tmp_path / "b")):
        assert (folder / "model.safetensors").is_file() and not (folder / "adapter_config.json").exists()
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert not isinstance(model, PeftModel) and model.config.id2label == {0: "no", 1: "yes"}
        merged = Predictor.load(folder).predict(texts)
        for one, other in zip(merged, run.predict(texts), strict=True):
            assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)
    assert isinstance(run.model, PeftModel)
    assert (run.save(tmp_path / "c") / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [(lambda t: None, "cannot be loaded"), (lambda t: t + 1, "gives different logits than the trained one")],
)
def test_a_run_whose_files_do_not_hold_it_fails(change, said, base, data, tmp_path, monkeypatch, capsys):
    """Exit code 1, with the parameter's name; the files stay."""
    whole = TransferTrainer._save

    def forgetful(self, output_dir=None, state_dict=None):
        whole(self, output_dir, state_dict)
        path = f"{output_dir}/adapter_model.safetensors"
        tensors = {k: change(v) if ".pooler." in k else v for k, v in load_file(path).items()}
        save_file({k: v for k, v in tensors.items() if v is not None}, path)

    monkeypatch.setattr(TransferTrainer, "_save", forgetful)
    keys = {**QUICK, "model_name_or_path": base, "dataset_name": data, "adapter": "lora", "output_dir": tmp_path / "o"}
    argv = [word for name, value in keys.items() for word in (f"--{name}", str(value))]
    assert main(["train", *argv]) == 2 and not (tmp_path / "o").exists()  # before it trains
    assert "so the run would fail when it has trained" in capsys.readouterr().err
    assert main(["train", *argv, "--preflight", "false"]) == 1
    error = capsys.readouterr().err
    assert said in error and "bert.pooler.dense" in error
    assert not (tmp_path / "o" / "results.json").exists() and (tmp_path / "o" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    "keys",
    [
        {"adapter": "adalora"},
        {"adapter": "prompt"},
        {"adapter": "vera", "gradient_accumulation_steps": 2},
        {"adapter": "lora", CHECKPOINTING: True, "lora_plus_ratio": 4, "strategy": "gradual"},
        {"adapter": {"peft_type": "BOTTLENECK", "placement": "houlsby"}, "strategy": "partial", "unfrozen_groups": 1},
        {"adapter": "ln_tuning", "freeze": ["layer.0"], "layer_lr_decay": 0.5},
        {"adapter": "rslora", "head": "mlp", "head_hidden_size": 8, "head_norm": "batch"},
    ],
    ids=lambda k: str(k["adapter"])[:25],
)
def test_kinds_of_runs(keys, base, data, tmp_path):
    """Each trains, is checked at its end, and is loaded again with the answers that it gave."""
    made = fine_tune(base, data, output_dir=str(tmp_path / "o"), **{**QUICK, **keys})
    losses = [s["loss"] for s in made.results["stages"]]
    assert all(torch.isfinite(torch.tensor(x)) for x in losses)
    assert Predictor.load(tmp_path / "o").predict(["word1 of yes"]) == made.predict(["word1 of yes"])
    if keys["adapter"] == "adalora":
        pattern = json.loads((tmp_path / "o" / "adapter_config.json").read_text())["rank_pattern"]
        kept = [sum(rank) for rank in pattern.values()]
        assert sum(kept) <= 8 * len(kept) < 12 * len(kept), "the budget went from 12 to 8 ranks a module"
    if "head" in keys:
        saved = load_file(tmp_path / "o" / "adapter_model.safetensors")
        assert not torch.equal(saved["base_model.model.classifier.norm.running_mean"], torch.zeros(8))
        merge(tmp_path / "o", tmp_path / "m")
        scores = [Predictor.load(tmp_path / f).predict("word1 of yes")[0]["scores"] for f in "om"]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_batchnorm_backbones(tmp_path):
    """Statistics are the checkpoint's, in the run and when it is loaded with plain libraries."""
    timm_checkpoint("test_efficientnet").save_pretrained(tmp_path / "base")
    keys = dict(max_train_samples=40, max_eval_samples=20, max_predict_samples=20, strategy="lora")
    made = fine_tune(str(tmp_path / "base"), "bundled:digits", output_dir=str(tmp_path / "o"), **QUICK | keys)
    statistics = {n: b for n, b in load_file(tmp_path / "base" / "model.safetensors").items() if "running" in n}
    own = {n.replace("base_model.model.", ""): b for n, b in made.model.named_buffers()}
    assert statistics and all(torch.equal(own[n], b) for n, b in statistics.items())
    merged = AutoModelForImageClassification.from_pretrained(made.save(tmp_path / "m", merged=True))
    assert merged.config.id2label == {i: str(i) for i in range(10)}
    (answer,) = Predictor.load(tmp_path / "o").predict([bundled.load_dataset("bundled:digits")["test"][0]["image"]])
    assert set(answer["scores"]) == set("0123456789")


def test_the_bundled_efficientnet_has_a_plain_folder(tmp_path, monkeypatch):
    """Its weights are no Hugging Face checkpoint: an adapter's files name a folder that plain libraries load."""
    monkeypatch.setattr(bundled_models.constants, "HF_HOME", str(tmp_path))
    folder = bundled_models.plain_folder("bundled:efficientnet-lite0")
    assert folder == bundled_models.plain_folder("bundled:efficientnet-lite0") and tmp_path in folder.parents
    model = AutoModelForImageClassification.from_pretrained(folder)
    weights = bundled_models.imagenet_weights("bundled:efficientnet-lite0")
    own = model.timm_model.state_dict()
    assert all(torch.equal(own[n], t) for n, t in weights.items() if not n.startswith("classifier"))
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


# ---- going on ------------------------------------------------------------------------------------------------------


def adapter_of(run_or_folder):
    folder = getattr(run_or_folder, "output_dir", run_or_folder)
    return {k: v for k, v in load_file(folder / "adapter_model.safetensors").items() if "lora_" in k}


def head_of(run):
    return load_file(run.output_dir / "adapter_model.safetensors")["base_model.model.classifier.weight"]


STILL = {**QUICK, "learning_rate": 1e-12, "num_train_epochs": 1}


def test_going_on_with_the_same_labels(run, data, tmp_path):
    again = fine_tune(str(run.output_dir), data, output_dir=str(tmp_path / "o"), **STILL)
    before, after = adapter_of(run), adapter_of(again)
    assert before.keys() == after.keys() and all(torch.allclose(before[k], after[k], atol=1e-6) for k in before)
    assert torch.allclose(head_of(run), head_of(again), atol=1e-6)
    assert json.loads((tmp_path / "o" / "adapter_config.json").read_text())["base_model_name_or_path"] != str(
        run.output_dir
    )


def test_going_on_with_new_labels(run, tmp_path, capsys):
    """A new head; the adapter is kept, or begun anew by a key."""
    three = table(tmp_path / "b.csv", ("x", "y", "z"))
    kept = fine_tune(str(run.output_dir), three, output_dir=str(tmp_path / "kept"), **STILL)
    assert (
        "Newly initialized head with 3 outputs (x, y, z); the checkpoint predicts no, yes." in capsys.readouterr().out
    )
    before, after = adapter_of(run), adapter_of(kept)
    assert all(torch.allclose(before[k], after[k], atol=1e-6) for k in before)
    assert head_of(kept).shape == (3, 16) and kept.predict(["word"])[0]["label"] in "xyz"

    keys = {**STILL, "restart_adapter": True, "adapter": "lora", "lora_r": 2}
    anew = fine_tune(str(run.output_dir), three, output_dir=str(tmp_path / "anew"), **keys)
    fresh = adapter_of(anew)
    assert all(t.shape[0] == 2 for k, t in fresh.items() if "lora_A" in k)
    assert all(t.abs().max() < 1e-6 for k, t in fresh.items() if "lora_B" in k)
    assert anew.results["labels"] == ["x", "y", "z"]


def test_restarting_with_the_same_labels_keeps_the_head(run, data, tmp_path):
    keys = {**STILL, "restart_adapter": True, "adapter": "ia3"}
    again = fine_tune(str(run.output_dir), data, output_dir=str(tmp_path / "o"), **keys)
    assert torch.allclose(head_of(run), head_of(again), atol=1e-6) and again.results["adapter"] == "ia3"
    assert not adapter_of(again)


def test_another_adapter_than_the_checkpoints_is_refused(run, data, tmp_path):
    for keys in ({"adapter": "ia3"}, {"adapter": "lora", "lora_r": 4}):
        with pytest.raises(UserError, match=r"differs from the adapter in the checkpoint .*restart_adapter=True"):
            fine_tune(str(run.output_dir), data, output_dir=str(tmp_path / "o"), **QUICK, **keys)
    with pytest.raises(UserError, match="needs a pretrained one"):
        fine_tune(str(run.output_dir), data, output_dir=str(tmp_path / "o"), adapter="lora", from_scratch=True)


def test_a_backbone_that_is_gone_is_named(run, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(run.output_dir, moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "nowhere")
    (moved / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"requires the backbone '.*nowhere', which does not exist"):
        Predictor.load(moved)


def test_a_resumed_run_equals_the_whole_one(base, data, tmp_path):
    keys = {**QUICK, "strategy": "gradual", "adapter": "lora", "num_train_epochs": 3, "save_strategy": "epoch"}
    whole = fine_tune(base, data, output_dir=str(tmp_path / "a"), save_total_limit=5, **keys)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "results.json").unlink()
    for last in sorted((tmp_path / "b").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))[1:]:
        shutil.rmtree(last)
    again = fine_tune(base, data, output_dir=str(tmp_path / "b"), resume_from_checkpoint="auto", **keys)
    ours, theirs = (load_file(r.output_dir / "adapter_model.safetensors") for r in (whole, again))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert len(list((tmp_path / "a").glob("checkpoint-*/config.json"))) == 3, "a checkpoint holds the labels too"
