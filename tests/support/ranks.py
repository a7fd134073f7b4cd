"""Real ranks for tests: processes with torchrun's variables, a free port and a deadline."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.support.warm_ranks import ORIGIN_OF_RANKS, WarmProcess, can_be_warm

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 180.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Ranks:
    """Rank processes of one run; a context manager that kills them at its end."""

    def __init__(
        self,
        world_size: int,
        command: Sequence[str],
        environ: dict[str, str] | None = None,
        folder: Path | None = None,
        cold: bool = False,
    ) -> None:
        """Starts the ranks. cold: each imports torch itself, see tests/support/warm_ranks.py."""
        self.port = port = str(free_port())
        self.outputs = [tempfile.TemporaryFile("w+") for _ in range(world_size)]  # noqa: SIM115 (closed by __exit__)
        self.processes: list[subprocess.Popen[bytes] | WarmProcess] = []
        for rank in range(world_size):
            sys.audit("tests.rank", rank)
            variables = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "SLURM"))}
            variables |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"} | (environ or {})
            if world_size > 1:
                variables |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "LOCAL_WORLD_SIZE": str(world_size),
                }
                variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            out = self.outputs[rank]
            if not cold and can_be_warm(command, environ or {}):
                self.processes.append(ORIGIN_OF_RANKS.take(rank).start(command, variables, out, folder))
                continue
            process = subprocess.Popen(
                [sys.executable, *command],
                env=variables,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                cwd=folder,
            )
            self.processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for out in self.outputs:
            out.close()

    def kill(self, ranks: Sequence[int] | None = None) -> None:
        """Sends SIGKILL to the process groups of these ranks (default: all)."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.processes[rank].pid, signal.SIGKILL)
            self.processes[rank].wait(10)

    def wait(self, deadline: float = DEADLINE) -> list[int]:
        """Exit codes by rank; after the deadline the test fails with the output of all ranks."""
        end = time.monotonic() + deadline
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"ranks still run after {deadline:.0f} s:\n{self.printed()}") from None

    def until(self, condition: Callable[[], bool], deadline: float = DEADLINE) -> bool:
        """Waits for a condition; False if the ranks ended before it held."""
        end = time.monotonic() + deadline
        while not condition():
            if all(process.poll() is not None for process in self.processes):
                return condition()
            assert time.monotonic() < end, f"not reached within {deadline:.0f} s:\n{self.printed()}"
            time.sleep(0.005)
        return True

    def until_alone(self, rank: int, deadline: float = 10.0) -> bool:
        """Waits until this rank's process group has no processes but zombies; False after the deadline."""
        end = time.monotonic() + deadline
        while time.monotonic() < end:
            if not any(_is_of(process, self.processes[rank].pid) for process in psutil.process_iter()):
                return True
            time.sleep(0.05)
        return False

    def output(self, rank: int) -> str:
        self.outputs[rank].seek(0)
        return self.outputs[rank].read()

    def printed(self) -> str:
        return "\n".join(f"--- rank {rank}\n{self.output(rank)}" for rank in range(len(self.outputs)))


def _is_of(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def train(world_size: int, *arguments: str, environ: dict[str, str] | None = None, cold: bool = False) -> Ranks:
    """Starts `python -m dist_train ...` on each rank."""
    return Ranks(world_size, ["-m", "dist_train", *arguments], environ, cold=cold)


def train_done(world_size: int, *arguments: str, deadline: float = DEADLINE, cold: bool = False) -> str:
    """Runs to the end, expects success, and returns the output of rank 0."""
    with train(world_size, *arguments, cold=cold) as ranks:
        codes = ranks.wait(deadline)
        assert codes == [0] * world_size, f"exit codes {codes}\n{ranks.printed()}"
        return ranks.output(0)


def call(world_size: int, function: str, *arguments: Any, deadline: float = DEADLINE) -> list[Any]:
    """Calls "module:function"(world, *arguments) on each rank of a real world; returns the JSON values by rank."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Ranks(world_size, ["-m", "tests.support.ranks", folder, function, json.dumps(arguments)]) as ranks,
    ):
        codes = ranks.wait(deadline)
        assert codes == [0] * world_size, f"exit codes {codes}\n{ranks.printed()}"
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world_size)]


def _main(folder: str, function: str, arguments: str) -> None:
    import torch

    from dist_train.config.tree import RunConfig
    from dist_train.distributed.process_group import join
    from dist_train.registry import resolve

    torch.set_num_threads(1)
    with join(RunConfig(device="cpu", timeout=120)) as world:
        value = resolve(function)(world, *json.loads(arguments))
    (Path(folder) / f"{world.rank}.json").write_text(json.dumps(value))


if __name__ == "__main__":
    _main(*sys.argv[1:])
