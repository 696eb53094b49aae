"""A folder that is a Space: the page of `demo` with everything that it needs, ready to be uploaded.

    app.py             starts the page
    requirements.txt   what is installed here, in these versions; torch and what Gradio refuses as the package allows
    README.md          the Space's card
    hf_transfer/       this package, which wins over another one of that name on the machine
    model/             the model, or a bank with its backbone; not for models of a hub, which are loaded from there
    examples.json      and examples/, where examples are asked for

Nothing in it says where the run's data is, or which examples it trained on.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement

import hf_transfer
from hf_transfer.adapters.attach import is_adapted
from hf_transfer.config.arguments.explaining import is_installed
from hf_transfer.config.arguments.export import check_new
from hf_transfer.config.extras import DISTRIBUTION
from hf_transfer.errors import UserError
from hf_transfer.files import as_json, write_json, write_text
from hf_transfer.inference.bank_files import BANK, save_tasks
from hf_transfer.inference.exported import ExportedModel
from hf_transfer.inference.predictor import Predictor
from hf_transfer.inference.run_keys import save_keys
from hf_transfer.inference.samples import Sample, save_samples
from hf_transfer.inference.served import Served
from hf_transfer.run_folder import EXAMPLES, model_files

MODEL, BACKBONE_FOLDER = "model", "backbone"
_PAIR = ("torch", "torchvision")  # as the package allows: pip picks a matching pair for the machine
_LFS = ("*.safetensors", "*.onnx", "*.onnx.data", "*.bin", "*.pt2")
_APP = '''"""The page of `hf-transfer demo`; see README.md."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

from pathlib import Path

from hf_transfer.inference.page import Page
from hf_transfer.inference.samples import load_samples
from hf_transfer.inference.served import Served

HERE = Path(__file__).parent
RUNS = {runs}

if __name__ == "__main__":
    served = Served.load([{place} for run in RUNS]{keys})
    Page(served, load_samples(HERE), {title!r}).launch()
'''


def write_space(
    folder: Path, words: Sequence[str], served: Served, samples: Mapping[str, Sequence[Sample]], title: str, **keys: Any
) -> Path:
    """Write a Space beside `folder` and rename.

    Args:
        folder: is made.
        words: the bank or the runs that `served` was loaded from.
        served: the tasks.
        samples: of each task, examples that everyone may see.
        title: of the page.
        **keys: to load it with, as of `Predictor.load`.

    Raises:
        UserError: there is such a folder already, or the package is not installed.
    """
    check_new(folder, "space")
    here = not all(_is_on_hub(word) for word in words)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".space-") as beside:
        whole = Path(beside) / "space"
        whole.mkdir()
        if here:
            _save_model(words, served, whole / MODEL)
        write_text(whole / "app.py", _app([MODEL] if here else words, here, title, keys))
        write_text(whole / "requirements.txt", "\n".join(_requirements(served)) + "\n")
        write_text(whole / "README.md", _card(title, [] if here else words, served))
        write_text(whole / ".gitattributes", "".join(f"{kind} filter=lfs diff=lfs merge=lfs -text\n" for kind in _LFS))
        if any(samples.values()):
            save_samples(samples, whole)
        package = Path(hf_transfer.__file__).parent
        shutil.copytree(package, whole / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        if folder.is_dir():
            folder.rmdir()  # empty: checked
        whole.replace(folder)
    return folder


# ---- the model ----


def _is_on_hub(word: str) -> bool:
    return not Path(word).expanduser().exists()


def _save_model(words: Sequence[str], served: Served, folder: Path) -> None:
    """The tasks, without what their runs say of data."""
    plain = {
        name: replace(predictor, record=None, data=predictor.other_data())
        for name, predictor in served.predictors.items()
    }
    (first, *_) = plain.values()
    if all(is_adapted(predictor.model) for predictor in plain.values()):
        _save_bank(plain, folder)
    elif isinstance(first.model, ExportedModel):
        run = Path(words[0]).expanduser()
        shutil.copytree(run if run.is_dir() else run.parent, folder, ignore=shutil.ignore_patterns(EXAMPLES))
        save_keys(first, folder)
    else:
        folder.mkdir()
        first.model.save_pretrained(folder)
        first.processor.save_pretrained(folder)
        save_keys(first, folder)


def _save_bank(predictors: Mapping[str, Predictor], folder: Path) -> None:
    """Adapters with their backbone, which is copied where it is a folder and stays on its hub where it is there."""
    save_tasks({name: (predictor, threading.Lock()) for name, predictor in predictors.items()}, "", folder)
    bank = json.loads((folder / BANK).read_text(encoding="utf-8"))
    for entry in bank["tasks"].values():
        place = folder / entry["folder"]
        (place / "README.md").unlink(missing_ok=True)  # of peft: it names the backbone's folder
        path = place / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        base = Path(config["base_model_name_or_path"])
        if base.is_dir():
            if not (folder / BACKBONE_FOLDER).exists():
                (folder / BACKBONE_FOLDER).mkdir()
                for file in model_files(base):
                    shutil.copy(file, folder / BACKBONE_FOLDER)
            write_json(path, {**config, "base_model_name_or_path": f"../../{BACKBONE_FOLDER}"})
            bank["backbone"] = BACKBONE_FOLDER
        else:
            bank["backbone"] = str(config["base_model_name_or_path"])
    write_json(folder / BANK, bank)


# ---- the other files ----


def _app(runs: Sequence[str], here: bool, title: str, keys: Mapping[str, Any]) -> str:
    keys = {name: value for name, value in keys.items() if not (here and name == "model_revision")}
    given = "".join(f", {name}={as_json(value)!r}" for name, value in keys.items())
    return _APP.format(runs=list(runs), place="str(HERE / run)" if here else "run", keys=given, title=title)


def _requirements(served: Served) -> list[str]:
    """What the page needs, as pip reads it; Gradio is named in the card."""
    try:
        declared = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError as error:
        raise UserError(
            f"{DISTRIBUTION} is not installed, only on the path, so that its requirements are not known.",
            "Install it, for example with `pip install --editable .`.",
            key="space",
        ) from error
    reads_images = any(p.task.suffixes for p in served.predictors.values())
    extras = {name for name, has in (("vision", reads_images), ("explain", is_installed())) if has}
    exports = [p.model.about.format for p in served.predictors.values() if isinstance(p.model, ExportedModel)]
    wanted = [r for r in declared if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in ("", *extras))]
    runtimes = {"onnx": "onnxruntime", "openvino": "openvino"}
    names = [*wanted, *(Requirement(runtimes[form]) for form in exports if form in runtimes)]
    return sorted({_pinned(requirement) for requirement in names})


def _pinned(requirement: Requirement) -> str:
    """In the version that is installed here, unless Gradio refuses it: the Space installs both together."""
    installed = metadata.version(requirement.name).partition("+")[0]
    of_gradio = (r for r in map(Requirement, metadata.requires("gradio") or ()) if r.name == requirement.name)
    if requirement.name in _PAIR or not all(r.specifier.contains(installed) for r in of_gradio):
        return f"{requirement.name}{requirement.specifier}"
    return f"{requirement.name}=={installed}"


def _card(title: str, hub_ids: Iterable[str], served: Served) -> str:
    head = {
        "title": title,
        "sdk": "gradio",
        "sdk_version": metadata.version("gradio"),
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": "app.py",
        "pinned": False,
        **({"models": [word.partition("@")[0] for word in hub_ids]} if hub_ids else {}),
    }
    tasks = [
        f"| {_cell(name)} | {predictor.task.name} | {_cell(', '.join(predictor.labels.names))} |"
        for name, predictor in served.predictors.items()
    ]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False, allow_unicode=True).rstrip(),
            "---",
            "",
            f"# {title}",
            "",
            "A page to try a trained model on, written by `hf-transfer demo --space`.",
            "",
            "| task | reads | labels |",
            "|---|---|---|",
            *tasks,
            "",
            f"`hf_transfer/` is a copy of hf_transfer {hf_transfer.__version__} (Apache-2.0).",
            "",
        ]
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
