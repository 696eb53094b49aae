"""A process with the real client, which a test tells what to do: a case per line in, its outcome per line out.

The client reads HF_ENDPOINT, HF_HOME and HF_TOKEN once, so that a hub needs a process of its own; importing takes
seconds, so that all cases share it. Nothing is patched but `time.sleep`: retries wait for seconds. Whether Xet is used
is what HF_HUB_DISABLE_XET became, which is read at each use.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request as web
from pathlib import Path
from typing import Any

from tests.hub_server import LARGE, Store

ROOT = Path(__file__).parents[1]
TOKEN = "hf_alicewritesTHISisNOTaREALtoken"
DIRECT = web.build_opener(web.ProxyHandler({}))
READER = "hf_bobreadsTHISisNOTaREALtoken"


class Hub:
    """The server's process."""

    def __init__(self, root: Path):
        self.root = root
        (root / "cas").mkdir(parents=True)
        tokens = ["--token", f"{TOKEN}=alice:write", "--token", f"{READER}=alice:read"]
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "hub_server.py"), "--root", str(root), *tokens],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "CAS": f"local://{root / 'cas'}"},
        )
        assert self.process.stdout is not None
        self.endpoint = self.process.stdout.readline().split()[1]

    def fail(self, *faults: dict[str, Any]) -> None:
        """Make these faults from now on, and forget what was asked."""
        DIRECT.open(f"{self.endpoint}/__test__/faults", json.dumps(faults).encode()).close()

    def log(self) -> list[str]:
        with DIRECT.open(f"{self.endpoint}/__test__/log") as answer:
            return [f"{entry['method']} {entry['path']}" for entry in json.load(answer)]

    def seed(self, name: str, folder: str | Path) -> None:
        """Put a folder's files into a public repository."""
        files = [p for p in Path(folder).iterdir() if p.is_file()]
        store, repo = Store(str(self.root)), {"private": False, "branches": {}, "commits": {}}
        tree = {p.name: {**store.entry(p.read_bytes()), "lfs": p.suffix in LARGE} for p in files}
        store.commit(repo, "main", tree, "seeded")
        store.save(name, repo)

    def commits(self, name: str, branch: str = "main") -> list[str]:
        """Titles, the newest first."""
        repo = self.repo(name)
        sha, titles = repo["branches"][branch], []
        while sha:
            titles.append(repo["commits"][sha]["title"])
            sha = repo["commits"][sha]["parent"]
        return titles

    def repo(self, name: str) -> dict[str, Any]:
        return json.loads((self.root / "repos" / f"{name}.json").read_text())

    def files(self, name: str, branch: str = "main") -> dict[str, bytes | None]:
        """What a branch holds, but for the file that every repository begins with; None for what Xet's storage has."""
        repo = self.repo(name)
        tree = repo["commits"][repo["branches"][branch]]["tree"]
        found = {path: entry for path, entry in tree.items() if path[0] != "."}
        places = {
            path: self.root / "objects" / entry["sha256"] for path, entry in found.items() if not entry.get("xet")
        }
        return {path: places[path].read_bytes() if path in places else None for path in found}


class Client:
    """The client's process, which uploads by LFS."""

    name = "lfs"

    def __init__(self, endpoint: str, home: Path):
        self.errors, self.said = home.with_suffix(".stderr"), list[str]()
        home.mkdir(parents=True)
        own = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(ROOT),
            "TOKENIZERS_PARALLELISM": "false",
        }
        kept = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_CACHE", "HF_TOKEN_PATH", "TRANSFORMERS_CACHE")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub_client"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors.open("w"),
            text=True,
            env={**kept, **own},
            cwd=ROOT,
        )

    def ask(self, **case: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"by": self.name, **case}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.errors.read_text()[-2000:]
        self.said.append(line)
        return json.loads(line)

    def run(self, *argv: Any, **case: Any) -> tuple[int, str, str]:
        """(exit code, standard output, standard error) of a command; `fresh` empties the cache before it."""
        found = self.ask(argv=[str(word) for word in argv], **case)
        return found["code"], found["out"], found["err"]

    def python(self, code: str, **case: Any) -> Any:
        """What `found` is after this code."""
        answer = self.ask(python=code, **case)
        assert "found" in answer, answer
        return answer["found"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


class XetClient(Client):
    """The same process, which uploads and downloads by Xet when this one asks."""

    name = "xet"

    def __init__(self, other: Client):
        self.errors, self.said, self.process = other.errors, other.said, other.process


# ---- in the client's process ---------------------------------------------------------------------------------------


def serve() -> None:
    from huggingface_hub import constants

    from hf_transfer import hub_client
    from hf_transfer.cli.program import main
    from tests import warm

    warm.hasten()
    answers, sleep = os.fdopen(os.dup(1), "w"), time.sleep
    os.dup2(2, 1)
    time.sleep = lambda seconds: sleep(min(seconds, 0.01))
    names: dict[str, Any] = {}
    for line in sys.stdin:
        case = json.loads(line)
        if case.get("fresh"):
            shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
        constants.HF_HUB_DISABLE_XET = case["by"] != "xet"
        for key, value in case.get("env", {}).items():
            os.environ[key] = value
        hub_client.find.cache_clear()
        hub_client.fetch.cache_clear()
        out, err = io.StringIO(), io.StringIO()
        found: dict[str, Any] = {}
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                if "python" in case:
                    exec(case["python"], names)
                    found = {"found": names["found"]}
                else:
                    found = {"code": main(case["argv"])}
            except BaseException as error:
                found = {"code": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps({**found, "out": out.getvalue(), "err": err.getvalue()}) + "\n")
        answers.flush()
        warm.settle()


if __name__ == "__main__":
    serve()
