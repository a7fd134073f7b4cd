"""The sampler: the same global batches at any world size, each sample once, from any step on."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dist_train.data import permutation
from dist_train.data.sampler import ElasticDistributedSampler, evaluation_slice, shares

SIZES = st.integers(1, 400)
WORLDS = st.integers(1, 9)
BATCHES = st.integers(1, 70)


def samplers(size: int, world_size: int, **options: Any) -> list[ElasticDistributedSampler]:
    return [ElasticDistributedSampler(range(size), world_size, rank, **options) for rank in range(world_size)]


@given(st.integers(0, 300), st.integers(1, 40))
def test_shares_are_even_and_never_a_single_row_of_many(rows: int, world_size: int) -> None:
    sizes = shares(rows, world_size)
    assert len(sizes) == world_size and sum(sizes) == rows
    assert sizes == sorted(sizes, reverse=True)
    taken = [size for size in sizes if size]
    assert not taken or max(taken) - min(taken) <= 1
    if rows >= 2 * world_size:
        assert len(taken) == world_size
    if rows >= 2:
        assert min(taken) >= 2
        assert len(taken) == min(world_size, rows // 2)
    if rows == 1:
        assert sizes[0] == 1


def test_shares_that_were_worked_out_by_hand() -> None:
    assert shares(64, 4) == [16, 16, 16, 16]
    assert shares(10, 4) == [3, 3, 2, 2]
    assert shares(7, 4) == [3, 2, 2, 0]
    assert shares(3, 2) == [3, 0]
    assert shares(1, 3) == [1, 0, 0]
    assert shares(0, 2) == [0, 0]
    for rows, world_size in ((-1, 2), (4, 0)):
        with pytest.raises(ValueError):
            shares(rows, world_size)


@given(st.integers(0, 500), st.integers(1, 20))
def test_evaluation_takes_each_sample_once(size: int, world_size: int) -> None:
    parts = [evaluation_slice(size, world_size, rank) for rank in range(world_size)]
    assert [index for part in parts for index in part] == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(ValueError):
        evaluation_slice(size, world_size, world_size)


@settings(deadline=None)
@given(SIZES, WORLDS, BATCHES, st.booleans(), st.booleans(), st.integers(0, 3))
def test_an_epoch_takes_each_sample_once_over_all_ranks(
    size: int, world_size: int, batch: int, drop_last: bool, shuffle: bool, epoch: int
) -> None:
    ranks = samplers(size, world_size, global_batch_size=batch, drop_last=drop_last, shuffle=shuffle)
    for sampler in ranks:
        sampler.set_epoch(epoch)
    steps = ranks[0].num_steps
    assert steps == (size // batch if drop_last else -(-size // batch))
    seen: list[int] = []
    for step in range(steps):
        slices = [sampler.rank_slice(step) for sampler in ranks]
        whole = ranks[0].global_batch(step)
        assert np.array_equal(np.concatenate([piece.ids for piece in slices]), whole)
        assert [len(piece.ids) for piece in slices] == shares(len(whole), world_size)
        for piece in slices:
            assert piece.global_count == len(whole)
            assert len(piece.filler) == max(0, 2 - len(piece.ids))
            assert set(piece.filler) <= set(whole)
        seen += whole.tolist()
    dropped = size % batch if drop_last else 0
    assert len(seen) == len(set(seen)) == size - dropped
    assert set(seen) <= set(range(size))
    if not shuffle:
        assert seen == list(range(size - dropped))
    iterated = [list(sampler) for sampler in ranks]
    assert sorted(sum(iterated, [])) == sorted(seen)
    assert [len(sampler) for sampler in ranks] == [len(ids) for ids in iterated]


@settings(deadline=None)
@given(SIZES, WORLDS, WORLDS, BATCHES, st.booleans(), st.data())
def test_a_resume_on_another_world_size_takes_the_same_global_batches(
    size: int, before: int, after: int, batch: int, drop_last: bool, data: st.DataObject
) -> None:
    options = {"global_batch_size": batch, "drop_last": drop_last, "seed": 5}
    undisturbed = samplers(size, before, **options)
    start = data.draw(st.integers(0, undisturbed[0].num_steps))
    resumed = samplers(size, after, start_step=start, **options)
    for sampler in (*undisturbed, *resumed):
        sampler.set_epoch(2)
    for step in range(undisturbed[0].num_steps):
        assert np.array_equal(undisturbed[0].global_batch(step), resumed[-1].global_batch(step))
    tail = [undisturbed[0].global_batch(step).tolist() for step in range(start, undisturbed[0].num_steps)]
    assert sorted(sum((list(sampler) for sampler in resumed), [])) == sorted(sum(tail, []))
    assert [len(sampler) for sampler in resumed] == [len(list(sampler)) for sampler in resumed]
    same_world = samplers(size, before, start_step=start, **options)
    for sampler, whole in zip(same_world, undisturbed, strict=False):
        sampler.set_epoch(2)
        skipped = sum(len(whole.rank_slice(step).ids) for step in range(start))
        assert list(sampler) == list(whole)[skipped:]


@given(SIZES, WORLDS, WORLDS, BATCHES)
def test_sharing_as_others_do_takes_the_shares_of_a_sampler_made_so(
    size: int, before: int, after: int, batch: int
) -> None:
    for rank, made in enumerate(samplers(size, after, global_batch_size=batch)):
        shared = ElasticDistributedSampler(range(size), before, 0, global_batch_size=batch)
        shared.rank_slice(0)
        shared.share_as(after, rank)
        for step in range(made.num_steps):
            expected, found = made.rank_slice(step), shared.rank_slice(step)
            assert expected.ids.tolist() == found.ids.tolist() and expected.filler.tolist() == found.filler.tolist()


def test_sharing_as_a_rank_that_is_none_is_refused() -> None:
    sampler = ElasticDistributedSampler(range(10), 2, 0, global_batch_size=4)
    with pytest.raises(ValueError, match="no rank 3 of 3"):
        sampler.share_as(3, 3)
    with pytest.raises(ValueError, match="no steps"):
        ElasticDistributedSampler(range(10), 2, 0).share_as(3, 1)


def test_start_step_holds_for_the_first_epoch_only() -> None:
    sampler = ElasticDistributedSampler(range(100), 1, 0, global_batch_size=10, start_step=7)
    sampler.set_epoch(4)
    assert len(sampler) == len(list(sampler)) == 30
    assert list(sampler) == list(sampler), "the same epoch again gives the same samples"
    sampler.set_epoch(4)
    assert len(sampler) == 30
    sampler.set_epoch(5)
    assert len(sampler) == len(list(sampler)) == 100


def test_epochs_and_seeds_give_other_orders() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        sampler = ElasticDistributedSampler(range(50), 1, 0, seed=seed, global_batch_size=8)
        sampler.set_epoch(epoch)
        return tuple(sampler)

    orders = [order(seed, epoch) for seed in (0, 1, 2**63 - 1) for epoch in range(4)]
    assert len(set(orders)) == len(orders)
    assert order(1, 3) == order(1, 3)


def test_a_late_step_of_a_huge_epoch_evaluates_a_few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = 0
    network = permutation.Permutation._network

    def counting(self: permutation.Permutation, values: np.ndarray) -> np.ndarray:
        nonlocal evaluated
        evaluated += values.size
        return network(self, values)

    monkeypatch.setattr(permutation.Permutation, "_network", counting)
    sampler = ElasticDistributedSampler(range(10**12), 4, 3, global_batch_size=256, start_step=10**9)
    ids = sampler.rank_slice(10**9).ids
    first = iter(sampler)
    assert [next(first) for _ in range(64)] == ids.tolist()
    # A window of slices, two at least; a few elements may have to walk.
    assert 128 <= evaluated <= 1100


@given(SIZES, WORLDS, st.booleans(), st.booleans())
@settings(deadline=None)
def test_without_a_global_batch_it_stands_where_a_distributed_sampler_stands(
    size: int, world_size: int, drop_last: bool, shuffle: bool
) -> None:
    dataset = TensorDataset(torch.arange(size))
    reference: list[DistributedSampler[tuple[torch.Tensor, ...]]] = [
        DistributedSampler(dataset, world_size, rank, shuffle, 3, drop_last) for rank in range(world_size)
    ]
    ours = samplers(size, world_size, shuffle=shuffle, seed=3, drop_last=drop_last)
    for sampler in (*reference, *ours):
        sampler.set_epoch(1)
    theirs, mine = [list(sampler) for sampler in reference], [list(sampler) for sampler in ours]
    assert [len(sampler) for sampler in ours] == [len(ids) for ids in mine] == [len(ids) for ids in theirs]
    assert [s.total_size for s in ours] == [s.total_size for s in reference]
    if not shuffle:
        assert mine == theirs
    counts, their_counts = (np.bincount(sum(ids, []), minlength=size) for ids in (mine, theirs))
    assert sorted(counts) == sorted(their_counts), "as many samples are repeated or dropped"
    assert list(ours[0]) == mine[0]


def test_it_refuses_what_a_distributed_sampler_refuses() -> None:
    for rank in (-1, 2, 5):
        with pytest.raises(ValueError) as theirs:
            DistributedSampler(range(4), 2, rank)  # type: ignore[arg-type]
        with pytest.raises(ValueError) as ours:
            ElasticDistributedSampler(range(4), 2, rank)
        assert str(ours.value) == str(theirs.value)
    with pytest.raises((RuntimeError, ValueError)) as without_group:
        DistributedSampler(range(4))  # type: ignore[arg-type]
    with pytest.raises(without_group.type):
        ElasticDistributedSampler(range(4))


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="global_batch_size must be at least 1"):
        ElasticDistributedSampler(range(4), 1, 0, global_batch_size=0)
    with pytest.raises(ValueError, match="start_step must lie in 0..2"):
        ElasticDistributedSampler(range(4), 1, 0, global_batch_size=2, start_step=3)
    with pytest.raises(ValueError, match="give global_batch_size"):
        ElasticDistributedSampler(range(4), 1, 0, start_step=1)
    with pytest.raises(ValueError, match="give it a global_batch_size"):
        ElasticDistributedSampler(range(4), 1, 0).rank_slice(0)
    sampler = ElasticDistributedSampler(range(4), 1, 0, global_batch_size=2)
    for step in (-1, 2):
        with pytest.raises(IndexError, match="2 steps"):
            sampler.rank_slice(step)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_loader_takes_it(workers: int) -> None:
    dataset = TensorDataset(torch.arange(103))
    seen: list[int] = []
    for rank in range(2):
        sampler = ElasticDistributedSampler(dataset, 2, rank, global_batch_size=16, start_step=1)
        loader = DataLoader(dataset, batch_size=8, sampler=sampler, num_workers=workers)
        batches = [batch.tolist() for (batch,) in loader]
        assert len(batches) == len(loader)
        for step, batch in enumerate(batches, start=1):
            assert batch == sampler.rank_slice(step).ids.tolist()
        seen += sum(batches, [])
    assert len(seen) == len(set(seen)) == 103 - 16


@pytest.mark.parametrize("micro", [2, 3, 5])
def test_pieces_of_all_ranks_are_the_same_rows_at_equal_world_times_micro_batch(micro: int) -> None:
    for size in (59, 61):

        def pieces(world_size: int, each: int, size: int = size) -> list[list[set[int]]]:
            """By step and piece: the rows that all ranks together have in it."""
            samplers = [
                ElasticDistributedSampler(
                    range(size), world_size, rank, seed=4, global_batch_size=24, micro_batch_size=each
                )
                for rank in range(world_size)
            ]
            found = []
            for step in range(samplers[0].num_steps):
                shares = [sampler.rank_slice(step) for sampler in samplers]
                counts = {len(share.pieces) for share in shares}
                assert len(counts) == 1, "every rank has as many, or they would wait for each other for ever"
                together: list[set[int]] = [set() for _ in range(counts.pop())]
                whole = samplers[0].global_batch(step).tolist()
                for share in shares:
                    assert max(share.pieces) <= max(each, 3) and sum(share.pieces) == len(share.ids)
                    ids = share.ids.tolist()
                    for piece, (rows, before) in enumerate(zip(share.pieces, share.predecessors, strict=True)):
                        own, ids = ids[:rows], ids[rows:]
                        together[piece].update(own)
                        assert not own or whole[whole.index(own[0]) - 1] == before
                assert set().union(*together) == set(whole) and sum(map(len, together)) == len(whole)
                assert all(len(rows) >= 2 for rows in together) or len(whole) == 1
                found.append(together)
            return found

        assert pieces(1, 6 * micro) == pieces(2, 3 * micro) == pieces(3, 2 * micro) == pieces(6, micro)
