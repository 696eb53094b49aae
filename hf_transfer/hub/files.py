"""The files of a run that are pushed: exactly those needed to load it, without machine-specific entries, and verified.

The files are copied to a staging folder and loaded from there; the loaded model must give the same logits as the run.
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
from hf_transfer.adapters import backbone
from hf_transfer.adapters.files import check_reload, logits_of
from hf_transfer.errors import UserError, WorkFailed, one_line, option
from hf_transfer.hub import card
from hf_transfer.hub.card_average import INTERPOLATION, is_average
from hf_transfer.inference.predictor import Predictor
from hf_transfer.layers.forward_pass import example
from hf_transfer.run_folder import ADAPTER, INTERPOLATION_PNG, MODEL_FILES, PROCESSOR, RUN_FILE, SHOWING, WHOLE

_LOCAL_PATHS = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "merges_file")
_LOCAL_OPTIONS = ("is_local", "local_files_only")  # how a tokenizer was loaded on this machine
TOLERANCE = 1e-4  # relative difference of logits if weights were merged or come from other files
KNOWN = (*MODEL_FILES, *SHOWING, INTERPOLATION_PNG)


def refuse_local(base: str) -> None:
    """Check that the backbone of an adapter is available to others.

    Raises:
        UserError: it is a local folder.
    """
    if card.hub_name(base) is None:
        raise UserError(
            f"RUN: the backbone {base!r} of its adapter is a local folder, so nobody else could load the pushed "
            "adapter.",
            f"Push a plain model with {option('merged', True)}, or push the backbone and set base_model_name_or_path "
            "in the run's adapter_config.json to its hub id.",
        )


def results_of(folder: Path) -> dict[str, Any]:
    """The results of the finished run in `folder`.

    Raises:
        UserError: there is no finished run, or its results cannot be read.
    """
    missing = [name for name in (run_folder.RESULTS, RUN_FILE, "config.json") if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"RUN: {str(folder)!r} does not contain a finished run: {', '.join(missing)} is missing.",
            "Use the output_dir of a finished run.",
        )
    try:
        results, _ = run_folder.read_results(folder)
        if "card" not in results:
            raise ValueError(
                "the run that it was made from was not finished, and left nothing for a model card"
                if is_average(results)
                else "written by an older version without model cards"
            )
    except ValueError as error:
        raise UserError(f"RUN: the results in {str(folder)!r} cannot be read ({one_line(error)}).") from error
    return results


def stage(folder: Path, staged: Path, results: dict[str, Any], name: str, merged: bool, model: Any) -> list[str]:
    """Copy the files to push from `folder` to `staged`, and verify them.

    Args:
        folder: folder of the run.
        staged: an empty folder.
        results: results of the run.
        name: hub id to write into the card, see `card.at`.
        merged: push a plain model with the adapter merged into its weights.
        model: the trained model (default: loaded from the run's files).

    Returns:
        Messages for the user.

    Raises:
        WorkFailed: the files cannot be loaded, give different logits than the run, or contain local paths.
    """
    is_adapter = results["adapter"] != "none" and not merged
    trained = model if model is not None else Predictor.load(folder).model
    if merged and results["adapter"] != "none":
        Predictor.load(folder).save_merged(staged)
        for path in staged.iterdir():
            if not any(fnmatch(path.name, pattern) for pattern in MODEL_FILES):
                path.unlink()
    else:
        shown = [INTERPOLATION_PNG] if results.get(INTERPOLATION) else []  # in the card
        wanted = (*(ADAPTER if is_adapter else WHOLE), *PROCESSOR, *shown)
        for path in sorted(folder.iterdir()):
            if path.is_file() and any(fnmatch(path.name, pattern) for pattern in wanted):
                shutil.copyfile(path, staged / path.name)
    for path in staged.glob("*config.json"):
        _clean(path)
    _check(trained, staged, folder, exact=not merged)
    notes = _name_base(folder, staged, trained) if is_adapter else []
    (staged / run_folder.CARD).write_text(_card(folder, staged, results, merged, name), encoding="utf-8")
    _check_paths(staged, folder)
    return notes


def check_report(folder: Path) -> None:
    """Raises:
    UserError: the run has no report.
    """
    if not (folder / run_folder.REPORT).is_file():
        raise UserError(
            f"with_report: {str(folder)!r} has no {run_folder.REPORT}.", f"`hf-transfer report {folder}` writes it."
        )


def stage_report(folder: Path, staged: Path) -> list[str]:
    """Copy what shows the user's data to the files to push; returns messages for the user.

    Args:
        folder: folder of the run.
        staged: with the other files.
    """
    copied = [name for name in SHOWING if (folder / name).is_file()]
    for name in copied:
        shutil.copyfile(folder / name, staged / name)
    return [f"  These files show examples of your data, and where they are: {', '.join(copied)}."]


def _clean(path: Path) -> None:
    """Remove entries of a JSON file that only apply to this machine."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    kept = {k: v for k, v in entries.items() if k not in _LOCAL_OPTIONS}
    kept = {k: v for k, v in kept.items() if k not in _LOCAL_PATHS or not Path(str(v)).is_absolute()}
    if kept != entries:
        _dump(kept, path)


def _dump(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def adapter_base(folder: Path) -> str:
    """The backbone of the adapter in `folder`."""
    return str(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])


def _name_base(folder: Path, staged: Path, trained: Any) -> list[str]:
    """Write the backbone's hub id into the configuration of the staged adapter; returns messages for the user.

    A bundled backbone is a local folder here, but others load it from the hub. If the hub has it, the logits are
    compared.
    """
    local = adapter_base(folder)
    base = card.hub_name(local)
    assert base is not None, "refused by refuse_local"
    config = json.loads((staged / "adapter_config.json").read_text(encoding="utf-8"))
    _dump({**config, "base_model_name_or_path": base}, staged / "adapter_config.json")
    try:
        hub_client.find("base_model_name_or_path", base, revision=config.get("revision"))
    except WorkFailed:
        return []  # the push will report the failure of the hub
    except UserError:
        return [
            f"Note: loading this adapter requires {base!r}, which {HfApi().endpoint} does not have; "
            f"{option('merged', True)} pushes a model that does not require it."
        ]
    if base != local:  # different files that should have the same weights, up to rounding
        (staged / run_folder.BACKBONE).unlink(missing_ok=True)
        backbone.write(_check(trained, staged, staged, exact=False), staged)
    return []


def _check(trained: Any, staged: Path, folder: Path, exact: bool) -> Any:
    """Load the staged files, under a different seed, and compare the logits with those of the trained model.

    Returns:
        The loaded model.

    Raises:
        WorkFailed: the files cannot be loaded, or the logits differ.
    """
    batch, is_merged = example(trained), not (staged / "adapter_config.json").is_file()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() + 1)
        try:
            again = Predictor.load(staged).model
        except UserError as error:
            raise WorkFailed(
                f"The files of {str(folder)!r} to push cannot be loaded: {error.message}", error.fix
            ) from error
    if batch is None:
        return again
    if exact:
        check_reload(trained, again, batch, folder)
        return again
    expected, actual = logits_of(trained, batch), logits_of(again.to(trained.device), batch)
    difference = float((expected - actual).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise WorkFailed(
            f"The model to push gives different logits than the run (maximum difference {difference:.2g}): "
            + (
                "merging changes this model."
                if is_merged
                else "the weights of the backbone on the hub differ from those it was trained on."
            ),
            f"Push the adapter, without {option('merged')}."
            if is_merged
            else f"Push a plain model with {option('merged', True)}.",
        )
    return again


def _card(folder: Path, staged: Path, results: dict[str, Any], merged: bool, name: str) -> str:
    """The run's card with the hub id in it.

    A new card is written for a merged model, and if the run's own card is unedited and the backbone has got a hub id
    since.
    """
    own, (_, keys) = folder / run_folder.CARD, run_folder.read_results(folder)
    written = own.read_text(encoding="utf-8") if own.is_file() else None
    if merged and results["adapter"] != "none":
        return card.with_id(card.text(results, keys, merged=True), name)
    base = card.hub_name(adapter_base(staged)) if results["adapter"] != "none" else results["card"]["base_model"]
    is_unedited = written is None or card.with_id(written, "") == card.with_id(card.text(results, keys), "")
    if written is None or (is_unedited and base != results["card"]["base_model"]):
        written = card.text({**results, "card": {**results["card"], "base_model": base}}, keys)
    return card.with_id(written, name)


def _check_paths(staged: Path, folder: Path) -> None:
    """Check that the files contain no paths of this machine.

    Raises:
        WorkFailed: one does.
    """
    _, keys = run_folder.read_results(folder)
    given = [keys.get(k) for k in ("model_name_or_path", "dataset_name", "train_file", "validation_file", "test_file")]
    local = [str(folder.resolve()), str(staged), str(Path.home()), *(str(g) for g in given if g)]
    local = [p for p in local if Path(p).is_absolute() and len(Path(p).parts) > 2]
    for path in (*staged.glob("*config.json"), staged / run_folder.CARD):
        text = path.read_text(encoding="utf-8")
        if contained := [p for p in local if p in text]:
            raise WorkFailed(
                f"{path.name} contains the local path {contained[0]!r}, so nothing was pushed.",
                f"Remove it from {path.name} in the run's folder.",
            )
