"""Records the files of a dataset that is made of files, so that a resume finds a file whose content was changed.

Names and sizes are in the dataset's fingerprint. The record adds the time of each file's last change, and a hash of as
many files as are read in `SECONDS`: all of a small folder, some of a large one. Times alone prove nothing, as a copy of
the folder has other ones: they say which files to look at first.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from dist_train.data.content import OfFiles
from dist_train.errors import DistTrainError
from dist_train.run_dir.files import replace_bytes

SECONDS = 2.0
"""Time for reading the files of a split, at the start of a run and at each resume."""
_UNKNOWN = 0  # in place of a hash


@dataclass(frozen=True)
class Compared:
    """The difference between the files of a split and the record.

    Attributes:
        changed: ids of files with other content.
        compared: number of files whose content was compared.
        touched: number of files with another time.
        unknown: ids of files with another time whose content was not compared.
    """

    changed: list[int]
    compared: int
    touched: int
    unknown: list[int]


def write_record(path: Path, splits: Mapping[str, OfFiles]) -> None:
    """Writes times and hashes of the files of each split."""
    arrays: dict[str, np.ndarray] = {}
    for name, split in splits.items():
        hashes = np.full(len(split.file_times), _UNKNOWN, np.uint64)
        for index, found in _hashed(split, _drawn(len(hashes))):
            hashes[index] = found
        arrays |= {f"{name}.times": split.file_times, f"{name}.hashes": hashes}
    replace_bytes(path, safetensors.numpy.save(arrays))


def read_record(path: Path) -> dict[str, np.ndarray] | None:
    """Returns the arrays of a record; None where there is none, or it is damaged."""
    try:
        return dict(safetensors.numpy.load(path.read_bytes()))
    except (OSError, SafetensorError):
        return None


def compare(record: Mapping[str, np.ndarray], name: str, split: OfFiles) -> Compared | None:
    """Compares the files of a split with the record: first those with another time, then others; None without one."""
    times, hashes = (record.get(f"{name}.{part}") for part in ("times", "hashes"))
    if times is None or hashes is None or not len(times) == len(hashes) == len(split.file_times):
        return None
    touched = times != split.file_times
    order = _drawn(len(times))
    order = np.concatenate([order[touched[order]], order[~touched[order]]])
    found = dict(_hashed(split, order[hashes[order] != _UNKNOWN]))
    changed = sorted(index for index, its in found.items() if its != int(hashes[index]))
    unknown = [index for index in np.flatnonzero(touched).tolist() if index not in found]
    return Compared(changed, len(found), int(touched.sum()), unknown)


def _drawn(count: int) -> np.ndarray:
    """Returns all ids in an order without meaning, so that of a large folder all classes are read."""
    return np.random.default_rng(0).permutation(count)


def _hashed(split: OfFiles, ids: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yields id and hash of files, until the time is over; leaves out what cannot be read."""
    end = time.monotonic() + SECONDS
    for index in map(int, ids):
        try:
            content = split.file_content(index)
        except DistTrainError:
            continue
        yield index, int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") or 1
        if time.monotonic() > end:
            return
