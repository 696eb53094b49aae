"""Push a run to a hub in one commit, with exactly the files needed to load it.

The run itself is only read (see `hf_transfer.hub.files`), except that its card gets the hub id after a push. The token
is left to the hub client: it comes from HF_TOKEN or the login, and is neither written nor shown.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import get_session, validate_repo_id
from huggingface_hub.utils import logging as hub_logging

from hf_transfer import hub_client, hub_errors, run_folder
from hf_transfer.errors import UserError, WorkFailed, one_line, option
from hf_transfer.hub.card import at
from hf_transfer.hub.files import (
    KNOWN,
    adapter_base,
    check_report,
    refuse_local,
    results_of,
    stage,
    stage_report,
)

T = TypeVar("T")
MESSAGE = "Upload model trained with hf_transfer"
WAITS = (1.0, 4.0)  # seconds before retrying after a temporary failure
PATIENCE = 120.0  # read timeout in seconds; the client's default is none


@dataclass(frozen=True)
class Target:
    """Where and how to push a run.

    Attributes:
        hub_model_id: `owner/name`, or a name in the user's own account; None uses the name of the run's folder.
        merged: push a plain model with the adapter merged into its weights.
        revision: branch, created if it does not exist (default: main).
        commit_message: commit message.
        private: visibility of a new repository; None creates a private one. Existing repositories keep theirs.
        with_report: push what shows the user's data too: the report, wrong answers, labels that look wrong, pictures.
    """

    hub_model_id: str | None
    merged: bool = False
    revision: str | None = None
    commit_message: str | None = None
    private: bool | None = None
    with_report: bool = False

    def command(self, folder: Path) -> str:
        """The command that repeats the push."""
        words = ["hf-transfer", "push", str(folder)]
        words += ["--hub_model_id", self.hub_model_id] if self.hub_model_id else []
        words += ["--merged"] if self.merged else []
        words += ["--revision", self.revision] if self.revision else []
        words += ["--commit_message", self.commit_message] if self.commit_message else []
        words += ["--public"] if self.private is False else []
        words += ["--with_report"] if self.with_report else []
        return shlex.join(words)


@dataclass(frozen=True)
class Pushed:
    """Result of a push.

    Attributes:
        hub_model_id: `owner/name` of the repository.
        url: URL of the repository.
        commit: revision that contains the run.
        files: names of the pushed files.
        is_changed: whether a commit was created; False if the hub already had all files.
        private: whether the repository is private.
        notes: messages for the user.
        revision: branch that contains the run; None for main.
    """

    hub_model_id: str
    url: str
    commit: str
    files: tuple[str, ...]
    is_changed: bool
    private: bool
    notes: tuple[str, ...] = ()
    revision: str | None = None

    def lines(self) -> Iterator[str]:
        """The summary, line by line."""
        kind = "private" if self.private else "public"
        if self.is_changed:
            yield f"Pushed {len(self.files)} files to {self.url} ({kind}), commit {self.commit[:12]}:"
            yield f"  {', '.join(self.files)}"
        else:
            yield f"Nothing to push: {self.url} ({kind}) already contains this run, commit {self.commit[:12]}."
        yield from self.notes
        yield f"  hf-transfer predict {at(self.hub_model_id, self.revision)} -   # loads it from the hub"


def push(folder: str | Path, target: Target, model: Any = None) -> Pushed:
    """Push the finished run in a folder.

    Args:
        folder: folder of the run.
        target: where and how to push it.
        model: the trained model, whose logits the pushed files must reproduce (default: loaded from the run's files).

    Raises:
        UserError: the folder does not contain a finished run or the report that is asked for, or its backbone is a
            local folder.
        WorkFailed: the hub or the connection failed, or the pushed files would give different logits. The run is
            unchanged.
    """
    folder = Path(folder)
    results = results_of(folder)
    if target.with_report:
        check_report(folder)
    if not target.merged and results["adapter"] != "none":
        refuse_local(adapter_base(folder))
    with _explained(folder, target), tempfile.TemporaryDirectory(prefix="hf-transfer-push-") as temporary:
        staged = Path(temporary)
        name = _repeat(lambda: account_of(target, folder))
        notes = stage(folder, staged, results, at(name, target.revision), target.merged, model)
        if target.with_report:
            notes += stage_report(folder, staged)
        shown = len(results["card"]["examples"])
        if shown and target.private is False:
            notes.append(f"  The public card shows {shown} held-out texts; set card_examples: 0 to show none.")
        with _read_timeout(PATIENCE):
            pushed = _repeat(lambda: _upload(staged, name, target, notes))
        if not target.merged:
            _replace(folder / run_folder.CARD, staged / run_folder.CARD)
    return pushed


def _replace(old: Path, new: Path) -> None:
    copy = old.with_name(f".{old.name}.new")
    shutil.copyfile(new, copy)
    copy.replace(old)


def account_of(target: Target, folder: Path) -> str:
    """The full hub id to push to, with the owner of the token if the target names none.

    Raises:
        UserError: invalid hub id.
        WorkFailed: the token has no write access to it.
        Exception: any of `hub_errors.failures()`, if the hub cannot be reached or rejects the token.
    """
    wanted = target.hub_model_id or folder.resolve().name
    try:
        validate_repo_id(wanted)
    except HFValidationError as error:
        raise UserError(
            f"hub_model_id: {wanted!r} is not a valid hub id ({one_line(error)}).",
            "Use owner/name, or a name alone for a repository in your own account"
            + (f", and {option('revision', wanted.partition('@')[2])} for a branch." if "@" in wanted else "."),
        ) from error
    api = HfApi()
    with _read_timeout(hub_client.TIMEOUT):
        who = api.whoami()
    owner, _, name = wanted.rpartition("/")
    role = (who.get("auth") or {}).get("accessToken", {}).get("role")
    if role == "read":
        raise WorkFailed(
            f"Cannot push {wanted!r} to {api.endpoint}: the token of {who['name']!r} is read-only (HTTP 403).",
            "Set HF_TOKEN to a token with write access, or log in with one using `hf auth login`.",
        )
    owners = {who["name"], *(o["name"] for o in who.get("orgs") or ())}
    if owner and role == "write" and owner not in owners:
        raise WorkFailed(
            f"Cannot push {wanted!r} to {api.endpoint}: {who['name']!r} has no write access to {owner!r} (HTTP 403).",
            f"Push to one of {', '.join(sorted(owners))}, or log in with another account.",
        )
    return f"{owner or who['name']}/{name}"


def wanted(values: Mapping[str, Any]) -> Target | None:
    """Where a run is pushed at its end according to its keys; None if it is not."""
    if not values["push_to_hub"]:
        return None
    return Target(values["hub_model_id"], revision=values["hub_revision"], private=values["hub_private_repo"])


def before_training(target: Target, folder: Path) -> str:
    """Check before training whether the run can be pushed.

    Returns:
        A warning if the hub does not respond, else an empty string.

    Raises:
        UserError: invalid hub id.
        WorkFailed: there is no token, or it has no write access.
    """
    try:
        _repeat(lambda: account_of(target, folder))
    except UserError:
        raise
    except hub_errors.failures() as error:
        cause, fix = hub_errors.explain(error)
        if not hub_errors.is_down(error):
            raise WorkFailed(
                f"push_to_hub: cannot push to {HfApi().endpoint}: {cause}.",
                f"{fix} Training has not started; remove push_to_hub to train now and push later.",
            ) from error
        return (
            f"Warning: cannot check whether the run can be pushed to {HfApi().endpoint}: {cause}. Training continues, "
            "and the push is tried at the end."
        )
    return ""


# ---- the hub -------------------------------------------------------------------------------------------------------


def _upload(staged: Path, name: str, target: Target, notes: list[str]) -> Pushed:
    """Push in one commit, which contains only changed files; without changes there is no commit.

    Raises:
        UserError: the repository exists with a different visibility.
    """
    api = HfApi()
    try:
        private = bool(api.model_info(name).private)
        if target.private not in (None, private):
            raise UserError(
                f"hub_model_id: {name!r} already exists and is {'private' if private else 'public'}.",
                "Change that in its settings on the hub, or remove --private or --public.",
            )
    except RepositoryNotFoundError:
        private = target.private is not False
        api.create_repo(name, private=private, exist_ok=True)
    if target.revision:
        api.create_branch(name, branch=target.revision, exist_ok=True)
    before = api.model_info(name, revision=target.revision)
    files = tuple(sorted(path.name for path in staged.iterdir()))
    existing = {sibling.rfilename for sibling in before.siblings or ()}
    outdated = [n for n in sorted(existing) if n not in files and any(fnmatch(n, pattern) for pattern in KNOWN)]
    commit = api.create_commit(
        name,
        [
            *(CommitOperationAdd(path_in_repo=n, path_or_fileobj=staged / n) for n in files),
            *(CommitOperationDelete(path_in_repo=n) for n in outdated),  # left by an earlier push, would be loaded too
        ],
        commit_message=target.commit_message or MESSAGE,
        revision=target.revision,
        parent_commit=before.sha,
    )
    url = f"{api.endpoint}/{name}"
    changed = commit.oid != before.sha
    return Pushed(name, url, commit.oid, files, changed, private, tuple(notes), target.revision)


def _repeat(work: Callable[[], T]) -> T:
    """Run `work`, with retries after temporary failures; `work` checks the state of the hub first."""
    for wait in WAITS:
        try:
            return work()
        except hub_errors.failures() as error:
            if not hub_errors.is_passing(error):
                raise
        time.sleep(wait)
    return work()


@contextmanager
def _explained(folder: Path, target: Target) -> Iterator[None]:
    """Turn the client's failures into `WorkFailed`, with the command to retry; the client's warnings are silenced."""
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    again = f"The run in {str(folder)!r} is unchanged. Retry with `{target.command(folder)}`."
    try:
        yield
    except WorkFailed as error:
        raise WorkFailed(error.message, f"{error.fix} {again}") from error
    except UserError:
        raise
    except hub_errors.failures() as error:
        cause, fix = hub_errors.explain(error)
        name = target.hub_model_id or folder.name
        raise WorkFailed(f"Pushing {name!r} to {HfApi().endpoint} failed: {cause}.", f"{fix} {again}") from error
    finally:
        hub_logging.set_verbosity(verbosity)


@contextmanager
def _read_timeout(seconds: float) -> Iterator[None]:
    """Context with a read timeout for requests."""
    session = get_session()
    previous = session.timeout
    session.timeout = seconds
    try:
        yield
    finally:
        session.timeout = previous
