"""Reads and writes whole objects in a folder of an object store, as fsspec knows stores."""

from __future__ import annotations

import asyncio
import errno
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import wait
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
_S3_TRIES = 2  # s3fs's own, each of as many of botocore's
_OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_LOOK_SECONDS = 0.2
_SILENT_SECONDS = 60.0
_UNDER_WAY, _SLOWEST = 500e6, 250e3  # bytes of ten parts, which s3fs sends at once; bytes a second


class Store:
    """A folder at an object store. Names of objects are relative to it, with / between their parts.

    Every method raises StoreError where the store does not do what it is asked, whatever its library raises. One that
    takes the request and never answers is given up, too.

    Attributes:
        ends: time.monotonic() at which every call fails, begun or not.
        interrupted: asked while a call waits, which then fails where it is true.
    """

    def __init__(self, address: str) -> None:
        """
        Raises:
            SetupError: the address is none, or its library is not installed.
        """
        if problem := problem_of(address):
            raise SetupError(*problem)
        self.address = address
        self.ends = math.inf
        self.interrupted: Callable[[], bool] = lambda: False
        protocol = address.partition("://")[0]
        options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
        if protocol in ("s3", "s3a") and "config_kwargs" not in conf.get(protocol, {}):
            options["config_kwargs"] = _S3
        with self._asked("opened"):
            self._fs, self._root = fsspec.core.url_to_fs(address, **options)
        self._root = self._root.rstrip("/")
        if protocol in ("s3", "s3a"):
            self._fs.retries = _S3_TRIES
        if self._fs.async_impl:
            # asyncio would print a traceback for each request that a cut connection ends, besides the call's own error.
            self._fs.loop.set_exception_handler(lambda loop, context: None)

    def sizes(self) -> dict[str, int]:
        """Lists the objects: maps each name to its bytes. Leaves out names that would lead out of a folder."""
        with self._asked("listed"):
            try:
                found = self._call("find", self._root, detail=True)
            except FileNotFoundError:
                return {}
        prefix = self._root + "/"
        names = {path.removeprefix(prefix): int(entry["size"] or 0) for path, entry in found.items() if prefix in path}
        return {name: size for name, size in names.items() if _stays_inside(name)}

    def read(self, name: str) -> bytes | None:
        """Reads a small object; None where there is none."""
        with self._asked(f"asked for {name}"):
            try:
                return bytes(self._call("cat_file", self._at(name)))
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Writes a small object, in the place of an older one."""
        with self._asked(f"given {name}"):
            self._call("pipe_file", self._at(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Writes a small object only if there is none; returns whether it was written.

        The store decides between several that create at once, where it can (S3's If-None-Match); else the last one's
        bytes stay, and the others find them there.
        """
        with self._asked(f"given {name}"):
            try:
                if self._call("exists", self._at(name)):
                    return False
                self._call("pipe_file", self._at(name), data, mode="create")
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
        size = file.stat().st_size
        with self._asked(f"given {name}"):
            # Told of only at the end of a part, of which several are under way.
            slow = min(size, _UNDER_WAY) / _SLOWEST
            self._call("put_file", str(file), self._at(name), callback=_Beating(beat), slow=slow)

    def download(self, name: str, file: Path, beat: Callable[[], None] = lambda: None) -> bool:
        """Writes an object's bytes to a new file; returns False where there is no such object.

        Raises:
            OSError: this machine's disk is full or read-only.
        """
        with self._asked(f"asked for {name}"):
            try:
                slow = _UNDER_WAY / _SLOWEST
                self._call("get_file", self._at(name), str(file), callback=_Beating(beat), slow=slow)
            except FileNotFoundError:
                return False
        return True

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            with self._asked(f"asked to remove {name}"), suppress(FileNotFoundError):
                self._call("rm_file", self._at(name))

    def _call(self, verb: str, *args: Any, slow: float = 0.0, **options: Any) -> Any:
        """Calls a method of the library, and gives it up without progress in _SILENT_SECONDS, and in `slow` more."""
        work = getattr(self._fs, f"_{verb}", None) if self._fs.async_impl else None
        if work is None:
            return getattr(self._fs, verb)(*args, **options)
        progress = options.get("callback")
        seen, moved = 0, time.monotonic()
        future = asyncio.run_coroutine_threadsafe(work(*args, **options), self._fs.loop)
        try:
            while not wait([future], _LOOK_SECONDS).done:
                now = time.monotonic()
                if progress is not None and progress.value != seen:
                    seen, moved = progress.value, now
                if self.interrupted():
                    raise TimeoutError("it is left for the end of the run")
                if now > self.ends or now - moved > _SILENT_SECONDS + slow:
                    raise TimeoutError(f"no answer in {now - moved:.0f} s")
            return future.result()
        except BaseException:
            future.cancel()  # closes its connection: nothing of it arrives later
            raise

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _asked(self, what: str) -> Iterator[None]:
        try:
            yield
        except DistTrainError:
            raise
        except Exception as error:  # of many kinds: of botocore, aiohttp, of each store's own library
            if isinstance(error, OSError) and error.errno in _OF_A_DISK:
                raise  # of this machine
            raise self._told(what, error) from error

    def _told(self, what: str, error: Exception) -> StoreError:
        hint = "look at the network, the bucket and the credentials; then the same command goes on"
        said = first_line(error) or type(error).__name__
        return StoreError(f"{self.address} could not be {what}: {said}", hint)


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
