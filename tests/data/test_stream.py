"""Iterable datasets: one stream, shared by global batches at any world size, read on where it was left."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from dist_train.data.augment.steps import Augmentation
from dist_train.data.loader import EvaluationLoader, Source, StepBatch, TrainLoader
from dist_train.data.sampler import ElasticDistributedSampler
from dist_train.data.splits import Splits
from dist_train.distributed.world import World
from dist_train.errors import DataError
from dist_train.training.loop import fit
from tests.support.ranks import ROOT, call, train
from tests.support.training_loops import CLASSES, flat, make, mlp


class Stream(IterableDataset[Any]):
    """Items that say their place and epoch, with noise of every global generator."""

    def __init__(self, length: int) -> None:
        self._length, self._epoch = length, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        for place in range(self._length):
            noise = (float(torch.rand(())) + np.random.rand() + random.random()) / 4
            yield torch.full((1, 4, 4), 100 * self._epoch + place + noise), place % CLASSES


def steps(
    size: int, batch: int, world_size: int = 1, rank: int = 0, epoch: int = 0, first: int = 0, length: int = 1000
) -> list[StepBatch]:
    augmentation = Augmentation([], seed=0, mean=(0.5,), std=(0.25,))
    source = Source(Stream(length), augmentation, torch.device("cpu"), False, 4, 3, size=size)
    sampler = ElasticDistributedSampler(range(size), world_size, rank, shuffle=False, seed=3, global_batch_size=batch)
    loader = TrainLoader(source, sampler, 3)
    return list(loader.epoch(epoch, first, loader.steps_per_epoch))


def inputs(batch: StepBatch) -> torch.Tensor:
    return torch.cat([micro.inputs[: micro.rows] for micro in batch.micro_batches])


def test_ranks_share_each_global_batch_of_one_stream() -> None:
    alone = steps(20, 5)
    assert [batch.ids for batch in alone] == [list(range(start, start + 5)) for start in range(0, 20, 5)]
    assert [int(row.min()) for batch in alone for row in inputs(batch)] == list(range(20))
    by_rank = [steps(20, 5, 3, rank) for rank in range(3)]
    for step, whole in enumerate(alone):
        assert torch.equal(torch.cat([inputs(batches[step]) for batches in by_rank]), inputs(whole))
        assert [number for batches in by_rank for number in batches[step].ids] == whole.ids


def test_it_is_read_on_in_the_middle_and_begins_again_each_epoch() -> None:
    whole = steps(20, 5, epoch=1)
    rest = steps(20, 5, epoch=1, first=2)
    assert all(torch.equal(inputs(left), inputs(right)) for left, right in zip(whole[2:], rest, strict=True))
    assert int(inputs(whole[0]).min()) == 100, "the stream was told the epoch"


def test_a_stream_that_is_too_short_is_named() -> None:
    with pytest.raises(DataError, match="the stream of Stream ended before item 19") as caught:
        steps(20, 5, length=18)
    assert "steps_per_epoch" in caught.value.hint


def _fit(world: World) -> dict[str, Any]:
    model = mlp()
    made = make(world, model, size=20, batch=5, dataset=Stream(20), evaluate_with=_loss_of_nothing)
    fit(made.run, None)
    return {"losses": made.recorder.of("loss"), "parameters": flat(model)}


def _loss_of_nothing(model: torch.nn.Module) -> Any:
    from dist_train.training.evaluate import Evaluation

    return Evaluation({"top1": 0.0, "count": 0}, torch.empty(0))


@pytest.mark.slow
def test_losses_agree_on_real_ranks() -> None:
    alone = _fit(World())
    for each in call(2, "tests.data.test_stream:_fit"):
        assert each["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert each["parameters"] == pytest.approx(alone["parameters"], rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_what_a_stream_cannot_be_is_said() -> None:
    pairs: Any = [(torch.zeros(1, 4, 4), 0)]
    options: dict[str, Any] = {"num_classes": 2, "classes": ("a", "b"), "mean": (0.5,), "std": (0.2,)}
    with pytest.raises(DataError, match=r"Splits\.steps_per_epoch, at least 1, is required") as caught:
        Splits(Stream(5), pairs, **options)
    assert "steps_per_epoch=" in caught.value.hint
    with pytest.raises(DataError, match="evaluation set is an iterable dataset"):
        Splits(Stream(5), Stream(5), **options, steps_per_epoch=2)
    with pytest.raises(DataError, match="required for an iterable training set"):
        Splits(pairs, pairs, **options, steps_per_epoch=2)
    for empty in ({"train": [], "eval": pairs}, {"train": pairs, "eval": []}):
        with pytest.raises(DataError, match="is empty"):
            Splits(**empty, **options)
    assert Splits(Stream(5), pairs, **options, steps_per_epoch=2).input_shape == (1, 4, 4)
    augmentation = Augmentation([], seed=0, mean=(0.5,), std=(0.25,))
    source = Source(Stream(9), augmentation, torch.device("cpu"), False, 0, 3, size=9)
    assert [batch.ids.tolist() for batch in EvaluationLoader(source, 3, 2, 1, 8)] == [[4, 5, 6], [7]], "calibration"


_MINE = """
import torch
from torch.utils.data import IterableDataset
import dist_train

class Stream(IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        while True:
            label = int(torch.randint(0, 2, (), generator=generator))
            yield torch.full((1, 8, 8), 200 * label + 20, dtype=torch.uint8), label

@dist_train.register_dataset("stream")
def stream(data):
    rows = torch.arange(8) % 2
    images = (200 * rows + 20).view(8, 1, 1, 1).expand(8, 1, 8, 8).to(torch.uint8)
    return dist_train.Splits(
        Stream(), dist_train.ImageArrays(images, rows), 2, ("dark", "bright"), (0.5,), (0.3,), steps_per_epoch=6
    )
"""


@pytest.mark.slow
def test_a_stream_trains_and_calibrates_on_two_ranks_and_states_its_promise(tmp_path: Path) -> None:
    (tmp_path / "streams.py").write_text(_MINE)
    options = ["run", "configs/quickstart.yaml", "--import", "streams", "--data.name", "stream", "--run.device", "cpu"]
    options += ["--run.dir", str(tmp_path / "run"), "--stages", "[train, ptq, convert]", "--train.epochs", "2"]
    options += ["--data.augment", "[]", "--data.global_batch_size", "9", "--debug.ledger", "false"]
    path = {"PYTHONPATH": f"{Path.cwd()}:{tmp_path}"}
    with train(2, *options, environ=path) as ranks:
        assert ranks.wait() == [0, 0], ranks.printed()
        assert "the training data is a stream, in its own order" in ranks.output(0)
        assert "top1 1.0000" in ranks.output(0)
    with train(1, *options, "--run.dir", str(tmp_path / "other"), "--debug.ledger", "true", environ=path) as ranks:
        assert ranks.wait() == [1] and "--debug.ledger false" in ranks.output(0)


_HELD = """
import torch
from dist_train.data.stack import Stack
from dist_train.data.stream import read_stream
from tests.data.test_stream import Stream
import numpy as np

held = read_stream(Stream(9), [np.arange(3), np.arange(3, 6)], 0, 0, Stack('Stream'))
print(next(held)[0].ids.tolist(), flush=True)
"""


@pytest.mark.heavy
def test_a_process_that_still_holds_a_stream_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _HELD], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "[0, 1, 2]\n"), done.stderr
