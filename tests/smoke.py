"""Every verb of an installed `hf-transfer`, from an empty folder, with tiny models: does the package work as installed?

    python -I tests/smoke.py FOLDER [--all]

runs with the Python that the package was installed into, from a wheel and not from this source tree, and leaves what
it wrote in FOLDER. Nothing is downloaded: models are random, and the hub is one of this machine. Verbs whose extra is
not installed are left out, unless all are asked for.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request as web
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PROGRAM = Path(sys.executable).parent / "hf-transfer"
DIRECT = web.build_opener(web.ProxyHandler({}))
INTERRUPTED = 130
TOKEN = "hf_smokewritesTHISisNOTaREALtoken"
SHORT = "--num_train_epochs 1 --per_device_train_batch_size 8"


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        words: of the command line, after `hf-transfer`.
        says: what its output must contain.
        writes: files and folders that must be there afterwards.
        hub: whether the hub of this machine is reachable.
        extra: of the package, that the verb needs.
        serves: whether it runs until it is stopped, and answers requests.
    """

    words: str
    says: str = ""
    writes: tuple[str, ...] = ()
    hub: bool = False
    extra: str = ""
    serves: bool = False

    @property
    def verb(self) -> str:
        return self.words.split()[0]


RUN = ("model.safetensors", "run.yaml", "results.json", "report.html", "README.md")
STEPS = (
    Step("--version"),
    Step("--help", "verbs:"),
    Step("--print_completion bash", "hf-transfer"),
    Step("doctor", "No problems found."),
    Step("plan tiny reviews.csv --strategy gradual", "Plan: gradual"),
    Step(f"train tiny reviews.csv all {SHORT} --strategy full", "accuracy", tuple(f"all/{name}" for name in RUN)),
    Step(
        f"train tiny reviews.csv other {SHORT} --strategy full --learning_rate 1e-3",
        "accuracy",
        ("other/results.json",),
    ),
    Step(f"train tiny reviews.csv lora {SHORT} --strategy lora", "accuracy", ("lora/adapter_model.safetensors",)),
    Step(f"train vit images pictures {SHORT} --strategy full", "accuracy", ("pictures/results.json",)),
    Step(f"train tiny reviews.csv ranks {SHORT} --strategy full --launch cpu_2proc", "", ("ranks/results.json",)),
    Step("predict lora 'a good film'", '"label"'),
    Step("predict pictures images/red --output reds.csv", "", ("reds.csv",)),
    Step("evaluate all", "accuracy"),
    Step("report all", "", ("all/report.html",)),
    Step("soup all other --output_dir averaged", "", ("averaged/model.safetensors",)),
    Step("export lora merged --format merged", "", ("merged/model.safetensors",)),
    Step("export lora onnx", "", ("onnx/model.onnx", "onnx/export.json")),
    Step("predict onnx 'a bad film'", '"label"'),
    Step("evaluate onnx", "accuracy"),
    Step("benchmark all --forms onnx,pt2 --seconds 0.1 --max_predict_samples 8", "onnx"),
    Step("serve lora --port 0", '"label"', extra="serve", serves=True),
    Step("demo lora --space space", "", ("space/app.py", "space/requirements.txt"), extra="demo"),
    Step("find-lr tiny reviews.csv rate --strategy full", "", ("rate/find_lr.csv", "rate/find_lr.png")),
    Step(f"compare tiny reviews.csv grid {SHORT} --grid '{{strategy: [linear-probe, full]}}' --seeds 0", "full"),
    Step("push all --hub_model_id alice/all", "alice/all", hub=True),
    Step("predict alice/all 'a good film'", '"label"', hub=True),
)


def make_inputs(folder: Path) -> None:
    """Two random models, a table and a folder of pictures."""
    from PIL import Image
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        BertTokenizer,
        ViTConfig,
        ViTForImageClassification,
        ViTImageProcessor,
    )

    sizes = dict(hidden_size=8, num_attention_heads=2, intermediate_size=16, num_hidden_layers=2)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", "good", "bad", *(f"n{i}" for i in range(40))]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=16).save_pretrained(folder / "tiny")
    config = BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder / "tiny")
    ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, **sizes)).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    rows = [f"a {('bad', 'good')[i % 2]} film n{i},{('bad', 'good')[i % 2]}" for i in range(40)]
    (folder / "reviews.csv").write_text("\n".join(["text,label", *rows]))
    for i in range(40):
        place = folder / "images" / ("red", "blue")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (200 - i, i, i) if i % 2 == 0 else (i, i, 200 - i)).save(place / f"{i}.png")


@contextmanager
def local_hub(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which clients find a hub on this machine."""
    command = [sys.executable, str(TESTS / "hub_server.py"), "--root", str(folder), "--token", f"{TOKEN}=alice:write"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            address = server.stdout.readline().split()[-1]
            nowhere = {f"{scheme}_proxy": "" for scheme in ("http", "https", "HTTP", "HTTPS")}
            yield {
                "HF_ENDPOINT": address,
                "HF_TOKEN": TOKEN,
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_OFFLINE": "0",
                **nowhere,
            }
        finally:
            server.terminate()


def run(step: Step, folder: Path, environment: dict[str, str]) -> str:
    """What is wrong with a step; empty if nothing is."""
    command = [str(PROGRAM), *shlex.split(step.words)]
    if step.serves:
        code, said = ask(command, folder, environment)
    else:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        code, said = done.returncode, done.stdout + done.stderr
    missing = [name for name in step.writes if not (folder / name).exists()]
    if code == 0 and step.says in said and not missing and "Traceback" not in said:
        return ""
    return f"exit code {code}, not written: {missing}, expected to say {step.says!r}\n{said}"


def ask(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """(exit code, what was said) of a service that is asked once and stopped as by Ctrl+C."""
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as service:
        assert service.stdout
        said = ""
        try:
            for line in service.stdout:
                said += line
                if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                    body = json.dumps({"inputs": ["a good film"]}).encode()
                    request = web.Request(f"{found[0]}/predict", body, {"Content-Type": "application/json"})
                    said += DIRECT.open(request, timeout=60).read().decode()
                    break
        finally:
            service.send_signal(signal.SIGINT)
        said += service.stdout.read()
    return 0 if service.returncode in (0, INTERRUPTED) else service.returncode, said


def unknown_verbs() -> set[str]:
    """Verbs that no step runs."""
    from hf_transfer.cli.verbs import VERBS

    return set(VERBS) - {step.verb for step in STEPS}


def main(folder: Path, needs_all: bool = False) -> int:
    import hf_transfer
    from hf_transfer.config.extras import missing_of

    home = Path(hf_transfer.__file__).parent
    if TESTS.parent in home.parents and "site-packages" not in home.parts:
        sys.exit(f"{home} is the source tree: run this with the Python of an environment that has the wheel.")
    if unknown := unknown_verbs():
        sys.exit(f"no step of {Path(__file__).name} runs {', '.join(sorted(unknown))}")
    folder.mkdir(parents=True)
    make_inputs(folder)
    # Nothing of the user's or of the source tree is seen.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    left_out = [step for step in STEPS if step.extra and missing_of(step.extra)]
    if left_out and needs_all:
        sys.exit(f"not installed: the extras {', '.join(step.extra for step in left_out)}")
    steps = [step for step in STEPS if step not in left_out]
    failed = 0
    with local_hub(folder / "hub") as hub:
        for step in steps:
            began = time.monotonic()
            wrong = run(step, folder, environment | hub if step.hub else environment)
            failed += bool(wrong)
            print(
                f"{'WRONG' if wrong else 'ok':<6}{time.monotonic() - began:5.1f} s  hf-transfer {step.words}",
                flush=True,
            )
            if wrong:
                print(wrong, flush=True)
    for step in left_out:
        print(f"left out: hf-transfer {step.words} (the extra {step.extra} is not installed)")
    print(f"{len(steps) - failed} of {len(steps)} commands work ({home})")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute(), "--all" in sys.argv))
