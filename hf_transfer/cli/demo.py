"""`hf-transfer demo`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hf_transfer.cli.imports import quick_imports
from hf_transfer.cli.listening import listening, url
from hf_transfer.cli.words import RunArguments, UseArguments, help_of, keys_with, read_words, words_parser
from hf_transfer.config.arguments.export import check_new
from hf_transfer.config.arguments.serving import ListenArguments
from hf_transfer.config.arguments.views import Views
from hf_transfer.config.extras import check_extra
from hf_transfer.config.fields import Key, setting, settings_of, wrong_values
from hf_transfer.config.places import check_run
from hf_transfer.errors import UserError, named
from hf_transfer.files import say

HELP = (
    "A web page to try a trained model on: a text or an image, probabilities, sets of labels, examples that the run "
    "held out, and a drop-down that switches the tasks of a bank. Nothing is loaded from elsewhere. RUN is the folder "
    "of a saved HeadBank, of a run or of any saved model, or a hub id; several runs with adapters on one backbone "
    "share it. Ctrl+C stops it."
)
PORT = 7860
TERMINATED = 143
_EXAMPLES = 8


@dataclass
class DemoArguments:
    """What the page shows."""

    title: str | None = setting(None, "heading of the page (default: the names of the tasks)")
    examples: int | None = setting(
        None, "examples of each run's validation split to click on (default: 8, in a Space none)", minimum=0
    )
    space: str | None = setting(
        None, "new folder to write the page to as a Space, with the model, ready to be uploaded; shows nothing"
    )


SECTIONS = (
    ("demo", DemoArguments),
    ("demo", ListenArguments),
    ("model", UseArguments),
    ("run", RunArguments),
    ("views", Views),
)


def keys() -> dict[str, Key]:
    return keys_with(*SECTIONS)


def parser() -> argparse.ArgumentParser:
    return words_parser("demo", "RUN...", HELP, keys())


def _check(words: list[str], values: dict[str, Any]) -> None:
    """Raises:
    UserError: what is typed is wrong, a package is missing, or the port is not free.
    """
    if not words:
        raise UserError("A RUN is needed: the folder of a run or of a saved HeadBank, or a hub id.", help_of("demo"))
    for word in words:
        check_run(word)
    for cls in (DemoArguments, ListenArguments):
        for problem in wrong_values(values, settings_of(cls)):
            raise UserError(problem)
    check_extra("demo")
    if values["space"] is not None:
        if not values["space"]:
            raise UserError("space: it is empty.", "Name a new folder.")
        check_new(Path(values["space"]), "space")
        values["examples"] = values["examples"] or 0
        return
    values["examples"] = _EXAMPLES if values["examples"] is None else values["examples"]
    values["port"] = PORT if values["port"] is None else values["port"]
    listening(values["host"], values["port"]).close()  # before the model is loaded


def run(argv: Sequence[str]) -> int:
    """Show the page until the process is stopped."""
    words, values = read_words(parser(), argv, keys(), _check)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with tempfile.TemporaryDirectory(prefix="hf-transfer-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "uploads")  # read when Gradio is imported

        with quick_imports():
            from hf_transfer.inference.page import Page
            from hf_transfer.inference.served import Served

        names = [f.name for f in (*fields(UseArguments), *fields(Views), *fields(RunArguments))]
        given = {name: values[name] for name in names if values[name] != keys()[name].default}
        used = {"model_revision" if name == "revision" else name: value for name, value in given.items()}
        served = Served.load(words, **used)
        title = values["title"] or named(served.names)
        samples = _samples(served, values, Path(folder))
        if values["space"]:
            from hf_transfer.inference.space import write_space

            write_space(Path(values["space"]), words, served, samples, title, **used)
            if not values["quiet"]:
                say(f"{values['space']} is a Space. Next: hf upload OWNER/NAME {values['space']} --repo-type space")
            return 0
        page = Page(served, samples, title)
        with listening(values["host"], values["port"]) as bound:
            port, address = bound.getsockname()[1], url(values["host"], bound)
        shown = page.launch(server_name=values["host"], server_port=port, prevent_thread_lock=True)
        if not values["quiet"]:
            say(f"Demo of {named(served.names)} at {address}. Ctrl+C stops it.")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # uploads are removed
        try:
            threading.Event().wait()
        finally:
            shown.close(verbose=False)
    return 0


def _samples(served: Any, values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Examples of each task; says for which there are none, and why."""
    from hf_transfer.inference.samples import samples_of

    samples = {}
    for i, (name, predictor) in enumerate(served.predictors.items()):
        try:
            samples[name] = samples_of(predictor, values["examples"], folder / f"examples-{i}")
        except UserError as error:
            if not values["quiet"]:
                sys.stderr.write(f"No examples for {name}: {error.message}\n")
    return samples
