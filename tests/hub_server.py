"""A hub on this machine, for the real client over real sockets: create, push through LFS or Xet, pull, and fail.

    python tests/hub_server.py --root DIR --token SECRET=alice:write --token OTHER=bob:read

prints `READY http://127.0.0.1:PORT`. What a repository holds lies in DIR: contents under `objects/`, named by their
SHA-256, and `repos/<owner>/<name>.json` with branches and commits. With `CAS=local://FOLDER` in the environment, which
hf_xet takes for its storage, clients that have Xet use it. Under `/__test__/` are the log of requests and the faults to
make: a list of `{path, method?, times?, status?, message?, drop?, truncate?, corrupt?, lose?}`, of which the first that
matches is made, `times` times (once; -1: always).
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = (".safetensors", ".bin", ".onnx")


class Refused(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


# ---- what repositories hold ----------------------------------------------------------------------------------------


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def xet_hash(sha256: str) -> str | None:
    """The Xet hash of a file, read from the shards (records of 48 bytes) that a `local://` storage keeps."""

    def swapped(data: bytes) -> bytes:
        return b"".join(data[i : i + 8][::-1] for i in range(0, 32, 8))

    wanted = bytes.fromhex(sha256)
    for shard in Path(os.environ.get("CAS", "local:///nowhere").removeprefix("local://")).rglob("*.mdb"):
        blob, at = shard.read_bytes(), 48
        while at + 48 <= len(blob) and blob[at : at + 32] != b"\xff" * 32:
            record = blob[at : at + 48]
            flags, count = (int.from_bytes(record[i : i + 4], "little") for i in (32, 36))
            at += 48 * (1 + count + (count if flags & (1 << 31) else 0))
            if flags & (1 << 30):
                found, at = blob[at : at + 32], at + 48
                if wanted in (found, swapped(found)):
                    return swapped(record[:32]).hex()
    return None


class Store:
    """Contents and repositories on the disk, each file written beside and renamed."""

    def __init__(self, root: str):
        self.root, self.lock = Path(root), threading.RLock()

    def write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, beside = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(number, "wb") as file:
            file.write(data)
        Path(beside).replace(path)

    def put(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        self.write(self.root / "objects" / sha256, data)
        return sha256

    def has(self, sha256: str) -> bool:
        return (self.root / "objects" / sha256).exists()

    def get(self, sha256: str) -> bytes:
        return (self.root / "objects" / sha256).read_bytes()

    def load(self, name: str) -> dict[str, Any] | None:
        path = self.root / "repos" / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def save(self, name: str, repo: dict[str, Any]) -> None:
        self.write(self.root / "repos" / f"{name}.json", json.dumps(repo, indent=1).encode())

    def entry(self, data: bytes) -> dict[str, Any]:
        return {"sha256": self.put(data), "size": len(data), "oid": git_hash(data), "lfs": False}

    @staticmethod
    def commit(repo: dict[str, Any], branch: str, tree: dict[str, Any], title: str) -> str:
        parent = repo["branches"].get(branch)
        sha = hashlib.sha1(json.dumps([parent, title, tree, time.time_ns()]).encode()).hexdigest()
        repo["commits"][sha] = {"parent": parent, "title": title, "tree": tree}
        repo["branches"][branch] = sha
        return sha

    @staticmethod
    def resolve(repo: dict[str, Any], revision: str) -> str:
        sha = repo["branches"].get(revision) or (revision if revision in repo["commits"] else None)
        if sha is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha


# ---- requests ------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def reply(self, value: Any = None, status: int = 200, data: bytes | None = None, **headers: Any) -> None:
        body = json.dumps(value if value is not None else {}).encode() if data is None else data
        fault, length = self.fault if self.command == "GET" and data else {}, len(body)
        if fault.get("corrupt"):
            body = body[:-1] + bytes([body[-1] ^ 255])
        if fault.get("truncate"):
            body, length = body[: len(body) // 2], len(body) // 2
        self.sent = status
        self.send_response(status)
        headers = {"Content_Type": "application/json" if data is None else "application/octet-stream", **headers}
        for name, entry in {"Content_Length": length, **headers}.items():
            self.send_header(name.replace("_", "-"), str(entry))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer(self) -> None:
        url, self.sent, self.fault = urlsplit(self.path), None, {}
        self.query, self.body = parse_qs(url.query), self.read_body()
        try:
            if not url.path.startswith("/__test__/"):
                self.fault = self.server.take_fault(self.command, url.path)
            if self.fault.get("drop"):
                self.close_connection = True
                self.connection.close()
                return
            if self.fault.get("status"):
                said = self.fault.get("message", "made for a test").replace(
                    "{auth}", str(self.headers["Authorization"])
                )
                raise Refused(self.fault["status"], said, self.fault.get("code"))
            self.user = self.authenticate()
            for method, pattern, function in ROUTES:
                found = re.fullmatch(pattern, url.path)
                if found and self.command in method.split():
                    function(self, *[g and unquote(g) for g in found.groups()])
                    return
            raise Refused(404, f"no route {self.command} {url.path}", "EntryNotFound")
        except Refused as error:
            headers = {"X_Error_Message": error.message, **error.headers}
            headers |= {"X_Error_Code": error.code} if error.code else {}
            self.reply({"error": error.message}, error.status, **headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            entry = {"method": self.command, "path": url.path, "status": self.sent}
            self.server.log.append({**entry, "auth": "Authorization" in self.headers})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    # ---- who may ----

    def authenticate(self) -> dict[str, str] | None:
        given = self.headers.get("Authorization")
        if not given or self.path.startswith("/__lfs__/"):
            return None
        if (user := self.server.users.get(given.removeprefix("Bearer "))) is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return user

    def repo(self, name: str, write: bool = False) -> dict[str, Any]:
        repo, owner = self.server.store.load(name), name.split("/")[0]
        if repo is None or (repo["private"] and (self.user is None or self.user["name"] != owner)):
            raise Refused(401 if self.user is None else 404, "Repository not found", "RepoNotFound")
        if write:
            self.check_write(owner)
        return repo

    def check_write(self, owner: str) -> None:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        if (self.user["name"], self.user["role"]) != (owner, "write"):
            raise Refused(403, f'You don\'t have the rights to write under the namespace "{owner}"')

    # ---- the API ----

    def whoami(self) -> None:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        token = {"type": "access_token", "accessToken": {"displayName": "t", "role": self.user["role"]}}
        self.reply({"type": "user", "name": self.user["name"], "orgs": [], "auth": token})

    def create(self) -> None:
        asked, store = json.loads(self.body), self.server.store
        owner = asked.get("organization") or (self.user or {}).get("name", "")
        self.check_write(owner)
        name = f"{owner}/{asked['name']}"
        url = f"{self.server.base}/{name}"
        with store.lock:
            if store.load(name):
                self.reply({"error": "You already created this repo", "url": url}, 409)
                return
            repo: dict[str, Any] = {"private": asked.get("visibility") == "private", "branches": {}, "commits": {}}
            attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE)
            store.commit(repo, "main", {".gitattributes": store.entry(attributes.encode())}, "initial commit")
            store.save(name, repo)
        self.reply({"url": url, "name": name, "id": name})

    def validate_yaml(self) -> None:
        """The hub's own validator is not public: YAML must be a mapping, with values of the types that it documents."""
        content, errors = json.loads(self.body)["content"], []
        found = re.match(r"---\n(.*?)\n---(\n|$)", content, re.DOTALL)
        try:
            meta = yaml.safe_load(found[1]) if found else {}
            for key in ("tags", "datasets", "metrics", "language"):
                if not all(isinstance(v, str) for v in _listed(meta.get(key))):
                    errors.append(f'"{key}" must be a string or a list of strings')
            for key in ("pipeline_tag", "library_name", "license"):
                if not isinstance(meta.get(key, ""), str):
                    errors.append(f'"{key}" must be a string')
            base = meta.get("base_model", "owner/name")
            if not isinstance(base, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
                errors.append(f'"base_model" with value "{base}" is not valid')
            for result in (meta.get("model-index") or [{"results": []}])[0]["results"]:
                if not {"type", "name"} <= set(result["dataset"]) or "type" not in result["task"]:
                    errors.append('"model-index" lacks the type of a task or data set')
                if not all(isinstance(m["value"], int | float) and m["type"] for m in result["metrics"]):
                    errors.append('"model-index" holds a metric without a type or a number')
        except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
            errors.append(f"yaml: {error}")
        self.reply({"errors": [{"message": e} for e in errors], "warnings": []}, 400 if errors else 200)

    def info(self, name: str, revision: str | None = None) -> None:
        repo = self.repo(name)
        sha = Store.resolve(repo, revision or "main")
        tree = repo["commits"][sha]["tree"]
        card = self.server.store.get(tree["README.md"]["sha256"]).decode() if "README.md" in tree else ""
        found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
        files = [{"rfilename": path} for path in sorted(tree)]
        about = {"id": name, "sha": sha, "private": repo["private"], "siblings": files, "tags": [], "downloads": 0}
        self.reply({**about, **({"cardData": yaml.safe_load(found[1])} if found else {})})

    def tree(self, name: str, revision: str) -> None:
        repo = self.repo(name)
        files = repo["commits"][Store.resolve(repo, revision)]["tree"]
        self.reply([_listing(path, entry) for path, entry in sorted(files.items())])

    def paths_info(self, name: str, revision: str) -> None:
        repo = self.repo(name)
        files = repo["commits"][Store.resolve(repo, revision)]["tree"]
        is_json = "json" in self.headers.get("Content-Type", "")
        wanted = json.loads(self.body)["paths"] if is_json else parse_qs(self.body.decode())["paths"]
        self.reply([_listing(path, files[path]) for path in wanted if path in files])

    def branch(self, name: str, branch: str) -> None:
        with self.server.store.lock:
            repo = self.repo(name, write=True)
            if branch in repo["branches"]:
                raise Refused(409, "Reference already exists")
            repo["branches"][branch] = repo["branches"]["main"]
            self.server.store.save(name, repo)
        self.reply()

    def preupload(self, name: str, revision: str) -> None:
        repo = self.repo(name, write=True)
        tree, answers = repo["commits"][Store.resolve(repo, revision)]["tree"], []
        for asked in json.loads(self.body)["files"]:
            old = tree.get(asked["path"])
            answers.append(
                {
                    "path": asked["path"],
                    "uploadMode": "lfs" if asked["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": old and (old["sha256"] if old["lfs"] else old["oid"]),
                }
            )
        self.reply({"files": answers})

    def commit(self, name: str, revision: str) -> None:
        header, *operations = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        store = self.server.store
        with store.lock:
            repo = self.repo(name, write=True)
            head = Store.resolve(repo, revision)
            if header["value"].get("parentCommit", head) != head:
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            tree = dict(repo["commits"][head]["tree"])
            for operation in operations:
                self.apply(operation["key"], operation["value"], tree, by_xet=name in self.server.by_xet)
            sha = store.commit(repo, revision, tree, header["value"]["summary"])
            store.save(name, repo)
        if self.fault.get("lose"):  # the commit is made, and the answer never comes
            raise ConnectionResetError
        self.reply({"success": True, "commitOid": sha, "commitUrl": f"{self.server.base}/{name}/commit/{sha}"})

    def apply(self, kind: str, value: dict[str, Any], tree: dict[str, Any], by_xet: bool) -> None:
        store, path = self.server.store, value["path"]
        if kind == "file":
            tree[path] = store.entry(base64.b64decode(value["content"]))
        elif kind == "lfsFile":
            xet = xet_hash(value["oid"]) if by_xet else None
            if not store.has(value["oid"]) and xet is None:
                raise Refused(400, f"LFS pointer pointed to a file that does not exist: {value['oid']}")
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\nsize {value['size']}\n"
            own = {"sha256": value["oid"], "size": value["size"], "oid": git_hash(pointer.encode())}
            tree[path] = {**own, "lfs": True, "xet": xet}
        elif kind == "deletedFile" and path in tree:
            del tree[path]
        else:
            raise Refused(400, f"unsupported: {kind} of {path}")

    def xet_token(self, name: str, kind: str) -> None:
        self.repo(name, write=kind == "write")
        if kind == "write":
            self.server.by_xet.add(name)
        cas, until = os.environ["CAS"], int(time.time()) + 3600
        headers = {"X_Xet_Cas_Url": cas, "X_Xet_Access_Token": "x", "X_Xet_Token_Expiration": until}
        self.reply({"casUrl": cas, "exp": until, "accessToken": "x"}, **headers)

    # ---- contents ----

    def lfs_batch(self, name: str) -> None:
        commits = self.repo(name, write=True)["commits"].values()
        held, answers = {entry["sha256"] for commit in commits for entry in commit["tree"].values()}, []
        for asked in json.loads(self.body)["objects"]:
            there = f"{self.server.base}/__lfs__/{asked['oid']}?X-Amz-Signature=signed-for-you"
            upload = {} if asked["oid"] in held else {"actions": {"upload": {"href": there}}}
            answers.append({"oid": asked["oid"], "size": asked["size"], **upload})
        self.reply({"transfer": "basic", "objects": answers}, Content_Type="application/vnd.git-lfs+json")

    def lfs_put(self, sha256: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise Refused(400, "sha256 mismatch")
        self.server.store.put(self.body)
        self.reply(ETag=f'"{sha256}"')

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.repo(name)
        sha = Store.resolve(repo, revision)
        entry = repo["commits"][sha]["tree"].get(path)
        if entry is None:
            raise Refused(404, "Entry not found", "EntryNotFound", {"X_Repo_Commit": sha})
        tag = f'"{entry["sha256"] if entry["lfs"] else entry["oid"]}"'
        headers = {"X_Repo_Commit": sha, "ETag": tag, "X_Linked_Size": entry["size"], "X_Linked_ETag": tag}
        if entry.get("xet"):
            link = f"{self.server.base}/api/models/{name}/xet-read-token/{sha}"
            headers |= {"X_Xet_Hash": entry["xet"], "Link": f'<{link}>; rel="xet-auth"'}
            self.reply(data=b"", Content_Length=entry["size"], **headers)
        elif self.command == "HEAD":
            self.reply(data=b"", Content_Length=entry["size"], **headers)
        else:
            self.reply(data=self.server.store.get(entry["sha256"]), **headers)

    def control(self, what: str) -> None:
        if what == "faults":
            self.server.faults, self.server.log = json.loads(self.body), []
        self.reply(self.server.log if what == "log" else {})


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _listing(path: str, entry: dict[str, Any]) -> dict[str, Any]:
    found = {"type": "file", "path": path, "size": entry["size"], "oid": entry["oid"]}
    if entry["lfs"]:
        found["lfs"] = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": 134}
    return {**found, **({"xetHash": entry["xet"]} if entry.get("xet") else {})}


NAME = r"([\w.-]+/[\w.-]+)"
API = f"/api/models/{NAME}"
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", API, Handler.info),
    ("GET", f"{API}/revision/([^/]+)", Handler.info),
    ("GET", f"{API}/tree/([^/]+)", Handler.tree),
    ("POST", f"{API}/paths-info/([^/]+)", Handler.paths_info),
    ("GET", f"{API}/xet-(read|write)-token/[^/]+", Handler.xet_token),
    ("POST", f"{API}/preupload/([^/]+)", Handler.preupload),
    ("POST", f"{API}/commit/([^/]+)", Handler.commit),
    ("POST", f"{API}/branch/([^/]+)", Handler.branch),
    ("POST", f"/{NAME}\\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/__lfs__/([0-9a-f]{64})", Handler.lfs_put),
    ("GET HEAD", f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("GET POST", "/__test__/(log|faults)", Handler.control),
]


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, root: str, users: dict[str, dict[str, str]]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.store, self.users, self.base = Store(root), users, f"http://127.0.0.1:{self.server_port}"
        self.faults: list[dict[str, Any]] = []
        self.log: list[dict[str, Any]] = []
        self.by_xet: set[str] = set()  # repositories that a client has uploaded to through Xet
        self.lock = threading.Lock()

    def take_fault(self, method: str, path: str) -> dict[str, Any]:
        with self.lock:
            for fault in self.faults:
                if (
                    fault.setdefault("times", 1)
                    and fault.get("method", method) == method
                    and re.search(fault["path"], path)
                ):
                    fault["times"] -= 1
                    return fault
        return {}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", required=True)
    parser.add_argument("--token", action="append", default=[], help="SECRET=name:role")
    args = parser.parse_args()
    users = {}
    for given in args.token:
        secret, _, user = given.partition("=")
        name, _, role = user.partition(":")
        users[secret] = {"name": name, "role": role}
    server = Server(args.root, users)
    print(f"READY {server.base}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
