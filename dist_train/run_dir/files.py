"""Writes files whole or not at all, and append-only files of JSON lines."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from dist_train.errors import RunDirError
from dist_train.run_dir.leftovers import beside
from dist_train.run_dir.retry import warn_once
from dist_train.untrusted import read_json_file

_LINES_BYTES = 65536  # of a file of lines that wait in memory, unless `flush` asks for them


@contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file to be written whole or not at all: beside `path`, to the disk, renamed.

    An exception inside leaves the old file as it was, and nothing beside it.
    """
    temporary = beside(path)
    try:
        with durable(temporary) as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def replace_bytes(path: Path, data: bytes) -> None:
    with replace_file(path) as file:
        file.write(data)


def replace_text(path: Path, text: str) -> None:
    replace_bytes(path, text.encode())


def replace_json(path: Path, value: Any, *, compact: bool = False) -> None:
    """Replaces a JSON file atomically: indented for people, or `compact`, on one line, for programs."""
    layout: dict[str, Any] = {"separators": (",", ":")} if compact else {"indent": 2}
    replace_text(path, json.dumps(value, allow_nan=False, **layout) + "\n")


def write_folder(path: Path, contents: Mapping[str, bytes | Iterable[bytes | memoryview]]) -> None:
    """Writes a new folder of files to the disk; the caller renames it into place, then calls `sync_directory`.

    contents: maps each file to its bytes, or to pieces of them, which are asked for while they are written, in order.
    """
    path.mkdir()
    for name, data in contents.items():
        with durable(path / name) as file:
            for piece in (data,) if isinstance(data, bytes) else data:
                file.write(piece)
    sync_directory(path)


def pieces_of(path: Path) -> Iterator[bytes]:
    """Yields the content of a file in pieces of at most 4 MiB."""
    with path.open("rb") as file:
        while piece := file.read(4 * 2**20):
            yield piece


@contextmanager
def durable(path: Path) -> Iterator[BinaryIO]:
    """Opens a new file, whose content is on the disk afterwards."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """Reads the JSON value in `path`; None where there is no such file.

    Raises:
        RunDirError: the file is not JSON. We replace such files whole, so something else damaged it.
    """
    try:
        return read_json_file(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunDirError(f"{path} is damaged: {error}", "restore it, or start anew with another --run.dir") from error


def last_line(path: Path) -> Any:
    """Reads the last whole JSON line of a file of lines; None where there is none, or it is damaged."""
    try:
        with path.open("rb") as file:
            end, size, tail = file.seek(0, os.SEEK_END), 4096, b""
            while tail.count(b"\n") < 2 and len(tail) < end:
                size *= 2
                file.seek(max(0, end - size))
                tail = file.read(min(size, end))
        whole = tail[: tail.rfind(b"\n") + 1].splitlines()
        return json.loads(whole[-1]) if whole else None
    except (OSError, ValueError):
        return None


def sync_directory(path: Path) -> None:
    """Makes the renames in a directory durable, where the file system can: 9p, CIFS and some of FUSE cannot."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
        warn_once(
            f"the file system of {path} cannot make renames durable (fsync of a folder): a crash of the machine may "
            "cost the newest checkpoint"
        )
    finally:
        os.close(descriptor)


class LineFile:
    """An append-only file of JSON lines that survives kills, and failures of the disk for a moment.

    A line that a kill tore is cut off when the file is opened again. Lines that could not be written are kept, and
    written before the next ones.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        self._pending = bytearray()
        self._cut_torn_line()

    def _cut_torn_line(self) -> None:
        end = self._file.seek(0, os.SEEK_END)
        position = end
        while position > 0:
            start = max(0, position - 65536)
            self._file.seek(start)
            newline = self._read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position < end:
            self._file.truncate(position)
        self._file.seek(0, os.SEEK_END)

    def append(self, value: dict[str, Any]) -> None:
        self._pending += json.dumps(value, separators=(",", ":")).encode() + b"\n"
        if len(self._pending) >= _LINES_BYTES:
            with suppress(OSError):  # `flush` or `sync` will tell
                self.flush()

    def flush(self) -> None:
        """Hands the lines to the system: they survive the process, not the machine."""
        while self._pending:
            del self._pending[: self._file.write(self._pending)]

    def sync(self) -> None:
        """Writes the lines to the disk."""
        self.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        try:
            self.sync()
        finally:
            self._file.close()

    def _read(self, size: int) -> bytes:
        """Reads `size` bytes, which are there."""
        data = b""
        while len(data) < size and (more := self._file.read(size - len(data))):
            data += more
        return data
