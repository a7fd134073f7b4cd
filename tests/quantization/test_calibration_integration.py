"""Calibration in whole runs on sorted data: samples of all classes, and bitwise equal ranges on one and three ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.ranks import train_done
from tests.support.small_runs import Runs
from tests.support.sorted_dataset import CLASSES, LEVELS, ids_file

SAMPLES = 120  # four batches: rank 0 of three has two of them
SETTINGS = [
    "--import",
    "tests.support.sorted_dataset",
    "--data.name",
    "sorted",
    "--data.args",
    "{}",
    "--data.workers",
    "0",
]
SETTINGS += ["--train.epochs", "1", "--ptq.samples", str(SAMPLES)]
# Batches of 50 on all ranks normalise alike where BatchNorm stands still.
SETTINGS += ["--qat.epochs", "1", "--qat.freeze_batch_norm", "0", "--qat.freeze_ranges", "1"]
NET = ["--model.name", "small_resnet", "--model.args", "{width: 4, blocks: 1}"]


def settings(folder: Path, stages: str, *more: str) -> list[str]:
    return [*SETTINGS, "--data.root", str(folder), "--stages", stages, *more]


def ranges(runs: Runs, name: str, stage: str = "ptq") -> dict[str, Tensor]:
    """The buffers of all fake-quantize modules, as the stage hands them on."""
    state: dict[str, Any] = runs.checkpoints(name).load(f"{stage}-end")["payload"]["quantized"]
    found = {name: value for name, value in state.items() if name.startswith("quantizers.")}
    assert found
    return found


def read_for_ranges(folder: Path, world_size: int) -> list[list[int]]:
    """The samples that each rank read behind the first 16, which the gates `prepare` and `gradients` ask for."""
    found = []
    for rank in range(world_size):
        ids = [int(line) for line in ids_file(folder, rank).read_text().splitlines()]
        first = next(place for place in range(len(ids)) if ids[place : place + 16] == list(range(16)))
        if ids[-1] == 0:  # by its first sample rank 0 describes the data in each checkpoint
            ids.pop()
        found.append(ids[first + 32 :] if ids[first + 16 : first + 32] == list(range(16)) else ids[first + 16 :])
    return found


def are_of_all_classes(ids: Sequence[int]) -> bool:
    """As many of each, more or less."""
    count = LEVELS[list(ids)].bincount(minlength=256)[25::50][:CLASSES]
    return int(count.min()) >= SAMPLES // CLASSES // 2


def test_ranges_of_sorted_data_are_of_all_classes_and_each_sample_counts_once(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    assert runs("run", *settings(tmp_path, "[train, ptq]")) == 0
    (ids,) = read_for_ranges(tmp_path, 1)
    assert len(ids) == len(set(ids)) == SAMPLES and are_of_all_classes(ids)
    highest = ranges(runs, "run")["quantizers.1_input.high"]
    assert float(highest) == pytest.approx(float(LEVELS.max() + 5) / 255), "the brightest pixel"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["min_max", "percentile", "mse"])
def test_whole_runs_on_one_and_three_ranks_have_the_same_ranges(method: str, tmp_path: Path) -> None:
    runs, found = Runs(tmp_path), {}
    assert runs("float", *settings(tmp_path, "[train]", *NET)) == 0
    start = [*NET, "--model.init_from", str(tmp_path / "float"), "--ptq.ranges", method]
    for world_size in (1, 3):
        (folder := tmp_path / f"data-{world_size}").mkdir()
        name, given = f"run-{world_size}", settings(folder, "[ptq, qat]", *start)
        train_done(world_size, "run", str(runs.config), "--run.dir", str(tmp_path / name), *given)
        found[world_size] = [ranges(runs, name, stage) for stage in ("ptq", "qat")]
    (alone, trained), (together, trained_together) = found[1], found[3]
    assert (
        alone.keys() == together.keys()
        and [name for name in alone if not torch.equal(alone[name], together[name])] == []
    )
    assert [name for name in alone if not torch.equal(alone[name], trained[name])], "qat goes on with them"
    for name, value in trained.items():
        torch.testing.assert_close(trained_together[name], value, rtol=0.02, atol=1e-3, msg=name)
