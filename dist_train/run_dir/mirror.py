"""Keeps a run's folder at an object store equal to its working copy, the run directory on this machine.

What is at the store is a run that can be resumed, whenever one looks: of a checkpoint the manifest is put after all
else, then `latest.json`, then the figures. A mark in both places names the last push that was ended, and so tells a
working copy that goes on from the store from one that another machine has left behind.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

from dist_train.errors import RunDirError, StoreError
from dist_train.run_dir import saved
from dist_train.run_dir.files import replace_json, sync_directory
from dist_train.run_dir.leftovers import beside, remove_leftovers
from dist_train.run_dir.paths import BEFORE_A_RUN
from dist_train.run_dir.store import Store
from dist_train.untrusted import parse_json, read_json_file

MARK = ".pushed.json"
STATUS = "status.json"
_TRIES = 5  # at reading a folder that changes meanwhile
Beat = Callable[[], None]


@dataclass
class _Mark:
    """Knowledge of a working copy about the store.

    Attributes:
        at: the last push that was ended, or taken from the store; None: none.
        next: the push that was begun after it.
        files: maps each file that is at the store to its bytes, its time of change in nanoseconds, and its inode: a
            file that is replaced within the clock's tick has another one.
    """

    at: str | None = None
    next: str | None = None
    files: dict[str, list[int]] = field(default_factory=dict)

    def leads_on_from(self, at: str | None, filled: bool) -> bool:
        """Tells whether the working copy has all that is at the store, whose last ended push is `at`.

        filled: True if there are objects: without a mark, of a first push that somebody began.
        """
        if at is None:
            return self.at is None and (self.next is not None or not filled)
        return at in (self.at, self.next)


class Mirror:
    """A working copy and its store. One process at a time pulls and pushes, which is up to `store_lease`."""

    def __init__(self, store: Store, local: Path, say: Callable[[str], None]) -> None:
        self._store, self._local, self._say = store, local, say
        self._there: dict[str, int] | None = None  # objects at the store, as this process knows them

    def pull(self) -> None:
        """Makes the working copy what is at the store, unless it goes on from there already.

        A working copy that does not, and holds what was never pushed, is kept under another name.

        Raises:
            StoreError: the store does not answer.
            RunDirError: what is there is no run.
            OSError: the working copy cannot be written.
        """
        remove_leftovers(self._local.parent)
        there = self._store.sizes()
        self._refuse_foreign(there)
        at, known = self._pushed(), self._read_mark()
        if known is not None and known.leads_on_from(at, bool(_visible(there))):
            return
        self._make_room(known)
        if not _visible(there):
            self._local.mkdir(parents=True, exist_ok=True)
            self._write_mark(_Mark())
            return
        for _ in range(_TRIES):
            if self._take(there, at):
                return
            there, at = self._store.sizes(), self._pushed()
        raise StoreError(
            f"{self._store.address} changes all the time: another process writes to it", "wait for its end"
        )

    def push(self, beat: Beat = lambda: None) -> None:
        """Makes the store's folder what the working copy is. What ends it in its middle leaves a run that is whole.

        Args:
            beat: called while it goes on; an error of it ends the push.

        Raises:
            StoreError: the store does not answer; the next push goes on from where this one was.
        """
        there = self._objects()
        mark, files = self._read_mark() or _Mark(), self._files()
        known = {name: each for name, each in mark.files.items() if there.get(name) == each[0]}
        changed = {name for name, each in files.items() if known.get(name) != each}
        gone = [name for name in _visible(there) if name not in files]
        if not changed and not gone and mark.next is None:
            return
        mark.next, mark.files = uuid.uuid4().hex, known
        self._write_mark(mark)
        # A folder that changes is no checkpoint and no artifact until its manifest is there again.
        again = {_manifest_of(name) for name in changed if _manifest_of(name) in files}
        self._remove(there, [name for name in again if name in there])
        # By its status a folder is known as a run's, whatever ends this push.
        first = STATUS if STATUS not in there else None
        for name in sorted(changed | again, key=lambda name: -1 if name == first else _order(name)):
            beat()
            try:
                self._store.upload(self._local / name, name, beat)
            except FileNotFoundError:  # removed meanwhile, as by retention
                continue
            there[name] = files[name][0]
            mark.files[name] = files[name]
        self._remove(there, sorted(gone, key=_order, reverse=True))
        self._store.write(MARK, _mark_bytes(mark.next))
        self._write_mark(_Mark(at=mark.next, files=mark.files))

    def _remove(self, there: dict[str, int], names: Iterable[str]) -> None:
        for name in names:
            self._store.remove([name])
            there.pop(name, None)

    def _objects(self) -> dict[str, int]:
        if self._there is None:
            self._there = self._store.sizes()
        return self._there

    def _pushed(self) -> str | None:
        try:
            nonce = parse_json(self._store.read(MARK) or b"{}").get("push")
        except (ValueError, AttributeError):
            return None
        return nonce if isinstance(nonce, str) else None

    def _refuse_foreign(self, there: Iterable[str]) -> None:
        names = set(there)
        begun = STATUS in names or any(name.startswith("checkpoints/") for name in names)
        if _visible(names) and not begun:
            raise RunDirError(
                f"{self._store.address} is not empty, and is not a run directory",
                "--run.dir ADDRESS, with a new or an empty folder",
            )

    def _take(self, there: dict[str, int], at: str | None) -> bool:
        """Reads what is at the store; returns False where it has changed meanwhile."""
        fresh = beside(self._local)
        try:
            fresh.mkdir(parents=True)
            for name in _whole(there):
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                if not self._store.download(name, fresh / name):
                    return False
            if self._pushed() != at:
                return False
            for entry in list(fresh.iterdir()):
                _move(entry, self._local / entry.name)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        sync_directory(self._local)
        self._write_mark(_Mark(at=at, files=self._files()))
        return True

    def _make_room(self, known: _Mark | None) -> None:
        """Empties the working copy, but for what a launcher puts there; keeps it elsewhere if it was never pushed."""
        if not self._local.exists():
            self._local.mkdir(parents=True)
            return
        stale = [
            entry
            for entry in self._local.iterdir()
            if entry.name not in BEFORE_A_RUN and (entry.name == MARK or not entry.name.startswith("."))
        ]
        files = {name: each for name, each in self._files().items() if PurePosixPath(name).parts[0] not in BEFORE_A_RUN}
        if known is None and not files:
            return
        if known is not None and all(known.files.get(name) == each for name, each in files.items()):
            for entry in stale:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            return
        number = 1
        while (aside := self._local.with_name(f"{self._local.name}-aside-{number}")).exists():
            number += 1
        aside.mkdir()
        for entry in stale:
            os.rename(entry, aside / entry.name)
        self._say(f"{self._local} does not go on from what is at {self._store.address}; it is kept as {aside}")

    def _files(self) -> dict[str, list[int]]:
        """Lists the files of the working copy, without hidden ones and links."""
        found: dict[str, list[int]] = {}
        for folder, folders, names in os.walk(self._local):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                file = Path(folder) / name
                if name.startswith(".") or file.is_symlink() or not file.is_file():
                    continue
                try:
                    stat = file.stat()
                except FileNotFoundError:
                    continue
                found[file.relative_to(self._local).as_posix()] = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        return found

    def _read_mark(self) -> _Mark | None:
        try:
            return _Mark(**read_json_file(self._local / MARK))
        except (OSError, ValueError, TypeError):
            return None

    def _write_mark(self, mark: _Mark) -> None:
        replace_json(self._local / MARK, asdict(mark), compact=True)


def _mark_bytes(push: str) -> bytes:
    return b'{"push": "%s"}\n' % push.encode()


def _visible(names: Iterable[str]) -> list[str]:
    return [name for name in names if not any(part.startswith(".") for part in PurePosixPath(name).parts)]


def _whole(there: Iterable[str]) -> list[str]:
    """Returns what a working copy takes: all but hidden objects, and checkpoints whose push was not ended."""
    names = set(there)
    return [
        name
        for name in _visible(there)
        if not (_is_of_checkpoint(name) and _manifest_of(name) not in names) and name.count("/") < 64
    ]


def _is_of_checkpoint(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return len(parts) > 2 and parts[0] == "checkpoints"


def _manifest_of(name: str) -> str:
    return str(PurePosixPath(name).parent / saved.MANIFEST)


def _order(name: str) -> int:
    """Tells what is put after what: data, manifests, the pointer to the newest checkpoint, what tells of the run."""
    if name in (STATUS, "results.json"):
        return 3
    last = name.rpartition("/")[2]
    return {saved.MANIFEST: 1, saved.LATEST: 2}.get(last, 0)


def _move(source: Path, target: Path) -> None:
    """Moves a file or folder to where there may be a folder already, as a launcher's logs."""
    if source.is_dir() and target.is_dir():
        for entry in list(source.iterdir()):
            _move(entry, target / entry.name)
    else:
        os.replace(source, target)
