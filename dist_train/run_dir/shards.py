"""Describes the shards of DTensors: what a rank writes of them, and which slices of written ones it needs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from dist_train.errors import CheckpointError
from dist_train.untrusted import parse_json

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

# The keys of torch.distributed.checkpoint, whose HuggingFaceStorageReader reads these files, too.
_VERSION, _SHARDING, _OFFSETS = "DCP_VERSION", "DCP_SHARDING_INFO", "saved_offsets"


@dataclass(frozen=True)
class Box:
    """A part of a tensor: where it begins in each dimension, and its sizes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def common(self, other: Box) -> Box | None:
        """Returns the part in both; None if there is none."""
        starts = tuple(map(max, self.offsets, other.offsets))
        ends = [min(a + b, c + d) for a, b, c, d in zip(*self, *other, strict=True)]
        sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return Box(starts, sizes) if all(size > 0 for size in sizes) else None

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Returns the slices of this part in a tensor that holds `outer`."""
        starts = [mine - its for mine, its in zip(self.offsets, outer.offsets, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.sizes, strict=True))

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return iter((self.offsets, self.sizes))


@dataclass(frozen=True)
class Shard:
    """A rank's part of a tensor, to be written.

    Attributes:
        data: its elements, contiguous.
        mesh: sizes of the device mesh.
        placements: for each of the mesh's dimensions the tensor's dimension that it shards; None where it replicates.
    """

    data: Tensor
    box: Box
    shape: tuple[int, ...]
    mesh: tuple[int, ...]
    placements: tuple[int | None, ...]


def in_shards(value: object) -> TypeGuard[DTensor]:
    """Tells whether a value is a tensor in shards."""
    # Importing it takes a third of the time of importing torch, and who has none need not.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def holds_shards(state: Any) -> bool:
    """Tells whether there is a DTensor in nested state."""
    if isinstance(state, Mapping):
        return any(holds_shards(each) for each in state.values())
    if isinstance(state, list | tuple):
        return any(holds_shards(each) for each in state)
    return in_shards(state)


def describe(tensor: DTensor, path: str) -> dict[str, Any]:
    """Returns what the tree holds of a DTensor beside its name.

    Raises:
        CheckpointError: its placements are not those of whole shards; names it.
    """
    placements = []
    for each in tensor.placements:
        # Subclasses interleave shards (_StridedShard), and a Partial is no value yet.
        kind = type(each).__name__
        if kind not in ("Shard", "Replicate"):
            raise CheckpointError(
                f"{path} is a DTensor with the placement {each}, which a checkpoint cannot hold",
                "shard it with Shard and Replicate, as fully_shard does",
            )
        placements.append(each.dim if kind == "Shard" else None)  # type: ignore[attr-defined]
    return {
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "mesh": list(tensor.device_mesh.shape),
        "placements": placements,
    }


def part_of(tensor: DTensor, path: str) -> Shard | None:
    """Returns what this rank writes of a DTensor; None for no elements, or where another rank writes the same."""
    entry = describe(tensor, path)
    place = tensor.device_mesh.get_coordinate()
    if place is None or any(at and dim is None for at, dim in zip(place, entry["placements"], strict=True)):
        return None
    data, box = tensor.to_local().detach(), box_of(tensor)
    if not box.numel:
        return None
    return Shard(data.contiguous(), box, tuple(tensor.shape), tuple(entry["mesh"]), tuple(entry["placements"]))


def box_of(tensor: DTensor) -> Box:
    """Returns the part of a DTensor that this rank holds."""
    (chunk,) = tensor.__create_chunk_list__()  # as torch.distributed.checkpoint asks for it
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def empty_on(mesh: DeviceMesh, entry: Mapping[str, Any]) -> DTensor:
    """Returns a DTensor without values for a description, sharded over `mesh` in the same dimensions.

    Raises:
        CheckpointError: the mesh has fewer dimensions than the tensor was sharded in.
    """
    from torch.distributed.tensor import Replicate, Shard, empty

    dims = [dim for dim in entry["placements"] if dim is not None]
    if len(dims) > mesh.ndim:
        raise CheckpointError(
            f"the state was sharded over {len(dims)} dimensions of a mesh, and this run has {mesh.ndim}",
            "resume with the strategy that wrote it",
        )
    placements = [*[Replicate()] * (mesh.ndim - len(dims)), *map(Shard, dims)]
    return empty(entry["shape"], dtype=dtype_of(entry), device_mesh=mesh, placements=placements)


def dtype_of(entry: Mapping[str, Any]) -> torch.dtype:
    """Returns the dtype of a description; raises ValueError where it names none."""
    found = getattr(torch, entry["dtype"], None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{entry['dtype']!r} is no dtype")
    return found


def metadata(shards: Mapping[str, Shard], checkpoint: str, rank: int, world_size: int) -> dict[str, str]:
    """Returns the metadata in the header of a rank's file: whose it is, and the place of each tensor's shard."""
    places = {
        name: {
            _OFFSETS: each.box.offsets,
            "shape": each.shape,
            "mesh": each.mesh,
            "placements": each.placements,
        }
        for name, each in shards.items()
    }
    label = {"checkpoint": checkpoint, "rank": str(rank), "world_size": str(world_size)}
    return {"format": "pt", _VERSION: "1.0", **label, _SHARDING: json.dumps(places, separators=(",", ":"))}


def boxes_in(found: Mapping[str, str], shapes: Mapping[str, list[int]]) -> dict[str, Box]:
    """Returns the place of each shard of a file, from its header.

    found: the header's metadata.
    shapes: name -> sizes of the shards in the file.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is no header of ours.
    """
    places = parse_json(found[_SHARDING])
    return {name: Box(tuple(map(int, places[name][_OFFSETS])), tuple(sizes)) for name, sizes in shapes.items()}
