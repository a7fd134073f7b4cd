"""Warm ranks behave as cold ones do."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import Ranks
from tests.support.warm_ranks import can_be_warm

pytestmark = pytest.mark.heavy


def described() -> dict[str, Any]:
    main = sys.modules["__main__"]
    return {
        "argv": sys.argv[1:],
        "main": main.__spec__.name if main.__spec__ else None,
        "folder": os.getcwd(),
        "path": sys.path[:2],
        "environ": {name: value for name, value in os.environ.items() if name != "MASTER_PORT"},
        "leads its group": os.getpgid(0) == os.getpid() == os.getsid(0),
        "signals": [str(signal.getsignal(each)) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "ours": [name for name in sys.modules if name.split(".")[0] == "dist_train"],
    }


def run(tmp_path: Path, cold: bool, world_size: int = 2, *arguments: str) -> tuple[list[int], list[str]]:
    command = ["-m", "tests.support.test_warm_ranks", *arguments]
    with Ranks(world_size, command, {"GIVEN": "1"}, tmp_path, cold=cold) as ranks:
        assert all(("Warm" in type(each).__name__) != cold for each in ranks.processes)
        return ranks.wait(), [ranks.output(rank) for rank in range(world_size)]


def test_what_it_sees_is_what_a_cold_one_sees(tmp_path: Path) -> None:
    codes, cold = run(tmp_path, True, 2, "words", "of its own")
    assert codes == [0, 0]
    codes, warm = run(tmp_path, False, 2, "words", "of its own")
    assert codes == [0, 0], warm
    for of_cold, of_warm in zip(cold, warm, strict=True):
        left, right = json.loads(of_cold), json.loads(of_warm)
        hashes = left.pop("hash"), right.pop("hash")
        assert left == right
        assert hashes[0] != hashes[1]
    assert json.loads(warm[0])["hash"] != json.loads(warm[1])["hash"], "of two origins"


@pytest.mark.parametrize("cold", [True, False])
@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("exit", 75, ""),
        ("raise", 1, "ValueError: planted"),
        ("kill", -signal.SIGKILL, ""),
        ("abort", -signal.SIGABRT, "Fatal Python error"),
        ("atexit", 0, "on the way out"),
    ],
)
def test_it_ends_as_a_cold_one_does(how: str, code: int, said: str, cold: bool, tmp_path: Path) -> None:
    codes, printed = run(tmp_path, cold, 1, "--end", how)
    assert codes == [code]
    assert said in printed[0]


def test_it_is_killed_with_its_group(tmp_path: Path) -> None:
    with Ranks(1, ["-m", "tests.support.test_warm_ranks", "--end", "wait"], None, tmp_path) as ranks:
        ranks.kill()
        assert ranks.processes[0].poll() == -signal.SIGKILL
        assert ranks.until_alone(0)


def test_variables_that_torch_reads_when_it_is_imported_make_a_cold_one() -> None:
    assert can_be_warm(["-m", "dist_train"], {"HOLD": "1", "MASTER_PORT": "1"})
    assert not can_be_warm(["-m", "dist_train"], {"OMP_NUM_THREADS": "2"})
    assert not can_be_warm(["-c", "pass"], {})


def _end(how: str) -> None:
    import atexit
    import time

    if how == "raise":
        raise ValueError("planted")
    if how == "atexit":
        atexit.register(print, "on the way out")
    if how == "wait":
        time.sleep(60)
    if how in ("kill", "abort"):
        os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGABRT)
    raise SystemExit(75 if how == "exit" else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--end"]:
        _end(sys.argv[2])
    print(json.dumps({**described(), "hash": hash("the same word")}))
