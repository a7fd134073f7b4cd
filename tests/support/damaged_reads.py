"""Rank 1 reads other bytes of one file than the disk holds, as from a damaged cache: --import of this module.

DAMAGED_READS names the file by the end of its path.
"""

from __future__ import annotations

import os
from pathlib import Path

_read = Path.read_bytes


def _read_bytes(path: Path) -> bytes:
    data = _read(path)
    if str(path).endswith(os.environ["DAMAGED_READS"]):
        return data[:-1] + bytes([data[-1] ^ 1])
    return data


if os.environ.get("RANK") == "1":
    Path.read_bytes = _read_bytes  # type: ignore[method-assign]
