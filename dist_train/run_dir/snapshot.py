"""Takes a state as the files of a checkpoint, copied or not, and gives their bytes piece by piece."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_train.run_dir import saved
from dist_train.run_dir import state_codec as codec
from dist_train.run_dir.shards import Shard, metadata

_PIECE = 4 * 2**20  # bytes that are hashed and written at once: few, so that they are still in the CPU's cache
_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
}
"""The names of dtypes in the header of a safetensors file."""


class Owner(NamedTuple):
    """Names the checkpoint and the rank whose shards a file holds."""

    checkpoint: str = ""
    rank: int = 0
    world_size: int = 1


ALONE = Owner()


class StateBuffer:
    """Memory of the host for one copy of a state, kept from save to save, so that its pages are there already."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def release(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Callable[[], None]]:
        """Copies flat tensors, uint8. Those of a GPU are copied behind the work that it has been given.

        Returns:
            the copies, uint8 on the CPU; and a function that waits until they are made.
        """
        ends = [0]
        for each in tensors:
            ends.append(ends[-1] + each.nbytes)
        devices = {each.device for each in tensors if each.device.type == "cuda"}
        if len(self._memory) < ends[-1] or self._memory.is_pinned() < bool(devices):
            self.release()  # before there are two
            self._memory = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=bool(devices))
        copies = [self._memory[start:end] for start, end in pairwise(ends)]
        for copy, each in zip(copies, tensors, strict=True):
            copy.copy_(each, non_blocking=each.is_cuda)
        # `blocking`: the thread that waits sleeps.
        events = [torch.cuda.current_stream(each).record_event(torch.cuda.Event(blocking=True)) for each in devices]

        def wait() -> None:
            for event in events:
                event.synchronize()

        return copies, wait


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file, in memory."""

    _header: bytes
    _data: Sequence[Tensor]  # uint8, in the order of the file
    _wait: Callable[[], None]

    def pieces(self, beat: Callable[[], None] = lambda: None) -> Iterator[bytes | memoryview]:
        """Yields the content in pieces of at most 4 MiB, and calls `beat` before each."""
        self._wait()
        yield self._header
        for data in self._data:
            for piece in data.split(_PIECE):
                beat()
                yield memoryview(piece.cpu().numpy())


@dataclass(frozen=True)
class Snapshot:
    """A state as the files of a checkpoint.

    Attributes:
        tree_file: content of the JSON file.
        tensors: the tensors that all ranks have.
        shards: this rank's shards of DTensors; None if the state has none.
    """

    tree_file: bytes
    tensors: TensorFile
    shards: TensorFile | None


class HashedPieces:
    """Pieces of a file, made anew each time they are asked for, and hashed on their way.

    Attributes:
        sha256: the hash in hexadecimal; "" until all pieces were taken once.
    """

    def __init__(self, make: Callable[[], Iterable[bytes | memoryview]]) -> None:
        self._make = make
        self.sha256 = ""

    def __iter__(self) -> Iterator[bytes | memoryview]:
        if self.sha256:
            yield from self._make()
            return
        found = hashlib.sha256()
        for piece in self._make():
            found.update(piece)
            yield piece
        self.sha256 = found.hexdigest()


@torch.no_grad()
def take(state: Any, buffer: StateBuffer | None = None, owner: Owner = ALONE) -> Snapshot:
    """Takes a state for a checkpoint.

    buffer: holds the copy of the tensors, until its next use; None: the tensors of the state are read in place, so that
        they may not change before they are written.

    Raises:
        CheckpointError: a checkpoint cannot hold the state.
    """
    found: dict[str, Shard | None] = {}
    tree, tensors = codec.encode(state, in_place=True, shards=found)
    ordered = _aligned(tensors if owner.rank == 0 else {})  # the other ranks have the same
    shards = {name: each for name, each in found.items() if each is not None}
    parts = _aligned({name: each.data for name, each in shards.items()})
    flat = [_bytes_of(each) for each in (*ordered.values(), *parts.values())]
    data, wait = (flat, lambda: None) if buffer is None else buffer.take(flat)
    document = {"format": saved.FORMAT, "state": tree}
    if found:
        document |= {"format": saved.SHARDED_FORMAT, "world_size": owner.world_size}
    return Snapshot(
        json.dumps(document, allow_nan=False).encode(),
        TensorFile(_header(ordered), data[: len(ordered)], wait),
        TensorFile(_header(parts, metadata(shards, *owner)), data[len(ordered) :], wait) if found else None,
    )


def _aligned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors with larger elements first, so that each is aligned in its file."""
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))


def _bytes_of(tensor: Tensor) -> Tensor:
    flat = tensor.flatten()
    return (torch.view_as_real(flat).flatten() if flat.is_complex() else flat).view(torch.uint8)


def _header(tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> bytes:
    """Returns the head of a safetensors file: its length in 8 bytes, then JSON; the tensors' bytes follow in order.

    about: becomes the file's metadata.
    """
    entries = [] if about is None else [f'"__metadata__":{json.dumps(about)}']
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        place = f'"shape":{list(tensor.shape)},"data_offsets":[{begin},{end}]'
        entries.append(f'{json.dumps(name)}:{{"dtype":"{_NAMES[tensor.dtype]}",{place}}}')
    text = f"{{{','.join(entries)}}}".encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
