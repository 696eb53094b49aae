"""What is pushed of a run: exactly the files that load it, cleaned of what is true on this machine only, and checked.

They are staged beside the run, loaded as a stranger would load them, and must answer as the run does.
"""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi

from hf_transfer import hub_client, run_folder
from hf_transfer.adapters.files import check_reload, logits_of
from hf_transfer.errors import UserError, WorkFailed, one_line
from hf_transfer.hub import card
from hf_transfer.inference.predictor import Predictor
from hf_transfer.layers.forward_pass import example
from hf_transfer.run_folder import RUN_FILE

ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "config.json")
WHOLE = ("config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
PROCESSOR = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
_ONLY_HERE = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "merges_file")
_ABOUT_LOADING = ("is_local", "local_files_only")  # how a tokenizer was found here
TOLERANCE = 1e-4  # of logits, relative, where weights were merged or come from other files
KNOWN = (*ADAPTER, *WHOLE, *PROCESSOR)


def refuse_local(base: str) -> None:
    """Raises:
    UserError: a backbone is a folder of this machine, which nobody else has.
    """
    if card.hub_name(base) is None:
        raise UserError(
            f"RUN: its adapter needs the backbone {base!r}, a folder of this machine: nobody else could load what is "
            "pushed.",
            "Push a plain model with --merged, or push the backbone too and write its hub id into "
            "base_model_name_or_path of the run's adapter_config.json.",
        )


def results_of(folder: Path) -> dict[str, Any]:
    missing = [name for name in (run_folder.RESULTS, RUN_FILE, "config.json") if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"RUN: {str(folder)!r} holds no finished run: {', '.join(missing)} is not there.",
            "Give the output_dir of a run that has ended.",
        )
    try:
        results, _ = run_folder.read_results(folder)
        if "card" not in results:
            raise ValueError("it is of an older version, which wrote no card")
    except ValueError as error:
        raise UserError(f"RUN: the results in {str(folder)!r} cannot be read ({one_line(error)}).") from error
    return results


def stage(folder: Path, staged: Path, results: dict[str, Any], name: str, merged: bool, model: Any) -> list[str]:
    """Put what is pushed of the run in `folder` into `staged`, checked. Returns notes for the user.

    Args:
        folder: of the run.
        staged: an empty folder.
        results: of the run.
        name: the hub id that the card names.
        merged: a plain model, the adapter in its weights.
        model: as it was trained (default: as the run's files hold it).

    Raises:
        WorkFailed: the files do not load, do not answer as the run, or name a place of this machine.
    """
    is_adapter = results["adapter"] != "none" and not merged
    ours = model if model is not None else Predictor.load(folder).model
    if merged and results["adapter"] != "none":
        Predictor.load(folder).save_merged(staged)
        for path in staged.iterdir():
            if not any(fnmatch(path.name, pattern) for pattern in KNOWN):
                path.unlink()
    else:
        wanted = (*(ADAPTER if is_adapter else WHOLE), *PROCESSOR)
        for path in sorted(folder.iterdir()):
            if path.is_file() and any(fnmatch(path.name, pattern) for pattern in wanted):
                shutil.copyfile(path, staged / path.name)
    for path in staged.glob("*config.json"):
        _clean(path)
    _check(ours, staged, folder, exact=not merged)
    notes = _name_base(folder, staged, ours) if is_adapter else []
    (staged / run_folder.CARD).write_text(_card(folder, staged, results, merged, name), encoding="utf-8")
    _check_paths(staged, folder)
    return notes


def _clean(path: Path) -> None:
    """Remove what is true on this machine only."""
    found = json.loads(path.read_text(encoding="utf-8"))
    kept = {k: v for k, v in found.items() if k not in _ABOUT_LOADING}
    kept = {k: v for k, v in kept.items() if k not in _ONLY_HERE or not Path(str(v)).is_absolute()}
    if kept != found:
        _dump(kept, path)


def _dump(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def adapter_base(folder: Path) -> str:
    return str(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])


def _name_base(folder: Path, staged: Path, ours: Any) -> list[str]:
    """Write the backbone's hub id into the staged adapter's configuration. Returns notes.

    A bundled backbone, which is a folder here, is had from the hub by others: where the hub has it, it is compared.
    """
    local = adapter_base(folder)
    base = card.hub_name(local)
    assert base is not None, "refused before"
    config = json.loads((staged / "adapter_config.json").read_text(encoding="utf-8"))
    _dump({**config, "base_model_name_or_path": base}, staged / "adapter_config.json")
    try:
        hub_client.find("base_model_name_or_path", base)
    except WorkFailed:
        return []  # the hub fails: the push will say so
    except UserError:
        return [
            f"Note: the hub at {HfApi().endpoint} has no {base!r}, which is needed to load this; --merged needs none."
        ]
    if base != local:  # other files, the same weights
        _check(ours, staged, staged, exact=False)
    return []


def _check(ours: Any, staged: Path, folder: Path, exact: bool) -> None:
    """Load what would be pushed, under another seed, and compare its answers.

    Raises:
        WorkFailed: it does not load, or they differ.
    """
    batch, is_merged = example(ours), not (staged / "adapter_config.json").is_file()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() + 1)
        try:
            again = Predictor.load(staged).model
        except UserError as error:
            raise WorkFailed(
                f"What would be pushed of {str(folder)!r} cannot be loaded: {error.message}", error.fix
            ) from error
    if batch is None:
        return
    if exact:
        check_reload(ours, again, batch, folder)
        return
    one, other = logits_of(ours, batch), logits_of(again.to(ours.device), batch)
    apart = float((one - other).abs().max())
    if not apart <= TOLERANCE * max(1.0, float(one.abs().max())):
        raise WorkFailed(
            f"What would be pushed does not answer as the run (logits differ by {apart:.2g}): the adapter is another "
            + (
                "model merged into its backbone." if is_merged else "model on the hub's backbone, whose weights differ."
            ),
            "Push the adapter, without --merged." if is_merged else "Push a plain model with --merged.",
        )


def _card(folder: Path, staged: Path, results: dict[str, Any], merged: bool, name: str) -> str:
    """The run's card with the id in it; another one for a plain model, or where the backbone has got a hub id since."""
    own, (_, keys) = folder / run_folder.CARD, run_folder.read_results(folder)
    written = own.read_text(encoding="utf-8") if own.is_file() else None
    if merged and results["adapter"] != "none":
        return card.with_id(card.text(results, keys, merged=True), name)
    base = card.hub_name(adapter_base(staged)) if results["adapter"] != "none" else results["card"]["base_model"]
    is_as_made = written is None or card.with_id(written, "") == card.with_id(card.text(results, keys), "")
    if written is None or (is_as_made and base != results["card"]["base_model"]):
        written = card.text({**results, "card": {**results["card"], "base_model": base}}, keys)
    return card.with_id(written, name)


def _check_paths(staged: Path, folder: Path) -> None:
    """Raises:
    WorkFailed: a file names a folder of this machine.
    """
    _, keys = run_folder.read_results(folder)
    given = [keys.get(k) for k in ("model_name_or_path", "dataset_name", "train_file", "validation_file", "test_file")]
    places = [str(folder.resolve()), str(staged), str(Path.home()), *(str(g) for g in given if g)]
    places = [p for p in places if Path(p).is_absolute() and len(Path(p).parts) > 2]
    for path in (*staged.glob("*config.json"), staged / run_folder.CARD):
        text = path.read_text(encoding="utf-8")
        if found := [place for place in places if place in text]:
            raise WorkFailed(
                f"{path.name} names {found[0]!r}, a place of this machine, so nothing was pushed.",
                f"Remove it from {path.name} in the run's folder.",
            )
