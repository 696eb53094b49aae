"""The command line: exit codes, one message on stderr, nothing half-written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hf_transfer.cli import main

TEXT = ["--model_name_or_path", "bundled:minilm-l6", "--dataset_name", "bundled:rotten-tomatoes"]


def fails(argv, capsys) -> str:
    assert main(argv) == 2
    _out, err = capsys.readouterr()
    assert "Traceback" not in err and err.startswith("hf-transfer: ")
    return err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", *TEXT, "--strategy", "gradul"], "Did you mean 'gradual'?"),
        (["train", *TEXT[:2], "--dataset_name", "bundled:rotten"], "Did you mean 'bundled:rotten-tomatoes'?"),
        (["train", *TEXT[2:], "--model_name_or_path", "bundled:minilm"], "Did you mean 'bundled:minilm-l6'?"),
        (["train", *TEXT[:2], "--dataset_name", "./nowhere.csv"], "there is no file or folder './nowhere.csv'"),
        (
            [
                "train",
                *TEXT[2:],
                "--model_name_or_path",
                "timm/resnet999",
                "--from_scratch",
                "--task",
                "image-classification",
            ],
            "no input column",
        ),
        (["train", *TEXT, "--label_column_name", "lable"], "Did you mean 'label'?"),
        (["train", *TEXT, "--text_column_name", "txt"], "Did you mean 'text'?"),
        (
            ["train", *TEXT, "--strategy", "partial", "--unfrozen_groups", "99", "--max_train_samples", "16"],
            "99 groups cannot be unfrozen: the model has 7",
        ),
        (["train", *TEXT, "--text_column_name", "[text, text, label]"], "are 3 columns"),
        (["train", *TEXT, "--problem_type", "multi_label_classification"], "wants lists of classes"),
        (["train", *TEXT[2:], "--model_name_or_path", "bundled:efficientnet-lite0"], "is a timm_wrapper model"),
        (["train", *TEXT[:2], "--dataset_name", "bundled:digits"], "is a bert model"),
        (["train", *TEXT, "--report_to", "nothing", "--max_train_samples", "8"], "nothing"),
        (["train", *TEXT, "--max_seq_length", "100000"], "the model reads 512 tokens"),
        (["train", *TEXT, "--image_size", "-3"], "image_size: -3 is not positive"),
    ],
)
def test_wrong_input_ends_in_exit_code_2(argv, said, tmp_path, capsys):
    out = tmp_path / "out"
    assert said in fails([*argv, "--output_dir", str(out)] if argv[0] == "train" else argv, capsys)
    assert not out.exists() or not any(p.is_file() for p in out.rglob("*"))


def test_a_misspelt_timm_name_shows_the_nearest(tmp_path, capsys):
    said = fails(
        [
            "train",
            "--model_name_or_path",
            "timm/resnet5O",
            "--from_scratch",
            "--dataset_name",
            "bundled:digits",
            "--output_dir",
            str(tmp_path / "o"),
        ],
        capsys,
    )
    assert "timm has no model 'resnet5O'. Did you mean 'resnet50" in said


def test_help(capsys):
    assert main([]) == 2 and main(["--help"]) == 0 and main(["--version"]) == 0
    assert "hf-transfer VERB" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "--layer_lr_decay" in text and "--learning_rate" in text and "[5e-05]" in text


def test_both_commands_are_installed():
    """`hf-transfer` and `python -m hf_transfer` end alike, without a traceback."""
    beside = Path(sys.executable).with_name("hf-transfer")
    for command in ([str(beside)], [sys.executable, "-m", "hf_transfer"]):
        done = subprocess.run([*command, "nonsense"], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "is not a verb" in done.stderr and not done.stdout
