"""Writes packs: decodes, scales and appends images in chunks, each of which is whole or absent after a kill."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import BinaryIO

from torch import Tensor
from torchvision.io import encode_jpeg
from torchvision.transforms.v2 import functional

from dist_train.data.image_file import read_image
from dist_train.data.packs.index import (
    Entry,
    FileTable,
    Kind,
    index_file,
    pixels_file,
    read_index,
    write_index,
)
from dist_train.data.packs.read import named
from dist_train.errors import CorruptSampleError, DataError
from dist_train.run_dir.files import LineFile
from dist_train.run_dir.leftovers import remove_leftovers

CHUNK = 128
"""Images that are written at once."""
QUALITY = 95
"""Of JPEGs in a pack."""
_SAMPLE = 32  # images that are packed on trial, to learn how much room all need
_SPARE = 1.05  # room asked for, in units of the estimate


@dataclass(frozen=True)
class Job:
    """A pack to write.

    Attributes:
        files: the images, all of which the pack holds in the end.
        folder: of the pack.
        most_pixels: limit on an image's pixels; a larger one counts as one that cannot be decoded.
        threads: decoders side by side.
    """

    files: FileTable
    folder: Path
    kind: Kind
    most_pixels: int
    threads: int


@dataclass(frozen=True)
class Packed:
    """Result: images that were packed now, those changed since an earlier pack, and those that cannot be decoded.

    Attributes:
        stopped: True where it was asked to stop; what is packed stays, and the next call goes on.
    """

    now: int
    changed: list[str]
    undecodable: int
    bytes: int
    stopped: bool = False


def write_pack(
    job: Job, begin: Callable[[int, int], None], count: Callable[[int], None], stop: Callable[[], bool]
) -> Packed:
    """Packs the images that are not packed yet, and writes the index when all are.

    A process that packs the same images waits for another that does, and then has nothing to do.

    Args:
        begin: told the number of images, and how many of them are packed already.
        count: told the images of each chunk.
        stop: asked before each chunk whether to stop.

    Raises:
        DataError: an image cannot be read, or there is no room.
    """
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        with _locked(job.folder):
            remove_leftovers(job.folder)
            return _Writer(job).write(begin, count, stop)
    except OSError as error:
        raise DataError(
            f"images cannot be packed in {job.folder}: {error.strerror or error}",
            "--data.cache_dir FOLDER, one with room on each node; or --data.args.pack off. What is packed stays",
        ) from error


class _Writer:
    def __init__(self, job: Job) -> None:
        self._job = job
        old = read_index(job.folder, job.files.folder)
        known = dict(old.entries()) if old is not None else {}
        known |= dict(_chunks(_journal_file(job.folder), pixels_file(job.folder)))
        self._entries: dict[int, Entry] = {}
        self._changed: list[str] = []
        for place in range(len(job.files)):
            name = job.files.name(place)
            entry = known.get(name)
            if entry is None:
                continue
            if (entry.size, entry.time) == (int(job.files.sizes[place]), int(job.files.times[place])):
                self._entries[place] = entry
            else:
                self._changed.append(name)
        self._end = max((entry.offset + entry.length for entry in known.values()), default=0)
        self._complete = old is not None and old.files.same(job.files)
        if 2 * sum(entry.length for entry in self._entries.values()) < self._end:
            self._entries.clear()  # most of the file would be images that are gone
            self._end = 0

    def write(
        self, begin: Callable[[int, int], None], count: Callable[[int], None], stop: Callable[[], bool]
    ) -> Packed:
        job, missing = self._job, [place for place in range(len(self._job.files)) if place not in self._entries]
        begin(len(job.files), len(self._entries))
        if self._complete and not missing:
            return self._result(0)
        stopped = False
        if missing:
            self._require_room(missing)
        if not self._end:  # a reader of earlier images keeps the file that it has mapped
            for path in (index_file(job.folder), _journal_file(job.folder), pixels_file(job.folder)):
                path.unlink(missing_ok=True)
        with (
            pixels_file(job.folder).open("ab") as pixels,
            _journal(job.folder) as journal,
            ThreadPoolExecutor(job.threads) as threads,
            ThreadPoolExecutor(1) as disk,
        ):
            pixels.truncate(self._end)  # behind it: of a chunk that a kill left unfinished
            written: Future[None] | None = None  # while a chunk is written, the next one is decoded
            for places in _cut(missing, CHUNK):
                if stopped := stop():
                    break
                made = list(threads.map(self._made, places))
                if written is not None:
                    written.result()
                written = disk.submit(self._append, places, made, pixels, journal)
                count(len(places))
            if written is not None:
                written.result()
            if stopped:
                return self._result(len(missing), stopped=True)
        write_index(job.folder, job.files, [self._entries[place] for place in range(len(job.files))])
        _journal_file(job.folder).unlink()
        return self._result(len(missing))

    def _append(
        self, places: Sequence[int], made: list[tuple[memoryview, int, int]], pixels: BinaryIO, journal: LineFile
    ) -> None:
        """Appends a chunk: its pixels are on the disk before the journal names them."""
        lines = []
        for place, (content, height, width) in zip(places, made, strict=True):
            size, time = int(self._job.files.sizes[place]), int(self._job.files.times[place])
            self._entries[place] = entry = Entry(size, time, self._end, len(content), height, width)
            pixels.write(content)
            self._end += len(content)
            lines.append([self._job.files.name(place), *astuple(entry)])
        pixels.flush()
        os.fsync(pixels.fileno())
        journal.append({"files": lines})
        journal.sync()

    def _made(self, place: int) -> tuple[memoryview, int, int]:
        """Returns an image's bytes, height and width; no bytes where it cannot be decoded."""
        path = self._job.files.path(place)
        try:
            image = scaled(read_image(path, most_pixels=self._job.most_pixels), self._job.kind.size)
        except CorruptSampleError:
            return memoryview(b""), 0, 0
        self._require_unchanged(place, path)
        content = image.permute(1, 2, 0).contiguous() if self._job.kind.format == "raw" else _as_jpeg(image)
        return memoryview(content.numpy().data).cast("B"), image.shape[1], image.shape[2]

    def _require_unchanged(self, place: int, path: Path) -> None:
        """Raises DataError where a file was changed since it was listed: its image would stand for another one."""
        try:
            seen = path.stat()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}", "the same command goes on") from error
        if (seen.st_size, seen.st_mtime_ns) != (self._job.files.sizes[place], self._job.files.times[place]):
            raise DataError(f"{path} was changed while it was packed", "the same command packs it again")

    def _require_room(self, missing: Sequence[int]) -> None:
        tried = missing[:: max(1, len(missing) // _SAMPLE)][:_SAMPLE]
        mean = sum(len(self._made(place)[0]) for place in tried) / len(tried)
        need, free = int(mean * len(missing) * _SPARE), shutil.disk_usage(self._job.folder).free
        if need > free:
            smaller = "" if self._job.kind.format == "jpeg" else ", or --data.args.pack_format jpeg for smaller ones"
            raise DataError(
                f"packing {len(missing):,} images ({self._job.kind}) takes about {in_bytes(need)}, and "
                f"{in_bytes(free)} are free in {self._job.folder}",
                f"--data.cache_dir FOLDER, one with room{smaller}; or --data.args.pack off",
            )

    def _result(self, missing: int, stopped: bool = False) -> Packed:
        undecodable = sum(not entry.length for entry in self._entries.values())
        return Packed(missing, self._changed, undecodable, self._end, stopped)


def scaled(image: Tensor, size: int) -> Tensor:
    """Returns an image [C, H, W] with a shorter edge of `size`; a smaller one stays as it is."""
    return image if min(image.shape[1:]) <= size else functional.resize(image, [size], antialias=True)


def _as_jpeg(image: Tensor) -> Tensor:
    return encode_jpeg(image.contiguous(), quality=QUALITY)


def in_bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,} bytes"


def told(packed: Packed) -> list[str]:
    """Returns what a person is told of a pack besides its place."""
    lines = []
    if packed.changed:
        lines.append(f"packed again, as they were changed: {named(packed.changed)}")
    if packed.undecodable:
        lines.append(f"{packed.undecodable:,} files cannot be decoded: they are treated as without a pack")
    return lines


def _cut(places: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (places[start : start + size] for start in range(0, len(places), size))


def _journal_file(folder: Path) -> Path:
    return folder / "journal.jsonl"


@contextmanager
def _journal(folder: Path) -> Iterator[LineFile]:
    journal = LineFile(_journal_file(folder))  # cuts off a line that a kill tore
    try:
        yield journal
    finally:
        journal.close()


def _chunks(journal: Path, pixels: Path) -> Iterator[tuple[str, Entry]]:
    """Yields name and entry of the images of whole chunks; nothing where there is no journal."""
    if not (journal.exists() and pixels.exists()):
        return
    end = pixels.stat().st_size
    with journal.open("rb") as lines:
        for line in lines:
            try:
                found = [(name, Entry(*numbers)) for name, *numbers in json.loads(line)["files"]]
            except (ValueError, KeyError, TypeError):
                return  # a kill tore this line
            yield from ((name, entry) for name, entry in found if entry.offset + entry.length <= end)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time write; a process that ends, however, lets go."""
    with (folder / "lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
