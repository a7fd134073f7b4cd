"""The sampler under torchft: replicas that die and come back train on the global batches of one undisturbed rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import ROOT, free_port

STEPS, LEAVE_AT, HOLD_AT = 200, 50, 100


@contextmanager
def lighthouse() -> Iterator[str]:
    coordination = pytest.importorskip("torchft.coordination", reason="only with torchft, which the extra ft brings")
    server = coordination.LighthouseServer(
        bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=500, heartbeat_timeout_ms=5000
    )
    try:
        yield f"http://127.0.0.1:{server.address().rpartition(':')[2]}"
    finally:
        server.shutdown()


def start(folder: Path, address: str, name: str, leave_at: int = 0, label: str = "") -> subprocess.Popen[bytes]:
    words = ["-m", "tests.support.torchft_replica", name, str(free_port()), str(STEPS), str(leave_at), str(HOLD_AT)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    with (folder / f"{label or name}.jsonl").open("wb") as out, (folder / f"{label or name}.err").open("wb") as err:
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=folder,
            env=environ | {"TORCHFT_LIGHTHOUSE": address},
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
        )


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    whole = (folder / f"{name}.jsonl").read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]


def until(condition: Callable[[], bool], *processes: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end and all(process.poll() is None for process in processes)
        time.sleep(0.02)


def ended(folder: Path, processes: dict[str, subprocess.Popen[bytes]]) -> None:
    """Waits until all have written their weights, and then lets them go."""
    try:
        until(lambda: all((folder / f"{name}.pt").is_file() for name in processes), *processes.values())
        for process in processes.values():
            assert process.stdin is not None
            process.stdin.close()
        assert [process.wait(60) for process in processes.values()] == [0] * len(processes)
    finally:
        for process in processes.values():
            process.kill()


@pytest.mark.slow
def test_replicas_that_die_and_return_train_on_the_same_global_batches(tmp_path: Path) -> None:
    go = tmp_path / "go"
    go.touch()
    with lighthouse() as address:
        ended(tmp_path, {"alone": start(tmp_path, address, "alone")})
    go.unlink()
    with lighthouse() as address:
        replicas = {name: start(tmp_path, address, name, leave_at=LEAVE_AT if name == "c" else 0) for name in "abc"}
        assert replicas.pop("c").wait(120) == 9
        (tmp_path / "c.ready").unlink()
        replicas["c"] = start(tmp_path, address, "c", label="back")
        until((tmp_path / "c.ready").is_file, *replicas.values())
        go.touch()
        ended(tmp_path, replicas)
    consumed: dict[int, list[int]] = {}
    numbers = set()
    for name in ("a", "b", "c", "back"):
        for line in lines(tmp_path, name):
            consumed.setdefault(line["step"], []).extend(line["ids"])
            numbers.add(line["ranks"])
    assert {step: sorted(ids) for step, ids in consumed.items()} == {
        line["step"]: sorted(line["ids"]) for line in lines(tmp_path, "alone")
    }
    assert len(consumed) == STEPS and 2 in numbers and 3 in numbers
    alone, first, returned = (torch.load(tmp_path / f"{name}.pt") for name in ("alone", "a", "c"))
    for mine, other, expected in zip(first, returned, alone, strict=True):
        assert torch.equal(mine, other)
        assert torch.allclose(mine, expected, atol=1e-5)
