"""Two network namespaces that stand for two machines joined by a cable.

Tests kill their processes and cut the cable; at the end nothing is left behind.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.ranks import ROOT

DEADLINE = 120.0
_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"])
_INTERFACE = "eth0"


def why_not() -> str | None:
    """The reason why no network namespaces can be made here, or None."""
    if os.geteuid() != 0:
        return "only as root"
    if shutil.which("ip", path=_PATH) is None:
        return "not installed: ip (iproute2)"
    name = _unique("probe")
    made = _ip("netns", "add", name, check=False)
    if made.returncode != 0:
        return f"only where network namespaces can be made: {made.stderr.strip()}"
    _ip("netns", "delete", name)
    return None


class Machine:
    """One namespace, its processes and their output."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address = name, address
        self._folder = folder
        self._started: list[subprocess.Popen[bytes]] = []

    @staticmethod
    def environ() -> dict[str, str]:
        """The environment of this process without the variables of launchers."""
        left = ("SLURM", "TORCHELASTIC", "GLOO", "MASTER_")
        keep = {name: value for name, value in os.environ.items() if not name.startswith(left)}
        return keep | {"PATH": _PATH, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(self, *command: str, cwd: Path, **environ: str) -> subprocess.Popen[bytes]:
        """Starts a command in this namespace; its output goes to a file of its own."""
        with self._output(len(self._started)).open("wb") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],  # execs the command, so the process id stays
                env=self.environ() | environ,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def launch(self, *words: str, cwd: Path) -> subprocess.Popen[bytes]:
        """`dist-train launch torchrun --local-addr ... WORDS` on this machine."""
        command = (sys.executable, "-m", "dist_train", "launch", "torchrun", "--local-addr", self.address)
        return self.start(*command, *words, cwd=cwd)

    def processes(self) -> list[int]:
        """The ids of all processes in this namespace."""
        return [int(number) for number in _ip("netns", "pids", self.name).stdout.split()]

    def kill(self) -> None:
        """Kills all processes with SIGKILL, as a power failure would."""
        end = time.monotonic() + 30
        while left := self.processes():
            assert time.monotonic() < end, f"{left} survive SIGKILL on {self.name}"
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        for process in self._started:
            process.wait(10)

    def printed(self) -> str:
        """The output of all commands that were started here, in order."""
        return "\n".join(self._output(number).read_text(errors="replace") for number in range(len(self._started)))

    def _output(self, number: int) -> Path:
        return self._folder / f"{self.name}.{number}.out"


class TwoMachines:
    """Context manager that makes and joins two machines, and kills and removes them at its end."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="machines-"))
        subnet = ".".join(["10", *(str(byte) for byte in secrets.token_bytes(2))])
        self.first, self.second = (
            Machine(_unique(f"machine{number}"), f"{subnet}.{number}", self._folder) for number in (1, 2)
        )

    def __iter__(self) -> Iterator[Machine]:
        return iter((self.first, self.second))

    def __enter__(self) -> TwoMachines:
        try:
            for machine in self:
                _ip("netns", "add", machine.name)
            ends = (_INTERFACE, "netns", self.first.name), (_INTERFACE, "netns", self.second.name)
            _ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
            for machine in self:
                _ip("-n", machine.name, "address", "add", f"{machine.address}/24", "dev", _INTERFACE)
                _ip("-n", machine.name, "link", "set", "lo", "up")
            self.join()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        names = _ip("netns", "list").stdout.split()
        for machine in self:
            if machine.name in names:
                machine.kill()
                _ip("netns", "delete", machine.name)
        shutil.rmtree(self._folder, ignore_errors=True)

    def left_behind(self) -> list[str]:
        """Namespaces that still have a name and should be gone."""
        return [name for name in _ip("netns", "list").stdout.split() if name in (self.first.name, self.second.name)]

    def cut(self) -> None:
        """Takes the link down: packets are lost and neither end of a connection is told."""
        _ip("-n", self.first.name, "link", "set", _INTERFACE, "down")

    def join(self) -> None:
        """Takes the link up and waits until it carries packets."""
        for machine in self:
            _ip("-n", machine.name, "link", "set", _INTERFACE, "up")
        self.until(
            lambda: all("state UP" in _ip("-n", machine.name, "link", "show", _INTERFACE).stdout for machine in self)
        )

    def until(self, condition: Callable[[], bool], deadline: float = DEADLINE) -> float:
        """Waits for a condition; returns the seconds that it took."""
        begin = time.monotonic()
        while not condition():
            assert time.monotonic() < begin + deadline, f"not reached within {deadline:.0f} s\n{self.printed()}"
            time.sleep(0.02)
        return time.monotonic() - begin

    def codes(self, *processes: subprocess.Popen[bytes], deadline: float = DEADLINE) -> list[int | None]:
        """Waits for all processes and returns their exit codes."""
        self.until(lambda: all(process.poll() is not None for process in processes), deadline)
        return [process.returncode for process in processes]

    def printed(self) -> str:
        return "\n".join(f"--- {machine.name}\n{machine.printed()}" for machine in self)


def _unique(what: str) -> str:
    return f"{what}-{os.getpid()}-{secrets.token_hex(2)}"


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["ip", *words], env={"PATH": _PATH}, capture_output=True, text=True, timeout=30, check=False)
    assert not check or done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done
