"""Where a run goes on, or why its folder cannot be used."""

from __future__ import annotations

from pathlib import Path

from hf_transfer.adapters.files import adapter_config
from hf_transfer.errors import UserError, option
from hf_transfer.run_folder import REPLACED, RESULTS, RUN_FILE, same_folder, weights_in
from hf_transfer.settings import Config
from hf_transfer.training import checkpoints


def checkpoint_of(config: Config, output_dir: Path) -> str | None:
    """The checkpoint to go on from, if any.

    Raises:
        UserError: the folder holds a finished run, an unfinished one that nobody asked to resume, or
            one whose checkpoints cannot be resumed.
    """
    wanted = config.training.resume_from_checkpoint
    saved = checkpoints.checkpoints(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir: {str(output_dir)!r} is a file, not a folder.")
    _refuse_base(config, output_dir)
    if config.data.overwrite_output_dir and wanted is None:
        return None
    if (output_dir / RESULTS).is_file() and not config.data.overwrite_output_dir:
        raise UserError(
            f"output_dir: {str(output_dir)!r} holds a finished run.",
            f"Choose another folder, or add {option('overwrite_output_dir', True)}.",
        )
    if wanted is not None and wanted != "auto":
        return str(checkpoints.checked(wanted))
    if wanted is None and saved:
        raise UserError(
            f"output_dir: {str(output_dir)!r} holds an unfinished run.",
            f"Continue it with {option('resume_from_checkpoint', 'auto')}, or start over with "
            f"{option('overwrite_output_dir', True)}.",
        )
    if wanted is not None:
        checkpoints.refuse_weights_only(output_dir)
    if wanted is None and not (output_dir / RUN_FILE).is_file() and (held := weights_in(output_dir)):
        raise UserError(
            f"output_dir: {str(output_dir)!r} holds a model that no run wrote ({held[0].name}).",
            f"Choose another folder, or replace it with {option('overwrite_output_dir', True)}.",
        )
    return wanted if saved else None


def _refuse_base(config: Config, output_dir: Path) -> None:
    """Check that a run does not write over what it starts from.

    Raises:
        UserError: its folder holds its model, or the backbone of its model's adapter.
    """
    name = config.model.model_name_or_path or ""
    start = Path(name).expanduser()
    adapter = adapter_config(str(start), {}) if start.is_dir() else None
    starts = [start] if adapter is None else [start, Path(str(adapter.base_model_name_or_path))]
    for path in starts:
        inside = checkpoints.checkpoints(output_dir) if config.data.overwrite_output_dir else []
        inside.append(output_dir / REPLACED)  # removed in the end, also by a run that is resumed
        if any(same_folder(path, folder) for folder in (output_dir, *inside)):
            what = "the model" if path is start else "the backbone of the adapter"
            raise UserError(
                f"output_dir: {str(output_dir)!r} holds {what} that the run starts from, and would be overwritten.",
                "Choose another folder.",
            )
