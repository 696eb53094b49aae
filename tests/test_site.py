"""The documentation site: what is in it, that its pages say what the code says, and that it builds."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

import hf_transfer
import mkdocs_hooks as site
from hf_transfer.keys import keys
from tests.test_docs import ROOT, check, commands, fences

DOCS = ROOT / "docs"
PAGES = {path.name: path.read_text() for path in sorted(DOCS.glob("*.md"))}
COOKBOOK = {path: page for pages in site.cookbook().values() for path, page in pages.items()}
RECIPES = [*ROOT.glob("recipes/*/**/*.yaml"), *(p for p in ROOT.glob("recipes/*.py") if p.name != "train.py")]


def in_navigation(section: Any) -> Iterator[str]:
    if isinstance(section, str):
        yield section
    else:
        for part in section.values() if isinstance(section, dict) else section:
            yield from in_navigation(part)


def test_every_page_is_in_the_navigation_once():
    named = list(in_navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(named) == sorted([*PAGES, "cookbook", site.KEYS_PAGE])
    config = type("Config", (), {"nav": [{"Data": "data.md"}, {"Cookbook": "cookbook"}]})
    assert list(in_navigation(site.on_config(config).nav)) == ["data.md", *COOKBOOK]


def test_the_index_names_every_page():
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", PAGES["index.md"])) == set(PAGES) - {"index.md"}


def anchors(page: str) -> set[str]:
    """What links into a page may name: its headings, as mkdocs writes them."""
    text = re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    text = re.sub(r"^```.*?^```$", "", PAGES[name], flags=re.DOTALL | re.MULTILINE)
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", text)):
        if target.startswith("https://") or target == site.KEYS_PAGE:
            continue
        assert not target or (DOCS / target).is_file(), target
        if anchor:
            assert anchor in anchors(PAGES[target or name]), f"{target}#{anchor}"


def test_the_reference_has_every_public_name_and_its_members_exist():
    entries = re.split(r"^::: hf_transfer\.", PAGES["reference.md"], flags=re.MULTILINE)[1:]
    assert sorted(entry.split()[0] for entry in entries) == hf_transfer.__all__
    for entry in entries:
        named = yaml.safe_load(entry.partition("\n")[2] or "{}") or {}
        for member in named.get("options", {}).get("members") or []:
            assert getattr(getattr(hf_transfer, entry.split()[0]), member).__doc__, member


def test_the_concepts_print_what_is_printed():
    names: dict[str, Any] = {}
    said = ""
    for language, block in fences(DOCS / "concepts.md"):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(block, "concepts.md", "exec"), names)
            said = out.getvalue()
        else:
            assert said.rstrip() == block.rstrip()


def test_every_recipe_has_a_page_with_its_command():
    assert len(COOKBOOK) == len(RECIPES) > 30
    for recipe in RECIPES:
        path = recipe.relative_to(ROOT).as_posix()
        (page,) = (page for page in COOKBOOK.values() if f"`{path}`:" in page or f"\npython {path}" in page)
        if recipe.suffix == ".py":
            continue
        about, fields = site.header(recipe)
        assert page.startswith(f"# {recipe.stem}\n\n{about}\n") and f"**Expected**: {fields['Expected']}" in page
        assert yaml.safe_load(page.split("```yaml\n")[1].split("```")[0]) == yaml.safe_load(recipe.read_text())
        ours = [shlex.split(line) for line in commands(page) if line.startswith("hf-transfer")]
        assert ours and all(f"{path}" == words[-1] for words in ours)
        for words in ours:
            check(words[1:])
        for line in (line for line in commands(page) if line.startswith("python ")):
            assert (ROOT / line.split()[1]).is_file()


def test_the_page_of_keys_has_every_key_once_with_its_help():
    page = site.keys_page()
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", page, flags=re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(keys())
    help = dict(rows)
    assert "gradual" in help["strategy"] and "`auto`" in help["strategy"]
    assert all(len(re.split(r"(?<!\\)\|", row)) == 3 for row in help.values())
    assert "&lt;name>" in help["model_name_or_path"]


@pytest.mark.slow
def test_the_site_builds_strictly_and_asks_no_other_machine(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings_handlers"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path.parent.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("index.html")}
    assert len(pages) == len(PAGES) + len(COOKBOOK) + 1
    for name in hf_transfer.__all__:
        assert f'id="hf_transfer.{name}"' in pages["reference"] or f">{name}<" in pages["reference"], name
    assert "Fine-tune a pretrained model on a dataset." in pages["reference"]
    assert not [
        p for p, text in pages.items() if re.search(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//', text)
    ]
