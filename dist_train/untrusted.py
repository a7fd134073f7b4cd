"""Reads files that others may have written: sizes are looked at before anything is parsed or memory is asked for."""

from __future__ import annotations

import itertools
import json
import os
import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

MOST_JSON_BYTES = 16 * 2**20
MOST_VALUES = 1_000_000  # in a JSON text: about 250 MB, were each a dict
MOST_LEVELS = 100


class BeyondLimits(ValueError):
    """A file or text is larger or deeper than anything that we write."""


def read_at_most(path: str | os.PathLike[str], most: int) -> bytes:
    """Returns a file's bytes, of which there are at most `most`; reads no more than that of an endless one.

    Raises:
        OSError: it cannot be read.
        BeyondLimits: it is longer.
    """
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise BeyondLimits(f"it has more than {in_units(most)}")
    return data


def read_whole(path: Path, size: int) -> bytes:
    """Returns the bytes of a regular file that must have `size` of them.

    Raises:
        OSError: it cannot be read.
        BeyondLimits: it is no file, or has another size: nothing was read then.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for its writer
        raise BeyondLimits("it is not a file")
    if found.st_size != size:
        raise BeyondLimits(f"it has {found.st_size} bytes, not {size}")
    with path.open("rb") as file:
        return file.read(size)


def parse_json(text: bytes | str, most_values: int = MOST_VALUES, most_bytes: int = MOST_JSON_BYTES) -> Any:
    """Parses JSON whose size, number of values and depth have limits.

    Raises:
        ValueError: it is not JSON, or not UTF-8.
        BeyondLimits: it is beyond the limits. Commas and brackets within texts count as values, too.
    """
    inner = refuse_long(text.encode(errors="surrogatepass") if isinstance(text, str) else text, most_values, most_bytes)
    try:
        value = json.loads(text if isinstance(text, str) else text.decode())
    except RecursionError:
        raise BeyondLimits(f"it is nested in more than {MOST_LEVELS} levels") from None
    if inner > MOST_LEVELS:
        refuse_deep(value)
    return value


def refuse_long(text: bytes, most_values: int = MOST_VALUES, most_bytes: int = MOST_JSON_BYTES) -> int:
    """Returns the number of lists and dicts in a JSON text, at most; raises BeyondLimits for one that is not read."""
    if len(text) > most_bytes:
        raise BeyondLimits(f"it has more than {in_units(most_bytes)}")
    inner = text.count(b"[") + text.count(b"{")
    if inner + text.count(b",") > most_values:
        raise BeyondLimits(f"it has more than {most_values:,} values")
    return inner


def refuse_deep(value: Any) -> None:
    """Raises BeyondLimits for lists and dicts in more than MOST_LEVELS levels; a text that has them is not read."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MOST_LEVELS + 1):  # after the last level there is none
        if not level:
            return
        inside = ([*each.values()] if isinstance(each, dict) else each for each in level)
        level = [each for each in itertools.chain.from_iterable(inside) if isinstance(each, dict | list)]
    raise BeyondLimits(f"it is nested in more than {MOST_LEVELS} levels")


def read_json_file(path: Path) -> Any:
    """Returns the JSON value in a file.

    Raises:
        OSError: it cannot be read.
        ValueError: as `parse_json`.
    """
    return parse_json(read_at_most(path, MOST_JSON_BYTES))


def refuse_inflated(archive: zipfile.ZipFile, file: str | os.PathLike[str] | IO[bytes]) -> None:
    """Refuses an archive whose files are larger than itself. torch compresses nothing, so its own never are.

    Raises:
        BeyondLimits: its directory says so, or one of its files is compressed.
    """
    if isinstance(file, str | os.PathLike):
        size = os.path.getsize(file)
    else:
        size = file.seek(0, os.SEEK_END)
    entries = archive.infolist()
    total = sum(entry.file_size for entry in entries)
    if total > size:
        raise BeyondLimits(f"its files would have {in_units(total)}, and the archive has {in_units(size)}")
    packed = next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise BeyondLimits(f"{packed.filename!r} in it is compressed, which torch never does")


def last_element(shape: Sequence[Any], stride: Sequence[Any], offset: Any = 0) -> int:
    """Returns the number of elements of memory that a tensor of these sizes and strides reaches into; 0 for none.

    Raises:
        BeyondLimits: these are no sizes and strides of a tensor, or their product is beyond 64 bits.
    """
    numbers = [*shape, *stride, offset]
    if len(shape) != len(stride) or any(type(each) is not int or not 0 <= each < 2**63 for each in numbers):
        raise BeyondLimits("these are no sizes and strides of a tensor")
    elements = 1
    for size in shape:
        elements *= max(size, 1)
        if elements >= 2**63:
            raise BeyondLimits("a tensor has more elements than 64 bits can count")
    if 0 in shape:
        return 0
    return int(offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1)


def in_units(size: int) -> str:
    """Returns "5 bytes", "16 MiB", "6.0 GiB"."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f}".removesuffix(".0") + f" {name}"
    return f"{size} bytes"
