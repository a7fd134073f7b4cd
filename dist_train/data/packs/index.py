"""Keeps the index of a pack: the files that it was made of, and the place of each image in it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from dist_train.run_dir.files import replace_bytes

VERSION = 1
"""Version of the files, and of the way in which an image is made; a pack of another version is not used."""
_FILE, _PLACE = ("sizes", "times"), ("offsets", "lengths", "heights", "widths")


@dataclass(frozen=True)
class Kind:
    """A kind of pack: the shorter edge of its images in pixels, at most, and the format of their bytes."""

    size: int
    format: Literal["raw", "jpeg"]

    def __str__(self) -> str:
        return f"{self.size} pixels, {self.format}"

    @property
    def code(self) -> str:
        """Text that tells the pixels of two kinds apart; part of a dataset's fingerprint."""
        return f"pack{VERSION}.{self.size}.{self.format}"


def packed_as(fingerprint: str) -> str:
    """Says how the images of a fingerprint are read: "images packed as pack1.256.raw", or "images that are files"."""
    codes = sorted({part.rpartition("+")[2] for part in fingerprint.split() if "+pack" in part})
    return f"images packed as {', '.join(codes)}" if codes else "images that are files"


@dataclass(frozen=True)
class FileTable:
    """Image files under a folder, in the order of their ids. There may be millions, so that they are arrays.

    Attributes:
        names: uint8, the paths' bytes, one behind the other.
        ends: int64 [N], the end of each path in `names`.
        sizes: int64 [N], bytes.
        times: int64 [N], time of the last change, ns.
    """

    folder: Path
    names: np.ndarray
    ends: np.ndarray
    sizes: np.ndarray
    times: np.ndarray

    @classmethod
    def of(cls, folder: Path, names: Sequence[str], sizes: Sequence[int], times: Sequence[int]) -> FileTable:
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        joined = np.frombuffer(b"".join(encoded), np.uint8)
        return cls(folder, joined, ends, np.array(sizes, np.int64), np.array(times, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.names[start : self.ends[index]].tobytes())

    def path(self, index: int) -> Path:
        return self.folder / self.name(index)

    def same(self, other: FileTable) -> bool:
        """Tells whether both have the same names, sizes and times in the same order."""
        return all(np.array_equal(getattr(self, part), getattr(other, part)) for part in ("names", "ends", *_FILE))


@dataclass(frozen=True)
class Index:
    """A pack's files, with the place of each image.

    Attributes:
        offsets, lengths: int64 [N], bytes in the pack; length 0: the file could not be decoded when it was packed.
        heights, widths: int64 [N], pixels.
    """

    files: FileTable
    offsets: np.ndarray
    lengths: np.ndarray
    heights: np.ndarray
    widths: np.ndarray

    @cached_property
    def end(self) -> int:
        """Bytes that the file of pixels has at least."""
        return int((self.offsets + self.lengths).max(initial=0))

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """Yields each name with its entry."""
        columns = [getattr(self.files, part) for part in _FILE] + [getattr(self, part) for part in _PLACE]
        for index, row in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
            yield self.files.name(index), Entry(*row)


@dataclass(frozen=True)
class Entry:
    """A file's size and time when it was packed, and the place of its image."""

    size: int
    time: int
    offset: int
    length: int
    height: int
    width: int


def pack_folder(cache: Path, files: Path, kind: Kind) -> Path:
    """Returns the folder of the pack of a folder of files: one for each place and kind, whatever the files are."""
    place = os.path.realpath(files)
    digest = hashlib.sha256(os.fsencode(f"{place}\n{kind.code}")).hexdigest()[:16]
    return cache / "packs" / f"{kind.code}-{digest}"


def pixels_file(folder: Path) -> Path:
    return folder / "pixels.bin"


def index_file(folder: Path) -> Path:
    return folder / "index.safetensors"


def read_index(folder: Path, files: Path) -> Index | None:
    """Returns the index of a whole pack; None where there is none, or one of its files is damaged."""
    try:
        stored = safetensors.numpy.load(index_file(folder).read_bytes())
        table = FileTable(files, *(stored[part] for part in ("names", "ends", *_FILE)))
        index = Index(table, *(stored[part] for part in _PLACE))
        columns = [getattr(table, part) for part in ("ends", *_FILE)] + [getattr(index, part) for part in _PLACE]
        if len({column.shape for column in columns}) > 1:
            return None
        whole = pixels_file(folder).stat().st_size >= index.end
    except (OSError, SafetensorError, KeyError):
        return None
    return index if whole else None


def write_index(folder: Path, files: FileTable, entries: Sequence[Entry]) -> None:
    """Writes the index of all files, whole or not at all: from then on the pack is there."""
    places = {f"{part}s": [getattr(entry, part) for entry in entries] for part in ("offset", "length", "height")}
    places["widths"] = [entry.width for entry in entries]
    stored = {part: np.array(values, np.int64) for part, values in places.items()}
    stored |= {part: getattr(files, part) for part in ("names", "ends", *_FILE)}
    replace_bytes(index_file(folder), safetensors.numpy.save(stored))
