"""wandb without an account: two attempts are one run, its steps are ours, and nothing is sent that nobody asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dist_train.config.tree import Config, WandbConfig
from dist_train.errors import SetupError
from dist_train.run_dir.paths import RunDir
from dist_train.trackers.wandb import Wandb
from tests.support.ranks import ROOT
from tests.support.wandb_files import files, read

ATTEMPT = """
import sys
from pathlib import Path
from dist_train.config.tree import Config
from dist_train.run_dir.paths import RunDir
from dist_train.trackers.base import Trackers
from dist_train.trackers.wandb import Wandb

attempt, first = int(sys.argv[1]), int(sys.argv[2])
trackers = Trackers([], say=sys.exit)
trackers.add("wandb", lambda: Wandb(RunDir(Path(sys.argv[3])), "my-run", attempt), Config())
for step in range(first, first + 3):
    trackers.log("train", 0, step, {"loss": 0.5 + step})
trackers.log("qat", 1, 0, {"eval_top1": 0.75})
trackers.close()
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """After two attempts, each a process of its own, in a folder of its own, as a user without an account."""
    folder = tmp_path_factory.mktemp("run")
    home = tmp_path_factory.mktemp("home")
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(home), "PLANTED": "environment-planted"}
    for attempt, first in ((0, 0), (1, 2)):
        answer = subprocess.run(
            [sys.executable, "-c", ATTEMPT, str(attempt), str(first), str(folder), "argument-planted"],
            env=environ,
            cwd=home,
            capture_output=True,
            text=True,
            timeout=100,
            stdin=subprocess.DEVNULL,
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
        assert answer.stdout == answer.stderr == ""
    assert not (home / "wandb").exists()
    return RunDir(folder)


@pytest.mark.heavy
def test_two_attempts_are_one_run_with_the_run_s_settings(run_dir: RunDir) -> None:
    runs = [record.run for path in files(run_dir.wandb) for record in read(path) if record.HasField("run")]
    assert [(run.run_id, run.display_name) for run in runs] == [
        ((run_dir.wandb / "run_id").read_text().strip(), "my-run")
    ] * 2
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["train"]["optim"]["name"] == "sgd"


def test_scalars_stand_at_our_steps_with_an_axis_for_each_stage(run_dir: RunDir) -> None:
    rows = []
    for path in files(run_dir.wandb):
        for record in read(path):
            if record.HasField("history"):
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                rows.append({key: json.loads(value) for key, value in items.items()})
    assert [(row["train/step"], row["train/loss"]) for row in rows if "train/loss" in row] == [
        (0, 0.5), (1, 1.5), (2, 2.5), (2, 2.5), (3, 3.5), (4, 4.5)
    ]  # fmt: skip
    assert [(row["qat/step"], row["qat/eval_top1"]) for row in rows if "qat/step" in row] == [(0, 0.75)] * 2
    axes = {
        record.metric.glob_name: record.metric.step_metric
        for path in files(run_dir.wandb)
        for record in read(path)
        if record.HasField("metric") and record.metric.glob_name
    }
    assert axes == {"train/*": "train/step", "qat/*": "qat/step"}


def test_neither_the_command_line_nor_the_environment_is_written(run_dir: RunDir) -> None:
    written = b"".join(
        path.read_bytes() for path in run_dir.wandb.rglob("*") if path.is_file() and not path.is_symlink()
    )
    assert b"train/loss" in written
    for planted in (b"argument-planted", b"environment-planted"):
        assert planted not in written


def test_online_without_a_key_says_what_to_type_instead_of_asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    tracker = Wandb(RunDir(tmp_path), "run", 0)
    with pytest.raises(SetupError, match="no API key"):
        tracker.begin(Config(wandb=WandbConfig(mode="online")))
