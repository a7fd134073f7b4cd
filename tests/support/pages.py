"""The README and the pages of docs/, and the fenced blocks in them."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.ranks import ROOT

README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def blocks(page: Path, language: str = "") -> list[str]:
    """The fenced blocks of a language, in order."""
    fenced = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]
