"""Two ranks whose run is at an object store: killed while they push, and gone on with by another machine."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_train.config.load import load
from dist_train.errors import EXIT_PREEMPTED
from dist_train.run_dir.ledger import check
from tests.run_dir.test_saves_in_flight_integration import CONFIG
from tests.support.ranks import Ranks, train
from tests.support.s3_server import S3, _s3_of_module, another_machine, s3

__all__ = ["_s3_of_module", "s3"]
pytestmark = pytest.mark.slow

DRAW = random.Random(23)
MOMENTS = [DRAW.randrange(20, 60) for _ in range(3)]
"""Requests to the store, of some 70 in a run, after which all ranks are killed."""


class Case:
    def __init__(self, folder: Path, s3: S3) -> None:
        self.folder, self.config, self.s3 = folder, folder / "stored.yaml", s3
        self.config.write_text(CONFIG)

    def start(self, place: str, *options: str) -> Ranks:
        words = ("--import", "tests.support.blocking_parts", "--run.dir", place, *options)
        return train(2, "run", str(self.config), *words)

    def done(self, place: str, *options: str) -> Path:
        """Runs to the end; returns the run directory on this machine."""
        with self.start(place, *options) as ranks:
            assert ranks.wait() == [0, 0], ranks.printed()
            assert "Traceback" not in ranks.printed()
        return load(self.config, ["--run.dir", place], environ={}, elsewhere=True).config.run_dir


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_killed_at_any_request_a_run_ends_on_another_machine_like_an_undisturbed_one(
    strategy: str, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, options = Case(tmp_path, s3), ("--strategy", strategy)
    undisturbed = case.done(str(tmp_path / "undisturbed"), *options)
    for number, requests in enumerate(MOMENTS):
        address = s3.address(f"{strategy}-{number}")
        another_machine(monkeypatch, tmp_path / "first")
        s3.way.let()
        with case.start(address, *options) as ranks:
            assert ranks.until(_asked(s3, requests)), ranks.printed()
            ranks.kill()
        another_machine(monkeypatch, tmp_path / "second")
        there = case.done(address, *options)
        files = undisturbed.glob("checkpoints/train-end/*.safetensors")
        ended = sorted(file.relative_to(undisturbed) for file in files)
        assert len(ended) == (1 if strategy == "ddp" else 3)
        for file in ended:
            assert (there / file).read_bytes() == (undisturbed / file).read_bytes(), file
        assert check(there).ok
        assert json.loads(s3.store(f"{strategy}-{number}").read("status.json") or b"")["state"] == "done"


def _asked(s3: S3, requests: int) -> Callable[[], bool]:
    return lambda: s3.way.requests >= requests


def test_a_run_that_is_stopped_is_whole_at_the_store(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, address = Case(tmp_path, s3), s3.address("stopped")
    with case.start(address) as ranks:
        assert ranks.until(_asked(s3, 25)), ranks.printed()
        (load(case.config, ["--run.dir", address], environ={}, elsewhere=True).config.run_dir / "STOP").touch()
        assert ranks.wait() == [EXIT_PREEMPTED] * 2, ranks.printed()
    store = s3.store("stopped")
    status = json.loads(store.read("status.json") or b"")
    latest = json.loads(store.read("checkpoints/latest.json") or b"")["name"]
    assert status["state"] == "preempted"
    assert int(re.sub(r"\D", "", latest)) == status["step"]
    assert not any(name.startswith(".owner-") for name in store.sizes())
    another_machine(monkeypatch, tmp_path / "second")
    assert check(case.done(address)).ok


def test_a_stop_is_saved_in_time_though_the_store_answers_nothing(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, address = Case(tmp_path, s3), s3.address("silent")
    run_dir = load(case.config, ["--run.dir", address], environ={}, elsewhere=True).config.run_dir
    with case.start(address, "--train.epochs", "500", "--stop.grace", "10") as ranks:
        assert ranks.until(_asked(s3, 25)), ranks.printed()
        s3.way.silent = True
        newest = _latest(run_dir)
        assert ranks.until(lambda: _latest(run_dir) != newest), ranks.printed()  # whose push gets no answer
        (run_dir / "STOP").touch()
        assert ranks.wait() == [EXIT_PREEMPTED] * 2, ranks.printed()
        assert "all of the run is in" in ranks.printed()
    assert json.loads((run_dir / "status.json").read_text())["state"] == "preempted"


def _latest(run_dir: Path) -> str:
    return str(json.loads((run_dir / "checkpoints" / "latest.json").read_text())["name"])
