"""Lists the image files of a folder, without hidden ones, and follows links once."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dist_train.data.image_file import is_image_name
from dist_train.errors import DataError


class FoundFile(NamedTuple):
    """An image file: its path under the folder, its size in bytes, and the time of its last change, ns."""

    path: str
    size: int
    changed: int


@dataclass
class Listing:
    """The files of a folder, at any depth.

    Attributes:
        files: the image files, sorted by path. A link that leads nowhere has 0 bytes and the time 0.
        dangling: links that lead nowhere.
        others: count of other files, by extension.
    """

    files: list[FoundFile] = field(default_factory=list)
    dangling: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


def list_images(folder: Path, root: Path) -> Listing:
    """Lists the image files of a folder that is `root` or lies in it.

    Follows a link to a folder, unless `leads_back` says that its files are found anyway. No folder is read twice.

    Raises:
        DataError: a folder or a file cannot be read.
    """
    found = Listing()
    seen: set[tuple[int, int]] = set()
    waiting = [str(folder)]
    while waiting:
        for entry in _entries(waiting.pop()):
            try:
                status = entry.stat()
            except OSError as error:
                if not entry.is_symlink():
                    raise _unreadable(entry.path, error) from error
                found.dangling.append(entry.path)
                found.files += (
                    [FoundFile(os.path.relpath(entry.path, folder), 0, 0)] if is_image_name(entry.name) else []
                )
                continue
            if stat.S_ISDIR(status.st_mode):
                place = (status.st_dev, status.st_ino)
                if place not in seen and not leads_back(Path(entry.path), root):
                    seen.add(place)
                    waiting.append(entry.path)
            elif is_image_name(entry.name) and stat.S_ISREG(status.st_mode):
                path = os.path.relpath(entry.path, folder)
                found.files.append(FoundFile(path, status.st_size, status.st_mtime_ns))
            else:
                found.others[Path(entry.name).suffix or "files without an extension"] += 1
    found.files.sort()
    return found


def leads_back(path: Path, root: Path) -> bool:
    """Returns true for a link to a folder above `root` or in it, apart from hidden folders, which are not searched."""
    if not path.is_symlink():
        return False
    target, top = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    if top.is_relative_to(target):
        return True
    return target.is_relative_to(top) and not any(part.startswith(".") for part in target.relative_to(top).parts)


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(folder, error) from error
    return (entry for entry in found if not entry.name.startswith("."))


def _unreadable(path: str, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {error.strerror}", "look at the file's permissions, or at the disk")
