"""A run end to end, on real weights and data where they matter: what it leaves behind, and that it loads anywhere."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_transfer import Predictor, UserError, fine_tune
from hf_transfer.cli.program import main
from hf_transfer.data import bundled
from hf_transfer.data.load import load_splits
from hf_transfer.errors import WorkFailed
from hf_transfer.models import bundled as bundled_models
from hf_transfer.runs import saving
from tests import warm
from tests.helpers import TOKENS, small_tokenizer, tiny_bert

TEXT = dict(
    model_name_or_path="bundled:minilm-l6",
    dataset_name="bundled:rotten-tomatoes",
    max_train_samples=32,
    max_eval_samples=16,
    max_predict_samples=24,
    strategy="gradual",
    groups_per_unfreeze=4,
    num_train_epochs=2,
    layer_lr_decay=0.9,
    learning_rate=1e-4,
    head_learning_rate=1e-3,
    logging_steps=2,
)
IMAGE = dict(
    model_name_or_path="bundled:efficientnet-lite0",
    dataset_name="bundled:digits",
    image_size=32,
    max_train_samples=40,
    max_eval_samples=20,
    max_predict_samples=20,
    strategy="two-phase",
    num_train_epochs=2,
    save_strategy="no",
)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    return fine_tune(**TEXT, output_dir=str(tmp_path_factory.mktemp("text") / "out"))


@pytest.fixture(scope="module")
def small(tiny_bert_folder, tmp_path_factory):
    """Keys of the same run of a small model with dropout: for what does not depend on the weights."""
    folder = tmp_path_factory.mktemp("small") / "bert"
    shutil.copytree(tiny_bert_folder, folder)
    tiny_bert(vocab_size=TOKENS, dropout=0.1).save_pretrained(folder)
    return TEXT | {"model_name_or_path": str(folder), "groups_per_unfreeze": 2, "head_learning_rate": 1e-2}


@pytest.fixture(scope="module")
def small_run(small, tmp_path_factory):
    return fine_tune(**small, output_dir=str(tmp_path_factory.mktemp("small") / "out"))


@pytest.fixture(scope="module")
def image_run(tmp_path_factory):
    return fine_tune(**IMAGE, output_dir=str(tmp_path_factory.mktemp("image") / "out"))


def test_results(text_run, image_run):
    for run, split, labels in ((text_run, "test", ["negative", "positive"]), (image_run, "test", list("0123456789"))):
        results = json.loads((run.output_dir / "results.json").read_text())
        assert results == json.loads(json.dumps(run.results))
        assert results["metrics_split"] == split and results["labels"] == labels
        assert {"accuracy", "f1_macro", "loss"} <= set(results["metrics"]) & set(results["validation_metrics"])
        low, high = results["intervals"]["accuracy"]
        assert low <= results["metrics"]["accuracy"] <= high
        assert [s["name"] for s in results["stages"]] == [s["name"] for s in results["plan"]]
        assert all(s["steps"] > 0 and s["seconds"] > 0 and s["loss"] > 0 for s in results["stages"])
        assert all("eval_accuracy" in s["metrics"] for s in results["stages"])
        assert results["versions"]["torch"] == version("torch")
    assert text_run.results["num_train_examples"] == 32
    assert text_run.results["plan"][0]["learning_rates"] == {"head": 1e-3}
    assert (
        text_run.results["trainable_parameters"]
        == sum(n for g, n in text_run.plan.groups if g not in text_run.plan.never_thawed)
        < text_run.results["total_parameters"]
    )


def test_history_has_a_line_per_log(text_run):
    lines = [json.loads(line) for line in (text_run.output_dir / "history.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == [2, 4, 6, 8]
    assert [line["stage"] for line in losses] == [0, 0, 1, 1]
    assert set(losses[-1]["learning_rate"]) == {"layer.2", "layer.3", "layer.4", "layer.5", "head"}
    assert losses[0]["learning_rate"]["layer.5"] == 0.0 < losses[-1]["learning_rate"]["layer.2"]
    assert all(line["samples_per_second"] > 0 and line["memory_bytes"] > 0 and "grad_norm" in line for line in losses)
    assert sum("eval_loss" in line for line in lines) == 2


def test_the_folder_holds_what_it_should(text_run, image_run):
    names = {p.name for p in text_run.output_dir.iterdir()}
    assert {
        "run.yaml",
        "results.json",
        "history.jsonl",
        "examples.npz",
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "checkpoint-8",
    } <= names
    assert {"model.safetensors", "config.json"} <= {p.name for p in image_run.output_dir.iterdir()}
    for run in (text_run, image_run):
        assert not [p for p in run.output_dir.iterdir() if p.suffix in (".bin", ".pt", ".new")]


def test_text_loads_with_plain_transformers(text_run):
    """In a fresh process that never imports this package, with another seed: the same logits to rounding."""
    code = f"""
import sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
torch.manual_seed(99)
folder = {str(text_run.output_dir)!r}
model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    print(*model(**tokenizer("a gripping film", return_tensors="pt")).logits[0].tolist())
print(pipeline("text-classification", model=folder)("a gripping film")[0]["label"])
assert "hf_transfer" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    logits, label = done.stdout.splitlines()
    tokenizer = AutoTokenizer.from_pretrained(text_run.output_dir)
    text_run.model.eval()
    with torch.no_grad():
        ours = text_run.model(**tokenizer("a gripping film", return_tensors="pt")).logits[0]
    # Another process may choose other kernels: equal to float32's precision, not to the bit.
    assert [float(x) for x in logits.split()] == pytest.approx(ours.tolist(), rel=1e-6, abs=1e-6)
    assert label == ["negative", "positive"][ours.argmax()]
    assert AutoModelForSequenceClassification.from_pretrained(text_run.output_dir).config.label2id == {
        "negative": 0,
        "positive": 1,
    }


def test_a_timm_model_loads_with_plain_transformers(image_run):
    model = AutoModelForImageClassification.from_pretrained(image_run.output_dir)
    processor = AutoImageProcessor.from_pretrained(image_run.output_dir)
    assert model.config.id2label == {i: str(i) for i in range(10)}
    image = bundled.load_dataset("bundled:digits")["test"][0]["image"].convert("RGB")
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32) and pixels.min() >= -1 and pixels.max() <= 1  # mean and std 0.5
    for parameter in model.parameters():  # a file's tensors lie unaligned in memory, which costs the last bit
        parameter.data = parameter.data.clone()
    image_run.model.eval()
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, image_run.model(pixels).logits)


def test_run_yaml_repeats_the_run(text_run, tmp_path, capsys):
    argv = ["train", "--config", str(text_run.output_dir / "run.yaml"), "--output_dir", str(tmp_path / "again")]
    assert main(argv) == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    for key in ("metrics", "validation_metrics", "intervals", "plan", "labels", "num_train_examples"):
        assert again[key] == text_run.results[key], key
    ours, theirs = (load_file(f / "model.safetensors") for f in (text_run.output_dir, tmp_path / "again"))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert set(yaml.safe_load((tmp_path / "again" / "run.yaml").read_text())) == set(
        yaml.safe_load((text_run.output_dir / "run.yaml").read_text())
    )
    out = capsys.readouterr().out
    assert (
        "Plan: gradual" in out and "stage 2/2 (top 4 groups)" in out and "Newly initialized head with 2 outputs" in out
    )
    assert "Result on test" in out
    said = {"predict": '"label": ', "evaluate": "95% CI", "train": "", "-c": "{0: 'negative', 1: 'positive'}\n"}
    for command in out.split("Next:\n")[1].splitlines():  # as printed, and the run only as far as its keys
        program, *argv = shlex.split(command.split("   #")[0])
        (verb,) = set(argv) & set(said)
        assert shutil.which(program)
        if argv[0] == "-c":
            done = warm.fork(lambda code=argv[1]: exec(code, {}))
        else:
            assert argv[:2] == ["-m", "hf_transfer"]
            done = warm.hf_transfer(*argv[2:], *(["--seed", "x"] if verb == "train" else []), stdin=b"fine\n")
        assert said.pop(verb) in done.stdout and (done.returncode == 0 or "seed: 'x'" in done.stderr)
    assert not said
    assert out.index("Plan: gradual") < out.index("step 2/8") < out.index("Result on test")


def test_a_probe_leaves_every_pretrained_weight_and_statistic_as_it_was(tmp_path):
    """Bit for bit on the real EfficientNet (BatchNorm) and the real MiniLM (dropout), weight decay on."""
    keys = dict(
        strategy="linear-probe",
        num_train_epochs=1,
        weight_decay=0.1,
        save_strategy="no",
        max_eval_samples=20,
        max_predict_samples=20,
        max_train_samples=40,
    )
    run = fine_tune(
        "bundled:efficientnet-lite0", "bundled:digits", image_size=32, output_dir=str(tmp_path / "i"), **keys
    )
    before = bundled_models.imagenet_weights("bundled:efficientnet-lite0")
    after = run.model.timm_model.state_dict()
    assert {n for n in after if not torch.equal(after[n], before[n]) if after[n].shape == before[n].shape} | {
        "classifier.weight",
        "classifier.bias",
    } == {"classifier.weight", "classifier.bias"}
    run = fine_tune("bundled:minilm-l6", "bundled:rotten-tomatoes", output_dir=str(tmp_path / "t"), **keys)
    before = load_file(bundled_models.model_path("bundled:minilm-l6") / "model.safetensors")
    after = {n.removeprefix("bert."): p for n, p in run.model.named_parameters()}
    shared = set(before) & set(after)
    assert len(shared) > 100 and all(torch.equal(before[n], after[n]) for n in shared)
    assert run.plan.never_thawed == tuple(g.name for g in run.trainer.layer_groups[:-1])


def test_a_finished_folder_is_refused(text_run):
    with pytest.raises(UserError, match="holds a finished run"):
        fine_tune(**TEXT, output_dir=str(text_run.output_dir))


def test_an_unfinished_run_is_continued(small, small_run, tmp_path):
    """From its checkpoint, to the same weights, and the history has neither gaps nor repeats."""
    out = tmp_path / "out"
    shutil.copytree(small_run.output_dir, out)
    (out / "results.json").unlink()
    shutil.rmtree(out / "checkpoint-8")
    with pytest.raises(UserError, match="resume_from_checkpoint='auto'"):
        fine_tune(**small, output_dir=str(out))
    fine_tune(**small, output_dir=str(out), resume_from_checkpoint="auto")
    ours, theirs = (load_file(f / "model.safetensors") for f in (small_run.output_dir, out))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    steps = [json.loads(line)["step"] for line in (out / "history.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 4, 6, 8, 8]


def test_overwriting_keeps_the_run_before_until_the_new_one_is_complete_and_then_nothing_of_it(
    small, small_run, tmp_path
):
    """Else its checkpoints would be resumed, and its results read, as this run's; and a kill would leave no model."""
    out = tmp_path / "my run's"
    shutil.copytree(small_run.output_dir, out)
    keys = small | {"strategy": "linear-probe", "groups_per_unfreeze": 1, "num_train_epochs": 1, "save_strategy": "no"}
    keys |= {"output_dir": str(out), "overwrite_output_dir": True}

    def killed():
        saving.save_model = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        fine_tune(**keys)

    for _ in range(2):  # what the first leaves is no run that would displace the finished one
        assert warm.fork(killed).returncode == -signal.SIGKILL
        kept = out / "replaced-run"
        for name in ("model.safetensors", "config.json", "results.json", "run.yaml", "examples.npz", "README.md"):
            assert (kept / name).read_bytes() == (small_run.output_dir / name).read_bytes(), name
        assert not (out / "results.json").exists() and not (out / "model.safetensors").exists()
    text = "a film of words"
    assert Predictor.load(kept).predict([text]) == Predictor.load(small_run.output_dir).predict([text])
    with pytest.raises(UserError, match="that the run starts from"):
        fine_tune(**keys | {"model_name_or_path": str(kept)})

    run = fine_tune(**keys)
    assert not list(out.glob("*replaced*")) and not list(out.glob("checkpoint-*"))
    assert json.loads((out / "results.json").read_text())["strategy"] == "linear-probe" == run.plan.strategy
    assert len((out / "history.jsonl").read_text().splitlines()) == 3


def test_a_run_that_diverges_says_so_and_writes_json(tiny_bert_folder, tmp_path, capsys):
    data = csv(tmp_path / "a.csv", [(f"words {i}", "xy"[i % 2]) for i in range(16)])
    keys = dict(
        learning_rate=1e30, strategy="full", num_train_epochs=2, save_strategy="no", per_device_train_batch_size=4
    )
    with pytest.raises(WorkFailed, match="NaN or infinite at optimizer step 1"):
        fine_tune(tiny_bert_folder, data, output_dir=str(tmp_path / "stopped"), **keys)
    run = fine_tune(tiny_bert_folder, data, output_dir=str(tmp_path / "o"), on_nonfinite=None, **keys)
    assert "training diverged" in capsys.readouterr().out

    def no_constant(text):
        raise AssertionError(text)

    text = (run.output_dir / "results.json").read_text()
    assert json.loads(text, parse_constant=no_constant)["metrics"]["loss"] is None


def test_stages_repeat_from_their_run_yaml(small, tmp_path):
    stages = [{"epochs": 1, "train": "head"}, {"epochs": 0.5, "train": ["layer.1", "head"]}]
    keys = {k: v for k, v in small.items() if k not in ("strategy", "groups_per_unfreeze", "num_train_epochs")}
    run = fine_tune(**keys, stages=stages, output_dir=str(tmp_path / "a"), save_strategy="no")
    assert [s["steps"] for s in run.results["stages"]] == [4, 2]
    assert main(["train", "--config", str(tmp_path / "a" / "run.yaml"), "--output_dir", str(tmp_path / "b")]) == 0
    again = json.loads((tmp_path / "b" / "results.json").read_text())
    assert again["metrics"] == run.metrics and again["plan"] == run.results["plan"]


def test_image_size_of_hugging_face_models(tmp_path):
    """A convolution takes any size; learned positions are interpolated, for whole patches."""
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    convolution = ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, image_size=32)
    positions = ViTConfig(
        hidden_size=8, num_attention_heads=2, intermediate_size=16, num_hidden_layers=1, image_size=32
    )
    for name, model in (
        ("c", ConvNextForImageClassification(convolution)),
        ("v", ViTForImageClassification(positions)),
    ):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    keys = dict(
        dataset_name="bundled:digits",
        image_size=64,
        max_train_samples=20,
        max_eval_samples=10,
        max_predict_samples=10,
        num_train_epochs=1,
        save_strategy="no",
    )
    run = fine_tune(str(tmp_path / "c"), output_dir=str(tmp_path / "o"), **keys)
    assert run.model.config.image_size == 64
    assert AutoImageProcessor.from_pretrained(run.output_dir).size["height"] == 64
    with pytest.raises(UserError, match=r"60 is not possible for a vit model\. Sizes that work: 32, 48, 64"):
        fine_tune(str(tmp_path / "v"), output_dir=str(tmp_path / "p"), **keys | {"image_size": 60})


def test_a_distilled_deit_is_refused_before_training(tmp_path):
    config = DeiTConfig(hidden_size=8, num_attention_heads=2, intermediate_size=16, num_hidden_layers=1, image_size=32)
    DeiTForImageClassificationWithTeacher(config).save_pretrained(tmp_path / "deit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "deit")
    with pytest.raises(UserError, match="computes no loss"):
        fine_tune(str(tmp_path / "deit"), "bundled:digits", output_dir=str(tmp_path / "o"), max_train_samples=20)


# ---- swapping heads ------------------------------------------------------------------------------------------------


def csv(path, rows):
    path.write_text("text,label\n" + "\n".join(f"{t},{y}" for t, y in rows) + "\n")
    return str(path)


def test_other_labels_get_a_fresh_head_and_the_same_labels_keep_it(small_run, tmp_path, capsys):
    keys = dict(
        model_name_or_path=str(small_run.output_dir),
        num_train_epochs=1,
        save_strategy="no",
        learning_rate=0.0,
        strategy="full",
        train_val_split=0.5,
    )
    three = csv(tmp_path / "a.csv", [(f"words {i}", "xyz"[i % 3]) for i in range(12)])
    run = fine_tune(dataset_name=three, output_dir=str(tmp_path / "a"), **keys | {"learning_rate": 1e-5})
    assert run.model.config.id2label == {0: "x", 1: "y", 2: "z"} and run.model.classifier.weight.shape[0] == 3
    assert (
        "Newly initialized head with 3 outputs (x, y, z); the checkpoint predicts negative, positive."
        in capsys.readouterr().out
    )

    two = csv(tmp_path / "b.csv", [(f"words {i}", ("yes", "no")[i % 2]) for i in range(12)])
    run = fine_tune(dataset_name=two, output_dir=str(tmp_path / "b"), **keys | {"learning_rate": 1e-9})
    trained = load_file(small_run.output_dir / "model.safetensors")["classifier.weight"]
    assert not torch.allclose(run.model.classifier.weight, trained, atol=1e-3)
    assert "Newly initialized head with 2 outputs (no, yes)" in capsys.readouterr().out

    same = csv(tmp_path / "c.csv", [(f"words {i}", ("positive", "negative")[i % 2]) for i in range(12)])
    run = fine_tune(dataset_name=same, output_dir=str(tmp_path / "c"), **keys | {"learning_rate": 1e-9})
    assert torch.allclose(run.model.classifier.weight, trained, atol=1e-6)
    assert run.model.config.id2label == {0: "negative", 1: "positive"}
    assert "Newly initialized head" not in capsys.readouterr().out


def test_what_the_checkpoint_lacks_trains_with_the_head(tiny_checkpoint, tmp_path, capsys):
    """A masked-language-model checkpoint has no pooler: it must not stay random under a frozen backbone."""
    data = csv(tmp_path / "a.csv", [(f"words {i}", "xy"[i % 2]) for i in range(12)])
    run = fine_tune(
        str(tiny_checkpoint),
        data,
        output_dir=str(tmp_path / "o"),
        strategy="linear-probe",
        num_train_epochs=1,
        train_val_split=0.5,
        save_strategy="no",
    )
    assert run.plan.stages[0].trainable == ("head",)
    assert run.trainer.layer_groups[-1].parameters[:2] == ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
    assert (
        "Missing from the checkpoint and trained with the head: bert.pooler.dense.bias, bert.pooler.dense.weight"
        in capsys.readouterr().out
    )


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory):
    """A masked-language model with the real vocabulary: no pooler, no head."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    config = BertConfig(
        hidden_size=8,
        num_attention_heads=2,
        intermediate_size=16,
        num_hidden_layers=1,
        vocab_size=TOKENS,
        max_position_embeddings=64,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    small_tokenizer(64).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("label", "problem_type", "labels", "metric"),
    [
        (lambda i: i / 7, "regression", ["label"], "rmse"),
        (lambda i: ["a", "b", "c"][: i % 4], "multi_label_classification", ["a", "b", "c"], "f1_micro"),
        (lambda i: bool(i % 2), "single_label_classification", ["False", "True"], "accuracy"),
    ],
)
def test_problem_types(label, problem_type, labels, metric, tiny_checkpoint, tmp_path):
    rows = [json.dumps({"premise": f"p {i}", "hypothesis": f"h {i}", "label": label(i)}) for i in range(24)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    run = fine_tune(
        str(tiny_checkpoint),
        str(tmp_path / "train.jsonl"),
        output_dir=str(tmp_path / "o"),
        num_train_epochs=1,
        gradient_accumulation_steps=2,
        train_val_split=0.25,
        save_strategy="no",
    )
    assert (run.results["problem_type"], run.results["labels"]) == (problem_type, labels)
    assert run.results["metrics_split"] == "validation" and metric in run.metrics and metric in run.results["intervals"]
    loaded = AutoModelForSequenceClassification.from_pretrained(run.output_dir)
    assert loaded.config.problem_type == problem_type and loaded.config.num_labels == len(labels)


def test_random_weights_of_a_timm_architecture(tmp_path):
    run = fine_tune(
        "timm/resnet10t",
        "bundled:digits",
        strategy="scratch",
        image_size=32,
        output_dir=str(tmp_path / "o"),
        max_train_samples=20,
        max_eval_samples=10,
        max_predict_samples=10,
        num_train_epochs=1,
        save_strategy="no",
    )
    assert run.plan.strategy == "scratch" and run.results["trainable_parameters"] == run.results["total_parameters"]
    assert AutoModelForImageClassification.from_pretrained(run.output_dir).config.architecture == "resnet10t"


def test_parameters_of_a_stage_that_never_began_did_not_train(tiny_bert_folder, tmp_path):
    (tmp_path / "x.csv").write_text("text,label\n" + "".join(f"word {i},{'ab'[i % 2]}\n" for i in range(20)))
    waits = dict(strategy="gradual", unfreeze_trigger="plateau", unfreeze_patience=5, num_train_epochs=1)
    quiet = dict(save_strategy="no", log_level="error", preflight=False, calibrate=False)
    run = fine_tune(tiny_bert_folder, str(tmp_path / "x.csv"), output_dir=str(tmp_path / "o"), **waits, **quiet)
    assert len(run.plan.stages) > len(run.results["stages"]) == 1
    assert run.results["trainable_parameters"] == run.plan.stages[0].num_trainable


# ---- bundled files -------------------------------------------------------------------------------------------------


def test_bundled_data_is_what_it_says():
    reviews = bundled.load_dataset("bundled:rotten-tomatoes")
    assert (len(reviews["train"]), len(reviews["test"])) == (7464, 1066)
    assert sum(reviews["test"]["label"]) == 533 and reviews["train"].features["label"].names == ["negative", "positive"]
    assert not set(reviews["train"]["text"]) & set(reviews["test"]["text"])
    digits = bundled.load_dataset("bundled:digits")
    assert (len(digits["train"]), len(digits["test"])) == (1437, 360) and digits["train"][0]["image"].size == (8, 8)
    assert reviews["test"]["text"] == bundled.load_dataset("bundled:rotten-tomatoes")["test"]["text"]  # fixed


def test_a_changed_file_is_not_used(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"other")
    with pytest.raises(UserError, match="Checksum mismatch"):
        bundled.verify(path, "0" * 64)
    with pytest.raises(UserError, match="cannot be read"):
        bundled.verify(tmp_path / "none", "0" * 64)
    whole = hashlib.sha256(b"other").hexdigest()
    assert bundled.verify(path, whole) == bundled.verify(path, whole) == path
    path.write_bytes(b"0ther")  # as long, after it was found whole
    with pytest.raises(UserError, match="Checksum mismatch"):
        bundled.verify(path, whole)


@pytest.mark.parametrize("name", bundled_models.IMAGENET)
def test_the_efficientnet_weights_are_the_real_ones(name):
    """Frozen ImageNet features separate digits far above chance; random ones would not load strictly by order."""
    from sklearn.linear_model import LogisticRegression

    pytest.importorskip(bundled_models.IMAGENET[name].package)
    from hf_transfer.config.arguments.data import DataArguments
    from hf_transfer.config.arguments.model import ModelArguments
    from hf_transfer.data.labels import Labels
    from hf_transfer.tasks import TASKS

    task = TASKS["image-classification"]
    args = DataArguments(dataset_name="bundled:digits", image_size=64)
    loaded, processor = task.load(
        ModelArguments(name), args, Labels("single_label_classification", tuple("0123456789"))
    )
    rows = load_splits(args)["train"].select(range(200)).rename_column("label", "labels")
    prepared = task.prepare(rows, ("image",), processor, args)
    loaded.model.eval()
    with torch.no_grad():
        pixels = torch.stack(list(prepared[:]["pixel_values"]))
        features = loaded.model.timm_model.forward_head(
            loaded.model.timm_model.forward_features(pixels), pre_logits=True
        )
    labels = rows["labels"]
    probe = LogisticRegression(max_iter=1000).fit(features[:140].numpy(), labels[:140])
    assert probe.score(features[140:].numpy(), labels[140:]) > 0.7
