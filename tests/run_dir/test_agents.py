"""Tells a restart that goes on after a stop from one that must not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dist_train.run_dir.agents import let_go_on, stopped_under_this_agent
from dist_train.run_dir.files import replace_json
from dist_train.run_dir.paths import RunDir


@pytest.fixture
def stopped(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path)
    fields = {"state": "preempted", "stage": "train", "step": 3, "restarts": 0, "error": None}
    replace_json(run_dir.status, fields)
    return run_dir


def environ(count: int) -> dict[str, str]:
    return {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": str(count)}


def test_a_restart_after_a_rank_had_to_be_killed_does_not_undo_the_stop(stopped: RunDir) -> None:
    let_go_on(stopped, environ(1))
    assert stopped_under_this_agent(stopped, environ(2))


def test_a_restart_because_a_node_joins_or_leaves_goes_on(stopped: RunDir) -> None:
    assert not stopped_under_this_agent(stopped, environ(0))
    assert stopped_under_this_agent(stopped, environ(1))
    let_go_on(stopped, environ(1))
    assert not stopped_under_this_agent(stopped, environ(1)), "the same number of restarts: a node joined"
    let_go_on(stopped, environ(1), more=1)
    assert not stopped_under_this_agent(stopped, environ(2)), "the next number: a node left"
    stopped.forget(0)
    assert stopped_under_this_agent(stopped, environ(2)), "every start makes the marks anew"


def test_a_stop_before_the_agent_began_does_not_count(stopped: RunDir) -> None:
    os.utime(stopped.status, (1.0, 1.0))
    assert not stopped_under_this_agent(stopped, environ(1))


def test_a_run_that_did_not_stop_goes_on_after_any_restart(stopped: RunDir) -> None:
    replace_json(stopped.status, {"state": "failed", "stage": "train", "step": 3, "restarts": 0, "error": "x"})
    assert not stopped_under_this_agent(stopped, environ(1))
