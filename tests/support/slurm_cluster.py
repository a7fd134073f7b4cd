"""A real Slurm cluster on one machine: munge, a controller and four nodes (127.0.0.1 to 127.0.0.4)."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.ranks import ROOT, free_port

NODES = 4
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "scancel")
DEADLINE = 240.0

SMALL = """\
run: {name: small, threads_per_rank: 1, device: cpu}
data:
  name: fake
  cache_dir: cache
  args: {num_train: 203, num_eval: 61, num_classes: 6, channels: 1, height: 8, width: 8}
  global_batch_size: 20
model: {name: mlp, args: {size: 8, hidden: 32}}
stages: [train]
train: {epochs: 2, optim: {lr: 0.02}}
"""

_CONF = """\
ClusterName=t
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=10,socket={dir}/munge.socket
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool.%n
SlurmctldPidFile={dir}/ctld.pid
SlurmdPidFile={dir}/slurmd.%n.pid
SlurmctldLogFile={dir}/ctld.log
SlurmdLogFile={dir}/slurmd.%n.log
SlurmctldPort={port}
FirstJobId={first_job}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=20
KillWait=10
NodeName=127.0.0.[1-4] NodeHostName={host} NodeAddr=127.0.0.[1-4] Port=[{ports}] CPUs=4 RealMemory=2000
PartitionName=low Nodes=127.0.0.[1-4] Default=YES PriorityTier=1 GraceTime=15 MaxTime=60 OverSubscribe=NO
PartitionName=high Nodes=127.0.0.[1-4] PriorityTier=10 PreemptMode=OFF MaxTime=60
"""


def why_not() -> str | None:
    """The reason why no Slurm can be started here, or None."""
    if os.geteuid() != 0:
        return "only as root"
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"])


class Cluster:
    """Context manager that starts four virtual nodes, and at its end stops them and their processes."""

    def __init__(self) -> None:
        self.dir = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.dir.chmod(0o755)  # munge must be able to search the folder of its socket
        keep = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TORCHELASTIC"))}
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            keep.pop(name, None)
        self.environ = keep | {
            "SLURM_CONF": str(self.dir / "slurm.conf"),
            "PATH": _path(),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        self._daemons: list[subprocess.Popen[bytes]] = []
        # Cleans up after a killed pytest, too: the pipe's other end is closed however this process ends.
        gone, self._alive = os.pipe()
        command = [sys.executable, "-m", "tests.support.slurm_cluster", str(self.dir), str(gone)]
        environ = os.environ | {"PYTHONPATH": str(ROOT)}
        self._survivor = subprocess.Popen(
            command, env=environ, pass_fds=[gone], stdin=subprocess.DEVNULL, start_new_session=True
        )
        os.close(gone)

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        folder = self.dir
        host = socket.gethostname().partition(".")[0]
        (folder / "state").mkdir()
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        first = free_port() // 2  # below the ephemeral range
        while not all(_free(first + offset) for offset in range(NODES)):
            first += NODES
        ports = f"{first}-{first + NODES - 1}"
        # Ports of jobs follow from their ids, and another cluster may be at work on this machine.
        text = _CONF.format(
            dir=folder, host=host, port=free_port(), ports=ports, first_job=1 + secrets.randbelow(50000)
        )
        (folder / "slurm.conf").write_text(text)
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("log", "pid", "seed")]
        socket_file = folder / "munge.socket"
        self._daemon("munged", "--foreground", "--force", f"--socket={socket_file}", f"--key-file={key}", *files)
        self.until(socket_file.exists)
        self._daemon("slurmctld", "-D", "-c")
        for number in range(1, NODES + 1):
            self._daemon("slurmd", "-D", "-N", f"127.0.0.{number}")
        self.until(lambda: self.run("sinfo", "-h", "-o", "%D %t", "-p", "low").stdout.strip() == f"{NODES} idle")

    def _daemon(self, *command: str) -> None:
        with (self.dir / f"{command[0]}.out").open("ab") as out:
            self._daemons.append(
                subprocess.Popen(
                    command, env=self.environ, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
                )
            )

    def __exit__(self, *_: object) -> None:
        try:
            with contextlib.suppress(subprocess.TimeoutExpired, AssertionError):
                self.run("scancel", "--user=root", deadline=20)
                self.until(lambda: self.run("squeue", "-h").stdout == "", 30)
        finally:
            for daemon in reversed(self._daemons):
                daemon.send_signal(signal.SIGTERM)
                try:
                    daemon.wait(20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait(20)
            os.write(self._alive, b".")  # closing alone ends nothing: forked data workers hold the pipe, too
            os.close(self._alive)
            self._survivor.wait(60)  # it does the clean-up

    def processes(self, *words: str) -> dict[int, str]:
        """Running processes of this cluster whose command line holds all `words`: pid -> command line."""
        return processes_of(self.dir, *words)

    def run(
        self,
        *command: str,
        cwd: Path | None = None,
        deadline: float = DEADLINE,
        text: str | None = None,
        **environ: str,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command with this cluster's configuration."""
        given = {"stdin": subprocess.DEVNULL} if text is None else {"input": text}
        return subprocess.run(  # type: ignore[call-overload,no-any-return]
            command, env=self.environ | environ, cwd=cwd, capture_output=True, text=True, timeout=deadline, **given
        )

    def launch(self, *words: str, cwd: Path, deadline: float = DEADLINE) -> subprocess.CompletedProcess[str]:
        """Runs `dist-train launch slurm ...`."""
        return self.run(sys.executable, "-m", "dist_train", "launch", "slurm", *words, cwd=cwd, deadline=deadline)

    def submit(self, script: str, cwd: Path, *options: str) -> str:
        """Submits a script and returns the id of its job."""
        answer = self.run("sbatch", "--parsable", *options, cwd=cwd, text=script)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Fields of a job as scontrol shows them: JobState, ExitCode, Restarts, StdOut, ..."""
        answer = self.run("scontrol", "show", "job", number)
        assert answer.returncode == 0, answer.stderr
        return dict(re.findall(r"(\w+)=(\S+)", answer.stdout))

    def ended(self, number: str, deadline: float = DEADLINE) -> dict[str, str]:
        """Waits until the job has left the queue for good; returns its fields."""
        running = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED")
        self.until(lambda: self.job(number)["JobState"] not in running, deadline, lambda: self.output(number))
        self.until(lambda: number not in self.run("squeue", "-h", "-o", "%A").stdout.split(), deadline)
        return self.job(number)

    def output(self, number: str) -> str:
        path = Path(self.job(number)["StdOut"])
        return path.read_text() if path.is_file() else ""

    def until(self, condition: Callable[[], bool], deadline: float = 60.0, say: Callable[[], str] = lambda: "") -> None:
        end = time.monotonic() + deadline
        while not condition():
            assert time.monotonic() < end, f"not reached within {deadline:.0f} s\n{say()}\n{self._logs()}"
            time.sleep(0.1)

    def _logs(self) -> str:
        files: Sequence[Path] = sorted(self.dir.glob("*.log")) + sorted(self.dir.glob("*.out"))
        return "\n".join(f"--- {file.name}\n{file.read_text()[-2000:]}" for file in files)


def processes_of(folder: Path, *words: str) -> dict[int, str]:
    mark = f"SLURM_CONF={folder}/slurm.conf".encode()
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0"):
                line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if line and all(word in line for word in words):
                    found[int(process.name)] = line
    return found


def kill_all(folder: Path) -> None:
    """Kills all processes of a cluster, also new ones, and removes its folder."""
    end = time.monotonic() + 30
    while (left := processes_of(folder)) and time.monotonic() < end:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


def _free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    os.read(int(sys.argv[2]), 1)  # returns when the pipe is closed
    kill_all(Path(sys.argv[1]))
