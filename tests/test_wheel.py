"""The package as others get it: what wheel and sdist hold, and every verb from an environment without the source."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path
from types import SimpleNamespace

import pytest

import hf_transfer
from hf_transfer.config.extras import missing_of
from tests import pins, smoke

ROOT = Path(__file__).parents[1]


def test_the_smoke_test_runs_every_verb():
    assert not smoke.unknown_verbs()


def tracked(*folders: str) -> set[str]:
    """Files under git, and what is new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("needs a git repository")
    return {name for name in done.stdout.splitlines() if (ROOT / name).exists()}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> SimpleNamespace:
    """The sdist, and the wheel that is built from it, with the build's own warnings."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return SimpleNamespace(wheel=wheel, sdist=sdist, said=done.stdout + done.stderr)


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(name).decode())


@pytest.mark.slow
def test_what_is_in_the_wheel_and_the_sdist(built):
    with zipfile.ZipFile(built.wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        inside = {name for name in archive.namelist() if ".dist-info/" in name}
    configs = {f"hf_transfer/{name}" for name in tracked("accelerate_configs")}
    assert names == tracked("hf_transfer") | configs and "hf_transfer/py.typed" in names and len(configs) >= 6
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    with tarfile.open(built.sdist) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    assert source - {"PKG-INFO"} == tracked()
    assert "deprecat" not in built.said.lower()


@pytest.mark.slow
def test_the_metadata(built):
    said = metadata_of(built.wheel)
    assert said["Name"] == "hf-transfer-toolkit" and said["Version"] == hf_transfer.__version__
    assert said["License-Expression"] == "Apache-2.0" and "License :: " not in str(said)
    assert {"Typing :: Typed", "Programming Language :: Python :: 3.11"} <= set(said.get_all("Classifier"))
    assert said["Requires-Python"] == ">=3.11" and said["Description-Content-Type"] == "text/markdown"
    assert said.get_payload().startswith("# hf_transfer")
    assert set(said.get_all("Provides-Extra")) == set(pins.project()["optional-dependencies"])
    always = {line for line in said.get_all("Requires-Dist") if "extra ==" not in line}
    assert len(always) == len(pins.project()["dependencies"]) and not any("@" in line for line in always)


@pytest.mark.slow
def test_every_verb_of_the_installed_wheel(built, tmp_path):
    """In a new environment that holds the wheel; of this one it sees the libraries only.

    What a `.pth` file names is put on the path without its own `.pth` files, by which this source tree is installed.
    """
    place = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    python = place / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", str(built.wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    (packages,) = (place / "lib").glob("python3*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [str(python), "-I", str(Path(smoke.__file__)), str(tmp_path / "smoke")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    count = len([step for step in smoke.STEPS if not (step.extra and missing_of(step.extra))])
    assert f"{count} of {count} commands work" in done.stdout
    assert str(packages) in done.stdout.splitlines()[-1]
