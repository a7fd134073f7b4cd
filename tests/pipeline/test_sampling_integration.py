"""Two ranks that draw rows by weight are killed and go on: same bytes, and a ledger that proves the draw."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.finished_run.ledger import check_ledger
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.ledger import read_steps
from dist_train.run_dir.paths import RunDir
from tests.pipeline.test_exactness_integration import bytes_of
from tests.support.ranks import train, train_done

CONFIG = """
run: {name: sampled, threads_per_rank: 1, device: cpu}
data:
  name: fake
  args: {num_train: 403, num_eval: 61, num_classes: 10, channels: 1, height: 8, width: 8}
  global_batch_size: 24
  augment: [{name: random_crop, padding: 1}]
  sampling: {weights: class_balanced, samples: 250}
  split: {folds: 4, fold: 1, by: class}
model: {name: mlp, args: {size: 8, hidden: 16}}
stages: [train]
train: {epochs: 8, optim: {lr: 0.05}}
checkpoint: {every_steps: 3}
log: {every_steps: 1}
debug: {ledger: true}
"""


def _rows(run_dir: Path) -> dict[int, list[int]]:
    return {step: sorted(n for line in lines for n in line["ids"]) for (_, step), lines in read_steps(run_dir).items()}


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_killed_run_of_two_ranks_draws_what_an_undisturbed_one_draws(tmp_path: Path) -> None:
    config = tmp_path / "sampled.yaml"
    config.write_text(CONFIG.replace("data:\n", f"data:\n  cache_dir: {tmp_path / 'cache'}\n"))
    whole, killed, alone = (tmp_path / name for name in ("whole", "killed", "alone"))
    for world_size, path in ((2, whole), (1, alone)):
        train_done(world_size, "run", str(config), "--run.dir", str(path))
    command = ("run", str(config), "--run.dir", str(killed))
    with train(2, *command) as ranks:
        saved = RunDir(killed).checkpoints
        assert ranks.until(lambda: len(list(saved.glob("train-0*"))) > 1)
        ranks.kill()
    train_done(2, *command)
    folders = [CheckpointFolder(RunDir(path).checkpoints) for path in (whole, killed)]
    states = [bytes_of(folder.load("train-end")["payload"]) for folder in folders]
    assert states[0] == states[1]
    assert _rows(whole) == _rows(killed) == _rows(alone)
    for path in (whole, killed, alone):
        report = check_ledger(path)
        assert report.ok and report.drawn, str(report)
