"""A run to a hub: exactly the files that load it, checked, in one commit.

The run itself is only read (see `staging`), but for the id that its card is told after a push. The token is the
client's business: it comes from HF_TOKEN or the login, and is neither written nor shown.
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

from hf_transfer import hub_client, run_folder
from hf_transfer.errors import UserError, WorkFailed, one_line
from hf_transfer.hub.files import KNOWN, adapter_base, refuse_local, results_of, stage

T = TypeVar("T")
MESSAGE = "A run of hf_transfer"
WAITS = (1.0, 4.0)  # seconds before another try, where a failure may pass
PATIENCE = 120.0  # seconds without a byte before a request is given up; the client's own limit is none


@dataclass(frozen=True)
class Target:
    """Where a run goes, and how.

    Attributes:
        hub_model_id: `owner/name`; a name alone is the account's; None is the name of the run's folder.
        merged: push a plain model, the adapter in its weights.
        revision: branch, made where there is none (default: main).
        commit_message: of the commit.
        private: of a repository that is made; None is private. One that is there keeps what it is.
    """

    hub_model_id: str | None
    merged: bool = False
    revision: str | None = None
    commit_message: str | None = None
    private: bool | None = None

    def command(self, folder: Path) -> str:
        """What repeats the push."""
        words = ["hf-transfer", "push", str(folder)]
        words += ["--hub_model_id", self.hub_model_id] if self.hub_model_id else []
        words += ["--merged"] if self.merged else []
        words += ["--revision", self.revision] if self.revision else []
        words += ["--commit_message", self.commit_message] if self.commit_message else []
        words += ["--public"] if self.private is False else []
        return shlex.join(words)


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        hub_model_id: with its owner.
        url: of the repository.
        commit: the revision that holds the run.
        files: what was pushed.
        is_changed: whether a commit was made; not where the hub had it all.
        private: whether the repository is.
        notes: sentences for the user.
    """

    hub_model_id: str
    url: str
    commit: str
    files: tuple[str, ...]
    is_changed: bool
    private: bool
    notes: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """For a person."""
        kind = "private" if self.private else "public"
        if self.is_changed:
            yield f"Pushed {len(self.files)} files to {self.url} ({kind}), commit {self.commit[:12]}:"
            yield f"  {', '.join(self.files)}"
        else:
            yield f"{self.url} ({kind}) has this run already, as commit {self.commit[:12]}: nothing was pushed."
        yield from self.notes
        yield f"  hf-transfer predict {self.hub_model_id} -   # loads it from there"


def push(folder: str | Path, target: Target, model: Any = None) -> Pushed:
    """Push the finished run in a folder.

    Args:
        folder: of the run.
        target: where to.
        model: as it was trained; what the files hold must answer as it does (default: the files, loaded).

    Raises:
        UserError: the folder holds no finished run, or its backbone is a folder of this machine.
        WorkFailed: the hub or the connection failed, or what would be pushed does not answer as the run. The run is as
            it was.
    """
    folder = Path(folder)
    results = results_of(folder)
    if not target.merged and results["adapter"] != "none":
        refuse_local(adapter_base(folder))
    with _told(folder, target), tempfile.TemporaryDirectory(prefix="hf-transfer-push-") as beside:
        staged = Path(beside)
        name = _repeat(lambda: account_of(target, folder))
        notes = stage(folder, staged, results, name, target.merged, model)
        shown = len(results["card"]["examples"])
        if shown and target.private is False:
            notes.append(f"  Its card shows {shown} held-out texts to all; a run with card_examples: 0 shows none.")
        with _patient(PATIENCE):
            pushed = _repeat(lambda: _upload(staged, name, target, notes))
        if not target.merged:
            _replace(folder / run_folder.CARD, staged / run_folder.CARD)
    return pushed


def _replace(old: Path, new: Path) -> None:
    beside = old.with_name(f".{old.name}.new")
    shutil.copyfile(new, beside)
    beside.replace(old)


def account_of(target: Target, folder: Path) -> str:
    """The whole id to push to, after asking the hub whose token this is.

    Raises:
        UserError: it is no id.
        WorkFailed: the token may not write there. What the client raises where the hub fails.
    """
    wanted = target.hub_model_id or folder.resolve().name
    try:
        validate_repo_id(wanted)
    except HFValidationError as error:
        raise UserError(
            f"hub_model_id: {wanted!r} is no hub id ({one_line(error)}).", "Write owner/name, or a name of your own."
        ) from error
    api = HfApi()
    with _patient(hub_client.TIMEOUT):
        who = api.whoami()
    owner, _, name = wanted.rpartition("/")
    role = (who.get("auth") or {}).get("accessToken", {}).get("role")
    if role == "read":
        raise WorkFailed(
            f"{wanted!r} cannot be pushed to {api.endpoint}: the token of {who['name']!r} may only read (403).",
            "Set HF_TOKEN to a token with the right to write, or log in with one by `hf auth login`.",
        )
    owners = {who["name"], *(o["name"] for o in who.get("orgs") or ())}
    if owner and role == "write" and owner not in owners:
        raise WorkFailed(
            f"{wanted!r} cannot be pushed to {api.endpoint}: {who['name']!r} has no right to write to {owner!r} (403).",
            f"Push to one of {', '.join(sorted(owners))}, or log in with another account.",
        )
    return f"{owner or who['name']}/{name}"


def wanted(values: Mapping[str, Any]) -> Target | None:
    """Where a run's keys want it pushed when it has ended."""
    if not values["push_to_hub"]:
        return None
    return Target(values["hub_model_id"], revision=values["hub_revision"], private=values["hub_private_repo"])


def before_training(target: Target, folder: Path) -> str:
    """Ask the hub whether this account may push, before time is spent on training. A doubt where it does not answer.

    Raises:
        UserError: there is no such id.
        WorkFailed: there is no token, or it may not write there.
    """
    try:
        _repeat(lambda: account_of(target, folder))
    except UserError:
        raise
    except hub_client.failures() as error:
        cause, fix = hub_client.explain(error)
        if not hub_client.is_down(error):
            raise WorkFailed(
                f"push_to_hub: nothing could be pushed to {HfApi().endpoint}: {cause}.",
                f"{fix} Nothing was trained yet; without push_to_hub the run trains and can be pushed later.",
            ) from error
        return (
            f"Warning: {HfApi().endpoint} does not say whether the run can be pushed: {cause}. It is trained all the "
            "same, and pushed at its end if the hub answers then."
        )
    return ""


# ---- the hub -------------------------------------------------------------------------------------------------------


def _upload(staged: Path, name: str, target: Target, notes: list[str]) -> Pushed:
    """One commit on top of what the hub has: unchanged files are left out, and so is a commit of nothing."""
    api = HfApi()
    try:
        private = bool(api.model_info(name).private)
        if target.private not in (None, private):
            raise UserError(
                f"hub_model_id: {name!r} is there already, and it is {'private' if private else 'public'}.",
                "Change that in its settings on the hub, or leave --private and --public out.",
            )
    except RepositoryNotFoundError:
        private = target.private is not False
        api.create_repo(name, private=private, exist_ok=True)
    if target.revision:
        api.create_branch(name, branch=target.revision, exist_ok=True)
    before = api.model_info(name, revision=target.revision)
    files = tuple(sorted(path.name for path in staged.iterdir()))
    there = {sibling.rfilename for sibling in before.siblings or ()}
    gone = [n for n in sorted(there) if n not in files and any(fnmatch(n, pattern) for pattern in KNOWN)]
    done = api.create_commit(
        name,
        [
            *(CommitOperationAdd(path_in_repo=n, path_or_fileobj=staged / n) for n in files),
            *(CommitOperationDelete(path_in_repo=n) for n in gone),  # of an earlier push: they would be loaded too
        ],
        commit_message=target.commit_message or MESSAGE,
        revision=target.revision,
        parent_commit=before.sha,
    )
    url = f"{api.endpoint}/{name}"
    return Pushed(name, url, done.oid, files, done.oid != before.sha, private, tuple(notes))


def _repeat(work: Callable[[], T]) -> T:
    """`work` again where a failure may pass. Each try looks first at what the hub has, so that none is made twice."""
    for wait in WAITS:
        try:
            return work()
        except hub_client.failures() as error:
            if not hub_client.is_passing(error):
                raise
        time.sleep(wait)
    return work()


@contextmanager
def _told(folder: Path, target: Target) -> Iterator[None]:
    """Turn the client's failures into ours, with the command that tries again; its own warnings are not shown."""
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    again = f"The run in {str(folder)!r} is as it was. Try again with `{target.command(folder)}`."
    try:
        yield
    except WorkFailed as error:
        raise WorkFailed(error.message, f"{error.fix} {again}") from error
    except UserError:
        raise
    except hub_client.failures() as error:
        cause, fix = hub_client.explain(error)
        name = target.hub_model_id or folder.name
        raise WorkFailed(f"{name!r} was not pushed to {HfApi().endpoint}: {cause}.", f"{fix} {again}") from error
    finally:
        hub_logging.set_verbosity(verbosity)


@contextmanager
def _patient(seconds: float) -> Iterator[None]:
    """No request waits for longer than this for the next byte."""
    session = get_session()
    kept = session.timeout
    session.timeout = seconds
    try:
        yield
    finally:
        session.timeout = kept
