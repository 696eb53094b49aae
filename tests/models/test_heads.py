"""When a checkpoint's head is kept, and what is said about it; MLP heads."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, BertModel

from hf_transfer import Predictor, TransferTrainer, UserError, fine_tune, layer_groups
from hf_transfer.adapters.attach import attach
from hf_transfer.adapters.files import reload_difference, write_config
from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.config.values import read_config_file
from hf_transfer.data.labels import Labels
from hf_transfer.errors import UserErrors
from hf_transfer.hub.files import stage
from hf_transfer.layers.forward_pass import example
from hf_transfer.models.heads import HEAD_KEY, MLPHead, MLPSpec, last_linear
from hf_transfer.models.load import load_config, load_model
from hf_transfer.settings import Config
from tests.helpers import arguments, changed, copy_state, texts, tiny_bert, tiny_timm_resnet, tiny_vit, with_mlp

TINY = dict(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)


def load(folder, *names):
    args = ModelArguments(str(folder))
    config = load_config(args, AutoModelForSequenceClassification)
    return load_model(args, AutoModelForSequenceClassification, config, Labels("single_label_classification", names))


def test_a_head_with_generic_names_is_kept_for_numbers(tmp_path):
    """A checkpoint of a script that named no classes: LABEL_0, LABEL_1."""
    trained = BertForSequenceClassification(BertConfig(**TINY, num_labels=2))
    trained.save_pretrained(tmp_path)
    kept = load(tmp_path, "0", "1")
    assert torch.equal(kept.model.classifier.weight, trained.classifier.weight) and not kept.fresh
    assert kept.model.config.id2label == {0: "0", 1: "1"}
    assert kept.notes == ("The checkpoint's head is kept: its LABEL_0, LABEL_1 are taken for 0, 1.",)


def test_a_new_head_is_not_explained_by_a_missing_one_where_there_is_one(tmp_path):
    BertForSequenceClassification(BertConfig(**TINY, num_labels=2)).save_pretrained(tmp_path / "head")
    for names in (("a", "b"), ("0", "1", "2")):
        loaded = load(tmp_path / "head", *names)
        assert "classifier.weight" in loaded.fresh
        assert loaded.notes[0].endswith("the checkpoint predicts LABEL_0, LABEL_1.")
    BertModel(BertConfig(**TINY)).save_pretrained(tmp_path / "none")
    assert load(tmp_path / "none", "a", "b").notes[0].endswith("the checkpoint has none.")


# ---- MLP heads -------------------------------------------------------------------------------------------------------

SMALL = dict(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
MODELS = {  # name: (model, where its MLP is, the head's layers below)
    "bert": (lambda: tiny_bert(), "classifier", []),
    "roberta": (
        lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SMALL)),
        "classifier.out_proj",
        ["classifier.dense"],
    ),
    "gpt2": (
        lambda: transformers.GPT2ForSequenceClassification(
            transformers.GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, pad_token_id=0, eos_token_id=2)
        ),
        "score",
        [],
    ),
    "resnet": (
        lambda: transformers.ResNetForImageClassification(
            transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
        ),
        "classifier.1",
        [],
    ),
    "vit": (tiny_vit, "classifier", []),
    "timm": (tiny_timm_resnet, "timm_model.fc", []),
}


def auto_of(model):
    is_text = model.main_input_name == "input_ids"
    return AutoModelForSequenceClassification if is_text else transformers.AutoModelForImageClassification


def load_as(model, folder, names=("a", "b", "c"), **keys):
    args, auto = ModelArguments(str(folder), **keys), auto_of(model)
    return load_model(args, auto, load_config(args, auto), Labels("single_label_classification", names))


def mlp_of(model):
    (head,) = [module for module in model.modules() if isinstance(module, MLPHead)]
    return head


@pytest.mark.parametrize("name", MODELS)
def test_an_mlp_replaces_the_last_linear_layer(name, tmp_path):
    """It belongs to the head's group, is loaded as it was saved, and plain transformers refuses it."""
    make, path, below = MODELS[name]
    plain = make()
    plain.save_pretrained(tmp_path / "plain")
    norm = "none" if name == "gpt2" else "batch"
    made = load_as(plain, tmp_path / "plain", head="mlp", head_hidden_size=5, head_dropout=0.1, head_norm=norm)
    head, model = made.model.get_submodule(path), made.model
    assert type(model) is type(plain) and isinstance(head, MLPHead)
    assert (head.dropout.p, head.output_dropout.p, head.hidden.out_features) == (0.1, 0.1, 5)
    assert made.notes[0].endswith(f" The layers of the head below it ({', '.join(below)}) are kept." if below else ".")
    own = {f"{path}.{n}" for n, _ in head.named_parameters()}
    assert set(made.fresh) == own and own <= set(layer_groups(model, made.layer_rules)[-1].parameters)
    kept = set(copy_state(plain)) - {f"{path}.weight", f"{path}.bias"}
    assert not changed({n: v for n, v in copy_state(plain).items() if n in kept}, copy_state(model))

    if head.norm is not None:
        head.norm.running_mean.uniform_()
        head.norm.weight.data.uniform_()
    model.save_pretrained(tmp_path / "mlp")
    torch.manual_seed(5)
    again = load_as(plain, tmp_path / "mlp")
    assert not again.fresh and not again.notes and type(again.model) is type(plain)
    assert not changed(copy_state(model), copy_state(again.model))
    batch = example(model)
    assert torch.equal(model.eval()(**batch).logits, again.model.eval()(**batch).logits)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        auto_of(plain).from_pretrained(tmp_path / "mlp")


def test_the_forward_pass_is_the_textbooks():
    torch.manual_seed(0)
    head = MLPHead(3, 2, MLPSpec("", 4, (0.25, 0.5), "batch"))
    x = torch.randn(6, 3)
    layers = torch.nn.Sequential(
        torch.nn.Dropout(0.25),
        head.hidden,
        copy.deepcopy(head.norm),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.5),
        head.output,
    )
    for training in (True, False):
        torch.manual_seed(1)
        expected = layers.train(training)(x)
        torch.manual_seed(1)
        assert torch.equal(head.train(training)(x), expected)


@pytest.fixture(scope="module")
def mlp_folder(tmp_path_factory):
    """Labels a and b, 6 hidden units."""
    folder = tmp_path_factory.mktemp("models") / "mlp"
    model = with_mlp(tiny_bert())
    model.config.id2label, model.config.label2id = {0: "a", 1: "b"}, {"a": 0, "b": 1}
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("names", "keys", "fresh", "said"),
    [
        ("ab", {}, set(), None),
        ("ba", {"head": "mlp"}, set(), "is kept"),
        ("ab", {"head": "mlp", "head_hidden_size": 6, "head_norm": "none"}, set(), "is kept"),
        ("ab", {"head": "mlp", "head_dropout": [0.0, 0.3]}, set(), None),
        ("xy", {}, {"output"}, "Newly initialized head with 2 outputs (x, y); the checkpoint predicts a, b."),
        ("abc", {"head": "mlp"}, {"output"}, "Newly initialized head with 3 outputs"),
        ("ab", {"head": "mlp", "head_hidden_size": 7}, {"hidden", "output"}, "replaces the checkpoint's MLP of 6"),
        ("ab", {"head": "mlp", "head_norm": "batch"}, {"hidden", "norm", "output"}, "replaces the checkpoint's MLP"),
        ("ab", {"head": "linear"}, {""}, "head: linear replaces the checkpoint's head, an MLP of 6 hidden units"),
    ],
)  # fmt: skip
def test_going_on_from_an_mlp_head(names, keys, fresh, said, mlp_folder):
    """What fits is kept, to the bit; what does not is new, and said."""
    saved, loaded = load_file(mlp_folder / "model.safetensors"), load_as(tiny_bert(), mlp_folder, tuple(names), **keys)
    assert {n.removeprefix("classifier").strip(".").rpartition(".")[0] for n in loaded.fresh} == fresh
    own = loaded.model.state_dict()
    differing = {n for n in own if n not in saved or not torch.equal(own[n], saved[n])}
    assert {n for n in differing if n in dict(loaded.model.named_parameters())} == set(loaded.fresh)
    assert said in " ".join(loaded.notes) if said else not loaded.notes
    assert (loaded.model.config.to_dict().get(HEAD_KEY) is None) == (keys.get("head") == "linear")
    if "head_dropout" in keys:
        assert MLPSpec.of(loaded.model.config).dropout == (0.0, 0.3) == (
            mlp_of(loaded.model).dropout.p, mlp_of(loaded.model).output_dropout.p
        )  # fmt: skip


def test_another_head_under_an_adapter(mlp_folder, tmp_path):
    """The adapter stays, to the bit; its head, of another kind or size than the checkpoint's, is new."""
    model = load_as(tiny_bert(), mlp_folder, ("a", "b")).model
    model = attach(model, arguments(tmp_path, adapter="lora"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 if parameter.requires_grad else 0.0)
    model.save_pretrained(tmp_path / "a")
    write_config(model, tmp_path / "a")
    kept = load_as(tiny_bert(), tmp_path / "a", ("a", "b"))
    assert not kept.fresh and not reload_difference(model, kept.model, example(model))
    lora = {n: p for n, p in copy_state(model).items() if "lora_" in n}
    for keys, names in (
        ({"head": "linear"}, {"weight", "bias"}),
        ({"head": "mlp", "head_hidden_size": 3}, {"hidden.weight", "hidden.bias", "output.weight", "output.bias"}),
    ):
        loaded = load_as(tiny_bert(), tmp_path / "a", ("a", "b"), **keys)
        assert set(loaded.fresh) == {f"classifier.{n}" for n in names} and not changed(lora, copy_state(loaded.model))
        trains = {n for n, p in loaded.model.named_parameters() if p.requires_grad and ".classifier." in n}
        assert trains == {f"base_model.model.classifier.modules_to_save.default.{n}" for n in names}


def test_random_weights_get_an_mlp_too(tmp_path):
    tiny_bert().save_pretrained(tmp_path)
    loaded = load_as(tiny_bert(), tmp_path, head="mlp", from_scratch=True)
    assert (mlp_of(loaded.model).hidden.out_features, mlp_of(loaded.model).output_dropout.p) == (512, 0.5)


def test_heads_that_an_mlp_does_not_fit(tmp_path):
    """Two linear layers side by side; a convolution; BatchNorm where every token is classified."""
    two = transformers.TimmWrapperForImageClassification(
        transformers.TimmWrapperConfig(
            architecture="deit_tiny_distilled_patch16_224", num_labels=2,
            model_args={"img_size": 32, "embed_dim": 12, "depth": 1, "num_heads": 2},
        )
    )  # fmt: skip
    two.save_pretrained(tmp_path / "two")
    with pytest.raises(UserError, match=r"head: .* is timm_model.head \(Linear\), timm_model.head_dist \(Linear\)"):
        load_as(two, tmp_path / "two", head="mlp")
    convolution = transformers.TimmWrapperForImageClassification(
        transformers.TimmWrapperConfig(architecture="test_resnet", num_labels=2, model_args={})
    )
    convolution.timm_model.fc = torch.nn.Conv2d(convolution.timm_model.fc.in_features, 2, 1)
    with pytest.raises(UserError, match=r"is timm_model.fc \(Conv2d\)"):
        last_linear(convolution)
    gpt2 = with_mlp(MODELS["gpt2"][0](), norm="batch")
    with pytest.raises(UserError, match=r"head_norm: batch is not possible .* its head reads every token"):
        gpt2(**example(gpt2))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"head": "mpl"}, "head: 'mpl' is not one of linear, mlp. Did you mean 'mlp'?"),
        ({"head": "mlp", "head_hidden_size": 0}, "head_hidden_size: expected a number at least 1, got 0."),
        ({"head": "mlp", "head_dropout": 1.0}, "at least 0 and below 1, got 1.0."),
        ({"head": "mlp", "head_dropout": [0.1, 0.2, 0.3]}, "head_dropout: expected one probability, or two"),
        ({"head": "mlp", "head_dropout": [0.1, "x"]}, "got [0.1, 'x']."),
        ({"head": "mlp", "head_dropout": []}, "got []."),
        ({"head": "mlp", "head_norm": "layer"}, "head_norm: 'layer' is not one of none, batch."),
        ({"head_hidden_size": 8}, "head_hidden_size has no effect without head: mlp; add head: mlp"),
        ({"head": "linear", "head_dropout": 0.1}, "head_dropout has no effect with head: linear"),
        ({"head": "mlp", "strategy": "linear-probe", "probe_solver": "lbfgs"}, "its loss is not convex"),
        ({"head": "mlp", "strategy": "two-phase", "head_init": "probe"}, "its loss is not convex"),
    ],
)  # fmt: skip
def test_keys_of_a_head_that_are_wrong(keys, said):
    with pytest.raises(UserErrors, match="1 problem") as error:
        Config.from_sources({}, {"model_name_or_path": "m", "train_file": "t", "output_dir": "o", **keys})
    assert said in str(error.value)


def test_a_checkpoints_mlp_head_is_not_solved_for(tmp_path):
    args = arguments(tmp_path, strategy="linear-probe", probe_solver="lbfgs")
    with pytest.raises(UserError, match="probe_solver: lbfgs cannot be combined with an MLP head"):
        TransferTrainer(with_mlp(tiny_bert()), args, train_dataset=texts())


# ---- runs with an MLP head -------------------------------------------------------------------------------------------

RUN = {
    "head": "mlp",
    "head_hidden_size": 6,
    "head_dropout": [0.1, 0.4],
    "head_norm": "batch",
    "strategy": "two-phase",
    "num_train_epochs": 2,
    "learning_rate": 0.02,
    "per_device_train_batch_size": 4,
}


@pytest.fixture(scope="module")
def run(tiny_bert_folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("mlp")
    lines = [f"word{i} of {label} {i % 5},{label}" for i in range(8) for label in ("no", "yes")]
    (place / "a.csv").write_text("\n".join(["text,label", *lines, ""]))
    return fine_tune(tiny_bert_folder, str(place / "a.csv"), output_dir=str(place / "out"), **RUN)


def test_a_run_with_an_mlp_head(run, tmp_path, capsys):
    """It is recorded, answers the same when loaded, repeats from its file, and what is pushed is checked."""
    sizes = {"type": "mlp", "path": "classifier", "hidden_size": 6, "dropout": [0.1, 0.4], "norm": "batch"}
    assert run.results["head"] == sizes == json.loads((run.output_dir / "config.json").read_text())[HEAD_KEY]
    assert "saving and loading" in run.results["preflight"]["checks"]
    again = Predictor.load(run.output_dir)
    assert again.predict(["word1 of yes", "no"]) == run.predict(["word1 of yes", "no"])
    assert again.evaluate()["metrics"] == run.metrics
    config = Config.from_sources(read_config_file(str(run.output_dir / "run.yaml")), {"output_dir": "o"})
    assert {name: config.values[name] for name in RUN} == RUN
    (tmp_path / "staged").mkdir()
    assert stage(run.output_dir, tmp_path / "staged", run.results, "a/b", False, None) == []
    assert "The head of this model is an MLP" in (tmp_path / "staged" / "README.md").read_text()


def test_a_resumed_run_with_an_mlp_head_equals_the_whole_one(run, tmp_path):
    """Bit for bit, statistics included; with another dropout it is another run."""
    first = min(run.output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    shutil.copytree(first, tmp_path / "o" / first.name)
    keys = dict(output_dir=str(tmp_path / "o"), resume_from_checkpoint="auto")
    train_file = run.results["dataset"]
    with pytest.raises(UserError, match=r"head_dropout: \[0.1, 0.4\] then, 0.2 now"):
        fine_tune(run.results["model"], train_file, **{**RUN, **keys, "head_dropout": 0.2})
    resumed = fine_tune(run.results["model"], train_file, **RUN, **keys)
    assert resumed.trainer.state.global_step == run.trainer.state.global_step
    assert not changed(copy_state(run.model), copy_state(resumed.model))
