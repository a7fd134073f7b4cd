"""Reads the ranks' files of shards of a checkpoint: verifies them, and gives whole tensors or a rank's own shards."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_train.errors import CheckpointError
from dist_train.run_dir import saved
from dist_train.run_dir.files import pieces_of
from dist_train.run_dir.shards import Box, box_of, boxes_in, dtype_of, empty_on
from dist_train.untrusted import last_element

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_MOST_OPEN = 256  # files at once; a process may have 1,024


class ShardFiles:
    """The files of shards of one checkpoint; a context manager that closes them.

    A file is verified by its hash before a tensor is read from it. Only headers and the slices that are asked for are
    held in memory.

    Args:
        folder: the checkpoint, or its copy.
        name: the name that it was saved under.
        hashes: the SHA-256 of each file, from the manifest.
        mesh: the device mesh that the tensors are to be sharded over; None: they are to be whole, on the CPU.
    """

    def __init__(self, folder: Path, name: str, hashes: Mapping[str, str], mesh: DeviceMesh | None = None) -> None:
        self._folder, self._name, self._hashes, self._mesh = folder, name, hashes, mesh
        self._verified: set[str] = set()
        self._open: dict[str, Any] = {}
        self._places: dict[str, list[tuple[str, Box]]] | None = None

    def __enter__(self) -> ShardFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for opened in self._open.values():
            opened.__exit__(None, None, None)

    def verify(self, file: str) -> None:
        """Compares a file with its recorded hash, once.

        Raises:
            DamagedCheckpointError: it is missing, or is not what was written; says whose shards it holds instead.
            CheckpointError: the file system does not let us read.
        """
        if file in self._verified:
            return
        found = hashlib.sha256()
        with saved.reading(self._folder):
            for piece in pieces_of(self._folder / file):
                found.update(piece)
        if found.hexdigest() != self._hashes[file]:
            raise saved.changed(self._folder / file, self._stranger(file))
        self._verified.add(file)

    def join(self, entry: Mapping[str, Any]) -> Tensor:
        """Makes the tensor that the tree describes: whole, or a DTensor of which this rank's slices are read.

        Raises:
            ValueError, KeyError, TypeError: the files do not hold the tensor that the tree describes.
            CheckpointError: a file is damaged, or cannot be read.
        """
        name, shape = entry["$shards"], tuple(entry["shape"])
        reach = last_element(shape, entry["stride"])
        whole = Box((0,) * len(shape), shape)
        places = self._index().get(name, [])
        inside = all(len(box.sizes) == len(shape) and box.common(whole) == box for _, box in places)
        if not inside or sum(box.numel for _, box in places) != whole.numel or reach != whole.numel:
            raise ValueError(f"the shards of {name} do not make up a tensor of {list(shape)}")
        if self._mesh is None:
            tensor = target = torch.empty_strided(shape, entry["stride"], dtype=dtype_of(entry))
            wanted = whole
        else:
            tensor = empty_on(self._mesh, entry)
            target, wanted = tensor.to_local(), box_of(tensor)
        for file, box in places:
            if (common := box.common(wanted)) is not None:
                self.verify(file)
                part = self._slice(file, name, common.within(box))
                if part.dtype != target.dtype:
                    raise ValueError(f"{name} is {part.dtype} in {file}, not {target.dtype}")
                target[common.within(wanted)].copy_(part)
        return tensor

    def _slice(self, file: str, name: str, slices: tuple[slice, ...]) -> Tensor:
        opened = self._opened(file)
        # A tensor without dimensions has no slices.
        found: Tensor = opened.get_slice(name)[slices] if slices else opened.get_tensor(name)
        return found

    def _opened(self, file: str) -> Any:
        if file not in self._open:
            with saved.reading(self._folder):
                (self._folder / file).stat()  # safe_open's own error tells no errno
                opened = safe_open(self._folder / file, framework="pt")
            if len(self._open) == _MOST_OPEN:
                self._open.pop(next(iter(self._open))).__exit__(None, None, None)
            self._open[file] = opened
        return self._open[file]

    def _index(self) -> dict[str, list[tuple[str, Box]]]:
        """Returns the file and the place of each shard of each tensor, from the files' headers."""
        if self._places is None:
            self._places = {}
            for file in self._hashes:
                for name, box in self._boxes(file).items():
                    self._places.setdefault(name, []).append((file, box))
        return self._places

    def _boxes(self, file: str) -> dict[str, Box]:
        try:
            opened = self._opened(file)
            return boxes_in(opened.metadata(), {name: opened.get_slice(name).get_shape() for name in opened.keys()})  # noqa: SIM118
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            self.verify(file)
            raise CheckpointError(
                f"the checkpoint {self._folder} cannot be read: {file}: {error}",
                "use the version of dist_train that wrote it",
            ) from error

    def _stranger(self, file: str) -> str:
        """Says whose shards a file holds that is not the one that was written; "" where it cannot tell."""
        try:
            with safe_open(self._folder / file, framework="pt") as opened:
                found = opened.metadata()
            owner = saved.shard_file(int(found["rank"])), found["checkpoint"]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return ""
        if owner == (file, self._name):
            return ""
        return f"; it holds the shards of rank {found['rank']} of the checkpoint {found['checkpoint']}"


def verify_share(folder: Path, name: str, hashes: Mapping[str, str], share: tuple[int, int]) -> None:
    """Verifies each n-th file of shards from the k-th on, for a share of (k, n).

    Raises:
        CheckpointError: as `ShardFiles.verify`.
    """
    first, step = share
    with ShardFiles(folder, name, hashes) as files:
        for file in list(hashes)[first::step]:
            files.verify(file)
