from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from dist_train.errors import RunDirError
from dist_train.run_dir import lease
from dist_train.run_dir.lease import Lease, RankProcess, acquire, this_process, wait_until_free
from dist_train.run_dir.processes import start_of

ELSEWHERE = RankProcess(0, "node7", "another boot of another kernel", 4711, 1)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(lease, "_POLL_SECONDS", 0.01)


@contextmanager
def another_process() -> Iterator[RankProcess]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        yield dataclasses.replace(this_process(0), pid=process.pid, started=start_of(process.pid))
    finally:
        process.kill()
        process.communicate()


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_directory_without_owner_is_taken_and_given_back(tmp_path: Path) -> None:
    held = acquire(tmp_path, [this_process(0)])
    assert json.loads((tmp_path / ".owner-1.json").read_text())["ranks"][0]["rank"] == 0
    held.release()
    assert files(tmp_path) == {}


def test_a_living_owner_is_named_and_its_file_is_not_touched(tmp_path: Path) -> None:
    with another_process() as process:
        acquire(tmp_path, [process])
        before, said = files(tmp_path), list[str]()
        with pytest.raises(RunDirError) as raised:
            acquire(tmp_path, [this_process(0)], said.append)
        assert f"process {process.pid} on {process.host}" in raised.value.message
        assert "--run.dir" in raised.value.hint and f"kill {process.pid}" in raised.value.hint
        assert len(said) == 1 and "waiting" in said[0]
        assert files(tmp_path) == before
    assert acquire(tmp_path, [this_process(0)]).number == 2
    assert list(files(tmp_path)) == [".owner-2.json"]


def test_a_start_waits_for_an_owner_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 60.0)
    with another_process() as process:
        acquire(tmp_path, [process])
        waits = threading.Event()

        def end() -> None:
            waits.wait(30)
            psutil.Process(process.pid).kill()

        threading.Thread(target=end).start()
        wait_until_free(tmp_path, lambda text: waits.set())
    assert waits.is_set()


def test_ranks_that_outlive_rank_0_are_waited_for(tmp_path: Path) -> None:
    with another_process() as gone:
        pass
    with another_process() as left:
        acquire(tmp_path, [gone, dataclasses.replace(left, rank=1)])
        with pytest.raises(RunDirError, match=f"process {left.pid} on"):
            wait_until_free(tmp_path)
    wait_until_free(tmp_path)


def test_a_process_with_a_used_pid_is_another_one(tmp_path: Path) -> None:
    mine = this_process(0)
    acquire(tmp_path, [dataclasses.replace(mine, started=(mine.started or 0) - 3600)])
    wait_until_free(tmp_path, lambda text: pytest.fail(text))


def test_a_silent_owner_on_another_machine_is_taken_over(tmp_path: Path) -> None:
    silent = acquire(tmp_path, [ELSEWHERE])
    said = list[str]()
    taken = acquire(tmp_path, [this_process(0)], said.append)
    assert taken.number == 2 and "node7" in said[0]
    # It was only frozen: it sees that it is owner no longer, and leaves the new one's file alone.
    assert not silent.beat()
    silent.release()
    assert taken.beat() and list(files(tmp_path)) == [".owner-2.json"]


def test_an_owner_on_another_machine_that_shows_life_is_not(tmp_path: Path) -> None:
    held = acquire(tmp_path, [ELSEWHERE])
    with pytest.raises(RunDirError, match="4711 on node7"):
        wait_until_free(tmp_path, lambda text: assert_true(held.beat()))


def assert_true(value: bool) -> None:
    assert value


@pytest.mark.slow
def test_one_of_many_starts_wins(tmp_path: Path) -> None:
    """Each finds the directory free; the file is made exclusively."""

    def start(_: int) -> Lease | RunDirError:
        try:
            return acquire(tmp_path, [this_process(0)])
        except RunDirError as error:
            return error

    for _ in range(20):
        with ThreadPoolExecutor(8) as pool:
            outcomes = list(pool.map(start, range(8)))
        won = [each for each in outcomes if isinstance(each, Lease)]
        assert len(won) == 1
        won[0].release()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"ranks": 1}', b'{"ranks": [{"pid": "x"}]}', b"\xff\x00"])
def test_a_damaged_claim_counts_as_long_as_it_changes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / ".owner-1.json"
    path.write_bytes(content)
    with pytest.raises(RunDirError):
        wait_until_free(tmp_path, lambda text: assert_true(path.write_bytes(content + b" ") > 0))
    wait_until_free(tmp_path)
    assert Lease(tmp_path, 1).beat()
