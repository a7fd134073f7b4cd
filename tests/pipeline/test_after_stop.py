"""Ends a rank whose peer was lost during a stop, and lets the next restart go on or not."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import dist_train
from dist_train.cluster.elastic import Agent
from dist_train.distributed.watchdog.stop_signals import StopRequest
from dist_train.errors import NodeLeft, SetupError
from dist_train.pipeline.after_stop import after_lost_peer
from dist_train.run_dir.agents import let_go_on, stopped_under_this_agent
from dist_train.run_dir.files import replace_json
from dist_train.run_dir.paths import RunDir

ELASTIC = Agent(node=0, nodes=2, least=1, most=2, restarts=1)


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    found = RunDir(tmp_path / "run")
    found.logs.mkdir(parents=True)
    replace_json(found.status, {"state": "preempted", "stage": "train", "step": 3, "restarts": 0, "error": None})
    return found


@pytest.mark.parametrize(
    ("agent", "signalled", "left", "stop", "goes_on"),
    [
        (ELASTIC, False, True, False, True),
        (ELASTIC, False, False, False, False),  # the other rank was told by a person
        (ELASTIC, False, True, True, False),  # and by the file STOP
        (ELASTIC, True, True, False, False),  # this node was told to leave, too
        (Agent(nodes=2, least=1, most=2, restarts=0), False, True, False, False),
        (Agent(nodes=2, least=2, most=2, restarts=1), False, True, False, False),
    ],
)
def test_a_rank_whose_peer_was_ended_in_a_stop_goes_on_only_where_that_one_s_node_left(
    run_dir: RunDir, agent: Agent, signalled: bool, left: bool, stop: bool, goes_on: bool
) -> None:
    request = StopRequest()
    if signalled:
        request.signal(signal.SIGTERM.name)
    if left:
        run_dir.leaving(0).touch()
    if stop:
        run_dir.stop.touch()
    assert isinstance(after_lost_peer(run_dir, 0, request, agent), NodeLeft) == goes_on
    assert stopped_under_this_agent(run_dir, {"TORCHELASTIC_RESTART_COUNT": "1"}) != goes_on


def test_ranks_that_go_on_after_a_stop_and_fail_to_meet_may_try_again(
    run_dir: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "small.yaml"
    file.write_text("run: {name: small}\ndata: {name: digits}\nmodel: {name: small_resnet}\nstages: [train]\n")
    config = dist_train.load_config(str(file), ["--run.dir", str(run_dir.path)])
    for name, value in {"RUN_ID": "x", "RESTART_COUNT": "1", "MAX_RESTARTS": "3"}.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("PET_NNODES", "1:2")
    monkeypatch.setenv("WORLD_SIZE", "2")  # without MASTER_ADDR
    monkeypatch.setenv("RANK", "0")
    let_go_on(run_dir, os.environ)
    with pytest.raises(SetupError, match="MASTER_ADDR"):
        dist_train.run(config)
    assert not stopped_under_this_agent(run_dir, {"TORCHELASTIC_RESTART_COUNT": "2"})
    assert stopped_under_this_agent(run_dir, {"TORCHELASTIC_RESTART_COUNT": "3"})
