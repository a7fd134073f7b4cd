"""Reads images of a pack, memory-mapped: the processes of a node share its pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from dist_train.data.packs.index import FileTable, Index, Kind, pack_folder, pixels_file, read_index
from dist_train.errors import DataError, escaped

SHOWN = 3  # names in a message


class Pack:
    """The images of a folder's files, by the files' ids.

    Attributes:
        kind: how they were packed.
        folder: holds the pack's files.
    """

    def __init__(self, folder: Path, index: Index, kind: Kind) -> None:
        self.folder, self.kind = folder, kind
        self.bytes = index.end
        self._index = index
        # Mapped now: if the file is replaced, this one stays, also for the worker processes that are forked later.
        self._pixels = _map(folder, index)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pixels": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pixels = _map(self.folder, self._index)

    def image(self, index: int) -> Tensor | None:
        """Returns an image, uint8 [3, H, W]; None where the file could not be decoded when it was packed.

        A raw image is a view of the file: only the rows that are used are read. It is not to be written to.
        """
        start, length = int(self._index.offsets[index]), int(self._index.lengths[index])
        if not length:
            return None
        content = self._pixels[start : start + length]
        if self.kind.format == "jpeg":
            return decode_jpeg(content, mode=ImageReadMode.RGB)
        height, width = int(self._index.heights[index]), int(self._index.widths[index])
        return content.view(height, width, 3).permute(2, 0, 1)


def _map(folder: Path, index: Index) -> Tensor:
    if not index.end:
        return torch.empty(0, dtype=torch.uint8)  # no file could be decoded
    # Copy-on-write: torch has no read-only tensors, and a stray write must not reach the file.
    return torch.from_numpy(np.memmap(pixels_file(folder), np.uint8, "c"))


def open_pack(cache: Path, files: FileTable, kind: Kind) -> Pack | None:
    """Returns the pack of these files; None where there is none, or it was made of other files, sizes or times."""
    folder = pack_folder(cache, files.folder, kind)
    index = read_index(folder, files.folder)
    return Pack(folder, index, kind) if index is not None and index.files.same(files) else None


def require_pack(cache: Path, files: FileTable, kind: Kind) -> Pack:
    """Returns the pack of these files.

    Raises:
        DataError: there is none, or files were changed; the message names them.
    """
    pack = open_pack(cache, files, kind)
    if pack is not None:
        return pack
    hint = "dist-train pack CONFIG, with the settings of the run, packs what is not packed; or --data.args.pack off"
    folder = pack_folder(cache, files.folder, kind)
    index = read_index(folder, files.folder)
    if index is None:
        raise DataError(f"there is no pack ({kind}) of the images in {files.folder}: looked in {folder}", hint)
    raise DataError(f"the pack {folder} is not of the images in {files.folder}: {difference(index, files)}", hint)


def difference(index: Index, files: FileTable) -> str:
    """Says what differs between a pack's files and those that are there now."""
    then = {name: (entry.size, entry.time) for name, entry in index.entries()}
    now = {files.name(place): (int(files.sizes[place]), int(files.times[place])) for place in range(len(files))}
    parts = (
        ("changed since", [name for name, seen in now.items() if then.get(name, seen) != seen]),
        ("not packed", [name for name in now if name not in then]),
        ("gone", [name for name in then if name not in now]),
    )
    return "; ".join(f"{what}: {named(names)}" for what, names in parts if names) or "their order is another"


def named(names: list[str]) -> str:
    """Returns the first names, and how many more there are."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(escaped(name) for name in names[:SHOWN]) + more
