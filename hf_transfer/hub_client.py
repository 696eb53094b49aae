"""Requests to a hub: whether a repository exists, and downloads. Failures are told by `hf_transfer.hub_errors`."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from tqdm.auto import tqdm

from hf_transfer.errors import UserError, WorkFailed, one_line
from hf_transfer.hub_errors import explain, failures, is_passing, refusal, unreachable

TIMEOUT = 10.0  # seconds per request; a download that cannot start is retried for half a minute
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
ADAPTER_WEIGHTS, PICKLED_ADAPTER = "adapter_model.safetensors", "adapter_model.bin"
# Files of a model repository that are not downloaded: subfolders, other formats, images.
NOT_LOADED = ["*/*", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.gguf", "*.tflite"]
NOT_LOADED += [
    "*.zip",
    "*.gz",
    "*.tar",
    "*.png",
    "*.jpg",
    "*.gif",
    "*.pdf",
    "*.parquet",
    "consolidated*",
    "*.pkl",
    ".*",
]


@dataclass(frozen=True)
class Repository:
    """A repository that exists, as far as the hub could be asked.

    Attributes:
        only_cached: whether the hub cannot be reached, so that only the cache can be used.
        card: metadata of its card; empty if the hub was not asked.
        files: names of its files; empty if the hub was not asked.
    """

    only_cached: bool = False
    card: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()

    @property
    def origin(self) -> dict[str, Any]:
        """License and language, if the card states them."""
        return {key: value for key in ("license", "language") if _is_stated(value := self.card.get(key))}


@cache
def find(key: str, name: str, kind: str = "model", revision: str | None = None) -> Repository:
    """Look up a repository; the hub is asked once per process.

    Args:
        key: the key that names the repository, for messages.
        name: its id, for example `google-bert/bert-base-uncased`.
        kind: model or dataset.
        revision: branch, tag or commit.

    Raises:
        UserError: there is no such repository or revision, or this account has no access to it.
        WorkFailed: the hub cannot be reached, and the repository is not in the cache.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{name!r} is neither a file, a folder nor a hub id ({one_line(error)}).", key=key) from error
    if constants.HF_HUB_OFFLINE:
        return Repository()
    api = HfApi()
    try:
        ask = api.model_info if kind == "model" else api.dataset_info
        about = ask(name, revision=revision, timeout=TIMEOUT)
    except HfHubHTTPError as error:
        if is_passing(error) and kind == "model" and _is_cached(name, revision):
            return Repository(only_cached=True)
        raise refusal(error, key, name, kind, revision) from error
    except unreachable() as error:
        if kind == "model" and _is_cached(name, revision):
            return Repository(only_cached=True)
        raise WorkFailed(
            f"{name!r} is not a local file or folder, and the hub at {api.endpoint} cannot be reached "
            f"({one_line(error)}).",
            "Check the network, the proxy and HF_ENDPOINT. Local folders and bundled:<name> need no hub, and with "
            "HF_HUB_OFFLINE=1 earlier downloads are used.",
            key,
        ) from error
    card, files = about.card_data, tuple(sibling.rfilename for sibling in about.siblings or ())
    return Repository(card=card.to_dict() if card is not None else {}, files=files)


def _is_cached(name: str, revision: str | None) -> bool:
    """Whether the cache has the configuration of a model or an adapter."""
    return any(_cached(name, file, revision) is not None for file in (CONFIG, ADAPTER_CONFIG))


def lacks_weights(name: str, revision: str | None) -> bool:
    """Whether the cache has the configuration of a model or an adapter without any weights."""
    folders = [_cached(name, file, revision) for file in (CONFIG, ADAPTER_CONFIG)]
    files = [file for path in folders if path is not None for file in path.parent.iterdir()]
    return bool(files) and not any(file.suffix in (".safetensors", ".bin") for file in files)


def _cached(name: str, file: str, revision: str | None) -> Path | None:
    """A file of a model repository in the cache; None if it is not there."""
    path = try_to_load_from_cache(name, file, revision=revision)
    return Path(path) if isinstance(path, str) else None


def off(kinds: str = "models") -> str:
    """A sentence where the hub is switched off; empty where it is asked."""
    said = f"HF_HUB_OFFLINE is set, so that only {kinds} that were downloaded before are found. "
    return said if constants.HF_HUB_OFFLINE else ""


def _is_stated(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) and text not in ("", "other", "unknown") for text in texts)


# ---- downloads -----------------------------------------------------------------------------------------------------


class LateBar(tqdm):
    """A progress bar of a download that takes time, on a terminal: files that are in the cache already show none.

    The client's own bars are off in a run, together with those of transformers, and uploads of a few bytes have them
    too. This one asks `show_downloads`.
    """

    DELAY = 1.0  # seconds
    wanted = True

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.pop("name", None)  # of the client's groups of bars
        self.began = time.time()
        is_off = not self.wanted or constants.HF_HUB_DISABLE_PROGRESS_BARS is True
        super().__init__(*args, **{**kwargs, "delay": self.DELAY, "disable": True if is_off else None})

    def display(self, *args: Any, **kwargs: Any) -> Any:
        is_late = self.disable or time.time() - self.began >= self.DELAY
        return super().display(*args, **kwargs) if is_late else None


def show_downloads(is_wanted: bool) -> bool:
    """Give downloads progress bars or none; returns whether they had them."""
    had, LateBar.wanted = LateBar.wanted, is_wanted
    return had


def adapter_folder(
    key: str, name: str, revision: str | None, found: Repository, allow_pickle: bool = False
) -> Path | None:
    """The folder in the cache that has the files of an adapter; None if the repository has no adapter.

    Args:
        key: the key that names the repository, for messages.
        name: its id.
        revision: branch, tag or commit.
        found: the repository, as `find` describes it.
        allow_pickle: whether weights that are not safetensors are wanted where there are no others.

    Raises:
        WorkFailed: as of `fetch`.
    """
    if ADAPTER_CONFIG in found.files:
        fetch(key, name, revision)
        if allow_pickle and ADAPTER_WEIGHTS not in found.files:
            fetch(key, name, revision, PICKLED_ADAPTER)
    elif found.files:
        return None
    path = _cached(name, ADAPTER_CONFIG, revision)
    return path.parent if path is not None else None


@cache
def fetch(key: str, name: str, revision: str | None = None, only: str | None = None) -> bool:
    """Download a model's files to the cache; whether they suffice to load it without further requests.

    New downloads are verified by the hub's hash: the client checks only the size.

    Args:
        key: the key that names the repository, for messages.
        name: its id.
        revision: branch, tag or commit.
        only: the only file that is wanted (default: all that are read, see `NOT_LOADED`).

    Raises:
        WorkFailed: the hub or the connection failed, or a file does not match its hash.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    began, api = time.time(), HfApi()
    try:
        wanted: dict[str, Any] = {"allow_patterns": only} if only else {"ignore_patterns": NOT_LOADED}
        folder = Path(api.snapshot_download(name, revision=revision, tqdm_class=LateBar, **wanted))
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        damaged = [path.name for path in files if _is_new(path, began) and _remove_if_damaged(path)]
    except failures() as error:
        cause, fix = explain(error)
        raise WorkFailed(
            f"{name!r} could not be downloaded from {api.endpoint}: {cause}.",
            f"{fix} Then run the same command again: files already downloaded are kept.",
            key,
        ) from error
    if damaged:
        raise WorkFailed(
            f"{', '.join(damaged)} of {name!r} was corrupted in the download from {api.endpoint}: the contents do not "
            "match the hub's hash.",
            "The corrupted files were removed; run the same command to download them again.",
            key,
        )
    return any(path.suffix == ".safetensors" and path.name.startswith(("model", "adapter_model")) for path in files)


def _is_new(path: Path, began: float) -> bool:
    return path.is_file() and path.stat().st_mtime >= began - 1


def _remove_if_damaged(path: Path) -> bool:
    """Verify a file of the cache, a link to a file named by its hash: SHA-256 if it is large, else git's SHA-1.

    The target may be another link, to contents shared between repositories.
    """
    if not path.is_symlink():
        return False
    blob = path.parent / path.readlink()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        digest = hashlib.sha256()
    elif re.fullmatch(r"[0-9a-f]{40}", blob.name):
        digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size, usedforsecurity=False)
    else:
        return False
    with blob.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    if digest.hexdigest() == blob.name:
        return False
    for wrong in (path.resolve(), blob, path):
        wrong.unlink(missing_ok=True)
    return True
