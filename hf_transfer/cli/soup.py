"""`hf-transfer soup`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from hf_transfer.cli.imports import quick_imports
from hf_transfer.cli.words import help_of, keys_with, read_words, words_parser
from hf_transfer.config.fields import Key, setting
from hf_transfer.errors import UserError

HELP = (
    "Average the weights of several runs, or of the checkpoints of one run, into a new folder that is used like a "
    "run's; or, with --with_pretrained, interpolate between the weights that a run started from and those that it "
    "ended with. What is kept is chosen on the validation split. RUN is the folder of a run or of a checkpoint."
)


@dataclass
class SoupArguments:
    """What is averaged, and how it is chosen."""

    output_dir: str | None = setting(None, "new folder for the averaged model")
    method: str = setting(
        "greedy",
        "greedy: the best one, and each that does not make it worse; uniform: all of them",
        choices=("greedy", "uniform"),
    )
    metric: str | None = setting(
        None, "validation metric that decides (default: accuracy, f1_micro or rmse, by problem type)"
    )
    with_pretrained: bool = setting(False, "interpolate between the weights that RUN started from and its own")
    alphas: float | list[float] | None = setting(
        None, "with_pretrained: weights of the fine-tuned model, from 0 to 1 (default: 0,0.25,0.5,0.75,1)"
    )
    forgetting_dataset_name: str | None = setting(
        None, "with_pretrained: labeled data of the checkpoint's own task, measured with its head (default: the run's)"
    )
    trust_remote_code: bool = setting(False, "run code from the model's repository")
    allow_pickle: bool = setting(False, "load weights that are not safetensors, from a source you trust")


def keys() -> dict[str, Key]:
    return keys_with(("soup", SoupArguments))


def parser() -> argparse.ArgumentParser:
    return words_parser("soup", "RUN ... --output_dir FOLDER", HELP, keys())


def run(argv: Sequence[str]) -> int:
    """Average weights."""
    words, values = read_words(parser(), argv, keys())
    if not words:
        raise UserError("A RUN is needed: the folder of a run, or several.", help_of("soup"))
    if not values["output_dir"]:
        raise UserError("it is missing: the new folder for the averaged model.", key="output_dir")
    if values["with_pretrained"] and len(words) > 1:
        raise UserError(f"with_pretrained: one RUN is interpolated, and {len(words)} were given.")
    if values["alphas"] is not None and not values["with_pretrained"]:
        raise UserError("alphas has no effect without with_pretrained; add it.")
    if values["forgetting_dataset_name"] is not None and not values["with_pretrained"]:
        raise UserError("forgetting_dataset_name has no effect without with_pretrained; add it.")
    if values["with_pretrained"] and values["method"] != "greedy":
        raise UserError("method has no effect with with_pretrained; remove it.")

    with quick_imports():
        from hf_transfer.runs.soup import ALPHAS, soup, with_pretrained

    common = {"metric": values["metric"], "talks": not values["quiet"]}
    common |= {name: values[name] for name in ("trust_remote_code", "allow_pickle")}
    if values["with_pretrained"]:
        alphas = ALPHAS if values["alphas"] is None else values["alphas"]
        alphas = alphas if isinstance(alphas, list | tuple) else [alphas]
        old = values["forgetting_dataset_name"]
        done = with_pretrained(words[0], values["output_dir"], alphas, forgetting_dataset_name=old, **common)
    else:
        done = soup(words, values["output_dir"], values["method"], **common)
    if not values["quiet"]:
        print("\n".join(done.lines))
    return 0
