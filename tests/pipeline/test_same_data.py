"""Words about ranks that see other data: short for any number of ranks, the usual value first."""

from __future__ import annotations

import numpy as np
import pytest

from dist_train.data.content import ITEMS, Content, Seen, sampled_ids
from dist_train.pipeline.same_data import by_ranks, differences, ranks_in_words

NODES = [f"node-{rank // 4}" for rank in range(100)]


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([3], "rank 3 (node-0)"),
        ([0, 1, 2], "ranks 0-2 (node-0)"),
        ([0, 1, 2, 5, 8, 9], "ranks 0-2, 5, 8-9 (node-0, node-1, node-2)"),
        (list(range(100)), "ranks 0-99 (node-0, node-1, node-2 and 22 more hosts)"),
        (list(range(0, 16, 2)), "ranks 0, 2, 4 and 5 more ranks (node-0, node-1, node-2 and 1 more host)"),
    ],
)
def test_ranks_and_their_hosts(ranks: list[int], said: str) -> None:
    assert ranks_in_words(ranks, NODES) == said


def test_the_value_of_most_ranks_comes_first() -> None:
    values = ["9,999", *["10,000"] * 3]
    assert by_ranks(values, NODES) == "10,000 on ranks 1-3 (node-0), 9,999 on rank 0 (node-0)"
    said = by_ranks([str(rank) for rank in range(100)], NODES)
    assert said.endswith("2 on rank 2 (node-0) and 97 more values") and len(said) < 100


def test_a_fingerprint_is_named_only_where_nothing_else_differs() -> None:
    same = {"training rows": "4", "classes": "a, b", "fingerprint": "4"}
    assert differences([same, same], NODES) == []
    assert differences([same, same | {"classes": "b, a"}], NODES) == ["classes"]
    said = differences([same, same | {"training rows": "3", "fingerprint": "3"}], NODES)
    assert said == ["training rows: 4 on rank 0 (node-0), 3 on rank 1 (node-0)"]
    assert differences([same, same | {"fingerprint": "x"}], NODES)[0].startswith("fingerprint: 4 on rank 0")


@pytest.mark.parametrize("rows", [1, 2, 3, 5, ITEMS, 1000, 10**12])
def test_the_sample_depends_on_seed_and_length_and_has_the_first_middle_and_last_item(rows: int) -> None:
    ids = sampled_ids(rows, 0)
    assert ids == sampled_ids(rows, 0) and len(ids) == len(set(ids)) == min(rows, ITEMS)
    assert {0, rows // 2, rows - 1} <= set(ids) and ids[0] == 0 and 0 <= min(ids) <= max(ids) < rows
    assert rows <= ITEMS or set(ids) != set(sampled_ids(rows, 1))


def seen(values: np.ndarray, shown: str = "float32 [8]") -> Seen:
    return Seen(shown, str(values.tobytes()), values.astype(np.float32).tobytes())


def test_rounding_is_told_from_other_content() -> None:
    values = np.random.default_rng(0).random(64)
    assert seen(values).is_like(seen(values + 0.005 * np.random.default_rng(1).random(64)))
    assert not seen(values).is_like(seen(np.random.default_rng(1).random(64)))
    assert not seen(values).is_like(seen(values + 1e-6, "float32 [9]"))
    assert not Seen("a.jpg of 9 bytes", "one").is_like(Seen("a.jpg of 9 bytes", "other"))


def test_items_that_only_one_side_has_read_are_not_compared() -> None:
    one, two = Seen("x", "1"), Seen("x", "2")
    assert Content({0: one, 1: one}).differing(Content({1: two, 2: two})) == [1]
    assert Content.from_state(Content({3: one, 5: two}).state_dict()) == Content({3: one, 5: two})
