"""doctor: each thing that can be wrong with an installation is seen, with what mends it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

import pytest
import torch

from hf_transfer.cli import doctor
from hf_transfer.cli.doctor import NOTE, OK, WRONG
from hf_transfer.cli.program import main


def states(check) -> dict[str, str]:
    return {c.name: c.state for c in check}


def pretend(folder: Path, name: str, version: str, requires: str = "") -> None:
    """An installed distribution, as pip would leave it."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")


def test_this_machine_is_in_order(monkeypatch, capsys):
    """The tests run on a right installation; a hub is not asked."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["doctor", "vision", "quickstart"]) == 0
    out = capsys.readouterr().out
    assert "No problems found." in out and "torch and torchvision" in out and "WRONG" not in out
    assert f"transformers: {metadata.version('transformers')}" in out
    assert main(["doctor", "--quiet"]) == 0 and capsys.readouterr().out == ""


def test_the_namesake(tmp_path, monkeypatch):
    """PyPI's package normalises to `hf-transfer` and is named `hf_transfer`."""
    assert states(doctor.namesake()) == {"name clash": OK}
    pretend(tmp_path, "hf_transfer", "0.1.9")
    monkeypatch.syspath_prepend(tmp_path)
    (check,) = doctor.namesake()
    assert check.state == WRONG and "0.1.9" in check.detail and "pip uninstall --yes hf_transfer" in check.fix


def test_a_pair_that_does_not_match(tmp_path, monkeypatch):
    assert states(doctor.torch_pair()) == {"torch and torchvision": OK}
    pretend(tmp_path, "torchvision", "0.20.0", "torch==2.5.0")
    monkeypatch.syspath_prepend(tmp_path)
    (check,) = doctor.torch_pair()
    assert check.state == WRONG and "is built for torch 2.5.0" in check.detail and "both in one command" in check.fix


def test_a_pair_that_does_not_load(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    (check,) = doctor.torch_pair()
    assert check.state == WRONG and "nms does not exist" in check.detail


def test_an_old_library_and_a_missing_one(tmp_path, monkeypatch):
    pretend(tmp_path, "peft", "0.1.0")
    monkeypatch.syspath_prepend(tmp_path)
    found = {c.name: c for c in doctor.packages()}
    assert found["peft"].state == WRONG and "0.1.0 does not satisfy >=" in found["peft"].detail
    assert found["peft"].fix.startswith('pip install --upgrade "peft>=') and found["torch"].state == OK
    theirs = metadata.version

    def version(name):
        if name == "evaluate":
            raise metadata.PackageNotFoundError(name)
        return theirs(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    missing = {c.name: c for c in doctor.packages()}["evaluate"]
    assert missing.state == WRONG and missing.fix.startswith('pip install "evaluate>=')


def test_extras(monkeypatch):
    """One that is missing is noted, and wrong where it was asked for."""
    monkeypatch.setitem(doctor.EXTRAS, "demo", ("no_such_module",))
    assert states(doctor.extras_installed(()))["extra demo"] == NOTE
    found = {c.name: c for c in doctor.extras_installed(("demo",))}["extra demo"]
    assert found.state == WRONG and found.fix == 'pip install "hf-transfer-toolkit[demo]"'
    written = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in written for extra in doctor.EXTRAS) and set(doctor.EXTRAS) == set(doctor.NEEDED_FOR)


def test_the_hub(monkeypatch):
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(503)
            self.end_headers()

        def log_message(self, *_):
            pass

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    found = list(doctor.hub())
    assert states(found) == {"hub": OK, "hub token": OK} and "hf_secret" not in str([str(c) for c in found])
    server.shutdown()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    dead = next(doctor.hub())
    assert dead.state == WRONG and "127.0.0.1:9 cannot be reached" in dead.detail and "HF_HUB_OFFLINE=1" in dead.fix


def test_little_room(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1e8})())
    found = list(doctor.disk())
    assert {c.state for c in found} == {WRONG} and any("HF_HOME" in c.fix for c in found)


def test_what_is_wrong_makes_the_exit_code(monkeypatch, capsys):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "[WRONG] hub: " in out and "\n        fix: check the network" in out and "1 problem found." in out


def test_it_runs_where_torch_does_not(tmp_path):
    """A broken torch is what it is for."""
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    code = "import sys; from hf_transfer.cli.program import main; sys.exit(main(['doctor']))"
    environment = {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1 and not done.stderr
    assert "[WRONG] devices: torch does not load (libcudart.so.12" in done.stdout


@pytest.mark.gpu
def test_it_names_the_gpu():
    assert any(c.name.startswith("cuda:") and "bf16" in c.detail for c in doctor.devices())


def test_where_the_boundary_cache_is(tmp_path, monkeypatch):
    """The place is the one that runs write to; its size is that of the files; the command empties it."""
    from huggingface_hub import constants

    from hf_transfer.features import budget
    from hf_transfer.features.store import Slot, Store

    assert doctor._hub_home() == Path(constants.HF_HOME)
    home = tmp_path / "a home"
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    (check,) = doctor.boundary_store()
    assert check.state == OK and "nothing on disk" in check.detail
    for name in "ab":
        slot = Slot("x", (1000,), torch.float32, False, torch.float32)
        Store([slot], None, 1000, budget.default_folder() / name).close()
    (check,) = doctor.boundary_store()
    assert f"2 recordings, 0.008 GB in {budget.default_folder()}" in check.detail
    command = check.detail.partition("uses them: ")[2]
    assert subprocess.run(command, shell=True, check=False).returncode == 0 and not budget.default_folder().exists()
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert doctor._hub_home() == tmp_path / "cache" / "huggingface"
