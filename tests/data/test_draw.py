"""Rows are drawn by weight as a function of (weights, seed, epoch, position), on any number of ranks, from any step."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dist_train.data.draw import WeightedDraw, _negative_log
from dist_train.data.sampler import ElasticDistributedSampler

WEIGHTS = np.array([1.0, 2.0, 0.0, 3.0, 4.0])
MANY = np.random.default_rng(0).random(1000)


def sampler(world_size: int = 1, rank: int = 0, **options: object) -> ElasticDistributedSampler:
    given = {"weights": MANY, "global_batch_size": 24, "seed": 3, **options}
    return ElasticDistributedSampler(range(1000), world_size, rank, **given)  # type: ignore[arg-type]


def test_rows_come_as_often_as_their_weights_say() -> None:
    drawn = WeightedDraw(WEIGHTS).order(7)(np.arange(20_000))
    counts = np.bincount(drawn, minlength=5)
    assert counts[2] == 0
    assert stats.chisquare(counts[WEIGHTS > 0], 20_000 * WEIGHTS[WEIGHTS > 0] / WEIGHTS.sum()).pvalue > 0.01


def test_draws_at_neighbouring_positions_and_epochs_are_independent() -> None:
    draw = WeightedDraw([1, 1, 1])
    first, second = draw.order(1)(np.arange(9001)), draw.order(2)(np.arange(9001))
    for pairs in (3 * first[:-1] + first[1:], 3 * first + second):
        assert stats.chisquare(np.bincount(pairs, minlength=9)).pvalue > 0.01


def test_without_replacement_each_next_row_is_drawn_from_those_that_are_left() -> None:
    draw = WeightedDraw(WEIGHTS, replacement=False)
    orders = np.array([draw.order(key)(np.arange(4)) for key in range(4000)])
    assert (np.sort(orders, axis=1) == [0, 1, 3, 4]).all()
    first = np.bincount(orders[:, 0], minlength=5)[WEIGHTS > 0]
    assert stats.chisquare(first, 4000 * WEIGHTS[WEIGHTS > 0] / 10).pvalue > 0.01
    second = np.bincount(orders[orders[:, 0] == 4, 1], minlength=5)[[0, 1, 3]]
    assert stats.chisquare(second, second.sum() * np.array([1, 2, 3]) / 6).pvalue > 0.01


def test_fewer_samples_without_replacement_are_the_beginning_of_all() -> None:
    whole, part = (WeightedDraw(MANY, False, samples).order(5) for samples in (None, 100))
    assert (part(np.arange(100)) == whole(np.arange(100))).all()


@pytest.mark.parametrize("values", [[2.0**-54, 1e-9, 0.3, 0.5, 2**-0.5, 0.9, 1 - 2.0**-53, 1.0]])
def test_the_portable_logarithm_is_the_logarithm(values: list[float]) -> None:
    assert np.allclose(_negative_log(np.array(values)), -np.log(values), rtol=1e-14, atol=0)


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("micro", [None, 5])
def test_every_world_size_draws_the_same_global_batches(replacement: bool, micro: int | None) -> None:
    alone = sampler(replacement=replacement, samples=200)
    alone.set_epoch(2)
    assert alone.num_steps == 9 and alone.epoch_size == 200
    for world_size in (1, 2, 3):
        ranks = [
            sampler(world_size, rank, replacement=replacement, samples=200, micro_batch_size=micro)
            for rank in range(world_size)
        ]
        for each in ranks:
            each.set_epoch(2)
        for step in range(alone.num_steps):
            shares = [each.rank_slice(step) for each in ranks]
            joined = np.concatenate([share.ids for share in shares])
            assert sorted(joined) == sorted(alone.global_batch(step))
            assert sum(map(len, (share.ids for share in shares))) == (24 if step < 8 else 8)


@pytest.mark.parametrize("replacement", [True, False])
def test_an_epoch_begun_at_any_step_equals_the_rest_of_it(replacement: bool) -> None:
    whole = list(sampler(2, 1, replacement=replacement))
    for step in (1, 17, 41):
        begun = sampler(2, 1, replacement=replacement, start_step=step)
        assert list(begun) == whole[-len(begun) :]


def test_epochs_and_seeds_draw_other_rows() -> None:
    first, later = sampler(), sampler()
    later.set_epoch(1)
    other = sampler(seed=4)
    batches = [each.global_batch(0).tolist() for each in (first, later, other)]
    assert batches[0] != batches[1] != batches[2] != batches[0]


def test_draws_of_one_row_are_told_apart_and_on_every_rank_alike() -> None:
    alone = sampler(weights=np.r_[np.ones(5), np.zeros(995)]).rank_slice(2)
    assert len(set(alone.ids.tolist())) <= 5
    assert alone.turns is not None and alone.turns[: len(alone.ids)].tolist() == list(range(48, 72))
    second = sampler(2, 1, weights=np.r_[np.ones(5), np.zeros(995)]).rank_slice(2)
    assert second.turns is not None and second.turns[: len(second.ids)].tolist() == list(range(60, 72))
    assert sampler(replacement=False).rank_slice(0).turns is None


@pytest.mark.parametrize(("drop_last", "length"), [(False, 34), (True, 33)])
def test_without_global_batches_it_keeps_the_lengths_of_distributed_sampler(drop_last: bool, length: int) -> None:
    ranks = [
        ElasticDistributedSampler(range(1000), 3, rank, drop_last=drop_last, weights=MANY, samples=100)
        for rank in range(3)
    ]
    assert [len(each) for each in ranks] == [len(list(each)) for each in ranks] == [length] * 3
    one = ElasticDistributedSampler(range(1000), 1, 0, weights=MANY, samples=100)
    assert [row for rows in zip(*ranks, strict=True) for row in rows][:99] == list(one)[:99]


@pytest.mark.parametrize(
    ("weights", "options", "said"),
    [
        ([1, -1.0], {}, "the weight of row 1 is -1, not a finite number >= 0"),
        ([float("nan"), 1, float("inf")], {}, "the weight of row 0 is nan, not a finite number >= 0, and 1 more are"),
        ([0, 0], {}, "the sum of the weights is 0, not"),
        ([1e308, 1e308], {}, "the sum of the weights is inf"),
        ([[1.0]], {}, r"must be numbers \[rows\], one a row, not float64 \[1, 1\]"),
        (["a"], {}, "must be numbers"),
        ([], {}, r"not float64 \[0\]"),
        (
            [0, 1, 1],
            {"replacement": False, "samples": 3},
            "3 rows cannot be drawn without replacement: 2 have a weight",
        ),
        ([1], {"samples": 0}, "at least one row, not 0"),
    ],
)
def test_weights_by_which_nothing_can_be_drawn_are_refused(
    weights: list[float], options: dict[str, int], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        WeightedDraw(weights, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": [1, 2]}, "2 weights for 1000 samples"),
        ({"shuffle": False}, "shuffle=False cannot keep"),
        ({"weights": None, "samples": 5}, "give weights too"),
    ],
)
def test_a_sampler_refuses_settings_that_do_not_go_with_weights(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sampler(**options)
