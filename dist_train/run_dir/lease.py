"""Gives a run directory one owner at a time, on any shared file system.

An owner holds the file `.owner-N.json` with the highest N. Taking over is creating the next number exclusively, which
one of several starts does. The holder's watcher changes the file every few seconds, so that another machine, which
cannot see the holder's processes, knows that it lives without comparing clocks. Locks of the kernel are not used: over
NFS they may be missing, or outlive their holder.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_train.errors import RunDirBusyError
from dist_train.run_dir.processes import start_of, this_machine
from dist_train.untrusted import parse_json

BEAT_SECONDS = 4.0
PATIENCE_SECONDS = 20.0
"""How long a start waits for an owner to end, and how long an owner that nobody sees may be silent."""
_POLL_SECONDS = 0.2
_NAME = re.compile(r"\.owner-(\d{1,9})\.json")


@dataclass(frozen=True)
class RankProcess:
    """The process of a rank.

    Attributes:
        host: name of its machine, for people.
        machine: as `processes.this_machine`.
        started: as `processes.start_of`.
    """

    rank: int
    host: str
    machine: str
    pid: int
    started: int | None

    @property
    def alive(self) -> bool | None:
        """True or False where this machine can tell, else None."""
        if self.machine != this_machine():
            return None
        return start_of(self.pid) == self.started


def this_process(rank: int) -> RankProcess:
    return RankProcess(rank, socket.gethostname(), this_machine(), os.getpid(), start_of(os.getpid()))


class Lease:
    """The claim to a run directory.

    Args:
        number: N of the file's name.
    """

    def __init__(self, run_dir: Path, number: int) -> None:
        self.number = number
        self._run_dir = run_dir
        self._path = run_dir / f".owner-{number}.json"

    def beat(self) -> bool:
        """Shows that the owner lives; returns False where another run has taken the directory over.

        Raises:
            OSError: the file system fails.
        """
        try:
            with self._path.open("r+b", buffering=0) as file:
                held = parse_json(file.read())
                held["beat"] = str(int(held["beat"]) + 1).zfill(12)
                # In place and of the same length: NFS shows it to whoever opens the file, and a name stays in caches.
                file.seek(0)
                file.write(_line(held))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass  # released, or damaged by somebody else
        return max(_numbers(self._run_dir), default=self.number) <= self.number

    def release(self) -> None:
        """Gives the directory back; does nothing where it was taken over."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def acquire(run_dir: Path, ranks: Sequence[RankProcess], say: Callable[[str], None] = lambda text: None) -> Lease:
    """Makes these ranks the owner of an existing run directory. Waits for an owner that is ending.

    Args:
        ranks: all processes of the run, rank 0 first.
        say: tells the user that and why this start waits.

    Raises:
        RunDirBusyError: another run uses the directory, or has just taken it.
        OSError: the directory cannot be written to.
    """
    # The next number after the one that was judged: if another start has taken it since, creating it fails.
    number = wait_until_free(run_dir, say) + 1
    held = {
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "ranks": [asdict(each) for each in ranks],
        "beat": "0".zfill(12),
    }
    lease = Lease(run_dir, number)
    path = run_dir / f".owner-{number}.json"
    try:
        with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666), "wb") as file:
            file.write(_line(held))
    except FileExistsError:
        raise RunDirBusyError(f"{run_dir} was taken by another start in this moment", _HINT) from None
    for each in _numbers(run_dir):
        if each < number:
            Lease(run_dir, each).release()
    return lease


def owner(run_dir: Path) -> list[RankProcess]:
    """Returns the processes of the run that owns the directory; none where that cannot be read."""
    with suppress(OSError):
        number = max(_numbers(run_dir), default=None)
        return _ranks(_read(run_dir / f".owner-{number}.json") or b"") if number is not None else []
    return []


def wait_until_free(run_dir: Path, say: Callable[[str], None] = lambda text: None) -> int:
    """Waits until no run owns the directory.

    Returns:
        the number of the last owner, whose file may still be there; 0 without one.

    Raises:
        RunDirBusyError: one still does after PATIENCE_SECONDS.
    """
    began = time.monotonic()
    first: bytes | None = None
    while True:
        number = max(_numbers(run_dir), default=None)
        content = b"" if number is None else _read(run_dir / f".owner-{number}.json")
        if number is None:
            return 0
        if content is None:
            continue
        ranks = _ranks(content)
        seen = [each.alive for each in ranks]
        # Rank 0 is the owner. Others that it left behind on this machine may still write.
        if ranks and seen[0] is False and True not in seen:
            return number
        if first is None:
            first = content
            say(f"{_in_use(run_dir, content, ranks)}; waiting up to {PATIENCE_SECONDS:g} s for its end")
        if time.monotonic() - began > PATIENCE_SECONDS:
            if True not in seen and content == first:
                return number  # it is on another machine, and silent
            raise RunDirBusyError(_in_use(run_dir, content, ranks), _HINT + _how_to_end(ranks))
        time.sleep(_POLL_SECONDS)


_HINT = "wait for its end, or start another run with --run.dir DIR or --run.name NEW"


def _how_to_end(ranks: Sequence[RankProcess]) -> str:
    pids = [str(each.pid) for each in ranks if each.alive]
    return f"; to end it here: kill {' '.join(pids)}" if pids else ""


def _in_use(run_dir: Path, content: bytes, ranks: Sequence[RankProcess]) -> str:
    by = [f"{each.pid} on {each.host}" for each in ranks if each.alive is not False][:4]
    with suppress(ValueError, AttributeError):
        held = parse_json(content)
        job = f", Slurm job {held['job']}" if held.get("job") else ""
        since = f", since {held['since']}" if held.get("since") else ""
        return f"{run_dir} is used by another start (process {', '.join(by) or 'unknown'}{job}{since})"
    return f"{run_dir} is used by another start"


def _numbers(run_dir: Path) -> list[int]:
    try:
        names = os.listdir(run_dir)
    except FileNotFoundError:
        return []
    return [int(match[1]) for match in map(_NAME.fullmatch, names) if match]


def _read(path: Path) -> bytes | None:
    """Returns the file's bytes; None if it was removed in the meantime."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _ranks(content: bytes) -> list[RankProcess]:
    """Returns the owner's ranks; none where the file is not written yet, or is damaged: then only silence counts."""
    try:
        return [RankProcess(**each) for each in parse_json(content)["ranks"]]
    except (ValueError, KeyError, TypeError):
        return []


def _line(held: dict[str, Any]) -> bytes:
    return json.dumps(held).encode() + b"\n"
