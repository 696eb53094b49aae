"""What is asked of a hub, what is downloaded from it, and what its failures mean.

Failures are told by their cause: the client's own messages name classes and addresses, and every library above it wraps
them in another one. No message holds a token.
"""

from __future__ import annotations

import hashlib
import re
import time
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

from hf_transfer.errors import UserError, WorkFailed, chain, one_line

TIMEOUT = 10.0  # seconds for the one question asked; a download that cannot begin retries for half a minute
LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token that is valid."
# Of a model's repository these are not loaded: what lies in folders, other formats, pictures.
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
_CARDS: dict[tuple[str, str], dict[str, Any]] = {}  # (kind, id): what the card of a repository says


@cache
def find(key: str, name: str, kind: str = "model", revision: str | None = None) -> bool:
    """Ask the hub once whether a repository is there; whether only the cache can be used.

    Args:
        key: the key that names the repository, for messages.
        name: its id, for example `google-bert/bert-base-uncased`.
        kind: model or dataset.
        revision: branch, tag or commit.

    Returns:
        True where the hub cannot be reached and the model is in the cache.

    Raises:
        UserError: there is no such repository or revision, or it is closed to this account.
        WorkFailed: the hub cannot be reached, and the repository is not in the cache.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    api = HfApi()
    try:
        ask = api.model_info if kind == "model" else api.dataset_info
        card = ask(name, revision=revision, timeout=TIMEOUT).card_data
        _CARDS[kind, name] = card.to_dict() if card is not None else {}
    except HFValidationError as error:
        raise UserError(f"{key}: {name!r} is neither a file, a folder nor a hub id ({one_line(error)}).") from error
    except HfHubHTTPError as error:
        raise _refusal(error, f"{key}: ", name, kind, revision) from error
    except _unreachable() as error:
        if kind == "model" and isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return True
        raise WorkFailed(
            f"{key}: {name!r} is no local file or folder, and the hub at {api.endpoint} cannot be reached "
            f"({one_line(error)}).",
            "Check the network, the proxy and HF_ENDPOINT. Local folders and bundled:<name> need no hub, and with "
            "HF_HUB_OFFLINE=1 what was downloaded before is used.",
        ) from error
    return False


def _refusal(error: HfHubHTTPError, prefix: str, name: str, kind: str, revision: str | None) -> UserError:
    """The hub's answer to the question for a repository, as an error for the user."""
    endpoint = HfApi().endpoint
    log_in = "log in with `hf auth login` or set HF_TOKEN."
    if isinstance(error, GatedRepoError):
        return UserError(
            f"{prefix}{name!r} on {endpoint} is open only to those who were granted access.",
            f"Ask for access at {endpoint}/{name}, then {log_in}",
        )
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"{prefix}{name!r} on {endpoint} has no revision {revision!r}.")
    if isinstance(error, RepositoryNotFoundError) or error.response.status_code in (401, 404):
        return UserError(
            f"{prefix}{name!r} is no file or folder here, and {endpoint} has no such {kind}, or keeps it private.",
            f"Check the name; for a private one, {log_in}",
        )
    return WorkFailed(
        f"{prefix}{endpoint} refused to say whether it has {name!r} ({without_secrets(error)}).",
        "Try again later; a wrong HF_TOKEN is refused too.",
    )


def card_of(name: str, kind: str) -> dict[str, Any]:
    """Licence and language of a repository, as far as its card told them when it was looked for; asks nothing."""
    told = _CARDS.get((kind, name), {})
    return {key: value for key in ("license", "language") if _is_told(value := told.get(key))}


def _is_told(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) and text not in ("", "other", "unknown") for text in texts)


# ---- downloads -----------------------------------------------------------------------------------------------------


@cache
def fetch(key: str, name: str, revision: str | None = None) -> bool:
    """Bring a model's files into the cache; whether they are all that loading it needs, so that nothing more is asked.

    What was downloaded just now is compared with the hub's hash: the client looks at the size only.

    Raises:
        WorkFailed: the hub or the connection failed, or a file is not what the hub says it is.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    began, api = time.time(), HfApi()
    try:
        folder = Path(api.snapshot_download(name, revision=revision, ignore_patterns=NOT_LOADED))
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        damaged = [path.name for path in files if _is_new(path, began) and _remove_if_damaged(path)]
    except failures() as error:
        cause, fix = explain(error)
        raise WorkFailed(
            f"{key}: {name!r} could not be downloaded from {api.endpoint}: {cause}.",
            f"{fix} Then run the same command again: what has come already is kept.",
        ) from error
    if damaged:
        raise WorkFailed(
            f"{key}: {', '.join(damaged)} of {name!r} came from {api.endpoint} damaged: the contents do not have the "
            "hash that the hub gives.",
            "They were removed; run the same command again to download them anew.",
        )
    return any(path.suffix == ".safetensors" for path in files)


def _is_new(path: Path, began: float) -> bool:
    return path.is_file() and path.stat().st_mtime >= began - 1


def _remove_if_damaged(path: Path) -> bool:
    """A file of the cache is a link to one named by the hub's hash: SHA-256 of a large one, git's SHA-1 of the others.

    That may be a link in turn, to where equal contents of all repositories lie.
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
    401: ("it does not accept the token", LOG_IN),
    403: ("the token may not do this", "Use a token with the right to write there."),
    404: (
        "it has no such repository or revision, or keeps it private from this account",
        "Check the name and the token.",
    ),
    412: ("somebody else changed the repository meanwhile", "Look at what changed there."),
    429: ("it was asked too often", "Wait a few minutes."),
}


def explain(error: BaseException) -> tuple[str, str]:
    """(the cause of a failure of the hub, what to do) in a few words, without the token and signed addresses."""
    causes = list(chain(error))
    for cause in causes:
        if isinstance(cause, LocalTokenNotFoundError):
            return "there is no token", LOG_IN
        if isinstance(cause, HfHubHTTPError):
            return _of_status(cause.response.status_code, without_secrets(cause.server_message or ""))
    names = {type(cause).__name__ for cause in causes}
    told = without_secrets(causes[-1])
    if found := re.search(r"HTTP status \w+ error \((\d{3})", told):  # Xet's own client
        return _of_status(int(found[1]), "")
    if any(name.startswith("OfflineMode") for name in names):
        return "HF_HUB_OFFLINE forbids to ask it", "Unset HF_HUB_OFFLINE."
    if "ConnectError" in names or "ConnectTimeout" in names:
        return f"it cannot be reached ({told})", "Check the network, the proxy and HF_ENDPOINT."
    if names & {"RemoteProtocolError", "ReadError", "WriteError", "ReadTimeout", "WriteTimeout"}:
        return f"the connection broke off ({told})", "Check the network."
    if "Consistency check failed" in told:
        return f"a file came incomplete ({told.split('. This')[0]})", "Check the network."
    return told or type(error).__name__, "Check the network and the disk."


def _of_status(status: int, said: str) -> tuple[str, str]:
    known = _STATUS.get(status)
    if known is None:
        fix = "Wait a little: the fault is not here." if status >= 500 else "Its reason says what to change."
        known = ("it has a fault of its own" if status >= 500 else "it refused", fix)
    return f"{known[0]} ({status}{': ' + said if said else ''})", known[1]


def is_down(error: BaseException) -> bool:
    """Whether a hub gave no answer that is about the request: it may give one later."""
    return is_passing(error) or any(type(cause).__name__ == "OfflineModeIsEnabled" for cause in chain(error))


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed in a moment."""
    for cause in chain(error):
        if isinstance(cause, HfHubHTTPError):
            return cause.response.status_code in (408, 429) or cause.response.status_code >= 500
        if isinstance(cause, _TRANSPORT):
            return True
    return False


def without_secrets(error: BaseException | str) -> str:
    """An error's text on one line, with neither the token nor the signature in an address."""
    text = re.sub(r"(https?://[^\s?'\")]+)\?[^\s'\")]+", r"\1", str(error))
    token = get_token()
    text = text.replace(token, "***") if token else text
    return one_line(Exception(re.sub(r"\bhf_\w{8,}", "hf_***", text))).rstrip(".")


def failures() -> tuple[type[Exception], ...]:
    """What the client raises where a hub, the connection or the disk fails."""
    return (*_unreachable(), ValueError, RuntimeError)


def _unreachable() -> tuple[type[Exception], ...]:
    """The errors of a connection, whose library is another one in older versions of huggingface_hub."""
    return (HTTPError, OSError)
