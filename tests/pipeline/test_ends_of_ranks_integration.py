"""A rank that ends before the run is done never looks like success; one that waits for its peers stops at once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_train
from dist_train.run_dir.files import read_json
from tests.support.ranks import ROOT, Ranks, train
from tests.support.small_runs import CONFIG


class Leaving(nn.Sequential):
    """Rank 1 leaves in the first training step."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.training and os.environ.get("RANK", "1") == os.environ["LEAVES"]:
            if os.environ["HOW"] == "process":
                os._exit(0)
            sys.exit(0)
        y: torch.Tensor = super().forward(x)
        return y


@dist_train.register_model("leaving")
def leaving(num_classes: int) -> nn.Module:
    return Leaving(nn.Flatten(), nn.Linear(64, num_classes))


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    (tmp_path / "small.yaml").write_text(CONFIG)
    model = ["--import", __name__, "--model.name", "leaving", "--model.args", "{}", "--data.cache_dir", str(tmp_path)]
    return [str(tmp_path / "small.yaml"), *model, "--run.dir", str(tmp_path / "run")]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["process", "exit"])
def test_a_rank_that_leaves_as_if_it_were_done_fails_the_run(how: str, given: list[str], tmp_path: Path) -> None:
    with train(2, "run", *given, environ={"LEAVES": "1", "HOW": how}) as ranks:
        codes = ranks.wait()
        printed = ranks.printed()
    status = read_json(tmp_path / "run" / "status.json")
    assert codes == ([1, 0] if how == "process" else [1, 1]) and status["state"] == "failed", printed
    said = "the process of rank 1 ended without a word in `" if how == "process" else "SystemExit: 0 ("
    assert said in status["error"] and said in printed and "Traceback" not in printed, printed


@pytest.mark.slow
def test_the_launch_of_a_rank_that_left_fails_and_says_why_last(given: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dist_train", "launch", "torchrun", "--nproc-per-node", "1", *given]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "LEAVES": "0", "HOW": "process"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=180)
    assert done.returncode == 1, done.stderr
    *_, why, hint, place = done.stderr.splitlines()
    assert why.startswith("dist-train: the run failed: RankEndedError: the process of rank 0 ended without a word")
    assert hint.startswith("  -> ") and place == f"  -> the ranks' output is in {tmp_path / 'run' / 'logs'}"


@pytest.mark.slow
def test_the_agents_table_shows_the_error_of_the_rank_that_has_it(given: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "LEAVES": "1", "HOW": "exit"}
    command += ["--local-addr", "127.0.0.1", "-m", "dist_train", "run", *given]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=180)
    cause = done.stderr.partition("Root Cause")[2]
    assert done.returncode != 0 and "rank      : 1 " in cause, done.stderr
    assert "traceback : dist-train: SystemExit: 0 (" in cause and "To enable traceback" not in done.stderr


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _alone(rank: int, port: int, given: list[str]) -> Ranks:
    """Starts one rank of two."""
    variables: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LEAVES": 2}
    return Ranks(1, ["-m", "dist_train", "run", *given], {name: str(value) for name, value in variables.items()})


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.slow
def test_a_rank_that_waits_for_its_peers_stops_at_once(rank: int, given: list[str], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with _alone(rank, port, [*given, "--stop.grace", "170"]) as ranks:
        assert ranks.until(lambda: _listens(port) if rank == 0 else "still trying for" in ranks.output(0))
        began = time.monotonic()
        os.kill(ranks.processes[0].pid, signal.SIGTERM)
        assert ranks.wait() == [75], ranks.printed()
        assert time.monotonic() - began < 100, "long before the grace is over"
        said = "asked to stop (SIGTERM) before the ranks had met: nothing was begun" in ranks.output(0)
        assert said == (rank == 0) and "is ended now" not in ranks.output(0)
    assert not (tmp_path / "run").exists()
