"""`hf-transfer plan`."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from hf_transfer.cli.imports import quick_imports
from hf_transfer.cli.words import check_run, read_run, run_keys, run_parser
from hf_transfer.config.fields import Key, setting
from hf_transfer.config.places import check_model
from hf_transfer.errors import UserError

HELP = (
    "What a run would do, with the keys of train: stages, learning rates, memory, time, money. Trains nothing and "
    "writes nothing. Without data, the plan is for the model alone."
)


@dataclass
class PlanVerbArguments:
    """How a plan is shown."""

    json: bool = setting(False, "print one JSON object instead of tables")
    preview: str | None = setting(None, "augmented images to draw (.png, .svg, .pdf)")
    depth_map: str | None = setting(None, "learning rates to draw (.png, .svg, .pdf)")
    gpus: list[str] | None = setting(None, "GPUs to compare (default: all of the table)")
    models: list[str] | None = setting(None, "models to rank on the data instead")


def parser() -> argparse.ArgumentParser:
    return run_parser("plan", HELP, PlanVerbArguments)


def keys() -> dict[str, Key]:
    return run_keys("plan", PlanVerbArguments)


def run(argv: Sequence[str]) -> int:
    """Show what a run would do."""
    file, given, values, problems = read_run("plan", argv, parser(), PlanVerbArguments)
    needs, models = ("model",), values["models"]
    if models:
        given["model_name_or_path"] = _readable(models)
    check_run(file, given, problems, needs, talks=not values["json"])

    from hf_transfer.analysis.prices import read_prices

    prices = read_prices({**file, **given}.get("prices_file"), values["gpus"])

    with quick_imports():
        from hf_transfer.report.depth_map import check_picture
        from hf_transfer.settings import Config

    if values["depth_map"]:
        check_picture(values["depth_map"])
    if values["preview"]:
        from hf_transfer.data.preview import check_preview

        check_preview(values["preview"])
    with tempfile.TemporaryDirectory() as folder:  # Trainer makes its folder
        config = Config.from_sources(file, {**given, "output_dir": folder}, needs=needs)
        talks = not (values["json"] or values["quiet"])
        if models:
            from hf_transfer.runs.ranking import rank_models

            ranking = rank_models(config, models, talks=talks)
            if values["json"]:
                print(json.dumps({"ranking": ranking.to_dict()}, indent=2))
            return 0

        from hf_transfer.runs.preview import plan_only

        planned = plan_only(config, talks=talks, preview=values["preview"], prices=prices)
    if values["json"]:
        print(json.dumps(planned.to_dict(), indent=2))
    if values["depth_map"]:
        planned.depth_map.draw(values["depth_map"])
    return 0


def _readable(models: Sequence[str]) -> str:
    """The first of the models that exists as far as the disk tells; the others may have a row that says why not.

    Raises:
        UserError: none does.
    """
    problems = []
    for name in models:
        try:
            check_model(name)
        except UserError as error:
            problems.append(error)
        else:
            return name
    raise problems[0]
