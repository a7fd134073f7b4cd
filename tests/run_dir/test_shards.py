"""Tests parts of tensors, and what a reader makes of them, without ranks."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_train.run_dir.shards import Box, Shard, boxes_in, holds_shards, metadata

SHAPE = (5, 4, 3)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    starts = [draw(st.integers(0, size - 1)) for size in SHAPE]
    return Box(tuple(starts), tuple(draw(st.integers(0, size - at)) for size, at in zip(SHAPE, starts, strict=True)))


WHOLE = Box((0, 0, 0), SHAPE)
NUMBERS = torch.arange(math.prod(SHAPE)).view(SHAPE)


@given(boxes(), boxes())
def test_what_two_parts_share_is_found_in_both(one: Box, other: Box) -> None:
    parts = [NUMBERS[each.within(WHOLE)] for each in (one, other)]
    shared = set(parts[0].flatten().tolist()) & set(parts[1].flatten().tolist())
    common = one.common(other)
    if common is None:
        assert not shared
        return
    found = [part[common.within(each)] for part, each in zip(parts, (one, other), strict=True)]
    assert torch.equal(*found) and set(found[0].flatten().tolist()) == shared and common.numel == len(shared)


def test_a_number_is_a_part_of_itself() -> None:
    assert Box((), ()).common(Box((), ())) == Box((), ()) and Box((), ()).numel == 1


def test_the_place_of_a_part_comes_back_from_the_header() -> None:
    box = Box((2, 0, 0), (3, 4, 3))
    written = metadata({"w": Shard(NUMBERS[box.within(WHOLE)], box, SHAPE, (2,), (0,))}, "train-00000001", 1, 2)
    assert boxes_in(written, {"w": [3, 4, 3]}) == {"w": box}
    assert {key: written[key] for key in ("checkpoint", "rank")} == {"checkpoint": "train-00000001", "rank": "1"}
    deep = {**written, "DCP_SHARDING_INFO": "[" * 100_000 + "]" * 100_000}
    with pytest.raises(ValueError, match="levels"):
        boxes_in(deep, {"w": [3, 4, 3]})
    assert json.loads(written["DCP_SHARDING_INFO"])["w"]["placements"] == [0]


def test_plain_states_have_no_shards() -> None:
    assert not holds_shards({"a": [torch.zeros(2), (1, {"b": None})], "c": "DTensor"})
