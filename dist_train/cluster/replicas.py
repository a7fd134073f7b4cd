"""Replicas of a run under `strategy: ft`: which one this process is, by the variables of torchft's launcher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

LIGHTHOUSE = "TORCHFT_LIGHTHOUSE"
NUMBER = "REPLICA_GROUP_ID"
TIMEOUT = "TORCHFT_TIMEOUT_SEC"
# torchft reads each of them by int().
NUMBERS = (TIMEOUT, "TORCHFT_QUORUM_TIMEOUT_SEC", "TORCHFT_CONNECT_TIMEOUT_SEC", "TORCHFT_QUORUM_RETRIES")


def replica_number(environ: Mapping[str, str]) -> int | None:
    """Returns this replica's number, 0 or more; None where the variable is missing or holds no number."""
    given = environ.get(NUMBER, "")
    return int(given) if given.isascii() and given.isdecimal() else None


def replica_folder(base: Path, number: int) -> Path:
    """Returns the run directory of a replica: base/replica-N, or `base` itself where that is its name already."""
    name = f"replica-{number}"
    return base if base.name == name else base / name
