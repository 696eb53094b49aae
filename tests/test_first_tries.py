"""What a new user types first and sees: five tries that work and six that do not, against transcripts to read.

A transcript is a file of `tests/first_tries/`: commands after `$`, Python after `>>>`, what they print after them, and
`exit N` where that is not 0. Decimal numbers, seconds, the interpreter's path and counts of right answers are left out
of the comparison. After a change, `FIRST_TRIES=write` in the environment writes them anew: read the difference as the
user would.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hf_transfer import UserError, fine_tune
from hf_transfer.cli.program import main
from hf_transfer.config import places

TRANSCRIPTS = Path(__file__).parent / "first_tries"
RIGHT = ("pictures", "table", "test-file", "frame", "predict")
WRONG = ("other-tools-keys", "misspelt-model", "misspelt-column", "missing-file", "many-labels", "two-texts")
EARLY = WRONG[:4]  # told before torch is imported
GOOD, BAD = ["lovely", "warm", "bright", "moving", "funny"], ["dull", "slow", "weak", "tired", "boring"]


def write_data(folder: Path) -> None:
    """Pictures in class folders and tables, as people have them."""
    random = np.random.default_rng(0)
    for i in range(200):
        name = ("blue", "red")[i % 2]
        pixels = random.integers(0, 60, (24, 24, 3), dtype=np.uint8)
        pixels[..., 0 if name == "red" else 2] += 150
        (folder / "pictures" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "pictures" / name / f"{i:03}.png")
    rows = []
    for i in range(340):
        words = random.choice((BAD, GOOD)[i % 2], 2, replace=False)
        rows.append((f"the film {i} is {words[0]} and {words[1]}", ("negative", "positive")[i % 2]))
    frame = pd.DataFrame(rows, columns=["text", "label"])
    frame[:300].to_csv(folder / "texts.csv", index=False)
    frame[300:].to_csv(folder / "labeled.csv", index=False)
    frame[300:304].to_csv(folder / "unlabeled.csv", columns=["text"], index=False)
    frame[:300].assign(label=[f"u{i}" for i in range(300)]).to_csv(folder / "ids.csv", index=False)
    titled = pd.DataFrame({"id": range(300), "title": [f"About film {i} and its makers" for i in range(300)]})
    titled.join(frame[:300]).rename(columns={"text": "review"}).to_csv(folder / "reviews.csv", index=False)


@pytest.fixture(scope="module")
def said(tmp_path_factory, tiny_bert_folder, tiny_vit_folder) -> Callable[[str], str]:
    """The transcript of a try as it is today; each is made once, in one folder."""
    folder, made = tmp_path_factory.mktemp("first"), dict[str, str]()
    write_data(folder)
    shutil.copytree(tiny_bert_folder, folder / "tiny-bert")
    shutil.copytree(tiny_vit_folder, folder / "tiny-vit")

    def transcript(name: str) -> str:
        if name not in made:
            with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
                for kind, model in (("text", "tiny-bert"), ("image", "tiny-vit")):  # installed, as far as anyone sees
                    patch.setitem(places.SUITED, kind, (model, "torch", "a/b"))
                lines = (TRANSCRIPTS / f"{name}.txt").read_text().splitlines()
                typed = [line for line in lines if line.startswith(("$ ", ">>> "))]
                made[name] = "\n".join(f"{line}\n{answer(line)}" for line in typed)
        return made[name]

    return transcript


def answer(line: str) -> str:
    """What a command or a line of Python prints."""
    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        if line.startswith("$ "):
            code = main(shlex.split(line)[2:])
        else:
            try:
                exec(line.removeprefix(">>> "), {"fine_tune": fine_tune, "pd": pd})
            except UserError as error:
                print(f"UserError: {error}")
    return plain(out.getvalue()) + (f"exit {code}\n" if code else "")


def plain(text: str) -> str:
    """A text without what differs from machine to machine."""
    text = text.replace(f"{shlex.quote(sys.executable)} -m hf_transfer", "hf-transfer")
    text = text.replace(shlex.quote(sys.executable), "python")
    text = re.sub(r"\b\d+(\.\d+)? s\b", "# s", text)
    text = re.sub(r"\d+\.\d+(e-?\d+)?|\b\d+e-\d+", "#", text)
    text = re.sub(r"\S+ examples/s  \S+ [MG]B", "# examples/s  # MB", text)
    text = re.sub(r"\(\d+ of (\d+)\) .*", r"(# of \1) #", text)
    return re.sub(r"^Most frequent errors: .*", "Most frequent errors: #", text, flags=re.MULTILINE)


def check(name: str, now: str) -> None:
    path = TRANSCRIPTS / f"{name}.txt"
    if os.environ.get("FIRST_TRIES") == "write":
        path.write_text(now)
    assert now == path.read_text()


@pytest.mark.parametrize("name", RIGHT)
def test_right(name, said):
    if name == "predict":
        said("table")  # whose model it uses
    check(name, said(name))


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name, said):
    began = time.process_time()
    now = said(name)
    assert time.process_time() - began < 1, "a mistake is told at once"
    assert "Traceback" not in now and "exit 2" in now
    check(name, now)


def test_mistakes_are_told_before_anything_slow_is_imported(tmp_path):
    write_data(tmp_path)
    commands = [
        shlex.split(line)[2:]
        for name in EARLY
        for line in (TRANSCRIPTS / f"{name}.txt").read_text().splitlines()
        if line.startswith("$ ") and "tiny" not in line
    ]
    code = (
        "import sys; from hf_transfer.cli.program import main\n"
        f"codes = [main(argv) for argv in {commands!r}]\n"
        "print(set(codes), {'torch', 'transformers', 'datasets', 'timm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "{2} set()", done.stdout + done.stderr


def test_every_transcript_is_compared():
    assert {path.stem for path in TRANSCRIPTS.glob("*.txt")} == {*RIGHT, *WRONG}
