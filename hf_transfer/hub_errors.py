"""Why a hub, the connection or the client failed, in the user's words.

The client's own messages name classes and addresses, and each library above it wraps them in another error. No message
contains a token.
"""

from __future__ import annotations

import os
import re
from importlib import import_module

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_transfer.errors import UserError, WorkFailed, chain, one_line

LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a valid token."
_TRANSPORT: type[Exception] = import_module(HTTPError.__module__.partition(".")[0]).TransportError


def refusal(error: HfHubHTTPError, key: str, name: str, kind: str, revision: str | None) -> UserError:
    """The hub's refusal to describe a repository, as an error for the user."""
    endpoint = HfApi().endpoint
    log_in = "log in with `hf auth login` or set HF_TOKEN."
    if error.response.status_code == 401 and _token_is_invalid():
        return UserError(
            f"{endpoint} does not accept the token {_token_place()} (HTTP 401), so {name!r} was not looked up.",
            f"{LOG_IN} Public repositories need none.",
            key,
        )
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


def _token_is_invalid() -> bool:
    """Whether the hub refuses the token itself: with status 401 it also refuses what a token has no access to."""
    if get_token() is None:
        return False
    try:
        HfApi().whoami()
    except HfHubHTTPError as error:
        return error.response.status_code == 401
    except failures():
        return False
    return False


def _token_place() -> str:
    name = next((n for n in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(n)), "")
    return f"in {name}" if name else "of `hf auth login`"


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
    return (*unreachable(), ValueError, RuntimeError)


def unreachable() -> tuple[type[Exception], ...]:
    """Connection errors; their library depends on the version of huggingface_hub."""
    return (HTTPError, OSError)
