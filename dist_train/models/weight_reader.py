"""Reads files of torch.save and safetensors that other programs wrote, without running code from them."""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dist_train.errors import DataError, first_line
from dist_train.models.weight_formats import AGAIN, SAVE, is_safetensors, refuse_other_formats
from dist_train.untrusted import BeyondLimits, in_units, parse_json, refuse_inflated

_MOST_PICKLED = 16 * 2**20  # bytes; a tensor has about 150
# Damaged pickles raise these, too.
_UNREADABLE = (
    OSError,
    RuntimeError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    struct.error,
)


class Unknown:
    """Stands for an object of a class that is not torch's, such as argparse.Namespace: nothing of it is kept or run.

    Attributes:
        kind: the name of the class.
        filled: the type that is filled in its place, where the class is a kind of dict or list: torch's reader fills
            these alone.
    """

    kind = ""
    filled: type | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls) if cls.filled is None else cls.filled()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        return

    def __setstate__(self, state: Any) -> None:
        return

    def __setitem__(self, key: Any, value: Any) -> None:
        return

    def append(self, value: Any) -> None:
        return

    def extend(self, values: Any) -> None:
        return


def load_content(path: Path) -> Any:
    """Returns what a file holds: tensors, plain values, and an `Unknown` for each object of another class.

    Raises:
        DataError: it cannot be read, is damaged or of another format, or would run code.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise DataError(f"cannot read weights from {path}: {error.strerror or error}", "check the path") from error
    refuse_other_formats(path, head)
    try:
        if is_safetensors(head):
            return _load_safetensors(path, head, size)
        return _load_pickled(path)
    except _UNREADABLE as error:
        raise DataError(
            f"cannot read weights from {path}: {_reason(error)}", f"{AGAIN}, or save a state_dict alone: {SAVE}"
        ) from error


def _reason(error: Exception) -> str:
    """Returns what is wrong with a file, without torch's advice to trust it."""
    text = str(error)
    if isinstance(error, BeyondLimits):
        return text
    if "Invalid magic number" in text:
        return "it is a pickle of another program"
    if "unrecognized function" in text or "is blocked" in text:
        return "reading it would run code of its own"
    return first_line(text.rpartition("WeightsUnpickler error:")[2] or type(error).__name__)


def _load_safetensors(path: Path, head: bytes, size: int) -> dict[str, Tensor]:
    length = int.from_bytes(head[:8], "little")
    with path.open("rb") as file:
        file.seek(8)
        header = file.read(length)
    if len(header) == length:
        tensors = [value for name, value in parse_json(header).items() if name != "__metadata__"]
        expected = 8 + length + max((value["data_offsets"][1] for value in tensors), default=0)
    else:
        expected = 8 + length
    if size < expected:
        raise DataError(f"{path} is truncated: it has {size} bytes, and its header says {expected}", AGAIN)
    return load_file(path)


def _load_pickled(path: Path) -> Any:
    """Reads a file of torch.save by torch's reader of plain data; other classes than its own are replaced by stubs.

    torch lists the classes in a zip archive; in files of torch before 1.6 it refuses one after the other.
    """
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            refuse_inflated(archive, path)
            _refuse_long_pickle(path, archive)
            damaged = archive.testzip()
        if damaged is not None:
            raise DataError(f"{path} is damaged: the checksum of {damaged} in it is another", AGAIN)
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
    filled: dict[int, type] = {}
    while True:
        stubs: list[Any] = [
            (type(f"Unknown{number}", (Unknown,), {"kind": name, "filled": filled.get(number)}), name)
            for number, name in enumerate(unknown)
        ]
        try:
            # As an open file, because torch decides by a path's suffix.
            with torch.serialization.safe_globals(stubs), path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            kept = re.search(r"Can only (SETITEM|append)[^<]*<class '[\w.]*Unknown(\d+)'>", str(error))
            if kept is not None and int(kept[2]) not in filled:
                filled[int(kept[2])] = OrderedDict if kept[1] == "SETITEM" else list
                continue
            refused = re.search(r"Unsupported global: GLOBAL (\S+) was not", str(error))
            # torch leaves out the module of what is built in.
            name = None if refused is None else refused[1] if "." in refused[1] else f"builtins.{refused[1]}"
            if name is None or name in unknown:
                raise
            unknown.append(name)


def _refuse_long_pickle(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuses a pickle that is no list of tensors, as torch reads it in Python objects, many times its size."""
    longest = max((entry.file_size for entry in archive.infolist() if entry.filename.endswith(".pkl")), default=0)
    if longest > _MOST_PICKLED:
        raise DataError(
            f"{path} holds {in_units(longest)} besides tensors, where {in_units(_MOST_PICKLED)} are the most",
            f"save a state_dict alone: {SAVE}",
        )
