"""Samples that cannot be decoded: training uses the others, in the same steps, at any world size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from dist_train.data.augment.steps import Augmentation
from dist_train.data.loader import EvaluationLoader, Source
from dist_train.data.sampler import ElasticDistributedSampler
from dist_train.distributed.world import World
from dist_train.errors import CorruptSampleError, DataError
from dist_train.tasks import Classification
from dist_train.training.evaluate import evaluate
from dist_train.training.loop import fit
from dist_train.training.optim import build_optimizer
from dist_train.training.schedule import build_schedule
from dist_train.training.step import train_step
from tests.support.ranks import call
from tests.support.training_loops import CLASSES, arrays, flat, make, mlp, normed

SIZE, BATCH, EPOCHS = 22, 6, 2


class Damaged(Dataset[Any]):
    """The rows of `arrays`, as a map-style dataset of which some items cannot be decoded."""

    def __init__(self, size: int, damaged: list[int]) -> None:
        self._rows, self._damaged = arrays(size), set(damaged)
        self.input_shape = (1, 4, 4)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index in self._damaged:
            raise CorruptSampleError(f"{index}.jpg cannot be decoded", "remove it")
        return self._rows.images[index], int(self._rows.targets[index])


def _fit(world: World, damaged: list[int], micro: int | None) -> dict[str, Any]:
    model = mlp()
    made = make(world, model, size=SIZE, batch=BATCH, epochs=EPOCHS, micro=micro, dataset=Damaged(SIZE, damaged))
    state = fit(made.run, None)
    return {
        "parameters": flat(model),
        "losses": made.recorder.of("loss"),
        "left out": made.recorder.of("skipped_samples"),
        "metrics": state.metrics,
    }


def test_ranks_that_synchronise_have_as_many_micro_batches_whatever_cannot_be_decoded() -> None:
    damaged = {0, 3, 4, 5, 9, 11, 12, 13, 17, 20}
    by_rank = [
        list(
            make(
                World(rank, world_size=2),
                mlp(),
                size=SIZE,
                batch=BATCH,
                joint_micro=2,
                dataset=Damaged(SIZE, [*damaged]),
            ).run.loader.epoch(0, 0, 4)
        )
        for rank in (0, 1)
    ]
    kept = [number for share in by_rank for batch in share for number in batch.ids]
    assert sorted(kept) == sorted(set(range(SIZE)) - damaged)
    for batches in zip(*by_rank, strict=True):
        assert len({len(batch.micro_batches) for batch in batches}) == 1
        for batch in batches:
            assert sum(micro.rows for micro in batch.micro_batches) == len(batch.ids)
            assert all(len(micro.inputs) >= 2 and len(micro.targets) == micro.rows for micro in batch.micro_batches)
    assert {micro.rows for share in by_rank for batch in share for micro in batch.micro_batches} == {0, 1, 2, 3}


def _by_hand(damaged: list[int]) -> list[float]:
    """Plain SGD on the mean over those of each global batch that can be decoded."""
    model, data = mlp(), arrays(SIZE)
    run = make(World(), model, size=SIZE, batch=BATCH, epochs=EPOCHS).run
    optimizer = build_optimizer(model, run.settings.optim)
    rates = build_schedule(optimizer, run.settings.schedule, run.total_steps, run.steps_per_epoch)
    sampler = ElasticDistributedSampler(data, 1, 0, seed=5, global_batch_size=BATCH)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for step in range(sampler.num_steps):
            kept = [number for number in sampler.global_batch(step).tolist() if number not in damaged]
            pixels = (data.images[kept] / 255 - 0.5) / 0.25
            optimizer.zero_grad()
            F.cross_entropy(model(pixels), data.targets[kept]).backward()
            optimizer.step()
            rates.step()
    return flat(model)


DAMAGED = ([3, 4, 11], list(range(0, SIZE, 2)))
ORDER = ElasticDistributedSampler(range(6), 1, 0, seed=5, global_batch_size=6).global_batch(0).tolist()
BARE = (
    ORDER[:1],
    ORDER[3:],
    ORDER[1:3],
)  # shares are 3 and 3 on two ranks: the second one leaves a rank without samples


def _statistics(world: World, damaged: list[int]) -> dict[str, Any]:
    """After one step of a batch of all 6 rows."""
    model = normed()
    run = make(world, model, size=6, batch=6, dataset=Damaged(6, damaged)).run
    (batch,) = run.loader.epoch(0, 0, 1)
    train_step(run.strategy.wrap(model.train()), batch, run.task, run.strategy, run.learner.reduction)
    run.learner.reduction.finish(0).means()
    return {"mean": model[1].running_mean.tolist(), "ids": batch.ids, "left out": list(batch.left_out)}


def _all(world: World, micro: int | None) -> dict[str, Any]:
    return {
        "fits": [_fit(world, damaged, micro) for damaged in DAMAGED],
        "statistics": [_statistics(world, damaged) for damaged in BARE],
    }


@pytest.fixture(scope="module")
def on_two_ranks() -> list[dict[str, Any]]:
    return call(2, "tests.data.test_left_out_integration:_all", 2)


@pytest.mark.slow
def test_training_without_them_is_training_on_the_others_in_the_same_steps(on_two_ranks: list[dict[str, Any]]) -> None:
    for number, damaged in enumerate(DAMAGED):
        expected = _by_hand(damaged)
        assert expected != pytest.approx(_by_hand([]), abs=1e-3)
        alone = _fit(World(), damaged, None)
        for result in (alone, *(rank["fits"][number] for rank in on_two_ranks)):
            assert result["parameters"] == pytest.approx(expected, abs=2e-6)
            assert result["losses"] == pytest.approx(alone["losses"], abs=1e-5)
            assert result["left out"] == [len(damaged)] * EPOCHS
            assert result["metrics"]["count"] == SIZE - len(damaged)
            assert result["metrics"]["skipped_samples"] == len(damaged)


def test_statistics_are_those_of_the_decoded_samples_even_where_a_rank_has_none(
    on_two_ranks: list[dict[str, Any]],
) -> None:
    for number, damaged in enumerate(BARE):
        kept = [sample for sample in ORDER if sample not in damaged]
        pixels = (arrays(6).images[kept] / 255 - 0.5) / 0.25
        expected = (0.1 * normed()[0](pixels).mean((0, 2, 3))).tolist()
        results = [rank["statistics"][number] for rank in on_two_ranks]
        assert [sample for result in results for sample in result["ids"]] == kept
        assert sorted(sample for result in results for sample in result["left out"]) == sorted(damaged)
        for result in results:
            assert result["mean"] == pytest.approx(expected, abs=1e-5)


def test_where_nothing_is_damaged_nothing_changes() -> None:
    found = _fit(World(), [], None)
    model = mlp()
    made = make(World(), model, size=SIZE, batch=BATCH, epochs=EPOCHS)
    fit(made.run, None)
    assert found["parameters"] == flat(model) and found["left out"] == [0, 0]
    assert "skipped_samples" not in found["metrics"]


def test_a_step_of_which_nothing_can_be_decoded_ends_the_run() -> None:
    first = ElasticDistributedSampler(range(SIZE), 1, 0, seed=5, global_batch_size=BATCH).global_batch(0).tolist()
    with pytest.raises(DataError, match="none of the 6 samples of step 0") as caught:
        _fit(World(), first, None)
    assert "--data.on_corrupt error" in caught.value.hint


def test_the_count_of_an_epoch_survives_an_interruption() -> None:
    damaged = list(range(0, SIZE, 2))
    model = mlp()
    options: dict[str, Any] = {"size": SIZE, "batch": BATCH, "epochs": 1, "dataset": Damaged(SIZE, damaged)}
    made = make(World(), model, checkpoint_every=2, **options)
    fit(made.run, None)
    state = made.memory.states[2]
    assert 0 < state["left_out"] < len(damaged)
    again = make(World(), model, **options)
    fit(again.run, state)
    assert again.recorder.of("skipped_samples") == [len(damaged)]


def _source(workers: int, skip_corrupt: bool) -> Source:
    augmentation = Augmentation([], seed=0, mean=(0.5,), std=(0.25,))
    return Source(
        Damaged(9, [4, 5, 8]), augmentation, torch.device("cpu"), False, workers, 0, skip_corrupt=skip_corrupt
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_without_skip_the_error_is_the_datasets_own(workers: int) -> None:
    with pytest.raises(CorruptSampleError) as caught:
        list(EvaluationLoader(_source(workers, skip_corrupt=False), 3, 1, 0))
    assert str(caught.value) == "4.jpg cannot be decoded\n  -> remove it"


@pytest.mark.slow
def test_an_evaluation_counts_what_was_evaluated_and_what_was_not() -> None:
    model = mlp().eval()
    loader = EvaluationLoader(_source(0, skip_corrupt=True), 2, 1, 0)
    found = evaluate(model, loader, Classification(CLASSES, {}), World())
    assert found.metrics["count"] == 6 and found.metrics["skipped_samples"] == 3 and len(found.decisions) == 6
