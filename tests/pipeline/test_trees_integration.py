"""Whole runs on trees: padded texts on two ranks, killed and resumed; mistakes are named before training."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.files import read_json
from dist_train.run_dir.ledger import check
from dist_train.run_dir.paths import RunDir
from tests.pipeline.test_exactness_integration import bytes_of, ids_by_step, lines
from tests.support.ranks import train, train_done

CONFIG = """
run: {name: texts, threads_per_rank: 1, device: cpu}
data: {name: texts, args: {size: 47, ragged: true}, global_batch_size: 8, eval_batch_size: 4, workers: 1}
model: {name: bag}
stages: [train]
train: {epochs: 6, optim: {name: adamw, lr: 0.01}, ema_decay: 0.9}
checkpoint: {every_steps: 2}
log: {every_steps: 1}
debug: {ledger: true}
"""


def command(folder: Path, run_dir: Path, *settings: str) -> list[str]:
    path = folder / "texts.yaml"
    path.write_text(CONFIG)
    return ["run", str(path), "--import", "tests.support.tree_parts", "--run.dir", str(run_dir), *settings]


@pytest.mark.slow
def test_a_run_on_padded_texts_is_killed_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_done(2, *command(tmp_path, whole))
    with train(2, *command(tmp_path, killed)) as ranks:
        assert ranks.until(lambda: lines(killed) >= lines(whole) // 2), ranks.printed()
        ranks.kill()
    assert read_json(RunDir(killed).status)["state"] != "done"
    train_done(2, *command(tmp_path, killed))
    folders = [CheckpointFolder(RunDir(path).checkpoints) for path in (whole, killed)]
    assert folders[0].names() == folders[1].names()
    for name in folders[0].names():
        one, other = (bytes_of(folder.load(name)["payload"]) for folder in folders)
        assert one == other, name
    assert ids_by_step(whole) == ids_by_step(killed) and check(killed).ok
    results = read_json(RunDir(killed).results)["models"]["fp32"]
    assert results["count"] == 19 and results == read_json(RunDir(whole).results)["models"]["fp32"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["--model.name", "mlp"], "and the data gives its inputs by name: ids, mask"),
        (["--data.mix.mixup", "0.2"], "mixes inputs that are one tensor of floats"),
        (["--task.name", "segmentation"], "segmentation takes targets uint8 or int64 [N, H, W]"),
    ],
)
def test_what_does_not_fit_is_named_before_training(settings: list[str], said: str, tmp_path: Path) -> None:
    with train(1, *command(tmp_path, tmp_path / "run", *settings)) as ranks:
        assert ranks.wait() != [0]
        assert said in ranks.output(0), ranks.output(0)
