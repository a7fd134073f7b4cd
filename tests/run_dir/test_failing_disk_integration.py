"""A run on a real file system that becomes full for a moment, or stays full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_train.errors import EXIT_DONE, EXIT_FAILED
from dist_train.run_dir.files import read_json
from dist_train.run_dir.ledger import check
from dist_train.run_dir.paths import RunDir
from tests.support.ranks import Ranks, train, train_done

CONFIG = """
compile: false  # its estimate runs the model once more, and the tests count
run: {name: small_disk, threads_per_rank: 1, device: cpu, timeout: 120}
data: {name: held, global_batch_size: 12, workers: 0}
model: {name: held}
task: {name: held}
stages: [train]
train: {epochs: 3, optim: {lr: 0.05}}
log: {every_steps: 1}
checkpoint: {every_steps: 2, retry: 50}
debug: {ledger: true}
"""
SIZE = 4 * 2**20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"only where a file system can be mounted: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Case:
    def __init__(self, disk: Path) -> None:
        self.disk, self.folder = disk, disk.parent
        self.config = self.folder / "small.yaml"
        self.config.write_text(CONFIG)
        self.run_dir = RunDir(disk / "run")

    def words(self, run_dir: RunDir, *options: str) -> list[str]:
        parts = ["--import", "tests.support.blocking_parts", "--run.dir", str(run_dir.path)]
        return ["run", str(self.config), *parts, *options]

    def held(self, *options: str) -> Ranks:
        """Two ranks that are held in front of a step, with checkpoints before and after it."""
        hold = {"HOLD": "forward 0 16 wait", "HOLD_DIR": str(self.folder)}
        ranks = train(2, *self.words(self.run_dir, *options), environ=hold)
        assert ranks.until((self.folder / "reached").exists), ranks.printed()
        return ranks

    def fill(self) -> Path:
        filler = self.disk / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                return filler

    def go(self) -> None:
        (self.folder / "go").touch()

    def weights(self, run_dir: RunDir) -> bytes:
        return (run_dir.checkpoints / "train-end" / "tensors.safetensors").read_bytes()


@pytest.fixture
def case(disk: Path) -> Case:
    return Case(disk)


@pytest.mark.slow
def test_a_run_outlives_a_disk_that_is_full_for_a_moment(case: Case) -> None:
    with case.held() as ranks:
        filler = case.fill()
        case.go()
        assert ranks.until(lambda: "it is tried again" in ranks.printed()), ranks.printed()
        filler.unlink()
        assert ranks.wait() == [EXIT_DONE, EXIT_DONE], ranks.printed()
        assert "Traceback" not in ranks.printed()
    assert read_json(case.run_dir.status)["state"] == "done"
    assert check(case.run_dir.path).ok
    lines = case.run_dir.metrics.read_text().splitlines()
    assert len(lines) == len(set(lines)) >= 30, "no line of the metrics is lost"
    undisturbed = RunDir(case.folder / "undisturbed")
    train_done(2, *case.words(undisturbed))
    assert case.weights(case.run_dir) == case.weights(undisturbed)


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run_in_words_and_it_resumes(case: Case) -> None:
    with case.held("--checkpoint.retry", "2") as ranks:
        latest = read_json(case.run_dir.checkpoints / "latest.json")
        filler = case.fill()
        case.go()
        assert ranks.wait() == [EXIT_FAILED, EXIT_FAILED], ranks.printed()
        said = ranks.printed()
        assert "No space left on device" in said and "  -> " in said and "Traceback" not in said
    assert read_json(case.run_dir.checkpoints / "latest.json") == latest
    filler.unlink()
    train_done(2, *case.words(case.run_dir))
    assert check(case.run_dir.path).ok
    assert not [each for each in os.listdir(case.run_dir.path) if each.endswith(".tmp")]
