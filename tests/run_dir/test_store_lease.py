"""One owner at a time of a run's folder at an object store, before a real S3 server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from threading import Thread
from typing import Any

import pytest

from dist_train.errors import RunDirBusyError
from dist_train.run_dir import store_lease
from dist_train.run_dir.lease import this_process
from dist_train.run_dir.store_lease import StoreLease, acquire
from tests.support.s3_server import S3, _s3_of_module, s3

__all__ = ["_s3_of_module", "s3"]
pytestmark = pytest.mark.heavy


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT_SECONDS", 0.1), ("PATIENCE_SECONDS", 2.0), ("_POLL_SECONDS", 0.05)):
        monkeypatch.setattr(store_lease, name, seconds)


def _quiet(text: str) -> None:
    pass


def _elsewhere() -> Any:
    """A process that this machine cannot see."""
    return replace(this_process(0), machine="00000000", host="elsewhere")


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_second_start_is_refused_while_the_first_lives_on_another_machine(s3: S3) -> None:
    first = acquire(s3.store("lives"), _elsewhere(), _quiet)
    said: list[str] = []
    try:
        with pytest.raises(RunDirBusyError, match="used by another start .* on elsewhere"):
            acquire(s3.store("lives"), this_process(0), said.append)
    finally:
        first.release()
    assert "waiting up to 2 s" in said[0]
    acquire(s3.store("lives"), this_process(0), _quiet).release()
    assert s3.store("lives").sizes() == {}


def test_a_silent_owner_of_another_machine_is_replaced_and_learns_it(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_lease, "BEAT_SECONDS", 3600.0)
    first = acquire(s3.store("silent"), _elsewhere(), _quiet)
    second = acquire(s3.store("silent"), _elsewhere(), _quiet)
    monkeypatch.setattr(store_lease, "BEAT_SECONDS", 0.1)
    woken = StoreLease(s3.store("silent"), 1, {"process": {}})  # as the first one's thread, once it runs again
    _until(lambda: woken.lost)
    with pytest.raises(RunDirBusyError, match="taken over"):
        woken.require()
    woken.release()
    assert list(s3.store("silent").sizes()) == [".owner-2.json"]  # what it lost it does not remove
    second.release()
    first._ended.set()


def test_a_dead_process_of_this_machine_is_replaced_at_once(s3: S3) -> None:
    dead = replace(this_process(0), pid=2**22 + 1, started=1)
    s3.store("dead").write(".owner-3.json", json.dumps({"process": vars(dead), "beat": 0}).encode())
    said: list[str] = []
    acquire(s3.store("dead"), this_process(0), said.append).release()
    assert said == []


def test_of_many_starts_at_once_one_gets_the_folder(s3: S3) -> None:
    found: list[StoreLease] = []

    def start() -> None:
        with suppress(RunDirBusyError):
            found.append(acquire(s3.store("race"), _elsewhere(), _quiet))

    threads = [Thread(target=start) for _ in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert len(found) == 1
    found[0].release()


def test_the_way_may_be_cut_for_a_while(s3: S3) -> None:
    lease = acquire(s3.store("cut"), _elsewhere(), _quiet)
    s3.way.let(0)
    _until(lambda: s3.way.refused > 2)
    s3.way.let()
    before = s3.store("cut").read(".owner-1.json")
    _until(lambda: s3.store("cut").read(".owner-1.json") != before)
    assert not lease.lost
    lease.release()
