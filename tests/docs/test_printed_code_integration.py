"""Code and commands on the pages work as printed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train import load_artifact
from dist_train.run_dir.files import read_json
from dist_train.run_dir.paths import RunDir
from tests.support.pages import DOCS, README, blocks
from tests.support.ranks import ROOT, Ranks

YOUR_OWN = DOCS / "your-own.md"


def _run_as_printed(marker: str, modules: dict[str, str], folder: Path) -> dict[str, Any]:
    """Writes the modules and mine.yaml of the page, runs its command that has `marker`, and returns the results.

    modules: name -> a word of the block that is the module.
    """
    for name, word in modules.items():
        (folder / f"{name}.py").write_text(next(block for block in blocks(YOUR_OWN, "python") if word in block))
    (folder / "mine.yaml").write_text(blocks(YOUR_OWN, "yaml")[0])
    command = next(block for block in blocks(YOUR_OWN) if marker in block).replace("\\\n", " ").split()
    assert command[:3] == ["torchrun", "--nproc_per_node", "2"]
    arguments: Sequence[str] = ["-m", "torch.distributed.run", *command[1:]]
    with Ranks(1, arguments, {"XDG_CACHE_HOME": str(folder / "cache")}, folder) as ranks:
        assert ranks.wait(280) == [0], ranks.printed()
        (folder / "printed").write_text(ranks.output(0))
    results: dict[str, Any] = read_json(RunDir(next((folder / "runs").iterdir())).results)
    return results


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_your_own_model_and_data_train_as_printed(tmp_path: Path) -> None:
    results = _run_as_printed("--import mine\n", {"mine": "register_model"}, tmp_path)
    assert len([line for line in (tmp_path / "mine.py").read_text().splitlines() if line]) <= 20
    assert results["models"]["int8"]["count"] == 100
    assert results["models"]["int8"]["top1"] > 0.9
    model, manifest = load_artifact(tmp_path / "runs" / "mine" / "export")
    assert manifest["classes"] == ["dark", "bright"]
    assert model(torch.zeros(3, 3, 16, 16)).shape == (3, 2)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_your_own_task_trains_as_printed(tmp_path: Path) -> None:
    modules = {"mine": "register_model", "counting": "register_task"}
    results = _run_as_printed("--import counting", modules, tmp_path)
    assert "  error " in (tmp_path / "printed").read_text()
    assert results["models"]["int8"]["count"] == 100 and results["models"]["int8"]["error"] < 1


@pytest.mark.timeout(300)
def test_the_python_of_readme_and_quickstart_runs_as_printed(tmp_path: Path) -> None:
    (code,) = blocks(README, "python")
    assert len([line for line in code.splitlines() if line]) <= 10
    (tmp_path / "program.py").write_text(code)
    with Ranks(1, ["program.py"], {"XDG_CACHE_HOME": str(tmp_path / "cache")}, tmp_path) as ranks:
        assert ranks.wait(280) == [0], ranks.printed()
    assert read_json(RunDir(tmp_path / "runs" / "from_python").results)["models"]["int8"]["top1"] > 0.9
    (tmp_path / "runs" / "quickstart").symlink_to("from_python")
    (code,) = blocks(DOCS / "quickstart.md", "python")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


def test_the_mistakes_are_shown_as_printed() -> None:
    block = next(block for block in blocks(DOCS / "command-line.md") if block.startswith("$ dist-train run"))
    command, _, printed = block.partition("\n")
    answer = subprocess.run(
        [sys.executable, "-m", "dist_train", *command.split()[2:]], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert answer.returncode == 78
    assert answer.stderr.strip() == printed.strip()
