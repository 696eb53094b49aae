"""Wrong input and a world that fails: each ends in one message that says what to do, never in a traceback."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from PIL import Image
from transformers import AutoTokenizer

from hf_transfer import UserError, fine_tune, hub_client
from hf_transfer.cli.program import main
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.load import load_splits
from hf_transfer.models import bundled as bundled_models
from tests import warm
from tests.helpers import tiny_bert, tiny_timm_vit


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a small model of each kind, good data, and much that is wrong."""
    root = tmp_path_factory.mktemp("world")
    tokenizer = AutoTokenizer.from_pretrained(bundled_models.model_path("bundled:minilm-l6"), model_max_length=16)
    bert = tiny_bert(vocab_size=tokenizer.vocab_size)
    for name in ("bert", "torn", "headless", "hollow"):
        tokenizer.save_pretrained(root / name)
        (bert.bert if name == "headless" else bert).save_pretrained(root / name)
    torn = root / "torn" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:1000])
    (root / "hollow" / "model.safetensors").unlink()
    tiny_timm_vit().save_pretrained(root / "vit")
    (root / "empty").mkdir()
    (root / "done").mkdir()
    (root / "done" / "results.json").write_text("{}")
    (root / "begun" / "checkpoint-3").mkdir(parents=True)

    rows = [f"a sentence of number {i},{'ab'[i % 2]}" for i in range(20)]
    (root / "good.csv").write_text("\n".join(["text,label", *rows]))
    (root / "nothing.csv").write_text("")
    (root / "header.csv").write_text("text,label\n")
    (root / "one_class.csv").write_text("text,label\na,x\nb,x\n")
    (root / "one_row.csv").write_text("text,label\na,x\n")
    (root / "no_label.csv").write_text("text,stars,size\na,1,2\nb,2,3\n")
    (root / "two_texts.csv").write_text("title,body,label\na,b,x\nc,d,y\n")
    (root / "binary.csv").write_bytes(bytes(range(256)) * 40)
    (root / "latin.csv").write_bytes("text,label\ncafé,a\nthé,b\n".encode("latin-1"))
    (root / "blank_label.csv").write_text("text,label\na,x\nb,\nc,y\n")
    (root / "nan_label.csv").write_text("text,label\na,1.5\nb,nan\nc,2.5\n")
    (root / "blank_text.csv").write_text("text,label\na,x\n,y\nc,x\nd,y\n")
    (root / "numbers.jsonl").write_text('{"text": 1, "label": "x"}\n{"text": 2, "label": "y"}\n')
    (root / "other_labels.csv").write_text("text,label\na,a\nb,z\n")
    (root / "torn.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "la')
    (root / "list.jsonl").write_text("[1, 2]\n")
    (root / "torn.parquet").write_bytes(b"PAR1 and no more")
    (root / "data.xlsx").write_bytes(b"PK")
    (root / "test_only").mkdir()
    (root / "test_only" / "test.csv").write_text("text,label\na,x\nb,y\n")
    (root / "images" / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(root / "images" / "cat" / "1.png")
    (root / "broken.png").write_bytes(b"\x89PNG and no more")
    (root / "twice.csv").write_text("text,label,text\nfirst,a,second\n")
    (root / "sentence.csv").write_text("sentence,label\nx,a\ny,b\n")
    (root / "hot.jsonl").write_text("".join(f'{{"text": "t{i}", "label": {[0, 0, 1][i:]}}}\n' for i in range(2)))
    (root / "hole.jsonl").write_text('{"text": "a", "label": ["x", null]}\n{"text": "b", "label": ["y"]}\n')
    (root / "deep.jsonl").write_text('{"text": "a", "label": {"x": 1}}\n{"text": "b", "label": {"x": 2}}\n')
    (root / "mixed").mkdir()
    (root / "mixed" / "train_data.csv").write_text("text,label\na,x\nb,y\n")
    (root / "mixed" / "reviews.csv").write_text("text,label\na,x\nb,y\n")
    (root / "date.yaml").write_text("output_dir: 2024-99-99\nnum_train_epochs: 0\n")
    (root / "bad.yaml").write_text("learning_rate: [1, 2\n")
    (root / "list.yaml").write_text("- 1\n- 2\n")
    (root / "typo.yaml").write_text("learning_rat: 1e-3\nstrategy: gradul\n")
    (root / "trust.yaml").write_text("trust_remote_code: true\n")
    (root / "token.yaml").write_text("hub_token: hf_x\n")
    return root


TRAIN = "train --model_name_or_path {w}/bert --output_dir {w}/out"
GOOD = f"{TRAIN} --train_file {{w}}/good.csv"
CASES = [
    # ---- the command line and files of keys
    ("trian", "Did you mean 'train'?"),
    ("train --config {w}/none.yaml", "--config: '{w}/none.yaml' cannot be read"),
    ("train --config {w}/bad.yaml", "is not YAML"),
    ("train --config {w}/list.yaml", "is not a mapping of keys"),
    ("train --config {w}/typo.yaml", "learning_rat is not a key. Did you mean 'learning_rate'?"),
    ("train --config {w}/typo.yaml", "'gradul' is not one of"),
    ("train --config {w}/trust.yaml", "trust_remote_code cannot be set in a file"),
    ("train --config {w}/token.yaml", "set HF_TOKEN"),
    ("train", "dataset_name or train_file is missing"),
    ("train --print_config --learning_rat 3", "Did you mean --learning_rate?"),
    (f"{GOOD} --seed 1 2", "--seed takes one value, not 2: 1, 2"),
    (f"{GOOD} --learn 1e-3", "learn is not a key"),
    (f"{GOOD} nonsense", "--train_file takes one value, not 2"),
    ("train nonsense --seed 1", "dataset_name or train_file is missing"),
    ("train one two three four", "'four' is one word too many: MODEL, DATA and OUT come first"),
    (f"{GOOD} --learning_rate", "--learning_rate needs a value"),
    (f"{GOOD} --learning_rate fast", "learning_rate: 'fast' is not a number"),
    (f"{GOOD} --learning_rate -1", "learning_rate: expected a number at least 0, got -1"),
    (f"{GOOD} --learning_rate nan", "learning_rate: 'nan' is not a number"),
    (f"{GOOD} --num_train_epochs 0", "num_train_epochs: expected a positive number, got 0"),
    (f"{GOOD} --per_device_train_batch_size 0", "per_device_train_batch_size: expected a positive number, got 0"),
    (f"{GOOD} --head_learning_rate -1e-3", "head_learning_rate"),
    (f"{GOOD} --stages '[{{epochs: 1, train: heat}}]'", "heat"),
    (f"{GOOD} --layer_lr_decay 0.9 --layer_lr_multiplier 2", "layer_lr_multiplier"),
    (f"{GOOD} --layer_learning_rates '{{layer.9: 1e-3}}'", "layer.9"),
    (f"{GOOD} --strategy partial --unfrozen_groups 99", "Cannot unfreeze 99 groups: the model has 3"),
    (f"{GOOD} --strategy gradual --unfreeze_until layer.7", "there is no group 'layer.7'"),
    (f"{GOOD} --fp16 --bf16", "fp16 and bf16 contradict each other"),
    (f"{GOOD} --dataset_name imdb", "dataset_name and train_file contradict each other"),
    (f"{GOOD} --from_scratch false --strategy scratch", "contradicts strategy: scratch"),
    (f"{GOOD} --metric_for_best_model acuracy", "Did you mean 'accuracy'?"),
    (f"{GOOD} --load_best_model_at_end --save_strategy no", "strateg"),
    (f"{GOOD} --lr_scheduler_type cosin", "Did you mean 'cosine'?"),
    (f"{GOOD} --lr_scheduler_type cosine_with_min_lr", "min_lr"),
    (f"{GOOD} --lr_scheduler_kwargs '{{speed: 3}}'", "speed"),
    (f"{GOOD} --optim adamw_bnb_8bit", "bitsandbytes"),
    (f"{GOOD} --optim_args 'fast'", "optim_args"),
    (f"{GOOD} --report_to wandbb", "wandbb"),
    (f"{GOOD} --max_seq_length 99999", "max_seq_length: 99999 exceeds the model's maximum of 16 tokens"),
    (f"{GOOD} --task image-classification", "no input column for image-classification"),
    (f"{GOOD} --task texts", "task: 'texts' is not one of"),
    (f"{GOOD} --train_val_split 1.5", "train_val_split: expected a number above 0 and below 1, got 1.5"),
    (f"{GOOD} --dataloader_drop_last --per_device_train_batch_size 64", "per_device_train_batch_size"),
    (f"{GOOD} --resume_from_checkpoint {{w}}/none", "there is no folder"),
    ("train --config {w}/date.yaml", "num_train_epochs: expected a positive number, got 0"),
    (f"{GOOD} --seed 4294967296", "seed: expected a number at least 0 and at most 4294967295, got 4294967296"),
    (f"{GOOD} --data_seed -1", "data_seed: expected a number at least 0"),
    (f"{GOOD} --num_train_epochs .inf", "num_train_epochs: expected a positive number, got inf"),
    (f"{GOOD} --max_steps -7", "max_steps: expected a number at least -1, got -7"),
    (f"{GOOD} --label_smoothing_factor 5", "label_smoothing_factor: expected a number at least 0 and below 1, got 5"),
    (f"{GOOD} --head_learning_rate .inf", "head_learning_rate: expected a positive number, got inf"),
    (f"{GOOD} --deepspeed {{w}}/none.json", "eepspeed"),
    (f"{GOOD} --prediction_loss_only true", "prediction_loss_only is not a key"),
    (f"{GOOD} --layer_rules '[[embeddings]]'", "layer_rules[0]: ['embeddings'] is not a pair"),
    (f"{GOOD} --layer_rules '[[3, stem]]'", "the pattern 3 is not a text"),
    (f"{GOOD} --layer_rules '[[layer, .nan]]'", "the depth nan is not"),
    (f"{GOOD} --layer_rules '[[layer, true]]'", "the depth True is not"),
    # ---- data
    (f"{GOOD} --test_file {{w}}/sentence.csv", "The test split has no column 'text'"),
    (f"{TRAIN} --train_file {{w}}/hot.jsonl", "hot.jsonl row 2: the label [0, 1] is not a vector of 3 entries"),
    (f"{TRAIN} --train_file {{w}}/hole.jsonl", "1 training examples have no label"),
    (f"{TRAIN} --train_file {{w}}/deep.jsonl", "expects one class per example"),
    (f"{TRAIN} --dataset_name {{w}}/mixed", "'reviews.csv' does not"),
    (f"{TRAIN} --train_file {{w}}/god.csv", "Did you mean 'good.csv'?"),
    (f"{TRAIN} --train_file {{w}}/nothing.csv", "is empty"),
    (f"{TRAIN} --train_file {{w}}/header.csv", "header.csv' has no examples"),
    (f"{TRAIN} --train_file {{w}}/one_class.csv", "has only one class"),
    (f"{TRAIN} --train_file {{w}}/one_row.csv", "has only one class"),
    (f"{TRAIN} --train_file {{w}}/no_label.csv", "Name one of stars, size"),
    (f"{TRAIN} --train_file {{w}}/good.csv --label_column_name lable", "Did you mean 'label'?"),
    (f"{TRAIN} --train_file {{w}}/good.csv --text_column_name txt", "Did you mean 'text'?"),
    (f"{TRAIN} --train_file {{w}}/two_texts.csv", "several columns may be the text: title, body"),
    (f"{TRAIN} --train_file {{w}}/binary.csv", "binary.csv' is not text in UTF-8"),
    (f"{TRAIN} --train_file {{w}}/latin.csv", "iconv -f cp1252 -t utf-8"),
    (
        f"{TRAIN} --train_file {{w}}/blank_label.csv",
        "1 training examples have no label in column 'label' (first: row 1)",
    ),
    (f"{TRAIN} --train_file {{w}}/nan_label.csv", "have no label"),
    (f"{TRAIN} --train_file {{w}}/blank_text.csv --max_train_samples 2", "empty text"),
    (f"{TRAIN} --train_file {{w}}/numbers.jsonl --text_column_name text", "contains int64, not text"),
    (f"{TRAIN} --train_file {{w}}/torn.jsonl", "torn.jsonl line 2: it is not valid JSON"),
    (f"{TRAIN} --train_file {{w}}/torn.parquet", "torn.parquet' cannot be read (Parquet magic"),
    (f"{TRAIN} --train_file {{w}}/data.xlsx", "Export the sheet as CSV"),
    (f"{GOOD} --validation_file {{w}}/other_labels.csv", "examples with unknown label 'z'"),
    (f"{GOOD} --validation_file {{w}}/no_label.csv", "validation split has no column 'label'"),
    (f"{GOOD} --problem_type regression", "regression expects numbers"),
    (f"{TRAIN} --dataset_name {{w}}/empty", "unrecognized data in folder"),
    (f"{TRAIN} --dataset_name {{w}}/test_only", "has no train split; its splits are test"),
    (f"{TRAIN} --dataset_name {{w}}/nowhere", "nowhere' does not exist"),
    (f"{TRAIN} --dataset_name bundled:rotten", "Did you mean 'bundled:rotten-tomatoes'?"),
    ("train --model_name_or_path {w}/vit --dataset_name {w}/images --output_dir {w}/out", "has only one class (cat)"),
    (f"{GOOD} --text_column_name '[text, text, label]'", "expected one column or a pair, got 3"),
    (f"{GOOD} --problem_type multi_label_classification", "expects lists of classes"),
    (f"{GOOD} --image_size -3", "image_size: expected a positive number, got -3"),
    # ---- models
    ("train --model_name_or_path {w}/bert --dataset_name bundled:digits --output_dir {w}/out", "is a bert model"),
    ("train --model_name_or_path {w}/none --train_file {w}/good.csv --output_dir {w}/out", "none' does not exist"),
    ("train --model_name_or_path {w}/empty --train_file {w}/good.csv --output_dir {w}/out", "has no config.json"),
    (
        "train --model_name_or_path {w}/good.csv --train_file {w}/good.csv --output_dir {w}/out",
        "good.csv' is data, and MODEL comes first",
    ),
    ("train --model_name_or_path {w}/torn --train_file {w}/good.csv --output_dir {w}/out", "cannot be loaded"),
    ("train --model_name_or_path {w}/hollow --train_file {w}/good.csv --output_dir {w}/out", "cannot be loaded"),
    ("train --model_name_or_path {w}/vit --train_file {w}/good.csv --output_dir {w}/out", "timm_wrapper model"),
    (
        "train --model_name_or_path bundled:minilm --train_file {w}/good.csv --output_dir {w}/out",
        "'bundled:minilm-l6'?",
    ),
    (
        "train --model_name_or_path timm/resnet5O.a1_in1k --dataset_name bundled:digits --output_dir {w}/out",
        "timm has no model 'resnet5O'. Did you mean 'timm/resnet50'?",
    ),
    ("train --model_name_or_path a:b --train_file {w}/good.csv --output_dir {w}/out", "a:b"),
    # ---- output folders
    (f"{GOOD} --output_dir {{w}}/done", "holds a finished run"),
    (f"{GOOD} --output_dir {{w}}/begun", "Continue it with --resume_from_checkpoint auto"),
    (f"{GOOD} --output_dir {{w}}/good.csv", "is a file, not a folder"),
    # ---- predict
    ("predict", "RUN and INPUT are needed"),
    ("predict {w}/bert", "RUN and INPUT are needed"),
    ("predict {w}/none text", "RUN: '{w}/none' does not exist"),
    ("predict {w}/hollow text", "cannot be loaded"),
    (
        "predict {w}/headless text",
        "holds no head for image-classification or text-classification: it contains BertModel",
    ),
    ("predict {w}/bert text --topk 2", "--topk is not a key. Did you mean --top_k?"),
    ("predict {w}/bert text --top_k 0", "--top_k: expected a positive number, got 0"),
    ("predict {w}/bert text --top_k", "--top_k needs a value"),
    ("predict {w}/bert text --top_k many", "--top_k: 'many' is not a whole number"),
    ("predict {w}/bert {w}/god.csv", "Did you mean 'good.csv'?"),
    ("predict {w}/bert {w}/data.xlsx", "has an unsupported file type"),
    ("predict {w}/bert {w}/two_texts.csv", "several columns may be the text"),
    ("predict {w}/bert {w}/good.csv --text_column_name txt", "has no column 'txt'"),
    ("predict {w}/bert {w}/header.csv", "holds no examples"),
    ("predict {w}/bert {w}/latin.csv", "is not text in UTF-8"),
    ("predict {w}/bert {w}/binary.csv", "is not text in UTF-8"),
    ("predict {w}/bert {w}/empty", "holds no"),
    ("predict {w}/bert text --output {w}/empty", "is a folder, not a file"),
    ("predict {w}/bert text --output {w}/none/x.jsonl", "there is no folder"),
    ("predict {w}/vit text", "there is no file or folder 'text'"),
    ("predict {w}/bert {w}/twice.csv", "has several columns called 'text'"),
    ("predict '' text", "RUN: it is empty"),
    ("predict {w}/vit ''", "there is no file or folder ''"),
    ("predict {w}/bert text --features=maybe", "--features: 'maybe' is not true or false"),
    # ---- evaluate and doctor
    ("evaluate {w}/bert --dataset_config_name x", "dataset_config_name: it belongs to a dataset_name"),
    ("evaluate {w}/bert --num_processes 2", "num_processes: this verb runs in one process"),
    ("predict {w}/bert text --launch=ddp", "launch: this verb runs in one process"),
    ("plan {w}/bert {w}/good.csv --num_processes 2", "num_processes: this verb runs in one process"),
    ("evaluate", "RUN is needed, a run's folder"),
    ("evaluate {w}/bert", "what to evaluate on"),
    ("evaluate {w}/bert --test_file {w}/good.csv --dataset_name imdb", "contradict each other"),
    ("evaluate {w}/bert --test_file {w}/good.csv", "with unknown labels 'a', 'b'"),
    ("evaluate {w}/bert --dataset_name {w}/test_only --split train", "split: the data has no split 'train'."),
    ("evaluate {w}/bert --test_file {w}/no_label.csv", "Name one of stars, size"),
    ("evaluate {w}/bert --test_file {w}/header.csv", "header.csv' has no examples"),
    ("evaluate {w}/bert {w}/good.csv --errors_file {w}/empty", "errors_file: '{w}/empty' is a folder"),
    ("evaluate {w}/bert {w}/good.csv --errors_file {w}/x.txt", "does not end in .csv"),
    ("evaluate {w}/bert {w}/good.csv --errors_file {w}/none/x.csv", "there is no folder"),
    ("evaluate {w}/bert {w}/good.csv --errors_file {w}/good.csv", "is the data to evaluate on, and would be replaced"),
    ("doctor visoin", "Did you mean 'vision'?"),
]


def words(command: str, world: Path) -> list[str]:
    import shlex

    return [word.replace("{w}", str(world)).replace("{{", "{").replace("}}", "}") for word in shlex.split(command)]


def run(argv: list[str], capsys) -> tuple[int, str, str]:
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def test_there_are_enough_cases():
    assert len({command for command, _ in CASES}) >= 100


@pytest.mark.parametrize(("command", "said"), CASES, ids=lambda text: re.sub(r"[^\w.-]+", " ", text)[-60:])
def test_wrong_input_ends_in_one_message(command, said, world, capsys):
    before = {p: p.stat().st_mtime_ns for p in world.rglob("*")}
    code, out, err = run(words(command, world), capsys)
    assert code == 2, err
    assert said.replace("{w}", str(world)) in err
    assert err.startswith("hf-transfer: ") and "Traceback" not in err and not out
    assert "--debug" not in err, "an error of ours that nobody explained"
    assert {p: p.stat().st_mtime_ns for p in world.rglob("*")} == before, "something was written"


# ---- the world fails: exit code 1 ----------------------------------------------------------------------------------


class _Hub(BaseHTTPRequestHandler):
    """Answers by the repository's name: `me/code-404` gets 404."""

    def do_GET(self):
        code = int(re.search(r"code-(\d+)", self.path)[1])
        self.send_response(code)
        if "gated" in self.path:
            self.send_header("X-Error-Code", "GatedRepo")
        if "revision" in self.path and "moved" in self.path:
            self.send_header("X-Error-Code", "RevisionNotFound")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        pass


@pytest.fixture
def loopback_hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _ask(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()


def _ask(monkeypatch, endpoint: str) -> None:
    monkeypatch.setattr(hub_client, "HfApi", partial(HfApi, endpoint=endpoint))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub_client.find.cache_clear()


@pytest.mark.parametrize(
    ("keys", "code", "said"),
    [
        (
            "--model_name_or_path me/code-404 --train_file {w}/good.csv",
            2,
            "'me/code-404' is not a local file or folder",
        ),
        ("--model_name_or_path me/code-401 --train_file {w}/good.csv", 2, "or it is private"),
        (
            "--model_name_or_path me/gated-code-403 --train_file {w}/good.csv",
            2,
            "is gated, and this account has no access",
        ),
        ("--model_name_or_path me/code-404 --model_revision moved --train_file {w}/good.csv", 2, "no revision 'moved'"),
        ("--model_name_or_path me/code-500 --train_file {w}/good.csv", 1, "refused the request"),
        ("--model_name_or_path me/code-403 --train_file {w}/good.csv", 1, "refused the request"),
        ("--model_name_or_path {w}/bert --dataset_name me/code-404", 2, "has no such dataset"),
        ("--model_name_or_path {w}/bert --dataset_name me/code-503", 1, "Try again later"),
    ],
)
def test_what_a_hub_answers(keys, code, said, loopback_hub, world, capsys):
    ended, out, err = run(words(f"train {keys} --output_dir {{w}}/out", world), capsys)
    assert (ended, out) == (code, "") and said in err and "Traceback" not in err
    assert not (world / "out").exists()


def test_a_hub_that_cannot_be_reached_is_told_fast(monkeypatch, world, capsys):
    """Port 9 of this machine refuses; a download would retry for half a minute before it says so."""
    _ask(monkeypatch, "http://127.0.0.1:9")
    for verb in ("train --train_file {w}/good.csv --output_dir {w}/out --model_name_or_path", "evaluate", "predict"):
        code, out, err = run(words(f"{verb} me/model" + (" text" if verb == "predict" else ""), world), capsys)
        assert (code, out) == (1, "")
        assert "the hub at http://127.0.0.1:9 cannot be reached" in err and "HF_HUB_OFFLINE=1" in err


def test_without_a_hub_an_unknown_id_is_wrong_input(world, capsys):
    """HF_HUB_OFFLINE=1, as the tests run: nothing is asked."""
    if not constants.HF_HUB_OFFLINE:
        pytest.skip("a hub may be asked here")
    code, _, err = run(
        words("train --train_file {w}/good.csv --output_dir {w}/out --model_name_or_path me/x", world), capsys
    )
    assert code == 2 and "'me/x' cannot be loaded" in err


@pytest.mark.parametrize("place", ["{w}/good.csv/out", "/proc/out"])
def test_a_folder_that_cannot_be_made(place, world, capsys):
    code, out, err = run(words(f"{GOOD} --output_dir {place}", world), capsys)
    assert (code, out) == (1, "") and "Choose another folder" in err


def test_a_folder_that_may_not_be_read(world, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs another user to become")
    (tmp_path / "closed").mkdir(mode=0o700)
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:3]:  # one more under xdist
        parent.chmod(0o755)
    done = warm.fork(
        lambda: load_splits(DataArguments(dataset_name=str(tmp_path / "closed"))) and 0, first=partial(os.setuid, 65534)
    )
    assert "UserError: dataset_name: folder" in done.stderr and "cannot be read (Permission denied)" in done.stderr


def _full_disk(folder: Path, world: Path, limit: int | None = None, more: str = "") -> subprocess.CompletedProcess[str]:
    argv = words(f"{GOOD} --num_train_epochs 1 --save_strategy no --output_dir {folder} {more}", world)
    return warm.hf_transfer(
        *argv, first=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)) if limit else int
    )


def _is_clean(done: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "The disk is full" in done.stderr and "Make room" in done.stderr, done.stderr
    names = {p.name for p in folder.glob("*")}
    assert "results.json" not in names and "model.safetensors" not in names and ".saving" not in names, names


@pytest.mark.parametrize("preflight", ["true", "false"])
def test_a_file_that_may_not_grow(preflight, world, tmp_path):
    """A quota: the operating system refuses the bytes of the model, of which there are about a million."""
    done = _full_disk(tmp_path / "out", world, 300_000, f"--preflight {preflight}")
    _is_clean(done, tmp_path / "out")
    assert (tmp_path / "out").exists() == (preflight == "false"), "the preflight comes before anything is written"


def test_a_full_disk(world, tmp_path):
    """The model takes about 1 MB, a checkpoint with the optimizer's state 3 MB."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("needs a disk of its own")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("may not mount")
    try:
        argv = words(f"{GOOD} --strategy two-phase --num_train_epochs 1 --output_dir {tmp_path}/out", world)
        full = warm.hf_transfer(*argv)
        _is_clean(full, tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
        assert main([*argv, "--save_strategy", "no"]) == 0
        done = _full_disk(tmp_path / "again", world)
        assert done.returncode == 1 and "MB free, and the run writes at least" in done.stderr
        assert not (tmp_path / "again").exists()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_weights_with_another_hash(monkeypatch, world, capsys):
    monkeypatch.setitem(bundled_models.MINILM_SHA256, "model.safetensors", "0" * 64)
    argv = "train --train_file {w}/good.csv --output_dir {w}/out --model_name_or_path bundled:minilm-l6"
    code, _, err = run(words(argv, world), capsys)
    assert code == 2 and "Checksum mismatch" in err and "Reinstall" in err


def test_a_mistake_of_ours_is_told_as_one(monkeypatch, world, capsys):
    def broken(*_, **__):
        raise KeyError("nobody thought of this")

    monkeypatch.setattr("hf_transfer.runs.prepare.load_splits", broken)
    code, out, err = run(words(GOOD, world), capsys)
    assert (code, out) == (1, "") and err.startswith("hf-transfer: KeyError: 'nobody thought of this'")
    assert "Traceback" not in err and "--debug" in err
    code, _, err = run(words(f"{GOOD} --debug", world), capsys)
    assert code == 1 and "Traceback" in err and "in broken" in err


def test_debug_shows_where_wrong_input_was_seen(world, capsys):
    code, _, err = run(words(f"{GOOD} --task texts --debug", world), capsys)
    assert code == 2 and "Traceback" in err and err.rstrip().splitlines()[-1].lstrip().startswith("- task: 'texts'")


def test_python_callers_get_the_same_message(world, tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        fine_tune(str(world / "empty"), str(world / "good.csv"), output_dir=str(tmp_path / "o"))
    assert issubclass(UserError, ValueError)


def test_bad_lines_of_a_table_are_answered_in_their_place(world, tmp_path, capsys):
    """One broken input does not cost the answers to the others; the exit code tells."""
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n{"text": 3}\n{"text": "four"}\n')
    code, out, err = run(words(f"predict {{w}}/bert {tmp_path}/x.jsonl --text_column_name text", world), capsys)
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and "2 of 4 inputs could not be read" in err
    assert ["error" in a for a in answers] == [False, True, True, False]
    assert answers[1]["error"] == "it has no text" and "3 is not a string" in answers[2]["error"]
