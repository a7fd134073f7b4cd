"""Docstrings begin with a noun or a verb, and a package says in one sentence what it is for."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
QUESTION = re.compile(r"(What|Whether|Where|Whose|Which|How|Who)\b")
NEXT_SENTENCE = re.compile(r"[.!?]\s+(?=[A-Z`(])")


@pytest.mark.parametrize("folder", ["dist_train", "benchmarks", "tests"])
def test_no_docstring_begins_with_a_question_word(folder: str) -> None:
    read, found = 0, []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(node)
                read += docstring is not None
                if docstring and QUESTION.match(docstring):
                    found.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}: {docstring.splitlines()[0]}")
    assert read > 0
    assert found == []


def test_the_docstring_of_a_package_is_one_sentence() -> None:
    packages = sorted((ROOT / "dist_train").rglob("__init__.py"))
    docstrings = {path: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) for path in packages}
    assert len(packages) > 20
    assert [
        str(path.relative_to(ROOT))
        for path, text in docstrings.items()
        if not text or not text.endswith(".") or NEXT_SENTENCE.search(text)
    ] == []
