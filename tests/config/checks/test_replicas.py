"""Strategy ft: what it needs of the environment, and what it cannot do; asked whether torchft is there or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_train.config.checks.strategy import strategy_problems
from dist_train.config.load import load
from dist_train.config.tree import Config
from dist_train.errors import ConfigError
from tests.support.small_runs import run_here

FT: dict[str, Any] = {"strategy": "ft", "stages": ["train"]}
REPLICA = {"TORCHFT_LIGHTHOUSE": "http://a:29510", "REPLICA_GROUP_ID": "1"}


@pytest.mark.parametrize(
    ("tree", "environ", "expected"),
    [
        (FT, REPLICA, []),
        (FT, {"TORCHFT_LIGHTHOUSE": "http://a:29510"}, ["strategy"]),
        (FT, {"REPLICA_GROUP_ID": "0"}, ["strategy"]),
        (FT, {**REPLICA, "REPLICA_GROUP_ID": "first"}, ["strategy"]),
        (FT, {**REPLICA, "TORCHFT_LIGHTHOUSE": "a:29510"}, ["strategy"]),
        (FT, {**REPLICA, "TORCHFT_TIMEOUT_SEC": "90"}, []),
        (FT, {**REPLICA, "TORCHFT_TIMEOUT_SEC": "abc", "TORCHFT_CONNECT_TIMEOUT_SEC": "0"}, ["strategy", "strategy"]),
        (FT, {**REPLICA, "RANK": "0", "WORLD_SIZE": "2"}, ["strategy"]),
        ({**FT, "stages": ["train", "qat"]}, REPLICA, ["stages"]),
        ({**FT, "stages": ["train", "ptq", "convert", "export"]}, REPLICA, []),
        ({**FT, "compile": True, "sync_batchnorm": True}, REPLICA, ["compile", "sync_batchnorm"]),
        (
            {**FT, "train": {"select": "best", "early_stopping": {"patience": 1}}},
            REPLICA,
            ["train.select", "train.early_stopping"],
        ),
        ({**FT, "train": {"schedule": {"name": "ReduceLROnPlateau"}}}, REPLICA, ["train.schedule.name"]),
        ({**FT, "run": {"dir": "s3://bucket/x"}}, REPLICA, ["run.dir"]),
    ],
)
def test_what_replicas_cannot_do_is_refused_with_what_to_type(
    tree: dict[str, Any], environ: dict[str, str], expected: list[str]
) -> None:
    found = list(strategy_problems(Config.model_validate(tree), environ))
    assert [problem.place for problem in found] == expected
    assert all(problem.hint for problem in found)


def test_without_a_lighthouse_nothing_begins(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("stages: [train]\nstrategy: ft\n")
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "x.yaml", [], {})
    assert "TORCHFT_LIGHTHOUSE is not set" in str(error.value)
    assert "-> torchft_lighthouse --min_replicas 1, on one machine" in str(error.value)
    assert "-> REPLICA_GROUP_ID=0 dist-train run CONFIG, and REPLICA_GROUP_ID=1 for the next" in str(error.value)


@pytest.mark.parametrize("given", [(), ("--run.dir", "runs/run/replica-1")])
def test_each_replica_has_a_run_directory_of_its_own(tmp_path: Path, given: tuple[str, ...]) -> None:
    pytest.importorskip("torchft", reason="only with torchft, which the extra ft brings")
    (tmp_path / "x.yaml").write_text("stages: [train]\nstrategy: ft\n")
    config = load(tmp_path / "x.yaml", given, REPLICA).config
    assert config.run_dir == Path("runs/run/replica-1")


def test_launch_starts_no_replicas_and_says_what_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchft", reason="only with torchft, which the extra ft brings")
    (tmp_path / "x.yaml").write_text("stages: [train]\nstrategy: ft\n")
    assert run_here("launch", "torchrun", str(tmp_path / "x.yaml")) == 78
    told = capsys.readouterr().err
    assert "replicas under 'ft' start one by one" in told and "REPLICA_GROUP_ID=0 dist-train run CONFIG" in told
