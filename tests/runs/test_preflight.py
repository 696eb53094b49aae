"""What would fail after hours fails before the first step, and a run with a preflight equals one without."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForSequenceClassification,
    ViTImageProcessor,
)

from hf_transfer import UserError, fine_tune
from hf_transfer.errors import Interrupted
from hf_transfer.layers.side_effects import untouched
from hf_transfer.runs import preflight, preflight_saving
from hf_transfer.runs.prepare import make_trainer, prepare, prepare_splits
from hf_transfer.runs.preview import plan_only
from hf_transfer.settings import Config
from hf_transfer.tasks import text_classification
from tests.helpers import PIXELS, tiny_bert

QUIET = dict(use_cpu=True, log_level="error", report_to="none", save_strategy="no", strategy="full", num_train_epochs=1)
TEXTS = [f"{'a fine film' if i % 2 else 'dull'} {'indeed ' * (i % 5)}{i}" for i in range(21)]


def table(path, texts=TEXTS):
    rows = [f"{text},{'xy'[i % 2]}" for i, text in enumerate(texts)]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return str(path)


def pictures(folder, count, size=PIXELS):
    """`count` training images, and 4 for validation."""
    for split, many in (("train", count), ("validation", 4)):
        for i in range(many):
            pixels = np.random.default_rng(i).integers(0, 255, (size, size, 3)).astype(np.uint8)
            (folder / split / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / split / "ab"[i % 2] / f"{i}.png")
    return str(folder)


def saved(model, folder, size=PIXELS):
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
    return str(folder)


def words_tokenizer(longest=16):
    """A tokenizer of 40 tokens that loads at once: BERT's special tokens, and the words of `TEXTS`."""
    words = [*["a", "fine", "film", "dull", "indeed", "word"], *map(str, range(29))]
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", special)
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=longest, model_input_names=inputs, **names
    )


def with_tokens(folder, tokenizer, model=None, **config):
    """A folder with a model of 40 tokens and a tokenizer."""
    tokenizer.save_pretrained(folder)
    (model or tiny_bert(dropout=0.1, **config)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return with_tokens(tmp_path_factory.mktemp("models") / "bert", words_tokenizer())


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """Its last stage is one pixel wide."""
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 4, 8, 8], depths=[1] * 4, layer_type="basic", num_labels=2)
    torch.manual_seed(0)
    return saved(ResNetForImageClassification(config), tmp_path_factory.mktemp("models") / "resnet")


def attempt(model, data, out, saves=False, change=None, **keys):
    """A preflight without a run; `change` is called with the trainer."""
    values = {**QUIET, "model_name_or_path": model, "train_file": data, "output_dir": str(out), **keys}
    values = {name: value for name, value in values.items() if value is not None}
    if Path(data).is_dir():
        values["dataset_name"] = values.pop("train_file")
    prepared = prepare(Config.from_sources({}, values))
    splits = prepare_splits(prepared)
    trainer = make_trainer(prepared, splits["train"], splits["validation"])
    if change is not None:
        change(trainer)
    return preflight.try_run(prepared, trainer, splits, out if saves else None), trainer


# ---- no trace ------------------------------------------------------------------------------------------------------


def test_a_run_with_a_preflight_equals_one_without(resnet, tmp_path):
    """BatchNorm, augmentation and Python's random numbers; uninterrupted, and resumed after the head's stage."""
    data = pictures(tmp_path / "d", 18)
    keys = QUIET | dict(strategy="two-phase", num_train_epochs=2, per_device_train_batch_size=8, logging_steps=1)
    keys |= dict(augmentation="basic", save_strategy="epoch", learning_rate=1e-2)

    def run(name, **more):
        result = fine_tune(resnet, data, output_dir=str(tmp_path / name), **keys | more)
        drawn = random.random(), np.random.rand(), torch.rand(1).item()
        logs = [
            {k: v for k, v in log.items() if "per_second" not in k and "time" not in k}
            for log in result.trainer.state.log_history
        ]
        return load_file(tmp_path / name / "model.safetensors"), logs, drawn, result

    weights, logs, drawn, result = run("without", preflight=False)
    assert result.results["preflight"] is None
    again = run("with")
    assert all(torch.equal(weights[n], again[0][n]) for n in weights)
    assert any("running_mean" in n for n in weights)
    assert (logs, drawn) == again[1:3]
    tried = again[3].results["preflight"]
    assert json.loads((tmp_path / "with" / "results.json").read_text())["preflight"] == tried
    assert tried["checks"] == [
        "an evaluation batch of validation",
        "a training step",
        "the last batch of 2",
        "saving and loading",
    ]
    for name in ("results.json", "checkpoint-6"):
        path = tmp_path / "with" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = run("with", resume_from_checkpoint="auto")
    assert all(torch.equal(weights[n], resumed[0][n]) for n in weights) and logs == resumed[1]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_of_a_preflight(fails, bert, tmp_path, monkeypatch):
    """Neither in the model nor in the trainer, the random numbers or the folder."""
    before = []

    def tensors(trainer):
        return dict(trainer.model.named_parameters()) | dict(trainer.model.named_buffers())

    def rest(trainer):
        modules, guards = dict(trainer.model.named_modules()), trainer.guards
        return (
            {name: {k: id(v) for k, v in vars(module).items()} for name, module in modules.items()},
            {name: (module.training, len(module._forward_hooks)) for name, module in modules.items()},
            [(p.grad, p.requires_grad) for p in trainer.model.parameters()],
            (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
            (trainer.optimizer, trainer.unfreezing.stage, trainer.unfreezing.frozen, vars(trainer.state).copy()),
            (len(trainer.accelerator._dataloaders), trainer.objective.num_examples, id(guards.recorder)),
            trainer.args.to_dict(),
        )

    def note(trainer):
        copies = {name: tensor.detach().clone() for name, tensor in tensors(trainer).items()}
        before.extend((trainer, copies, rest(trainer)))

    def no_model(*args):
        assert (tmp_path / "o" / ".preflight" / "model.safetensors").is_file()
        raise UserError("it is gone.")

    def run():
        return attempt(bert, table(tmp_path / "a.csv"), tmp_path / "o", True, note, strategy="gradual")

    if fails:
        monkeypatch.setattr(preflight_saving, "reloaded", no_model)
        with pytest.raises(UserError, match=r"cannot be saved and loaded again .it is gone"):
            run()
    else:
        assert run()[0].done[-1] == "saving and loading"
    trainer, copies, others = before
    assert all(torch.equal(copies[name], tensor) for name, tensor in tensors(trainer).items())
    assert rest(trainer) == others
    assert not list((tmp_path / "o").iterdir())


def test_what_modules_keep_between_forward_passes_is_restored(tmp_path):
    """Attributes, containers and buffers that a forward pass adds, replaces or fills."""

    class Keeps(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))
            self.register_buffer("table", torch.ones(2))
            self.longest, self.cache, self.seen = 0, {}, [1]

        def forward(self):
            self.table = torch.zeros(3)
            self.register_buffer("late", torch.ones(1))
            self.longest, self.cache["a"], self.new = 7, 1, True
            self.seen += [2]
            self.register_forward_hook(lambda *_: None)

    model = Keeps()
    table = model.table
    with pytest.raises(KeyError), untouched(model):
        model()
        table.add_(1)
        model.eval()
        raise KeyError
    assert model.table is table and table.tolist() == [1, 1] and "late" not in model._buffers
    assert (model.longest, model.cache, model.seen, model.training) == (0, {}, [1], True)
    assert not hasattr(model, "new") and not model._forward_hooks


# ---- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "keys", "fault"),
    [
        (17, {}, r"with 8 examples per batch, the last batch of the 17 training examples has one, and BatchNorm, which "
         r"trains in stage 'all groups', .* Set dataloader_drop_last: true, or per_device_train_batch_size: 9\."),
        (9, {"per_device_train_batch_size": 1}, r"a batch has one example, .* Set per_device_train_batch_size: 3\."),
        (17, {"dataloader_drop_last": True}, None),
        (17, {"max_steps": 5}, None),  # the last batch of the first epoch is the head's, whose backbone is frozen
        (17, {"max_steps": 6}, "has one"),
        (17, {"strategy": "linear-probe"}, None),
        (17, {"strategy": "linear-probe", "head": "mlp", "head_norm": "batch"}, "9, or head_norm: none"),
        (17, {"strategy": "linear-probe", "head": "mlp"}, None),
        (17, {"strategy": "full", "gradient_accumulation_steps": 2}, "has one"),
        (18, {}, None),
    ],
)  # fmt: skip
def test_a_last_batch_of_one(count, keys, fault, resnet, tmp_path):
    """BatchNorm on one pixel cannot normalize one image: only where it trains, and where the batch is reached."""
    data = pictures(tmp_path / "d", count)
    keys = dict(per_device_train_batch_size=8, strategy="two-phase", num_train_epochs=2) | keys
    if fault is None:
        attempt(resnet, data, tmp_path / "o", **keys)
    else:
        with pytest.raises(UserError, match=fault) as error:
            attempt(resnet, data, tmp_path / "o", **keys)
        assert error.value.key == "per_device_train_batch_size"


def test_the_fix_that_is_named_works(resnet, tmp_path):
    data = pictures(tmp_path / "d", 17)
    attempt(resnet, data, tmp_path / "o", per_device_train_batch_size=9)


def test_out_of_memory_names_the_batch(bert, tmp_path, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(preflight, "training_pass", full)
    with pytest.raises(
        UserError, match=r"out of memory: a training step.* \(2 examples, padded to \d+ tokens\)"
    ) as error:
        attempt(bert, table(tmp_path / "a.csv"), tmp_path / "o")
    assert error.value.key == "per_device_train_batch_size" and "max_seq_length" in error.value.fix


# ---- tokens --------------------------------------------------------------------------------------------------------


@pytest.fixture
def unfitted(monkeypatch):
    """Models are left as they are: no embeddings are added, and positions are as many as the configuration says."""
    monkeypatch.setattr(text_classification, "grow_embeddings", lambda *_: 0)

    def as_configured(model, tokenizer):
        return min(tokenizer.model_max_length, model.config.max_position_embeddings)

    monkeypatch.setattr(text_classification, "max_tokens", as_configured)


def test_tokens_that_the_model_has_no_embeddings_for(bert, unfitted, tmp_path):
    """In the test split alone, in pairs, and for padding."""
    tokenizer = words_tokenizer()
    data = table(tmp_path / "a.csv")
    segments = with_tokens(tmp_path / "segments", tokenizer, type_vocab_size=1)
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("one,two,label\n" + "".join(f"{text},a film {i},{'xy'[i % 2]}\n" for i, text in enumerate(TEXTS)))
    keys = dict(text_column_name=["one", "two"])
    with pytest.raises(UserError, match="numbers segments up to 1, and the model has 1 of them"):
        attempt(segments, str(pairs), tmp_path / "o", **keys)

    tokenizer.add_tokens(["<user>"])
    added = with_tokens(tmp_path / "added", tokenizer)
    attempt(added, data, tmp_path / "o")
    test = table(tmp_path / "test.csv", ["fine", "a <user> film"])
    message = (
        r"token '<user>' has the number 40, .* 40 tokens only, "
        r".*\(test, row 1 \('a <user> film'\), 5 tokens\)"
    )
    with pytest.raises(UserError, match=message) as error:
        attempt(added, data, tmp_path / "o", test_file=test)
    assert error.value.key == "model_name_or_path"

    tokenizer.pad_token = "<user>"
    with pytest.raises(UserError, match="token '<user>' for padding"):
        attempt(with_tokens(tmp_path / "padded", tokenizer), data, tmp_path / "o")


def test_a_text_longer_than_the_positions(bert, unfitted, tmp_path):
    """RoBERTa's positions start behind the padding token's, also in models that are not called RoBERTa."""
    tokenizer = words_tokenizer(64)
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = RobertaPreLayerNormConfig(vocab_size=40, max_position_embeddings=34, pad_token_id=1, **sizes)
    model = with_tokens(tmp_path / "m", tokenizer, RobertaPreLayerNormForSequenceClassification(config))
    data = table(tmp_path / "a.csv", [*TEXTS, "word " * 40])
    with pytest.raises(UserError, match=r"positions for 32 tokens, .*row 21 .*, 34 tokens.*Set max_seq_length: 32"):
        attempt(model, data, tmp_path / "o")
    attempt(model, data, tmp_path / "o", max_seq_length=32)


def test_a_model_that_reads_short_texts_only(bert, tmp_path):
    """Whatever the reason is, the longest text that it reads is found."""

    def reading(least, most):
        def change(trainer):
            forward = trainer.model.forward

            def limited(input_ids, **inputs):
                if not least <= input_ids.shape[1] <= most:
                    raise ValueError("wrong length")
                return forward(input_ids, **inputs)

            trainer.model.forward = limited

        return change

    data = table(tmp_path / "a.csv", [*TEXTS, "word " * 40])
    with pytest.raises(UserError, match=r"wrong length\)\. .* first 11 tokens.* Set max_seq_length: 11\.") as error:
        attempt(bert, data, tmp_path / "o", change=reading(1, 11))
    assert error.value.key == "max_seq_length"
    with pytest.raises(UserError, match=r"the shortest text alone fails .train, row \d+ .*Padded .* Remove this text"):
        attempt(bert, data, tmp_path / "o", change=reading(5, 16))


# ---- losses and gradients ------------------------------------------------------------------------------------------


def test_losses_that_are_not_finite(bert, tmp_path):
    def poison(trainer):
        with torch.no_grad():
            trainer.model.classifier.weight[0] = float("nan")

    data = table(tmp_path / "a.csv")
    with pytest.raises(UserError, match=r"NaN or infinite values before training .classifier.weight") as error:
        attempt(bert, data, tmp_path / "o", change=poison)
    assert error.value.key == "model_name_or_path"
    skipping, _ = attempt(bert, data, tmp_path / "o", change=poison, on_nonfinite="skip")
    assert any("the weights hold NaN" in note for note in skipping.notes)


def test_a_stage_that_the_loss_does_not_depend_on(bert, tmp_path):
    """Only the stage at fault is named; the others train."""

    def detach(trainer):
        trainer.model.bert.encoder.layer[0].register_forward_hook(lambda module, inputs, output: output.detach())

    stages = [{"epochs": 1, "train": "head"}, {"epochs": 1, "train": "layer.0"}]
    keys = dict(stages=stages, strategy=None, num_train_epochs=None)
    with pytest.raises(UserError, match=r"no gradient reaches what trains in stage 'layer.0'") as error:
        attempt(bert, table(tmp_path / "a.csv"), tmp_path / "o", change=detach, **keys)
    assert error.value.key == "stages"


# ---- saving --------------------------------------------------------------------------------------------------------


def test_a_model_that_would_not_load_as_it_was_trained(bert, tmp_path):
    """PiSSA changes the backbone, of which the adapter's files know nothing. An earlier run in the folder stays."""
    adapter = dict(peft_type="LORA", init_lora_weights="pissa_niter_4")
    data, keys = table(tmp_path / "a.csv"), dict(output_dir=str(tmp_path / "o"), **QUIET)
    with pytest.raises(UserError, match="changes the weights of the backbone") as error:
        fine_tune(bert, data, adapter=adapter, **keys)
    assert str(error.value).startswith("adapter: ") and not (tmp_path / "o").exists()
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "results.json").write_text("{}")
    with pytest.raises(UserError, match="would fail when it has trained"):
        fine_tune(bert, data, adapter=adapter, overwrite_output_dir=True, **keys)
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["results.json"], "what it holds stays"


def test_what_training_has_not_changed_yet_is_seen(bert, tmp_path):
    """A head that is not saved reloads with its first values: only other values show it."""

    def forget(trainer):
        model, save = trainer.model, trainer.model.save_pretrained
        first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trainer.model.save_pretrained = lambda folder, state_dict=None, **keys: save(
            folder, state_dict=model.state_dict() | {"classifier.bias": first["classifier.bias"]}, **keys
        )

    with pytest.raises(UserError, match=r"differing parameters: classifier.bias"):
        attempt(bert, table(tmp_path / "a.csv"), tmp_path / "o", True, forget)


def test_large_weights_are_not_saved_twice(bert, tmp_path, monkeypatch):
    """Of a large backbone with an adapter, the adapter and the head are still tried, without loading it again."""
    monkeypatch.setattr(preflight_saving, "MOST_BYTES", 6_000)
    data = table(tmp_path / "a.csv")
    tried, _ = attempt(bert, data, tmp_path / "o", True)
    assert "saving and loading" not in tried.done
    assert tried.notes == ["saving was not tried, because the weights take 0.0 GB, more than 6e-06 GB"]
    monkeypatch.setattr(preflight_saving, "reloaded", None)
    adapter = dict(peft_type="LORA", r=1)
    tried, _ = attempt(bert, data, tmp_path / "p", True, adapter=adapter)
    assert tried.done[-1] == "saving and loading"

    def forget(trainer):
        load = preflight_saving.load_peft_weights

        def halved(*args, **keys):
            return {n: t / 2 if "lora_B" in n else t for n, t in load(*args, **keys).items()}

        monkeypatch.setattr(preflight_saving, "load_peft_weights", halved)

    with pytest.raises(UserError, match="different logits after it was saved") as error:
        attempt(bert, data, tmp_path / "p", True, forget, adapter=adapter)
    assert error.value.key == "adapter"


def test_a_full_disk_is_left_alone(bert, tmp_path, monkeypatch):
    trainer = attempt(bert, table(tmp_path / "a.csv"), tmp_path / "o")[1]
    assert preflight_saving.why_not(trainer, tmp_path) == ""
    usage = shutil.disk_usage(tmp_path)._replace(free=20_000)
    monkeypatch.setattr(preflight_saving.shutil, "disk_usage", lambda _: usage)
    assert "more than a tenth of the disk's 0 MB free" in preflight_saving.why_not(trainer, tmp_path)


def test_a_signal_leaves_no_files(bert, tmp_path, monkeypatch):
    """SIGTERM while the model is being loaded; a folder of a process that was killed is removed."""
    left = tmp_path / "o" / ".preflight" / "x"
    left.mkdir(parents=True)

    def killed(*args):
        assert not left.exists()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(preflight_saving, "reloaded", killed)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as error:
        attempt(bert, table(tmp_path / "a.csv"), tmp_path / "o", True)
    assert error.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert not list((tmp_path / "o").iterdir())


# ---- images, streams, verbs ----------------------------------------------------------------------------------------


def test_images_of_a_size_that_the_model_does_not_take(resnet, tmp_path):
    def narrow(trainer):
        forward = trainer.model.forward

        def limited(pixel_values, **inputs):
            if pixel_values.shape[-1] != PIXELS:
                raise ValueError("wrong size")
            return forward(pixel_values, **inputs)

        trainer.model.forward = limited

    data = pictures(tmp_path / "d", 6)
    with pytest.raises(UserError, match="wrong size") as error:
        attempt(resnet, data, tmp_path / "o", change=narrow, image_size=48)
    assert error.value.key == "image_size"


def test_an_adapter_that_cannot_answer(bert, tmp_path):
    with pytest.raises(UserError, match=r"adapter of type POLY, .* Without the adapter the model answers") as error:
        attempt(bert, table(tmp_path / "a.csv"), tmp_path / "o", adapter={"peft_type": "POLY"})
    assert error.value.key == "adapter"


def test_a_stream_is_tried_on_its_beginning(bert, unfitted, tmp_path):
    tokenizer = words_tokenizer()
    tokenizer.add_tokens(["<user>"])
    data = table(tmp_path / "a.csv", [*TEXTS, "<user>"])
    keys = dict(streaming=True, max_steps=2, max_eval_samples=4)
    tried, _ = attempt(bert, data, tmp_path / "o", **keys)
    assert tried.done[0] == "the tokens of train and validation" and len(tried.done) == 3
    with pytest.raises(UserError, match="token '<user>'"):
        attempt(with_tokens(tmp_path / "m", tokenizer), data, tmp_path / "o", **keys)


def test_plan_tries_all_but_saving(bert, unfitted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "check_saving", None)
    keys = QUIET | dict(model_name_or_path=bert, train_file=table(tmp_path / "a.csv"), train_val_split=0.1)
    config = Config.from_sources({}, keys | dict(output_dir=str(tmp_path / "o")))
    planned = plan_only(config)
    assert planned.to_dict()["preflight"]["checks"] == planned.preflight.done and len(planned.preflight.done) == 4
    assert "Preflight: 4 checks in " in capsys.readouterr().out
    tokenizer = words_tokenizer()
    tokenizer.add_tokens(["indeed 16"])
    keys["model_name_or_path"] = with_tokens(tmp_path / "m", tokenizer)
    with pytest.raises(UserError, match="token 'indeed 16'"):
        plan_only(Config.from_sources({}, keys | dict(output_dir=str(tmp_path / "o"))))
