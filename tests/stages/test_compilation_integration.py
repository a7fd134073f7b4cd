"""`compile: auto` decides once for a stage: on all ranks, before its first step, and for all attempts of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.files import read_json
from dist_train.run_dir.paths import RunDir
from tests.support.compilers import hide_compiler
from tests.support.ranks import train, train_done
from tests.support.small_runs import Runs

# 203 samples in batches of 20: the last step of an epoch is a partial one.
SHORT = ["--train.epochs", "3", "--checkpoint.every_steps", "4"]
FREE = ["--import", "tests.support.cheap_compiler"]


def compiled(folder: Path, stage: str = "train") -> object:
    return read_json(RunDir(folder).results)["stages"][stage]["compiled"]


@pytest.mark.heavy
def test_a_short_run_is_not_compiled_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = Runs(tmp_path)
    assert runs("run", *SHORT) == 0
    assert compiled(tmp_path / "run") is False
    assert "auto: train runs uncompiled (an estimated 0 s saved in 33 steps, " in capsys.readouterr().out
    assert runs("told", *SHORT, "--compile", "false") == 0
    assert "auto: train runs" not in capsys.readouterr().out
    assert runs.product("told", "train") == runs.product("run", "train")


@pytest.mark.heavy
def test_without_a_compiler_nothing_is_compiled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_GRAPH", "_OPERATOR"):
        monkeypatch.setattr(f"dist_train.training.compile_costs.{name}", 0.0)
    hide_compiler(monkeypatch)
    assert Runs(tmp_path)("run", *SHORT) == 0
    assert compiled(tmp_path / "run") is False
    assert "auto: train runs uncompiled (no C++ compiler: CXX is no-such-compiler" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_run_goes_on_compiled_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    words = ["run", str(runs.config), *SHORT, *FREE, "--stages", "[train, ptq, qat]", "--qat.epochs", "1", "--run.dir"]
    whole = train_done(2, *words, str(tmp_path / "whole"), deadline=400)
    assert "auto: train runs compiled (" in whole and "auto: qat runs compiled (" in whole
    killed = RunDir(tmp_path / "killed")
    with train(2, *words, str(killed.path)) as ranks:
        latest = killed.checkpoints / "latest.json"
        saved = ranks.until(lambda: (read_json(latest) or {}).get("name", "") >= "train-00000008", 400)
        assert saved, ranks.printed()
        ranks.kill()
    # Compiling is expensive now, and an estimate would say so.
    resumed = train_done(2, *[word for word in words if word not in FREE], str(killed.path), deadline=400)
    assert "auto: train runs compiled (as at the first start)" in resumed and "auto: qat runs uncompiled (" in resumed
    assert compiled(killed.path) is True and compiled(killed.path, "qat") is False
    folders = [CheckpointFolder(RunDir(tmp_path / name).checkpoints) for name in ("whole", "killed")]
    one, other = (folder.load("train-end")["payload"]["model"] for folder in folders)
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.mark.slow
def test_a_rank_that_cannot_compile_makes_all_ranks_run_uncompiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    runs = Runs(tmp_path)
    words = ["run", str(runs.config), *SHORT, "--run.dir"]
    train_done(2, *words, str(tmp_path / "plain"))
    with train(2, *words, str(tmp_path / "run"), *FREE, environ={"BROKEN_COMPILER": "1"}) as ranks:
        assert ranks.wait() == [0, 0], ranks.printed()
        printed = ranks.output(0)
    assert "auto: train runs uncompiled: torch.compile fails: " in printed and "(rank 1)" in printed
    assert compiled(tmp_path / "run") is False
    folders = [CheckpointFolder(RunDir(tmp_path / name).checkpoints) for name in ("plain", "run")]
    one, other = (folder.load("train-end")["payload"]["model"] for folder in folders)
    assert all(one[name].equal(other[name]) for name in one)
