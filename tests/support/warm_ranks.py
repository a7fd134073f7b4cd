"""Forks rank processes from an origin process that has imported torch, and nothing of dist_train.

Importing torch, torchvision, torchmetrics and torchao takes 5 s of a processor, and the suite starts hundreds of ranks.
A warm rank has its own session, variables, folder and output, imports `dist_train` itself and exits as Python does.
It shares the seed of `hash` and the memory layout with its relatives, and no result may depend on either.
So there are two origins with different seeds, and ranks and runs take them in turn.
Ranks are started cold where a test is about that, or sets variables that torch reads when it is imported.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
ORIGINS = 2
# No module may start threads or open sockets when it is imported.
IMPORTED = (
    "torch",
    "torchvision",
    "torchmetrics",
    "torchao.quantization.pt2e",
    "torch.export",
    "torch._dynamo",
    "torch.distributed",
)
IMPORTED += ("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", "torch.fx.experimental.symbolic_shapes")
READ_AT_IMPORT = (
    "OMP_",
    "MKL_",
    "KMP_",
    "OPENBLAS_",
    "TORCH",
    "PYTORCH",
    "PYTHON",
    "CUDA",
    "NCCL",
    "GLOO",
    "LD_",
    "ATEN_",
    "DNNL_",
    "ONEDNN_",
    "CXX",
)
# A test may have changed its variables when the first rank is started, and all later ones come from the same origins.
AT_START = dict(os.environ)


class WarmProcess:
    """Handle of a process that an origin forked, with the methods of subprocess.Popen."""

    def __init__(self, origin: Origin, pid: int) -> None:
        self.pid, self._origin = pid, origin
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._origin.code(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired(f"warm process {self.pid}", timeout or 0.0)
            self._origin.await_news(left)
        return code


class Origin:
    """Handle of a process that ranks are forked from; it ends when its socket is closed, however ours ends."""

    def __init__(self, seed: int) -> None:
        self._socket, theirs = socket.socketpair()
        variables = {
            **AT_START,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONFAULTHANDLER": "1",
            "PYTHONHASHSEED": str(seed),
        }
        with theirs:
            command = [sys.executable, "-m", "tests.support.warm_ranks", str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, env=variables, cwd=ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        self._codes: dict[int, int] = {}
        self._read = b""

    def start(
        self, command: Sequence[str], environ: dict[str, str], output: IO[Any], folder: Path | None
    ) -> WarmProcess:
        job = json.dumps({"command": list(command), "environ": environ, "folder": str(folder or Path.cwd())}).encode()
        self._socket.sendmsg(
            [len(job).to_bytes(4, "little") + job],
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [output.fileno()]).tobytes())],
        )
        while True:
            for news in self._news(None):
                if "started" in news:
                    return WarmProcess(self, news["started"])

    def code(self, pid: int) -> int | None:
        self._news(0.0)
        return self._codes.get(pid)

    def await_news(self, timeout: float | None) -> None:
        select.select([self._socket], [], [], timeout)

    def close(self) -> None:
        # Closing alone ends nothing: forked data workers of these tests hold the socket, too.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._process.wait(30)

    def _news(self, timeout: float | None) -> list[dict[str, Any]]:
        """Messages received: `{"started": pid}`, or `{"ended": pid, "code": code}`, whose code is kept."""
        if not select.select([self._socket], [], [], timeout)[0]:
            return []
        data = self._socket.recv(65536)
        assert data, "the process that warm ranks are forked from has ended"
        *lines, self._read = (self._read + data).split(b"\n")
        found = [json.loads(line) for line in lines]
        self._codes |= {each["ended"]: each["code"] for each in found if "ended" in each}
        return found


class Origins:
    """The origins of this test run, started at the first rank."""

    def __init__(self) -> None:
        self._origins: list[Origin] = []
        self._turn = 0

    def take(self, rank: int) -> Origin:
        """The next origin: it alternates between the ranks of a run, and between runs."""
        if not self._origins:
            self._origins = [Origin(seed) for seed in range(1, ORIGINS + 1)]
            atexit.register(self._close)
        self._turn += rank == 0
        return self._origins[(self._turn + rank) % ORIGINS]

    def _close(self) -> None:
        for origin in self._origins:
            origin.close()


ORIGIN_OF_RANKS = Origins()


def can_be_warm(command: Sequence[str], given: dict[str, str]) -> bool:
    """True if a forked rank with this command and these further variables behaves as a cold one."""
    return (
        command[0] == "-m"
        and "DIST_TRAIN_COLD_RANKS" not in os.environ
        and not any(name.startswith(READ_AT_IMPORT) for name in given)
    )


def _serve(server: socket.socket) -> dict[str, Any] | None:
    """Forks a process for each job. Returns the job in that process, and None in the origin at its end."""
    children_end, wakes = socket.socketpair()
    for end in (children_end, wakes):
        end.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # Ctrl-C goes to the tests, which end ranks themselves; ranks get the inherited action back (nohup ignores it).
    interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        ready = select.select([server, children_end], [], [])[0]
        if children_end in ready:
            children_end.recv(4096)
            _tell_ended(server)
        if server not in ready:
            continue
        data, files, _, _ = socket.recv_fds(server, 4, 1)
        if not data:
            return None
        job = json.loads(_exactly(server, int.from_bytes(data, "little")))
        leads, tells = os.pipe()
        if pid := os.fork():
            os.close(files[0])
            os.close(tells)
            os.read(leads, 1)  # the caller may kill the process group as soon as it is told
            os.close(leads)
            server.sendall(json.dumps({"started": pid}).encode() + b"\n")
            continue
        os.setsid()
        signal.signal(signal.SIGINT, interrupted)
        os.close(tells)
        os.close(leads)
        signal.set_wakeup_fd(-1)
        for each in (server, children_end, wakes):
            each.close()
        return {**job, "output": files[0]}


def _tell_ended(server: socket.socket) -> None:
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            news = {"ended": found[0], "code": os.waitstatus_to_exitcode(found[1])}
            server.sendall(json.dumps(news).encode() + b"\n")


def _exactly(server: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += server.recv(size - len(data))
    return data


def _become(job: dict[str, Any]) -> None:
    """Gives this process the command, variables, folder and output of the job, as exec would."""
    for number in (1, 2):
        os.dup2(job["output"], number)
    os.close(job["output"])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environ"])
    sys.path[0] = job["folder"]
    import numpy as np

    np.random.seed()  # else all forked processes would draw the same
    _, module, *arguments = job["command"]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _main(descriptor: int) -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    assert not any(name.split(".")[0] == "dist_train" for name in sys.modules)
    with open("/proc/self/status") as status:
        assert "Threads:\t1\n" in status.read(), "a process with threads cannot be forked"
    job = _serve(socket.socket(fileno=descriptor))
    if job is not None:
        _become(job)


if __name__ == "__main__":
    _main(int(sys.argv[1]))
