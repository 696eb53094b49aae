"""Requests to a hub: whether a repository exists, downloads, and the causes of failures.

Messages state the cause of a failure: the client's own name classes and addresses, and each library above it wraps them
in another error. No message contains a token.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, tqdm

from hf_transfer.errors import UserError, WorkFailed, chain, one_line

TIMEOUT = 10.0  # seconds per request; a download that cannot start is retried for half a minute
LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a valid token."
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
_TRANSPORT: type[Exception] = import_module(HTTPError.__module__.partition(".")[0]).TransportError


@dataclass(frozen=True)
class Repository:
    """A repository that exists, as far as the hub could be asked.

    Attributes:
        only_cached: whether the hub cannot be reached, so that only the cache can be used.
        card: metadata of its card; empty if the hub was not asked.
    """

    only_cached: bool = False
    card: Mapping[str, Any] = field(default_factory=dict)

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
    if constants.HF_HUB_OFFLINE:
        return Repository()
    api = HfApi()
    try:
        ask = api.model_info if kind == "model" else api.dataset_info
        card = ask(name, revision=revision, timeout=TIMEOUT).card_data
    except HFValidationError as error:
        raise UserError(f"{name!r} is neither a file, a folder nor a hub id ({one_line(error)}).", key=key) from error
    except HfHubHTTPError as error:
        raise _refusal(error, key, name, kind, revision) from error
    except _unreachable() as error:
        if kind == "model" and isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return Repository(only_cached=True)
        raise WorkFailed(
            f"{name!r} is not a local file or folder, and the hub at {api.endpoint} cannot be reached "
            f"({one_line(error)}).",
            "Check the network, the proxy and HF_ENDPOINT. Local folders and bundled:<name> need no hub, and with "
            "HF_HUB_OFFLINE=1 earlier downloads are used.",
            key,
        ) from error
    return Repository(card=card.to_dict() if card is not None else {})


def off(kinds: str = "models") -> str:
    """A sentence where the hub is switched off; empty where it is asked."""
    said = f"HF_HUB_OFFLINE is set, so that only {kinds} that were downloaded before are found. "
    return said if constants.HF_HUB_OFFLINE else ""


def _refusal(error: HfHubHTTPError, key: str, name: str, kind: str, revision: str | None) -> UserError:
    """The hub's refusal to describe a repository, as an error for the user."""
    endpoint = HfApi().endpoint
    log_in = "log in with `hf auth login` or set HF_TOKEN."
    if isinstance(error, GatedRepoError):
        return UserError(
            f"{name!r} on {endpoint} is gated, and this account has no access.",
            f"Request access at {endpoint}/{name}, then {log_in}",
            key,
        )
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"{name!r} on {endpoint} has no revision {revision!r}.", key=key)
    if isinstance(error, RepositoryNotFoundError) or error.response.status_code in (401, 404):
        return UserError(
            f"{name!r} is not a local file or folder, and {endpoint} has no such {kind}, or it is private.",
            f"Check the name; if it is private, {log_in}",
            key,
        )
    return WorkFailed(
        f"{endpoint} refused the request for {name!r} ({without_secrets(error)}).",
        "Try again later; an invalid HF_TOKEN is refused too.",
        key,
    )


def _is_stated(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) and text not in ("", "other", "unknown") for text in texts)


# ---- downloads -----------------------------------------------------------------------------------------------------


class LateBar(tqdm):
    """A progress bar of a download that takes time: files that are in the cache already show none."""

    DELAY = 1.0  # seconds

    def __init__(self, *args: Any, **kwargs: Any):
        self.began = time.time()
        super().__init__(*args, **{**kwargs, "delay": self.DELAY})

    def display(self, *args: Any, **kwargs: Any) -> Any:
        is_late = self.disable or time.time() - self.began >= self.DELAY
        return super().display(*args, **kwargs) if is_late else None


def shows_downloads() -> bool:
    """Whether downloads have progress bars."""
    return not are_progress_bars_disabled()


def show_downloads(is_wanted: bool) -> None:
    """Give downloads progress bars or none. transformers and datasets switch these off together with their own."""
    (enable_progress_bars if is_wanted else disable_progress_bars)()


@cache
def fetch(key: str, name: str, revision: str | None = None) -> bool:
    """Download a model's files to the cache; whether they suffice to load it without further requests.

    New downloads are verified by the hub's hash: the client checks only the size.

    Raises:
        WorkFailed: the hub or the connection failed, or a file does not match its hash.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    began, api = time.time(), HfApi()
    try:
        folder = Path(api.snapshot_download(name, revision=revision, ignore_patterns=NOT_LOADED, tqdm_class=LateBar))
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
    return any(path.suffix == ".safetensors" for path in files)


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


# ---- failures ------------------------------------------------------------------------------------------------------

_STATUS = {
    401: ("the token is not accepted", LOG_IN),
    403: ("the token lacks permission", "Use a token with write access to the repository."),
    404: ("no such repository or revision, or it is private", "Check the name and the token."),
    412: ("the repository was changed by someone else in the meantime", "Look at what changed there."),
    429: ("rate limit exceeded", "Wait a few minutes."),
}


def explain(error: BaseException) -> tuple[str, str]:
    """(cause of a hub failure, what to do), without the token and signed addresses."""
    causes = list(chain(error))
    for cause in causes:
        if isinstance(cause, LocalTokenNotFoundError):
            return "no token is set", LOG_IN
        if isinstance(cause, HfHubHTTPError):
            return _of_status(cause.response.status_code, without_secrets(cause.server_message or ""))
    names = {type(cause).__name__ for cause in causes}
    text = without_secrets(causes[-1])
    if status := re.search(r"HTTP status \w+ error \((\d{3})", text):  # Xet's own client
        return _of_status(int(status[1]), "")
    if any(name.startswith("OfflineMode") for name in names):
        return "HF_HUB_OFFLINE is set", "Unset HF_HUB_OFFLINE."
    if "ConnectError" in names or "ConnectTimeout" in names:
        return f"the hub cannot be reached ({text})", "Check the network, the proxy and HF_ENDPOINT."
    if names & {"RemoteProtocolError", "ReadError", "WriteError", "ReadTimeout", "WriteTimeout"}:
        return f"the connection was lost ({text})", "Check the network."
    if "Consistency check failed" in text:
        return f"a file arrived incomplete ({text.split('. This')[0]})", "Check the network."
    return text or type(error).__name__, "Check the network and the disk."


def _of_status(status: int, details: str) -> tuple[str, str]:
    if status in _STATUS:
        cause, fix = _STATUS[status]
    elif status >= 500:
        cause, fix = "server error", "Wait a few minutes: the problem is on the server."
    else:
        cause, fix = "the request was refused", "The reason says what to change."
    return f"{cause} (HTTP {status}{': ' + details if details else ''})", fix


def is_down(error: BaseException) -> bool:
    """Whether the hub could not process the request, and may be able to later."""
    return is_passing(error) or any(type(cause).__name__ == "OfflineModeIsEnabled" for cause in chain(error))


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed when retried."""
    for cause in chain(error):
        if isinstance(cause, HfHubHTTPError):
            return cause.response.status_code in (408, 429) or cause.response.status_code >= 500
        if isinstance(cause, _TRANSPORT):
            return True
    return False


def without_secrets(error: BaseException | str) -> str:
    """The text of an error on one line, without tokens and without signatures in addresses."""
    text = re.sub(r"(https?://[^\s?'\")]+)\?[^\s'\")]+", r"\1", str(error))
    token = get_token()
    text = text.replace(token, "***") if token else text
    return one_line(Exception(re.sub(r"\bhf_\w{8,}", "hf_***", text))).rstrip(".")


def failures() -> tuple[type[Exception], ...]:
    """The errors that the client raises when the hub, the connection or the disk fails."""
    return (*_unreachable(), ValueError, RuntimeError)


def _unreachable() -> tuple[type[Exception], ...]:
    """Connection errors; their library depends on the version of huggingface_hub."""
    return (HTTPError, OSError)
