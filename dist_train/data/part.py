"""Parts of a map-style dataset: rows of it, which keep their ids."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch.utils.data import Dataset

from dist_train.data.content import OfFiles
from dist_train.data.permutation import Int64Array


class Part(Dataset[Any]):
    """Rows of a map-style dataset. `Source` reads them from the dataset itself, so that they keep their ids there.

    Attributes:
        whole: the dataset.
        rows: int64 [N], ascending; item i is item rows[i] of the dataset.
    """

    def __init__(self, whole: Dataset[Any], rows: Int64Array) -> None:
        self.whole, self.rows = whole, rows
        stated = getattr(whole, "fingerprint", None)
        among = f"{len(cast(Any, whole))}" if stated is None else f"{stated}"
        # Which rows they are comes first: what a pack adds is told by the end of a fingerprint.
        self.fingerprint = f"rows-{hashlib.sha256(rows.tobytes()).hexdigest()[:16]}-of-{among}"
        # What the set-up asks a dataset for, beside its items.
        for name in ("input_shape", "own_steps", "collate", "longest"):
            if hasattr(whole, name):
                setattr(self, name, getattr(whole, name))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return cast(Any, self.whole)[int(self.rows[index])]


class PartOfFiles(Part):
    """A part of a dataset with a file for each item, see `OfFiles`."""

    def __init__(self, whole: OfFiles, rows: Int64Array) -> None:
        super().__init__(cast("Dataset[Any]", whole), rows)
        self._files = whole
        self.file_times: np.ndarray = whole.file_times[rows]

    def path(self, index: int) -> Path:
        return self._files.path(int(self.rows[index]))

    def file_content(self, index: int) -> bytes:
        return self._files.file_content(int(self.rows[index]))


def part_of(dataset: Dataset[Any], rows: Int64Array) -> Part:
    """Returns these rows of a dataset; of a part, in the ids of the whole."""
    if isinstance(dataset, Part):
        return part_of(dataset.whole, dataset.rows[rows])
    return PartOfFiles(dataset, rows) if isinstance(dataset, OfFiles) else Part(dataset, rows)
