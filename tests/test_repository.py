"""Keeps the repository free of binary files outside docs/: results, caches and datasets that were added by mistake."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="only in a git checkout")
def test_git_tracks_no_binary_file_outside_docs() -> None:
    # Compared with the empty tree, git counts "-" added lines for a file that it takes for binary.
    empty = subprocess.check_output(["git", "hash-object", "-t", "tree", "/dev/null"], cwd=ROOT, text=True).strip()
    counted = subprocess.check_output(["git", "diff", "--cached", "--numstat", "-z", empty], cwd=ROOT, text=True)
    files = [line.split("\t") for line in counted.split("\0") if line]
    assert len(files) > 100
    binary = [name for added, _, name in files if added == "-" and not name.startswith("docs/")]
    assert binary == [], f"git rm --cached {' '.join(binary)}"
