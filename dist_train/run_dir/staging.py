"""Hands the other ranks' files of a checkpoint to rank 0: written beside it by each rank, moved into it by rank 0."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dist_train.errors import CheckpointError
from dist_train.run_dir.files import durable, sync_directory
from dist_train.run_dir.leftovers import beside


@dataclass(frozen=True)
class Staged:
    """A rank's file, on the disk under hidden names.

    Attributes:
        file: its name in the checkpoint.
        sha256: its hash.
        at: maps the checkpoint, and its copy if there is one, to the hidden name of the file for it.
    """

    file: str
    sha256: str
    at: dict[str, str]


def stage(path: Path, file: str, places: Sequence[str], pieces: Iterable[bytes | memoryview]) -> dict[str, str]:
    """Writes a file of checkpoints in the folder `path` beside them, to the disk; once for each of `places`.

    Returns:
        the hidden names, as of `Staged.at`.

    Raises:
        CheckpointError: the file system does not let us write; nothing is left then.
    """
    written: dict[str, Path] = {}
    try:
        path.mkdir(parents=True, exist_ok=True)
        for place in places:
            written[place] = beside(path / f"{place}-{file}")
            with durable(written[place]) as opened:
                for piece in pieces:
                    opened.write(piece)
        sync_directory(path)
    except BaseException as error:
        for each in written.values():
            with suppress(OSError):  # another try needs the room
                each.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(path / places[-1], error) from error
        raise
    return {place: each.name for place, each in written.items()}


class Adoption:
    """Moves the other ranks' files into a checkpoint that is being written under a hidden name, and back if that fails.

    Attributes:
        temporary: the folder that is going to be `place`.
    """

    def __init__(self, path: Path, place: str) -> None:
        self.temporary = beside(path / place)
        self._path, self._place = path, place
        self._staged: Sequence[Staged] = ()

    def do(self, staged: Sequence[Staged]) -> None:
        self._staged = staged
        for each in staged:
            os.rename(self._path / each.at[self._place], self.temporary / each.file)
        if staged:
            sync_directory(self.temporary)

    def undo(self) -> None:
        """Moves the files back, for another try, and removes the folder."""
        for each in self._staged:
            for folder in (self.temporary, self._path / self._place):
                with suppress(FileNotFoundError):
                    os.rename(folder / each.file, self._path / each.at[self._place])
        shutil.rmtree(self.temporary, ignore_errors=True)  # another try needs the room


def cannot_write(checkpoint: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot write the checkpoint {checkpoint}: {error}",
        "make room or mend the file system, then the same command resumes",
    )
