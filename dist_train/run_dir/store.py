"""Reads and writes whole objects in a folder of an object store, as fsspec knows stores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.callbacks import Callback
from fsspec.config import conf

from dist_train.addresses import problem_of
from dist_train.errors import DistTrainError, SetupError, StoreError, first_line

# A connection that was cut is noticed in a minute; botocore's own defaults take several.
_S3 = {"connect_timeout": 10, "read_timeout": 30, "retries": {"max_attempts": 2}}


class Store:
    """A folder at an object store. Names of objects are relative to it, with / between their parts.

    Every method raises StoreError where the store does not do what it is asked, whatever its library raises.
    """

    def __init__(self, address: str) -> None:
        """
        Raises:
            SetupError: the address is none, or its library is not installed.
        """
        if problem := problem_of(address):
            raise SetupError(*problem)
        self.address = address
        protocol = address.partition("://")[0]
        options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
        if protocol in ("s3", "s3a") and "config_kwargs" not in conf.get(protocol, {}):
            options["config_kwargs"] = _S3
        with self._asked("opened"):
            self._fs, self._root = fsspec.core.url_to_fs(address, **options)
        self._root = self._root.rstrip("/")
        if self._fs.async_impl:
            # asyncio would print a traceback for each request that a cut connection ends, besides the call's own error.
            self._fs.loop.set_exception_handler(lambda loop, context: None)

    def sizes(self) -> dict[str, int]:
        """Lists the objects: maps each name to its bytes. Leaves out names that would lead out of a folder."""
        with self._asked("listed"):
            try:
                found = self._fs.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
        prefix = self._root + "/"
        names = {path.removeprefix(prefix): int(entry["size"] or 0) for path, entry in found.items() if prefix in path}
        return {name: size for name, size in names.items() if _stays_inside(name)}

    def read(self, name: str) -> bytes | None:
        """Reads a small object; None where there is none."""
        with self._asked(f"asked for {name}"):
            try:
                return bytes(self._fs.cat_file(self._at(name)))
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Writes a small object, in the place of an older one."""
        with self._asked(f"given {name}"):
            self._fs.pipe_file(self._at(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Writes a small object only if there is none; returns whether it was written.

        The store decides between several that create at once, where it can (S3's If-None-Match); else the last one's
        bytes stay, and the others find them there.
        """
        with self._asked(f"given {name}"):
            try:
                if self._fs.exists(self._at(name)):
                    return False
                self._fs.pipe_file(self._at(name), data, mode="create")
            except FileExistsError:
                return False
            except Exception as error:
                if "NotImplemented" not in f"{type(error).__name__} {error}":  # S3's own code for it, and Python's
                    raise
                self._fs.pipe_file(self._at(name), data)
        return self.read(name) == data

    def upload(self, file: Path, name: str, beat: Callable[[], None] = lambda: None) -> None:
        """Writes a file's bytes to an object. `beat` is called while it goes on, and ends it by an error.

        Raises:
            FileNotFoundError: the file was removed.
        """
        file.stat()
        with self._asked(f"given {name}"):
            self._fs.put_file(str(file), self._at(name), callback=_Beating(beat))

    def download(self, name: str, file: Path, beat: Callable[[], None] = lambda: None) -> bool:
        """Writes an object's bytes to a new file; returns False where there is no such object."""
        with self._asked(f"asked for {name}"):
            try:
                self._fs.get_file(self._at(name), str(file), callback=_Beating(beat))
            except FileNotFoundError:
                return False
        return True

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            with self._asked(f"asked to remove {name}"), suppress(FileNotFoundError):
                self._fs.rm_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _asked(self, what: str) -> Iterator[None]:
        try:
            yield
        except DistTrainError:
            raise
        except Exception as error:  # of many kinds: of botocore, aiohttp, of each store's own library
            hint = "look at the network, the bucket and the credentials; then the same command goes on"
            said = first_line(error) or type(error).__name__
            raise StoreError(f"{self.address} could not be {what}: {said}", hint) from error


class _Beating(Callback):
    def __init__(self, beat: Callable[[], None]) -> None:
        super().__init__()
        self._beat = beat

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        self._beat()


def _stays_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return (
        bool(parts)
        and "\\" not in name
        and "\0" not in name
        and not {"..", "/"} & set(parts)
        and name == "/".join(parts)
    )
