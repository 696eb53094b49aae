"""`plan`, its map of groups and rates, and `freeze`: what is shown is what would train."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from hf_transfer import TransferTrainer, UserError, layer_groups, make_plan
from hf_transfer.cli.program import main
from hf_transfer.config.arguments.plan import PlanArguments
from hf_transfer.report.depth_map import depth_map
from tests.helpers import arguments, changed, copy_state, images, texts, tiny_bert, tiny_timm_resnet

GROUPS = layer_groups(tiny_bert(layers=4))
NAMES = [g.name for g in GROUPS]


class Keys(PlanArguments):
    peak_learning_rate, num_train_epochs = 1e-3, 4.0


def plan_of(**keys):
    return make_plan(Keys(**keys), GROUPS)


# ---- freeze --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [
        ("embeddings", ["embeddings"]),
        (["embeddings", "layer.1"], ["embeddings", "layer.1"]),
        ("layer.0-2", ["layer.0", "layer.1", "layer.2"]),
        (["embeddings", "layer.0-3"], ["embeddings", "layer.0", "layer.1", "layer.2", "layer.3"]),
        ("layer.2-2", ["layer.2"]),
    ],
)
@pytest.mark.parametrize("strategy", ["full", "gradual", "two-phase"])
def test_freeze_by_name(freeze, frozen, strategy):
    """Never trained in any stage, whatever the strategy counts; all else as without it."""
    plan, without = plan_of(strategy=strategy, freeze=freeze), plan_of(strategy=strategy)
    for stage, plain in zip(plan.stages, without.stages, strict=True):
        for group in GROUPS:
            for name in group.parameters:
                expected = 0.0 if group.name in frozen else plain.rate(group.name, name)
                assert stage.rate(group.name, name) == expected, (group.name, name)
    assert set(frozen) <= set(plan.never_thawed)


def test_a_name_also_means_what_is_inside_it():
    """Stages of timm and Swin: `layer1` is all of `layer1.0`, `layer1.1`; `layer.1` is not `layer.10`."""
    groups = layer_groups(tiny_timm_resnet())
    plan = make_plan(Keys(strategy="full", freeze=["stem", "layer1-2"]), groups)
    assert plan.never_thawed == ("stem", "layer1.0", "layer2.0")
    many = layer_groups(tiny_bert(layers=12))
    assert make_plan(Keys(strategy="full", freeze="layer.1"), many).never_thawed == ("layer.1",)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("MobileViTForImageClassification", "layer.2"),
        ("SiglipForImageClassification", "head"),
        ("SwinForImageClassification", "layers.0"),
        ("CvtForImageClassification", "stages.0"),
    ],
)
def test_a_name_means_groups_and_nothing_else(name, entry):
    """Parameters of other groups may have the same words in their names."""
    from tests import architectures as arch

    groups = layer_groups(arch.hugging_face(name))
    meant = {g.name for g in groups if g.name == entry or g.name.startswith(f"{entry}.")}
    (stage,) = make_plan(Keys(strategy="full", freeze=entry), groups).stages
    frozen = {(g.name, n) for g in groups for n in g.parameters if stage.rate(g.name, n) == 0}
    assert meant and frozen == {(g.name, n) for g in groups if g.name in meant for n in g.parameters}


def test_freeze_by_pattern_on_parameters():
    plan = plan_of(strategy="full", freeze=["attention", r"layer\.3\.output"])
    free = {n for g in GROUPS for n in g.parameters if plan.stages[0].rate(g.name, n) > 0}
    everything = {n for g in GROUPS for n in g.parameters}
    assert everything - free == {n for n in everything if ".attention." in n or "layer.3.output." in n}
    assert plan.never_thawed == ()


def test_freeze_comes_before_rates():
    plan = plan_of(strategy="full", freeze="layer.1", layer_learning_rates={r"layer\.\d": 5e-3})
    assert [plan.stages[0].rate(n) for n in NAMES] == [1e-3, 5e-3, 0.0, 5e-3, 5e-3, 1e-3]


@pytest.mark.parametrize(
    ("freeze", "said"),
    [
        ("layer.0-9", "no group 'layer.4' in 'layer.0-9'. The groups are embeddings, layer.0"),
        ("layr.1", "Did you mean 'layer.1'?"),
        (["stem"], "'stem' matches no group and no parameter"),
        ("(", "'(' matches no group"),
        ("layer.3-1", "no group 'layer.3-1'"),
        (["layer.0", "nothing", "nowhere"], "2 problems"),
        (NAMES, "trains nothing"),
    ],
)
def test_what_cannot_be_frozen(freeze, said):
    with pytest.raises(UserError) as raised:
        plan_of(strategy="full", freeze=freeze)
    assert said in str(raised.value)


@pytest.mark.parametrize("entry", [3, "", None])
def test_entries_that_are_no_text(entry):
    with pytest.raises(UserError, match="freeze"):
        arguments("unused", freeze=[entry])


@pytest.mark.parametrize(
    ("make", "data", "freeze", "frozen"),
    [
        (
            lambda: tiny_bert(layers=3, dropout=0.1),
            texts,
            ["embeddings", "layer.0-1"],
            ("embeddings", "layer.0", "layer.1"),
        ),
        (tiny_timm_resnet, images, ["stem", "layer1-3"], ("stem", "layer1.0", "layer2.0", "layer3.0")),
    ],
)
def test_what_is_frozen_by_name_does_not_move_by_one_bit(make, data, freeze, frozen, tmp_path):
    """Parameters and BatchNorm statistics, with weight decay on; all else moves."""
    model = make()
    before = copy_state(model)
    groups = layer_groups(model)
    args = arguments(tmp_path, strategy="full", freeze=freeze, weight_decay=0.5)
    TransferTrainer(model=model, args=args, train_dataset=data(8)).train()
    moved = changed(before, copy_state(model))
    held = {n for g in groups if g.name in frozen for n in g.parameters}
    assert not moved & held and moved >= {n for g in groups if g.name not in frozen for n in g.parameters} - {
        n
        for n in before
        if n.endswith("key.bias")  # attention does not depend on it
    }
    owners = {n.rpartition(".")[0] for n in held}
    assert not {n for n in moved if n.rpartition(".")[0] in owners}, "statistics of frozen BatchNorm"


# ---- the map -------------------------------------------------------------------------------------------------------


def test_every_cell_is_the_plans_rate():
    plan = plan_of(strategy="gradual", groups_per_unfreeze=2, layer_lr_decay=0.5, head_learning_rate=1e-2)
    made = depth_map(plan, GROUPS)
    assert [row.name for row in made.rows] == NAMES
    for row, group in zip(made.rows, GROUPS, strict=True):
        assert row.num_parameters == group.num_parameters
        assert row.rates == tuple((stage.rate(group.name),) for stage in plan.stages)
    lines = str(made).splitlines()
    assert lines[1].split("  ")[0] == "group" and "1 head" in lines[1] and "4 all groups" in lines[1]
    cells = {line.split()[0]: line.split()[-4:] for line in lines[3:]}
    assert cells["layer.3"] == ["-", "0.001", "0.001", "0.001"] and cells["embeddings"] == ["-", "-", "-", "6.3e-05"]
    assert cells["head"] == ["0.01"] * 4
    assert "attention, intermediate, output, pooler.dense" in str(made)


def test_a_group_with_several_rates_shows_them_all():
    model = tiny_bert(layers=4)
    for parameter in model.bert.encoder.layer[2].attention.parameters():
        parameter.requires_grad_(False)  # the caller's own freeze counts too
    groups = layer_groups(model)
    plan = make_plan(Keys(strategy="full", layer_learning_rates={r"layer\.1\.output": 5e-3}), groups)
    made = depth_map(plan, groups)
    rates = {row.name: row.rates[0] for row in made.rows}
    assert rates["layer.1"] == (5e-3, 1e-3) and rates["layer.2"] == (1e-3, 0.0) and rates["layer.3"] == (1e-3,)
    assert "0.005*" in str(made) and "* highest of several" in str(made)
    data = {row["name"]: row["learning_rates"] for row in made.to_list()}
    assert data["layer.1"] == [[5e-3, 1e-3]] and data["head"] == [1e-3]


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_the_picture(kind, tmp_path):
    made = depth_map(plan_of(strategy="gradual", layer_lr_decay=0.7), GROUPS)
    made.draw(tmp_path / f"map.{kind}")
    if kind == "png":
        with Image.open(tmp_path / "map.png") as picture:
            assert picture.width > 1000 and len(picture.convert("RGB").getcolors(10**6)) > 20
    else:
        assert (tmp_path / f"map.{kind}").stat().st_size > 3000
    depth_map(plan_of(strategy="linear-probe"), GROUPS).draw(tmp_path / f"one_rate.{kind}")


# ---- the verb ------------------------------------------------------------------------------------------------------

RUN = [
    *("--model_name_or_path", "bundled:minilm-l6", "--dataset_name", "bundled:rotten-tomatoes"),
    *("--max_train_samples", "64", "--per_device_train_batch_size", "16", "--strategy", "gradual"),
    *("--groups_per_unfreeze", "4", "--num_train_epochs", "3", "--layer_lr_decay", "0.5", "--learning_rate", "1e-3"),
]


def test_plan_prints_what_train_would_do(tiny_bert_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = ["--model_name_or_path", tiny_bert_folder, *RUN[2:], "--groups_per_unfreeze", "2"]
    assert main(["plan", *run, "--depth_map", "map.svg"]) == 0
    out = capsys.readouterr().out
    assert "Examples: train 64" in out and "3 all groups    1 from step 8" in out
    assert "Learning rate of each group by stage" in out and "embeddings" in out
    assert {p.name for p in tmp_path.iterdir()} == {"map.svg"}, "it writes nothing else"


def test_plan_as_json_is_the_plan_that_train_executes(tiny_bert_folder, tmp_path, capsys):
    run = ["--model_name_or_path", tiny_bert_folder, *RUN[2:], "--groups_per_unfreeze", "2"]
    assert main(["plan", *run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    small = ["--max_eval_samples", "8", "--max_predict_samples", "8", "--save_strategy", "no", "--logging_steps", "1"]
    assert main(["train", *run, *small, "--quiet", "--output_dir", str(tmp_path / "o")]) == 0
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    stages = [{k: v for k, v in s.items() if k != "start_step"} for s in found["stages"]]
    assert stages == results["plan"] and found["total_parameters"] == results["total_parameters"]
    assert [s["start_step"] for s in found["stages"]] == [0, 4, 8] and found["examples"]["train"] == 64
    rates = {g["name"]: g["learning_rates"] for g in found["groups"]}
    history = [json.loads(line) for line in (tmp_path / "o" / "history.jsonl").read_text().splitlines()]
    for entry in (e for e in history if "loss" in e):
        for name, rate in entry["learning_rate"].items():
            planned = rates[name][entry["stage"]] * (12 - entry["step"] + 1) / 12  # the run's linear schedule
            assert rate == pytest.approx(planned)


def test_plan_of_a_model_alone(capsys):
    """Without data and without an output_dir; for any key of a run."""
    assert main(["plan", "--model_name_or_path", "bundled:efficientnet-lite0", "--freeze", "stem", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dataset"] is None and found["strategy"] == "two-phase" and found["never_trained"] == ["stem"]
    assert found["groups"][0]["name"] == "stem" and found["groups"][-1]["modules"] == ["timm_model.classifier"]
    assert main(["plan", "--model_name_or_path", "bundled:minilm-l6", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["plan"], "model_name_or_path is missing"),
        (["plan", *RUN, "--depth_map", "map.jpg"], "unsupported file extension"),
        (["plan", *RUN, "--depth_map", "nowhere/map.png"], "folder 'nowhere' does not exist"),
        (["plan", *RUN, "--freeze", "[layer.7]"], "Did you mean 'layer."),
        (["plan", *RUN, "--freeze", "layer.2-7"], "no group 'layer.6' in 'layer.2-7'"),
        (["plan", *RUN[:6], "--strategy", "partial", "--unfrozen_groups", "9"], "Cannot unfreeze 9 groups"),
        (["plan", *RUN[:6], "--layer_lr_decay", "1.2"], "layer_lr_decay: 1.2 is over 1"),
        (["plan", *RUN[:6], "--layer_lr_decay", "0"], "layer_lr_decay: expected a positive number, got 0"),
        (["plan", *RUN[:6], "--layer_learning_rates", "{layr: 1}"], "pattern 'layr' matches no group"),
        (["plan", *RUN[:6], "--layer_rules", "[[^bert, nexxt]]"], "Did you mean 'next'?"),
        (["plan", *RUN[:6], "--strategy", "null"], "so there is no plan"),
    ],
)
def test_what_cannot_be_planned(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert said in err and not out and not list(tmp_path.iterdir())


def test_layer_rules_from_a_recipe(tmp_path, capsys, monkeypatch):
    """For a model whose own rules are gone: the same keys reach the loader, the plan and the trainer."""
    from hf_transfer.layers import declared
    from tests import architectures as arch

    arch.hugging_face("ResNetForImageClassification").save_pretrained(tmp_path / "m")
    monkeypatch.setattr(declared, "ARCHITECTURE_RULES", {})
    monkeypatch.setattr(declared, "_blocks", lambda core: [])
    argv = ["plan", "--model_name_or_path", str(tmp_path / "m"), "--json"]
    monkeypatch.setattr("hf_transfer.tasks.image_classification.load_processor", lambda *_: None)
    assert main(argv) == 2 and "Add ordered rules" in capsys.readouterr().err
    rules = "[['embedder', stem], ['stages\\.(\\d+)\\.layers\\.(\\d+)', null], ['^classifier', head]]"
    assert main([*argv, "--layer_rules", rules]) == 0
    names = [g["name"] for g in json.loads(capsys.readouterr().out)["groups"]]
    assert names == ["stem", "stages.0.layers.0", "stages.1.layers.0", "stages.1.layers.1", "head"]


def test_plan_without_data_puts_what_the_checkpoint_lacks_into_the_head(tmp_path, capsys):
    """BERT's pooler on a masked-language checkpoint, as `train` does."""
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    from hf_transfer.models import bundled as bundled_models

    config = BertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=16, num_hidden_layers=2)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(bundled_models.model_path("bundled:minilm-l6")).save_pretrained(tmp_path)
    assert main(["plan", "--model_name_or_path", str(tmp_path), "--strategy", "linear-probe", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "pooler.dense" in " ".join(found["groups"][-1]["modules"])
    assert found["stages"][0]["trainable_parameters"] == 8 * 8 + 8 + 2 * 8 + 2


def test_no_tax_of_the_check_before_training(tmp_path):
    """`check_optimization` leaves nothing behind: the losses are those without it."""
    losses = []
    for check in (False, True):
        torch.manual_seed(0)
        trainer = TransferTrainer(
            model=tiny_bert(), args=arguments(tmp_path, strategy="gradual"), train_dataset=texts(8)
        )
        if check:
            trainer.resolve_plan()
            trainer.check_optimization()
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == losses[1]
