"""Shell completion: what click answers where a shell asks the program itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_train.config.shipped import shipped

ROOT = Path(__file__).resolve().parents[2]


def asked(cwd: Path, instruction: str, words: list[str]) -> str:
    """Runs the program as the shell's completion does: the last of `words` is incomplete."""
    environ = os.environ | {
        "PYTHONPATH": str(ROOT),
        "_DIST_TRAIN_COMPLETE": instruction,
        "COMP_WORDS": " ".join(["dist-train", *words]),
        "COMP_CWORD": str(len(words)),
    }
    command = [sys.executable, "-m", "dist_train"]
    done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    return done.stdout


def completed(cwd: Path, *words: str) -> list[str]:
    """Returns what bash would offer for the last of `words`; "file," and "dir," let it complete paths."""
    return asked(cwd, "bash_complete", list(words)).split()


def test_the_program_prints_the_function_that_a_shell_loads(tmp_path: Path) -> None:
    script = asked(tmp_path, "bash_source", [])
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "_DIST_TRAIN_COMPLETE=bash_complete" in script and " dist-train" in script


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["r"], ["plain,run", "plain,report"]),
        (["config", "s"], ["plain,show", "plain,schema"]),
        (["launch", ""], ["plain,torchrun", "plain,accelerate", "plain,slurm", "plain,kubernetes"]),
        (["launch", "slurm", "--c"], ["plain,--cpus-per-process"]),
        (["launch", "torchrun", "--c"], []),
        (["launch", "torchrun", "--nproc-per-node", "2", "mi"], ["plain,mine.yaml"]),
        (["launch", "torchrun", "mine.yaml", "--train.ep"], ["plain,--train.epochs"]),
        (["run", "mine.yaml", "--run.seed", "1", "--qat.opt"], None),
        (["run", "none_like_it"], ["file,none_like_it"]),
        (["export", "--format", "o"], ["plain,onnx", "plain,openvino"]),
        (["doctor", "--only", "s"], ["plain,slurm"]),
        (["evaluate", "runs"], ["dir,runs"]),
    ],
)
def test_words_are_completed_where_they_stand(words: list[str], offered: list[str] | None, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("run: {name: mine}\n")
    found = completed(tmp_path, *words)
    if offered is None:
        assert {"plain,--qat.optim.lr", "plain,--qat.optim.name"} <= set(found)
    else:
        assert found == offered


@pytest.mark.parametrize(
    "words", [["run"], ["config", "show"], ["config", "copy"], ["launch", "accelerate"], ["doctor"]]
)
def test_the_shipped_configurations_are_offered_for_config(words: list[str], tmp_path: Path) -> None:
    assert {f"plain,{name}" for name in shipped()} <= set(completed(tmp_path, *words, ""))
