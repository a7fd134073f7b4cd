"""Commands and code of README.md work as printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dist_train import load_artifact
from dist_train.run_dir.files import read_json
from dist_train.run_dir.paths import RunDir
from tests.support.ranks import ROOT, Ranks

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Returns the fenced blocks of a language, in order."""
    found, inside = [], None
    for line in README.splitlines(keepends=True):
        if line.startswith("```"):
            if inside is not None and inside[0] == language:
                found.append("".join(inside[1:]))
            inside = [line[3:].strip()] if inside is None else None
        elif inside is not None:
            inside.append(line)
    return found


def test_there_are_two_set_up_commands_each_one_line() -> None:
    commands = [line for line in README.splitlines() if line.startswith("pip install")]
    assert len(commands) == 2
    assert commands[0].endswith("torchrun --nproc_per_node 2 -m dist_train run configs/quickstart.yaml")
    assert commands[1].endswith("pytest")


@pytest.mark.timeout(300)
def test_your_own_model_and_data_train_as_printed(tmp_path: Path) -> None:
    code = next(block for block in blocks("python") if "register_model" in block)
    settings = blocks("yaml")[0]
    command = next(block for block in blocks("") if "--import mine" in block).strip()
    assert len([line for line in code.splitlines() if line]) <= 20
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "mine.yaml").write_text(settings)
    assert command.startswith("torchrun --nproc_per_node 2 ")
    arguments = command.split()[1:]
    with Ranks(
        1, ["-m", "torch.distributed.run", *arguments], {"XDG_CACHE_HOME": str(tmp_path / "cache")}, tmp_path
    ) as ranks:
        assert ranks.wait(280) == [0], ranks.printed()
    results = read_json(RunDir(tmp_path / "runs" / "mine").results)
    assert results["models"]["int8"]["count"] == 100
    assert results["models"]["int8"]["top1"] > 0.9
    model, manifest = load_artifact(tmp_path / "runs" / "mine" / "export")
    assert manifest["classes"] == ["dark", "bright"]
    assert model(torch.zeros(3, 3, 16, 16)).shape == (3, 2)


@pytest.mark.timeout(300)
def test_your_own_task_trains_as_printed(tmp_path: Path) -> None:
    for name, marker in (("mine", "register_model"), ("counting", "register_task")):
        (tmp_path / f"{name}.py").write_text(next(block for block in blocks("python") if marker in block))
    (tmp_path / "mine.yaml").write_text(blocks("yaml")[0])
    command = next(block for block in blocks("") if "--import counting" in block).strip()
    environ = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    with Ranks(1, ["-m", "torch.distributed.run", *command.split()[1:]], environ, tmp_path) as ranks:
        assert ranks.wait(280) == [0], ranks.printed()
        assert "  error " in ranks.output(0)
    results = read_json(RunDir(tmp_path / "runs" / "count").results)
    assert results["models"]["int8"]["count"] == 100 and results["models"]["int8"]["error"] < 1


def test_the_mistakes_are_shown_as_printed(tmp_path: Path) -> None:
    block = next(block for block in blocks("") if block.startswith("$ dist-train run"))
    command, _, printed = block.partition("\n")
    answer = subprocess.run(
        [sys.executable, "-m", "dist_train", *command.split()[2:]], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert answer.returncode == 78
    assert answer.stderr.strip() == printed.strip()


def test_the_settings_are_those_of_the_code() -> None:
    block = README.partition("<!-- config reference -->\n")[2].partition("<!-- /config reference -->")[0]
    answer = subprocess.run(
        [sys.executable, "-m", "dist_train", "config", "reference"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert block.strip() == answer.stdout.strip(), "dist-train config reference, between the two comments of README.md"


def test_the_feature_table_names_tests_and_files_that_are_there() -> None:
    table = README.partition("## Features")[2].partition("\n## ")[0]
    named = set(re.findall(r"`((?:tests|configs|benchmarks)/[\w/.]+)`", table))
    assert len(named) > 30
    assert not [name for name in named if not (ROOT / name).exists()]
