"""Reads the files that wandb writes offline."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from wandb.proto import wandb_internal_pb2 as records


def files(folder: Path) -> list[Path]:
    """The .wandb files, one for each attempt."""
    return sorted(folder.glob("offline-run-*/*.wandb"))


def read(path: Path) -> Iterator[records.Record]:
    """The records of a .wandb file, without a last one that a kill cut off.

    The format is LevelDB's log: blocks of 32 KiB after a header of 7 bytes.
    """
    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # no room for a record's header: zeros to the block's end
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        position += 7 + length
        if position > len(data):
            return
        parts += data[position - length : position]
        if kind in (1, 4):  # a whole record, or the last part of one
            record = records.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def run_ids(folder: Path) -> list[str]:
    """The id of each attempt's run."""
    return [record.run.run_id for path in files(folder) for record in read(path) if record.HasField("run")]
