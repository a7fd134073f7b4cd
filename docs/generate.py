"""Writes the parts of the pages that the code determines: `python docs/generate.py`. A test runs it with `--check`.

Settings come from the pydantic models. Floors and the order of the packages come from import-linter's contract in
setup.cfg. A package's sentence comes from its docstring.
"""

from __future__ import annotations

import ast
import configparser
import re
import sys
from pathlib import Path

from dist_train import registry
from dist_train.config.reference import reference

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
SETTINGS = """# Settings

Every setting, with its type, default and meaning. The page is written from the settings' models by
`python docs/generate.py`. `dist-train config reference` prints the same tables, with the stages of installed packages.

On the command line a setting is `--section.setting VALUE`, as in `--train.optim.lr 0.05`. The value of a name
or a path is the text as typed, any other is YAML: see [The command line](command-line.md#values).
A *fixed* setting determines the result: it cannot change when a run is resumed. The others may.

The stages' sections are on [a page of their own](settings-stages.md).

"""
STAGES = """# Settings of the stages

The sections of [the stages](settings.md), in their order. The page is written as that one is.

"""
WIDTH, ROW, GAP = 600, 46, 8
TREE = re.compile(r"(?<=<!-- tree -->\n).*?(?=<!-- /tree -->)", re.DOTALL)


def pages() -> dict[Path, str]:
    """The generated files with their text."""
    architecture = DOCS / "architecture.md"
    return {
        DOCS / "settings.md": SETTINGS + "".join(settings(of_stages=False)).rstrip() + "\n",
        DOCS / "settings-stages.md": STAGES + "".join(settings(of_stages=True)).rstrip() + "\n",
        DOCS / "floors.svg": floors(),
        architecture: TREE.sub(lambda _: tree() + "\n", architecture.read_text()),
    }


def settings(of_stages: bool) -> list[str]:
    """The tables of the stages' sections, or all others."""
    tables = re.split(r"^(?=## )", reference(), flags=re.MULTILINE)
    stages = {f"## `{name}`" for name in registry.stages.names()}
    return [table for table in tables if (table.partition("\n")[0] in stages) == of_stages]


def layers() -> list[list[str]]:
    """The floors of the contract, from the top: the packages of each."""
    lines = _setup()["importlinter:contract:floors"]["layers"].split("\n")
    return [re.split(r"\s*[|:]\s*", line.strip()) for line in lines if line.strip()]


def without_torch() -> set[str]:
    """The packages that the contract forbids to import torch."""
    names = _setup()["importlinter:contract:no_torch"]["source_modules"].split()
    return {name.removeprefix("dist_train.") for name in names}


def tree() -> str:
    """A Markdown table of the packages, from the top floor, each with the first sentence of its docstring."""
    rows = ["| Package | Purpose |", "|---|---|"]
    for name in (name for floor in layers() for name in floor):
        package = ROOT / "dist_train" / name
        if not package.is_dir():
            if name != "__main__":
                rows.append(f"| `{name}.py` | {_sentence(package.with_suffix('.py'))} |")
            continue
        for folder in [package, *sorted(each.parent for each in package.glob("*/__init__.py"))]:
            rows.append(f"| `{folder.relative_to(ROOT / 'dist_train')}/` | {_sentence(folder / '__init__.py')} |")
    return "\n".join(rows)


def floors() -> str:
    """The picture of the contract: a row of boxes for each floor, from the top."""
    rows, light = layers(), without_torch()
    height = len(rows) * ROW + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'font-family="sans-serif" font-size="13" text-anchor="middle">',
        "<title>The packages of dist_train: each imports only from the floors below its own</title>",
    ]
    for number, names in enumerate(rows):
        width = (WIDTH - GAP * (len(names) - 1)) / len(names)
        for place, name in enumerate(names):
            parts += _box(name, place * (width + GAP), number * ROW, width, name in light)
    y = len(rows) * ROW + 8
    parts += _box("imports no torch", 0, y, 160, True) + _box("may import torch", 168, y, 160, False)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _box(text: str, x: float, y: float, width: float, light: bool) -> list[str]:
    fill, edge = ("#d3f0dd", "#3d8b5f") if light else ("#d9e6fb", "#3f6fb5")
    return [
        f'<rect x="{x + 1:.1f}" y="{y + 1}" width="{width - 2:.1f}" height="30" rx="5" fill="{fill}" stroke="{edge}"/>',
        f'<text x="{x + width / 2:.1f}" y="{y + 21}" fill="#16202e">{text}</text>',
    ]


def _setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg")
    return parser


def _sentence(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    first = re.match(r".*?[.](?=\s|$)", " ".join(docstring.split()))
    return (first[0] if first else docstring).replace("|", "\\|")


if __name__ == "__main__":
    stale = {path: text for path, text in pages().items() if not path.exists() or path.read_text() != text}
    if sys.argv[1:] == ["--check"]:
        sys.exit(f"not current: {', '.join(path.name for path in stale)}; python docs/generate.py" if stale else 0)
    for path, text in stale.items():
        path.write_text(text)
