"""Pages of the site that are written from what they describe: one per recipe, and one of every key.

mkdocs calls `on_config` and `on_files`; nothing here is written to `docs/`, so that no page can be out of date.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from hf_transfer.config.command_line import kind_of_value, plain
from hf_transfer.config.fields import Key
from hf_transfer.keys import keys

ROOT = Path(__file__).parent
FOLDERS = {
    "text_classification": "Texts",
    "text_classification/three_datasets": "Three tasks on texts",
    "image_classification": "Images",
    "image_classification/three_datasets": "Three tasks on images",
    "studies": "Studies",
}
SCRIPTS = "Scripts"
HEADER = ("Command", "Data", "Hardware", "Time", "Expected")
KEYS_PAGE = "keys.md"


# ---- recipes -------------------------------------------------------------------------------------------------------


def header(recipe: Path) -> tuple[str, dict[str, str]]:
    """The comment at the top of a recipe: what it is, and its fields by name (`HEADER`)."""
    about: list[str] = []
    found: dict[str, str] = {}
    last = ""
    for line in recipe.read_text().splitlines():
        if not line.startswith("#"):
            break
        text = line[1:].strip()
        name, colon, value = text.partition(":")
        if colon and name in HEADER:
            last, found[name] = name, value.strip()
        elif last:
            found[last] += f" {text}"
        else:
            about.append(text)
    return " ".join(about), found


def recipe_page(recipe: Path) -> str:
    """Title, what it is, its command, what to expect, and the file itself."""
    path = recipe.relative_to(ROOT).as_posix()
    about, fields = header(recipe)
    body = re.sub(r"\A(#.*\n)+", "", recipe.read_text())
    study = recipe.parent.name == "studies"
    commands = [fields["Data"]] if "Data" in fields else []
    commands += [f"hf-transfer {'compare' if study else 'train'} --config {path}"]
    more = "The results are discussed in [Studies](../../studies.md).\n" if study else ""
    if not study:
        commands += [f"hf-transfer plan --config {path}"]
        more = "`plan` says what it would do, and trains nothing.\n"
    if recipe.parent.name == "three_datasets":
        commands.insert(0, f"python {(recipe.parent / 'data.py').relative_to(ROOT)}")
        folder = recipe.parent.relative_to(ROOT)
        more += f"All tasks of the folder, on one backbone: `python recipes/many_tasks.py {folder}`.\n"
    facts = [f"- **{name}**: {fields[name]}" for name in ("Hardware", "Time", "Expected") if name in fields]
    return "\n".join(
        [
            f"# {recipe.stem}\n\n{about}\n\n```",
            *commands,
            f"```\n{more}",
            *facts,
            f"\n`{path}`:\n```yaml\n{body.strip()}\n```",
            "A key on the command line wins over the file's: `--learning_rate 1e-4 --seed 1 --output_dir out/again`.",
            f"[Keys]({'../' * len(recipe.relative_to(ROOT / 'recipes').parents)}keys.md) lists all of them.\n",
        ]
    )


def script_page(script: Path) -> str:
    """A program of `recipes/`, from its docstring."""
    about = ast.get_docstring(ast.parse(script.read_text())) or ""
    title, _, rest = about.partition("\n\n")
    code, _, rest = rest.partition("\n\n")
    commands = "\n".join(line.strip() for line in code.splitlines())
    return f"# {script.stem}\n\n{title}\n\n```\n{commands}\n```\n{rest}\n"


def cookbook() -> dict[str, dict[str, str]]:
    """{heading: {path below docs: page}} of all recipes."""
    found: dict[str, dict[str, str]] = {}
    for folder, heading in FOLDERS.items():
        recipes = sorted((ROOT / "recipes" / folder).glob("*.yaml"))
        found[heading] = {f"cookbook/{folder}/{recipe.stem}.md": recipe_page(recipe) for recipe in recipes}
    scripts = [path for path in sorted((ROOT / "recipes").glob("*.py")) if path.name != "train.py"]
    found[SCRIPTS] = {f"cookbook/scripts/{script.stem}.md": script_page(script) for script in scripts}
    return found


# ---- keys ----------------------------------------------------------------------------------------------------------


def keys_page() -> str:
    """Every key of `train` and `fine_tune` by topic, with its kind, default and help."""
    topics: dict[str, list[Key]] = {}
    for key in keys().values():
        topics.setdefault(key.topic, []).append(key)
    lines = [
        "# Keys",
        "Every key of `hf-transfer train`, with its default; a YAML file and `fine_tune` take the same names. Keys",
        "without a default here are not set, or chosen from the data. `hf-transfer train --help KEY` says the same of",
        "one key, with its bounds and an example. Other verbs have keys of their own: `hf-transfer VERB --help`.",
    ]
    for topic, members in topics.items():
        lines += [f"\n## {topic[:1].upper()}{topic[1:]}\n| key | what it is | value | default |\n|---|---|---|---|"]
        lines += [_row(key) for key in members]
    return "\n".join(lines) + "\n"


def _row(key: Key) -> str:
    default = "" if key.default is None else f"`{plain(key.default)}`"
    choices = ", ".join(f"`{choice}`" for choice in key.about.choices) or kind_of_value(key).lower()
    bounds = f"; {key.about.range}" if key.about.range else ""
    help = " ".join(key.help.split()) + bounds
    return "| " + " | ".join(_cell(text) for text in (f"`{key.name}`", help, choices, default)) + " |"


def _cell(text: str) -> str:
    return re.sub(r"<(?=\w)", "&lt;", text).replace("|", r"\|")


# ---- mkdocs --------------------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """Put the recipes where the navigation has `cookbook`."""
    for section in config.nav:
        for heading, content in section.items():
            if content == "cookbook":
                section[heading] = [{name: list(pages)} for name, pages in cookbook().items()]
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pages that are not files."""
    from mkdocs.structure.files import File

    written = {KEYS_PAGE: keys_page()}
    for pages in cookbook().values():
        written |= pages
    for path, content in written.items():
        files.append(File.generated(config, path, content=content))
    return files
