"""Recipes and documents: every YAML is a right configuration, every command in the documents is one that works."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import hf_transfer
from hf_transfer import layer_groups, make_plan
from hf_transfer.adapters.attach import attach
from hf_transfer.cli.launching import without_launch_keys
from hf_transfer.cli.program import usage
from hf_transfer.cli.verbs import VERBS
from hf_transfer.config.arguments.plan import PlanArguments
from hf_transfer.config.values import read_config_file
from hf_transfer.keys import parse_command_line
from hf_transfer.plan.strategies import STRATEGIES
from hf_transfer.settings import Config
from tests.helpers import texts, tiny_bert

ROOT = Path(__file__).parents[1]
RECIPES = [path for path in sorted(ROOT.glob("recipes/*/**/*.yaml")) if path.parent.name != "studies"]
HUB = [p for p in RECIPES if "bundled:" not in p.read_text()]
PLANS, QUICKSTART = ROOT / "docs" / "plans.md", ROOT / "docs" / "quickstart.md"
# Keys that cut a documented run down to a few steps.
SMALL = {"max_train_samples": 20, "max_eval_samples": 10, "max_predict_samples": 10, "save_strategy": "no"}
# What a run does besides training, and what has tests of its own.
QUICK = {"preflight": False, "label_issues": False}
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]


def configure(argv: list[str]) -> Config:
    """What `train` does before it loads anything."""
    given, problems = parse_command_line(argv)
    path = given.pop("config", None)
    return Config.from_sources(read_config_file(str(ROOT / path)) if path else {}, given, problems)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_recipe_is_a_configuration_with_its_figures(path):
    made = configure(["--config", str(path)])
    assert made.training.strategy and made.model.model_name_or_path and made.training.output_dir.startswith("out/")
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    command = next(line.split(":", 1)[1].strip() for line in header if line.startswith("# Command:"))
    assert command == f"accelerate launch recipes/train.py --config {path.relative_to(ROOT)}"
    expected = next(line for line in header if line.startswith("# Expected:"))
    time = next(line for line in header if line.startswith("# Time:"))
    hardware = next(line for line in header if line.startswith("# Hardware:"))
    if path in HUB:
        assert "not measured here" in expected and "not measured here" in time and "GPU" in hardware
    else:
        assert re.search(r"accuracy [01]\.\d+", expected) and "seed" in expected
        assert "core" in hardware and re.search(r"\d+ (s|min)", time)


def architecture(name: str) -> Any:
    """The hub model's configuration, from what is installed: no weights, no hub."""
    import transformers

    from hf_transfer.models.timm_names import timm_config

    if name.startswith("timm/"):
        return timm_config(name.removeprefix("timm/"))
    made = {
        "google-bert/bert-base-uncased": transformers.BertConfig,
        "answerdotai/ModernBERT-base": transformers.ModernBertConfig,
        "facebook/dinov2-base": transformers.Dinov2Config,
    }
    return made[name]()


@pytest.mark.parametrize("path", HUB, ids=lambda p: p.stem)
def test_recipes_for_hub_models_make_their_plan(path):
    """A dry run: the model in its real size without its weights, the plan in the recipe's own steps."""
    import torch
    import transformers

    made = configure(["--config", str(path)])
    kind = "ImageClassification" if "image" in path.parent.name else "SequenceClassification"
    with torch.device("meta"):
        model = getattr(transformers, f"AutoModelFor{kind}").from_config(architecture(made.model.model_name_or_path))
    backbone = sum(p.numel() for p in model.parameters())
    model = attach(model, made.training)
    plan = make_plan(made.training, layer_groups(model)).resolve(1000)
    assert plan.strategy == "linear-probe" or not plan.never_thawed or made.training.is_adapted
    assert not made.training.is_adapted or plan.stages[-1].num_trainable < 0.05 * backbone
    assert sum(s.epochs for s in plan.stages) == made.training.num_train_epochs
    millions = backbone / 1e6
    sizes = {
        "bert_base": 109,
        "modernbert_base": 150,
        "resnet50": 24,
        "vit_base": 87,
        "lora_vit": 87,
        "convnext_tiny": 29,
        "dinov2_base": 87,
    }
    assert millions == pytest.approx(sizes[path.stem], abs=1.5), "not the model that the recipe names"


def fences(path: Path) -> list[tuple[str, str]]:
    """(language, body) of each fenced block, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def blocks(path: Path, language: str) -> list[str]:
    return [body for name, body in fences(path) if name == language]


def commands(block: str) -> list[str]:
    lines = [line.split("#")[0].strip() for line in block.splitlines()]
    return [line for line in lines if line.startswith(("make ", "hf-transfer ", "accelerate ", "pip ", "python "))]


COMMANDS = [(path.name, command) for path in DOCUMENTS for block in blocks(path, "") for command in commands(block)]


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize(("document", "command"), COMMANDS)
def test_every_command_in_the_documents_is_right(document, command):
    program, *argv = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{argv[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    elif program == "pip":
        extras = re.search(r"(?:hf-transfer-toolkit|\.)\[(\w+)\]", command)
        assert extras and f"\n{extras[1]} = [" in (ROOT / "pyproject.toml").read_text()
    elif program == "accelerate":
        config = argv.index("--config_file") + 1
        assert argv[0] == "launch" and yaml.safe_load((ROOT / argv[config]).read_text())["num_processes"]
        script = argv.index("recipes/train.py")
        configure(argv[script + 1 :])
    elif program == "python":
        end = next((i for i, word in enumerate(argv) if word.startswith("--")), len(argv))
        assert all((ROOT / path).exists() for path in argv[:end])
        if keys := argv[end:]:  # of each recipe of a folder
            for recipe in sorted((ROOT / argv[end - 1]).glob("*.yaml")):
                configure(["--config", str(recipe), *keys])
    else:
        assert program == "hf-transfer"
        check(argv)


def check(argv: list[str]) -> None:
    """What a verb does with its words before it loads anything."""
    if argv[0] == "train":
        if argv[1:2] != ["--print_config"]:  # which needs nothing
            configure(without_launch_keys(argv[1:]))
    elif argv[0].startswith("--"):
        assert argv[0] in usage()
    else:
        made = VERBS[argv[0]].parser()
        names = {action.dest for action in made._actions}
        given = {word[2:] for word in argv if word.startswith("--")}
        assert given <= names, given - names


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """With its names as written; only the size of the data is cut down."""
    whole = hf_transfer.fine_tune
    small = {**SMALL, **QUICK, "num_train_epochs": 1, "max_train_samples": 40}
    monkeypatch.setattr(hf_transfer, "fine_tune", lambda *a, **k: whole(*a, **k, **small), raising=False)
    names = {"model": tiny_bert(), "train": texts(8), "validation": texts(4), "tokenizer": None}
    found = blocks(ROOT / "README.md", "python")
    assert len(found) == 3
    monkeypatch.chdir(tmp_path)
    rows = [f"review {n},{'good' if n % 2 else 'bad'}" for n in range(60)]
    for name, part in {"reviews": rows[:50], "labeled": rows[50:], "mood": rows, "topic": rows}.items():
        Path(f"{name}.csv").write_text("\n".join(["text,label", *part]))
    for block in found:
        exec(compile(block, "README.md", "exec"), names)
    result = names["result"]
    assert result.metrics["accuracy"] >= 0 and result.results["metrics_split"] == "test"
    assert result.confusion_matrix().to_numpy().sum() == 10 and "Plan: two-phase" in capsys.readouterr().out
    (after,) = blocks(ROOT / "docs" / "commands.md", "python")  # on what the first one trained
    Path("out").rename("all")
    Path("all/sentiment").rename("out")
    exec(compile(after, "commands.md", "exec"), names)
    assert [set(a) for a in names["answers"]] == [{"input", "label", "score", "scores"}] * 2


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_quickstart_runs(tmp_path, monkeypatch, capsys):
    """Its blocks in order, as written; runs are cut down, and what needs a network or an installation is left out."""
    from hf_transfer.cli import main

    monkeypatch.chdir(tmp_path)
    small = [
        word
        for name, value in {**SMALL, "per_device_train_batch_size": 20, **QUICK}.items()
        for word in (f"--{name}", str(value))
    ]
    ran = []
    for language, block in fences(QUICKSTART):
        if language == "python":
            exec(compile(block, QUICKSTART.name, "exec"), {})
        for command in commands(block) if language == "" else ():
            program, verb, *argv = shlex.split(command)
            if program == "hf-transfer" and verb not in ("doctor", "push"):
                # Of few examples a run that is told nothing makes many epochs.
                short = ["--num_train_epochs", "1"] if "--strategy" not in argv else []
                assert main([verb, *argv, *([*small, *short] if verb == "train" else [])]) == 0, command
                ran.append(verb)
    assert ran == ["plan", "train", "train", "train", "predict", "predict", "predict", "evaluate", "evaluate"]
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert len(answers) == 40 and {a["label"] for a in answers} <= {"negative", "positive"}
    assert len(json.loads(Path("digits.jsonl").read_text().splitlines()[0])["scores"]) == 3
    said = capsys.readouterr().out
    assert "Plan: gradual" in said and "['head', 'top 4 groups', 'all groups']" in said


def test_the_frozen_features_in_the_documents_run(tmp_path, monkeypatch, capsys):
    (code,) = blocks(ROOT / "docs" / "features.md", "python")
    monkeypatch.chdir(tmp_path)
    rows = (f"a {'good' if n % 2 else 'bad'} film {n},{'good' if n % 2 else 'bad'}" for n in range(40))
    Path("reviews.csv").write_text("\n".join(["text,label", *rows]))
    names: dict[str, Any] = {}
    exec(compile(code, "features.md", "exec"), names)
    assert names["train"].groups == ("embeddings", *(f"layer.{i}" for i in range(6)), "head")
    scores = re.findall(r"^(layer\.2|last) ([01]\.\d+)$", capsys.readouterr().out, flags=re.MULTILINE)
    assert [name for name, _ in scores] == ["layer.2", "last"] and float(scores[1][1]) > 0.9
    exec(compile(code, "features.md", "exec"), names)
    assert names["train"].computed == names["validation"].computed == 0


def test_the_plan_in_the_readme_is_the_quickstarts(capsys):
    """Character for character, from the recipe and a model of MiniLM's shape."""
    import torch
    import transformers

    made = configure(["--config", "recipes/text_classification/quickstart.yaml"])
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(config)
    plan = make_plan(made.training, layer_groups(model)).resolve(512 // 16)
    assert str(plan) in (ROOT / "README.md").read_text()


def test_the_documents_show_every_strategy():
    text = PLANS.read_text() + (ROOT / "docs" / "adapters.md").read_text()
    assert all(f"`{name}`" in text and f"`{name}`" in (ROOT / "README.md").read_text() for name in STRATEGIES)
    assert all(f"`{name}" in text or name in ("strategy", "layer_rules") for name in PlanArguments.__dataclass_fields__)


def test_the_tree_in_the_readme_exists():
    tree = next(b for b in blocks(ROOT / "README.md", "") if b.startswith("hf_transfer/\n"))
    for line in tree.splitlines():
        folder = ROOT / "hf_transfer" if line.startswith(" ") else ROOT
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            assert (folder / name).exists(), name


def test_the_names_and_counts_in_coming_from_are_right():
    """The table of names is what an unknown name is told; the lines and commands of each tool are counted."""
    from hf_transfer.config.arguments.other_names import NOTES, SYNONYMS, VERBS_ELSEWHERE

    text = (ROOT / "docs" / "coming-from.md").read_text()
    start, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    tools = [line for line in start.splitlines() if line.startswith("|")][2:]
    for tool, section in zip(tools, sections, strict=False):
        counts = [
            (len(body.replace("\\\n", "").splitlines()) - body.count("\n\n"), "line" if language == "py" else "command")
            for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)
        ]
        assert counts == [(int(n), unit) for n, unit in re.findall(r"(\d+) (line|command)", tool)], tool
    names = next(part for part in sections if part.startswith("What you call it"))
    rows = [
        re.findall(r"`([^`]+)`", cell)
        for row in names.split("| result")[0].splitlines()
        for cell in row.split("|")[1:3]
    ]
    pairs = [(word, ours) for words, ours in zip(rows[::2], rows[1::2], strict=True) for word in words]
    assert len(pairs) > 50
    for word, ours in pairs:
        assert SYNONYMS.get(word) in ours or VERBS_ELSEWHERE.get(word) in ours, word
    (others,) = re.findall(r"what to do instead: (.*?)\.\n", names, flags=re.DOTALL)
    assert set(re.findall(r"`(\w+)`", others)) <= set(NOTES)


def test_the_strategy_in_contributing_works():
    """The function as printed, added to the table, makes a plan."""
    code = next(b for b in blocks(ROOT / "CONTRIBUTING.md", "python") if b.startswith("def top_down"))
    names: dict = {}
    exec(f"from __future__ import annotations\n{code}", names)
    stages = names["top_down"](None, ["stem", "a", "b", "c"])
    assert [s["train"] for s in stages] == ["head", 2, "all"]
    groups = layer_groups(tiny_bert(layers=3))

    class Keys(PlanArguments):
        peak_learning_rate, num_train_epochs = 1e-3, 4.0

    STRATEGIES["top-down"] = names["top_down"]
    try:
        plan = make_plan(Keys(strategy="top-down"), groups)
    finally:
        del STRATEGIES["top-down"]
    assert [s.name for s in plan.stages] == ["head", "top 2 groups", "all groups"]


def test_the_configs_of_accelerate_say_when_to_pick_them():
    for path in sorted(ROOT.glob("accelerate_configs/*.yaml")):
        assert "Pick it" in path.read_text().split("compute_environment")[0], path


def test_the_architecture_in_contributing_is_all_that_is_needed(monkeypatch):
    """Without any other rule, the line as printed puts HF's ResNet in order."""
    from hf_transfer.layers import declared
    from tests import architectures as arch

    line = next(b for b in blocks(ROOT / "CONTRIBUTING.md", "python") if b.startswith('"resnet"'))
    rules = ast.literal_eval("{" + re.sub(r"\b(STEM|HEAD|LAST|NEXT)\b", lambda m: repr(m[1].lower()), line) + "}")
    model = arch.hugging_face("ResNetForImageClassification")
    monkeypatch.setattr(declared, "ARCHITECTURE_RULES", {})
    uses = arch.first_uses(model, lambda: model(**arch.inputs_of(model)))
    assert len(layer_groups(model)) != 5, "the rule is needed"
    monkeypatch.setattr(declared, "ARCHITECTURE_RULES", rules)
    groups = layer_groups(model)
    assert len(groups) == 5 and not arch.overlaps(groups, uses)
