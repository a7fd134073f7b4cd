"""A state as the files of a checkpoint, copied or in place."""

from __future__ import annotations

import json
from typing import Any

import pytest
import safetensors.torch
import torch

from dist_train.run_dir import state_codec as codec
from dist_train.run_dir.snapshot import _NAMES, HashedPieces, Snapshot, StateBuffer, take


def decoded(snapshot: Snapshot) -> Any:
    tensors = safetensors.torch.load(b"".join(snapshot.tensors.pieces()))
    return codec.decode(json.loads(snapshot.tree_file)["state"], tensors)


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    weight = torch.randn(3, 5, 7, 2).contiguous(memory_format=torch.channels_last)
    return {"weight": weight, "tied": weight, "step": torch.tensor(3.0), "none": torch.empty(0), "rows": [weight[0]]}


@pytest.mark.parametrize("buffer", [None, StateBuffer()], ids=["in place", "copied"])
def test_it_gives_back_the_state(buffer: StateBuffer | None) -> None:
    found = decoded(take(state(), buffer))
    assert found["weight"].is_contiguous(memory_format=torch.channels_last)
    assert found["tied"].data_ptr() == found["weight"].data_ptr()
    torch.testing.assert_close(found, state(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", sorted(_NAMES, key=str), ids=str)
def test_each_dtype_comes_back_beside_odd_sizes(dtype: torch.dtype) -> None:
    data = torch.arange(8 * 3, dtype=torch.uint8).fill_(1) if dtype is torch.bool else torch.arange(24).to(torch.uint8)
    tensor = data.view(dtype)
    found = decoded(take({"odd": torch.arange(3, dtype=torch.uint8), "tensor": tensor}, StateBuffer()))
    assert found["tensor"].dtype == dtype and torch.equal(found["tensor"].view(torch.uint8), data)


def test_a_copy_does_not_follow_the_state() -> None:
    changing = {"weight": torch.zeros(1000), "momentum": [torch.zeros(3, 4).t()]}
    snapshot = take(changing, StateBuffer())
    changing["weight"].fill_(1)
    changing["momentum"][0].fill_(1)
    found = decoded(snapshot)
    assert not found["weight"].any() and not found["momentum"][0].any()


def test_copies_reuse_one_memory() -> None:
    buffer = StateBuffer()
    places = set()
    for fill in (1.0, 2.0, 3.0):
        snapshot = take({"weight": torch.full((500_000,), fill), "bias": torch.ones(7)}, buffer)
        places.add(snapshot.tensors._data[0].untyped_storage().data_ptr())
        assert {each.untyped_storage().nbytes() for each in snapshot.tensors._data} == {2_000_028}
        assert decoded(snapshot)["weight"][0] == fill
    assert len(places) == 1


def test_a_large_tensor_is_given_in_pieces_that_are_told() -> None:
    beats: list[int] = []
    snapshot = take({"weight": torch.zeros(5 * 2**20)})
    assert max(len(piece) for piece in snapshot.tensors.pieces(lambda: beats.append(1))) == 4 * 2**20
    assert len(beats) == 5


def test_pieces_are_hashed_once_and_given_again() -> None:
    pieces = HashedPieces(lambda: iter([b"ab", b"c"]))
    assert pieces.sha256 == "" and list(pieces) == [b"ab", b"c"] and list(pieces) == [b"ab", b"c"]
    assert pieces.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.gpu
def test_the_state_of_a_gpu_is_copied_behind_its_work_to_pinned_memory() -> None:
    device = torch.device("cuda")
    weight, buffer = torch.zeros(2**24, device=device), StateBuffer()
    for step in range(1, 4):
        torch.cuda._sleep(50_000_000)
        weight.add_(1)
        snapshot = take({"weight": weight, "step": torch.tensor(step)}, buffer)
        weight.mul_(100).div_(100)
        assert snapshot.tensors._data[0].is_pinned()
        found = decoded(snapshot)
        assert found["weight"].unique().tolist() == [step] and found["step"] == step
