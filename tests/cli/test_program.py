"""The command line: help, completion, recipes made from keys, how much is said."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from hf_transfer.cli.help import example
from hf_transfer.cli.imports import quick_imports
from hf_transfer.cli.program import SHELLS, main
from hf_transfer.cli.verbs import VERBS
from hf_transfer.config.arguments.short_help import SHORT
from hf_transfer.config.arguments.trainer import INHERITED
from hf_transfer.config.command_line import describe
from hf_transfer.config.fields import wrong_values
from hf_transfer.config.values import coerce, load_yaml
from hf_transfer.keys import COMMAND_LINE_ONLY, TOPICS, keys
from hf_transfer.settings import Config
from tests import warm

SMALL = [
    *("--model_name_or_path", "bundled:minilm-l6", "--dataset_name", "bundled:rotten-tomatoes"),
    *("--max_train_samples", "16", "--max_eval_samples", "8", "--max_predict_samples", "8"),
    *("--num_train_epochs", "1", "--strategy", "linear-probe"),
]


def help_of(verb: str, capsys, *words: str) -> str:
    assert main([verb, *(words or ("--help",))]) == 0
    return capsys.readouterr().out


def test_help_lists_the_verbs(capsys):
    assert main([]) == 2 and main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {verb} " in out for verb in VERBS) and "--print_completion" in out
    assert main(["--version"]) == 0


def test_help_of_train_is_grouped_by_topic_with_defaults_and_units(capsys):
    text = " ".join(help_of("train", capsys, "--help-all").split())
    assert set(keys()) <= {word.strip("-") for word in text.split() if word.startswith("--")}
    topics = list(dict.fromkeys(key.topic for key in keys().values()))
    assert len(topics) > 12 and topics[:4] == ["output", "model", "data", "plan"]
    places = [text.index(f" {topic}: --") for topic in topics]
    assert places == sorted(places)
    assert "--learning_rate FLOAT peak learning rate of the backbone (default: 5e-5; 1e-3 for strategy: linear-" in text
    assert "--warmup_steps FLOAT optimizer steps over which the learning rate rises from 0; below 1, a fract" in text
    assert "--unfreeze_interval FLOAT gradual: epochs between two unfreezes [1.0]" in text
    assert all(key.help for key in keys().values()), "a key without help"
    assert {name for name, about in INHERITED.items() if about.help} <= set(keys())
    assert "External Script Flags (not used by Trainer)" in TOPICS


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_help_of_a_run_is_short_and_says_how_to_see_more(verb, capsys):
    text = help_of(verb, capsys)
    shown = [word[2:] for word in text.split() if word.startswith("--") and word[2:] in keys()]
    assert sorted(shown) == sorted(name for names in SHORT.values() for name in names) and 12 < len(shown) < 20
    assert len(text.splitlines()) < 75 and f"hf-transfer {verb} --help-all" in text and "--quiet" in text
    assert "number of epochs; may be fractional [3.0]" in " ".join(text.split())


def test_help_of_one_key(capsys):
    text = " ".join(help_of("train", capsys, "bundled:minilm-l6", "--help", "lora_r").split())
    for said in ("--lora_r INT", "rank of lora", "a positive number", "default 8", "read by lora, dora", "is refused."):
        assert said in text, said
    assert "--strategy full" not in text and "--lora_r 8, or in YAML lora_r: 8" in text
    assert "allow_changed_plan" in help_of("train", capsys, "--help", "--learning_rate")
    assert "--top_k INT" in help_of("predict", capsys, "--help", "top_k")
    assert main(["train", "--help", "epochs"]) == 2
    assert "Did you mean --num_train_epochs?" in capsys.readouterr().err


def test_an_example_is_a_value_of_its_key():
    for key in keys().values():
        if shown := example(key):
            value = coerce(shown, key)
            assert not list(wrong_values({key.name: value}, {key.name: key.about})), (key.name, shown)


@pytest.mark.parametrize("verb", [v for v in VERBS if v not in ("train", "plan")])
def test_help_of_the_other_verbs(verb, capsys):
    text = help_of(verb, capsys)
    assert text.startswith(f"usage: hf-transfer {verb} ") and "--quiet" in text and "--debug" in text


def test_print_config_is_a_recipe_with_every_key(capsys):
    """It reads back as exactly the same configuration."""
    given = ["--learning_rate", "3e-5", "--stages", "[{epochs: 1, train: head}, {epochs: 2, train: all}]", *SMALL[:4]]
    assert main(["train", "--print_config", *given]) == 0
    out = capsys.readouterr().out
    file = load_yaml(out)
    assert set(file) == set(keys()) - set(COMMAND_LINE_ONLY)
    assert file["learning_rate"] == 3e-5 and file["stages"][1] == {"epochs": 2, "train": "all"}
    file.pop("num_train_epochs")  # `stages` sets it
    made = Config.from_sources(file, {"output_dir": "o"})
    expected = Config.from_sources(
        {},
        {
            "output_dir": "o",
            **{k: file[k] for k in ("learning_rate", "stages")},
            **dict(zip((w[2:] for w in SMALL[:4:2]), SMALL[1:4:2], strict=True)),
        },
    )
    assert made.values == expected.values
    lines = out.splitlines()
    described = describe(keys()["unfreeze_interval"])
    assert lines[lines.index("unfreeze_interval: 1.0") - 1] == f"# {described}"


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_scripts(shell, capsys):
    assert main(["--print_completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("layer_lr_decay", "top_k", "gradual", "evaluate"))
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


@pytest.mark.skipif(not shutil.which("bash"), reason="completes in bash")
@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["ev"], "evaluate"),
        (["train", "--layer_lr_d"], "--layer_lr_decay"),
        (["train", "--strategy", "gr"], "gradual"),
        (["predict", "--top"], "--top_k"),
    ],
)
def test_bash_completes(words, completed, tmp_path, capsys):
    main(["--print_completion", "bash"])
    (tmp_path / "c").write_text(capsys.readouterr().out)
    line = " ".join(["hf-transfer", *words])
    code = (
        f"source {tmp_path}/c; COMP_WORDS=({line}); COMP_CWORD={len(words)}; _shtab_hf_transfer; echo ${{COMPREPLY[@]}}"
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [completed]


def test_a_wrong_shell(capsys):
    assert main(["--print_completion", "cmd"]) == 2 and "bash, zsh, tcsh" in capsys.readouterr().err


def test_both_commands_are_installed():
    """`hf-transfer` and `python -m hf_transfer` end alike, without a traceback."""
    beside = Path(sys.executable).with_name("hf-transfer")
    for command in ([str(beside)], [sys.executable, "-m", "hf_transfer"]):
        done = subprocess.run([*command, "nonsense"], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "Unknown command 'nonsense'" in done.stderr and not done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["nonsense"],
        ["doctor", "--help"],
        ["train", "--help"],
        ["train", "--help-all"],
        ["--print_completion", "bash"],
        ["train", "x", "y", "--epochs", "3"],
        ["plan", "x", "--strategy", "gradul"],
        ["train", "bundled:minilm-l6", "reviws.csv"],
        ["train", "minilm", "bundled:digits"],
        ["predict", "x", "y", "--top", "3"],
        ["evaluate", "x", "--top", "3"],
    ],
)
def test_what_needs_no_model_imports_no_torch(words):
    code = "import sys; from hf_transfer.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "datasets"} & set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train bundled:minilm-l6 reviews.cvs out", "file 'reviews.cvs' does not exist. Did you mean 'reviews.csv'?"),
        ("evaluate ./rnu", "RUN: './rnu' does not exist. Did you mean 'run'?"),
        ("evaluate me/run review.csv", "'review.csv' does not exist. Did you mean 'reviews.csv'?"),
        ("evaluate me/run reviews.csv --errors_file no/x.csv", "errors_file: there is no folder 'no'"),
        ("predict ./rnu reviews.csv", "RUN: './rnu' does not exist. Did you mean 'run'?"),
        ("plan bundled:minilm-l6 --gpus H10", "'H10' is not in the price table. Did you mean 'H100'?"),
        ("find-lr bundled:minilm-l6 reviews.csv --num_steps 5", "num_steps: a range test of 5 steps is too short"),
        ("train bundled:minilm-l6 reviews.csv --prices_file no.yaml", "prices_file: 'no.yaml' cannot be read"),
        ("predict me/run review.csv", "INPUT: there is no file or folder 'review.csv'. Did you mean 'reviews.csv'?"),
    ],
)
def test_a_path_that_does_not_exist_is_told_without_torch(words, said, tmp_path):
    (tmp_path / "reviews.csv").write_text("text,label\na,b\n")
    (tmp_path / "run").mkdir()
    code = "import sys; from hf_transfer.cli import main\nprint(main(sys.argv[1:]), *sys.modules)"
    call = [sys.executable, "-c", code, *words.split()]
    done = subprocess.run(call, capture_output=True, text=True, check=True, cwd=tmp_path)
    code, *modules = done.stdout.splitlines()[-1].split()
    assert code == "2" and said in " ".join(done.stderr.split())
    assert not {"torch", "transformers", "datasets"} & set(modules)


def test_a_column_that_does_not_exist_is_told_without_torch(tmp_path):
    """Of each kind of file and each key of files, and of a folder; also a path of a model that is not there."""
    (tmp_path / "d.csv").write_text("text,label\na,1\nb,0\n")
    (tmp_path / "d.jsonl").write_text('{"text": "a", "label": 1}\n' * 2)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "label": [1]}), tmp_path / "d.parquet")
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "d.csv", tmp_path / "folder")
    lines = [["--dataset_name", file] for file in ("d.csv", "d.jsonl", "d.parquet", "folder")]
    lines += [["--train_file", "d.csv", f"--{split}_file", "d.jsonl"] for split in ("validation", "test")]
    lines = [[*line, "--text_column_name", "tekst"] for line in lines] + [["--dataset_name", "d.csv"]]
    code = "import sys, json; from hf_transfer.cli import main\nfor line in json.loads(sys.argv[1]):\n"
    code += "    main(['train', '--model_name_or_path', './modle' if len(line) == 2 else 'bundled:minilm-l6', *line])\n"
    code += "print(*sys.modules)"
    call = [sys.executable, "-c", code, json.dumps(lines)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.count("column 'tekst' does not exist") == 6 and "'./modle' does not exist" in done.stderr
    assert not {"torch", "transformers", "datasets", "pandas"} & set(done.stdout.splitlines()[-1].split())


# ---- how much is said ----------------------------------------------------------------------------------------------


def test_a_run_in_a_file_or_in_ci_is_plain_lines(tmp_path):
    """No warning of any library, no bar, nothing on standard error; with an evaluation, a checkpoint and a save."""
    argv = ["train", *SMALL, "--output_dir", str(tmp_path / "o")]
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(
        [sys.executable, "-m", "hf_transfer", *argv], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stderr == ""
    assert "\r" not in done.stdout and "Warning" not in done.stdout and "Plan: linear-probe, 1 epoch," in done.stdout
    assert "Result on test" in done.stdout and "Next:" in done.stdout


def test_quiet_says_nothing(tmp_path, capfd):
    assert main(["train", *SMALL, "--quiet", "--output_dir", str(tmp_path / "o")]) == 0
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "o" / "results.json").is_file()


def test_verbose_lets_the_libraries_speak(tiny_bert_folder, tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"word {i},{'ab'[i % 2]}\n" for i in range(20)))
    argv = ["train", "--model_name_or_path", tiny_bert_folder, "--train_file", str(tmp_path / "a.csv")]
    argv += [*SMALL[-4:], "--verbose", "--output_dir", str(tmp_path / "o")]

    def run() -> int:
        for handler in logging.getLogger("transformers").handlers:
            if type(handler) is logging.StreamHandler:
                handler.setStream(sys.stderr)  # as in a process that imports it anew
        return main(argv)

    done = warm.fork(run)
    assert done.returncode == 0, done.stderr
    assert "***** Running training *****" in done.stderr and "Plan: linear-probe" in done.stdout


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    """`hf-transfer predict ... | head -1`."""
    tail = "| head -1; echo ${PIPESTATUS[0]}"
    code = f"{sys.executable} -m hf_transfer --help {tail}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout.splitlines()[0].startswith("usage:")


def test_what_a_verb_imports_is_left_to_no_collector(monkeypatch):
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    monkeypatch.setitem(sys.modules, "torch", object())
    with quick_imports():  # in a process that has torch: nothing of what it holds is kept forever
        assert gc.isenabled()
    assert not frozen
    monkeypatch.delitem(sys.modules, "torch")
    with quick_imports():
        assert not gc.isenabled()
    assert gc.isenabled() and frozen == [False]
    with pytest.raises(ImportError), quick_imports():
        raise ImportError
    assert gc.isenabled() and frozen == [False]
