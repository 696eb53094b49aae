"""What is asked of a hub before anything is downloaded from it."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import UserError, WorkFailed, one_line

TIMEOUT = 10.0  # seconds for the one question asked; a download that cannot begin retries for half a minute


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
        ask(name, revision=revision, timeout=TIMEOUT)
    except GatedRepoError as error:
        raise UserError(
            f"{key}: {name!r} on {api.endpoint} is open only to those who were granted access.",
            f"Ask for access at {api.endpoint}/{name}, then log in with `hf auth login` or set HF_TOKEN.",
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{key}: {name!r} on {api.endpoint} has no revision {revision!r}.") from error
    except HFValidationError as error:
        raise UserError(f"{key}: {name!r} is neither a file, a folder nor a hub id ({one_line(error)}).") from error
    except HfHubHTTPError as error:
        if isinstance(error, RepositoryNotFoundError) or error.response.status_code in (401, 404):
            raise UserError(
                f"{key}: {name!r} is no file or folder here, and {api.endpoint} has no such {kind}, or keeps it "
                "private.",
                "Check the name; for a private one, log in with `hf auth login` or set HF_TOKEN.",
            ) from error
        raise WorkFailed(
            f"{key}: {api.endpoint} refused to say whether it has {name!r} ({one_line(error)}).",
            "Try again later; a wrong HF_TOKEN is refused too.",
        ) from error
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


def _unreachable() -> tuple[type[Exception], ...]:
    """The errors of a connection, whose library is another one in older versions of huggingface_hub."""
    for name in ("httpx2", "httpx"):
        if find_spec(name) is not None:
            return (import_module(name).HTTPError, OSError)
    return (OSError,)
