"""Writes files whole or not at all, and append-only files of JSON lines."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dist_train.errors import RunDirError


@contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file to be written whole or not at all: beside `path`, to the disk, renamed.

    An exception inside leaves the old file as it was, and nothing beside it.
    """
    # Two ranks may write one file (status.json, at a failure), on two nodes even with the same process id.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with _durable(temporary) as file:
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


def write_folder(path: Path, contents: Mapping[str, bytes]) -> None:
    """Writes a new folder of files to the disk; the caller renames it into place, then calls `sync_directory`."""
    path.mkdir()
    for name, data in contents.items():
        with _durable(path / name) as file:
            file.write(data)
    sync_directory(path)


@contextmanager
def _durable(path: Path) -> Iterator[BinaryIO]:
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
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunDirError(f"{path} is damaged: {error}", "restore it, or start anew with another --run.dir") from error


def sync_directory(path: Path) -> None:
    """Makes the renames in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LineFile:
    """An append-only file of JSON lines that survives kills.

    A line that a kill tore is cut off when the file is opened again.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._cut_torn_line()

    def _cut_torn_line(self) -> None:
        end = self._file.seek(0, os.SEEK_END)
        position = end
        while position > 0:
            start = max(0, position - 65536)
            self._file.seek(start)
            newline = self._file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position < end:
            self._file.truncate(position)
        self._file.seek(0, os.SEEK_END)

    def append(self, value: dict[str, Any]) -> None:
        self._file.write(json.dumps(value, separators=(",", ":")).encode() + b"\n")

    def flush(self) -> None:
        """Hands the lines to the system: they survive the process, not the machine."""
        self._file.flush()

    def sync(self) -> None:
        """Writes the lines to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()
