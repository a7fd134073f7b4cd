"""Gives a run's folder at an object store one owner at a time, as `lease` does on a file system.

An owner holds the object `.owner-N.json` with the highest N, and writes it anew every few seconds. Taking over is
creating the next number, which a store lets one of several starts do.
"""

from __future__ import annotations

import json
import re
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from threading import Event, Thread
from typing import Any

from dist_train.errors import RunDirBusyError, StoreError
from dist_train.run_dir.lease import RankProcess
from dist_train.run_dir.store import Store
from dist_train.untrusted import parse_json

BEAT_SECONDS = 10.0
PATIENCE_SECONDS = 40.0
"""How long a start waits for an owner to end, and how long an owner that nobody sees may be silent."""
_POLL_SECONDS = 1.0
_NAME = re.compile(r"\.owner-(\d{1,9})\.json")
_HINT = "wait for its end, or start another run with --run.dir ADDRESS"


class StoreLease:
    """The claim to a folder at a store, renewed by a thread.

    Attributes:
        lost: True once another start has taken the folder over.
    """

    def __init__(self, store: Store, number: int, held: dict[str, Any]) -> None:
        self.lost = False
        self._store, self._number, self._held = store, number, held
        self._ended = Event()
        self._thread = Thread(target=self._renew, name="store-lease", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Raises RunDirBusyError where another start has taken the folder over: nothing may be written to it."""
        if self.lost:
            raise RunDirBusyError(f"{self._store.address} was taken over by another start", _HINT)

    def release(self) -> None:
        """Gives the folder back; only says so where the store does not answer."""
        self._ended.set()
        self._thread.join(5 * BEAT_SECONDS)
        if not self.lost:
            try:
                self._store.remove([_name(self._number)])
            except StoreError as error:
                print(f"dist-train: warning: {error.message}; the next start waits for that", file=sys.stderr)

    def _renew(self) -> None:
        beats = 0
        while not self._ended.wait(BEAT_SECONDS):
            beats += 1
            try:
                if max(_numbers(self._store), default=0) > self._number:
                    self.lost = True
                    return
                self._store.write(_name(self._number), _content({**self._held, "beat": beats}))
            except StoreError:
                continue  # an upload tells


def acquire(store: Store, process: RankProcess, say: Callable[[str], None]) -> StoreLease:
    """Makes this process the owner of a folder at a store. Waits for an owner that is ending.

    Args:
        say: tells the user that and why this start waits.

    Raises:
        RunDirBusyError: another run uses the folder, or has just taken it.
        StoreError: the store cannot be read or written to.
    """
    number = wait_until_free(store, say) + 1
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    held = {"since": since, "nonce": uuid.uuid4().hex, "process": asdict(process), "beat": 0}
    if not store.create(_name(number), _content(held)):
        raise RunDirBusyError(f"{store.address} was taken by another start in this moment", _HINT)
    store.remove(_name(each) for each in _numbers(store) if each < number)
    return StoreLease(store, number, held)


def wait_until_free(store: Store, say: Callable[[str], None]) -> int:
    """Waits until no run owns the folder; returns the number of the last owner, 0 without one.

    Raises:
        RunDirBusyError: one still does after PATIENCE_SECONDS.
    """
    began = time.monotonic()
    first: bytes | None = None
    while True:
        number = max(_numbers(store), default=0)
        content = store.read(_name(number)) if number else None
        if content is None:
            if number:
                continue  # given back in this moment
            return 0
        process = _process(content)
        if process is not None and process.alive is False:
            return number
        if first is None:
            first = content
            say(f"{_in_use(store, process)}; waiting up to {PATIENCE_SECONDS:g} s for its end")
        if time.monotonic() - began > PATIENCE_SECONDS:
            if content == first and (process is None or process.alive is None):
                return number  # it is on another machine, and silent
            raise RunDirBusyError(_in_use(store, process), _HINT)
        time.sleep(_POLL_SECONDS)


def _in_use(store: Store, process: RankProcess | None) -> str:
    by = "" if process is None else f" (process {process.pid} on {process.host})"
    return f"{store.address} is used by another start{by}"


def _process(content: bytes) -> RankProcess | None:
    try:
        return RankProcess(**parse_json(content)["process"])
    except (ValueError, KeyError, TypeError):
        return None


def _numbers(store: Store) -> list[int]:
    return [int(match[1]) for match in map(_NAME.fullmatch, store.sizes()) if match]


def _name(number: int) -> str:
    return f".owner-{number}.json"


def _content(held: dict[str, Any]) -> bytes:
    return json.dumps(held).encode() + b"\n"
