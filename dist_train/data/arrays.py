"""Image datasets as memory-mapped arrays: written once per node, named by their content, shared by its processes."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_train.errors import DataError
from dist_train.run_dir.files import replace_file
from dist_train.run_dir.leftovers import remove_leftovers
from dist_train.trees import Tree

_PARTS = ("images", "targets", "ids")
_TARGETS = (torch.int64, torch.uint8, torch.float32)


@dataclass(frozen=True)
class Batch:
    """Rows of a dataset.

    Attributes:
        ids: int64 [B], as stored with the rows.
        inputs, targets: tree of tensors [B, ...].
        missing: indices, within the requested rows, of rows that could not be decoded and are left out.
    """

    ids: Tensor
    inputs: Tree
    targets: Tree
    missing: tuple[int, ...] = ()


class ImageArrays:
    """Images with their targets and ids, in memory or memory-mapped.

    Attributes:
        images: uint8 [N, C, H, W], contiguous; N >= 1.
        targets: numbers [N, ...], as the task takes them: integers [N] are classes, uint8 [N, H, W] masks. Other
            integers and bool become int64, floats float32.
        ids: int64 [N], 0..N-1 unless given. A row keeps its id, so a ledger shows which rows entered forward.

    Raises:
        DataError: wrong dtypes or shapes, or no rows.
    """

    def __init__(self, images: Tensor, targets: Tensor, ids: Tensor | None = None) -> None:
        ids = torch.arange(len(images)) if ids is None else ids
        if images.dtype != torch.uint8 or images.dim() != 4 or not images.numel():
            raise DataError(f"images must be uint8 [N, C, H, W] with N >= 1, not {images.dtype} {list(images.shape)}")
        if targets.is_floating_point():
            targets = targets.float()
        elif (targets.dtype != torch.uint8 or targets.dim() == 1) and not targets.is_complex():
            targets = targets.long()
        if targets.dtype not in _TARGETS or targets.shape[:1] != images.shape[:1] or not targets.numel():
            raise DataError(
                f"targets must be int64, uint8 or float32 [{len(images)}, ...], "
                f"not {targets.dtype} {list(targets.shape)}"
            )
        if ids.dtype != torch.int64 or ids.shape != images.shape[:1]:
            raise DataError(f"ids must be int64 [{len(images)}], not {ids.dtype} {list(ids.shape)}")
        self.images, self.targets, self.ids = images.contiguous(), targets.contiguous(), ids.contiguous()

    def __len__(self) -> int:
        return len(self.images)

    def gather(self, rows: npt.NDArray[np.int64] | Tensor) -> Batch:
        """Copies the rows at these indices: int64 [B], each in range(len(self)), else IndexError."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        try:
            ids, images, targets = (values.index_select(0, index) for values in (self.ids, self.images, self.targets))
        except IndexError:
            raise IndexError(f"rows must lie in range({len(self)}), got {index.min()}..{index.max()}") from None
        return Batch(ids, images, targets)

    def write(self, directory: Path) -> str:
        """Writes the arrays to a folder in `directory` and returns the folder's name, a hash of their content.

        Each file appears whole or not at all. Files that already hold these arrays stay, damaged ones are replaced.
        Several processes may write the same arrays at once.

        Raises:
            DataError: the files cannot be written.
        """
        parts = {part: getattr(self, part).numpy() for part in _PARTS}
        digest = hashlib.sha256()
        for part, array in parts.items():
            digest.update(f"{part} {array.dtype.str} {array.shape}\n".encode())
            digest.update(memoryview(array).cast("B"))
        name = digest.hexdigest()[:32]
        try:
            (directory / name).mkdir(parents=True, exist_ok=True)
            remove_leftovers(*directory.glob("*/"))  # as large as the dataset, each
            for part, array in parts.items():
                path = directory / name / f"{part}.npy"
                if not _holds(path, array):
                    with replace_file(path) as file:
                        np.save(file, array)
        except OSError as error:
            message = f"cannot write the arrays of a dataset to {directory}: {error}"
            raise DataError(message, "--data.cache_dir FOLDER, one with room on each node") from error
        return name

    @classmethod
    def open(cls, path: Path) -> "ImageArrays":
        """Memory-maps a folder that `write` made; the processes of a node share its pages.

        Raises:
            DataError: a file is missing or damaged.
        """
        try:
            # Copy-on-write: torch has no read-only tensors, and a stray write must not reach the file.
            arrays = {part: torch.from_numpy(np.load(path / f"{part}.npy", mmap_mode="c")) for part in _PARTS}
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"the stored dataset {path} is damaged: {error}", f"rm -r {path}") from error
        return cls(**arrays)


def _holds(path: Path, array: npt.NDArray[Any]) -> bool:
    """Tells whether the file holds this array. Compares the content: a name alone would trust a damaged disk."""
    try:
        stored = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return stored.dtype == array.dtype and np.array_equal(stored, array)
