"""A job as data: its program, nodes and resources, and the exit code of its launch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_train.cluster.rank_plan import ASKED, EXIT_FILE
from dist_train.errors import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED


@dataclass(frozen=True)
class Job:
    """Settings of a job: first the ones of all launchers, then the ones of some.

    Attributes:
        arguments: words after `dist-train run`: the configuration, then its options with `--run.dir`.
        run_dir: the value of `--run.dir`.
        home: the run directory itself, on this machine; it differs from `run_dir` for a fast development run, and where
            that is the address of an object store.
        nodes: least and most nodes; torchrun and Slurm start with any number between.
        restarts: how often an agent starts failed ranks again on the same nodes.
        port: port at which the ranks meet; None: derived from the job.
        endpoint: host at which the ranks of several nodes meet.
        rdzv_id: name that is the same on all nodes of this job, and on no other job's.
        interface: network interface of `local_addr`, for gloo; "": gloo chooses one itself.
        is_host: True where this node is the endpoint; None: host names tell.
        node_rank: 0 .. nodes - 1, for accelerate on several nodes.
        shutdown_timeout: seconds between SIGTERM and SIGKILL of the ranks: more than `stop.grace`.
        stop_before: seconds between the signal to stop and the end of a Slurm job's time.
        requeues: how often a preempted Slurm job is put back into the queue, or the pods of Kubernetes that failed.
        sbatch: further options of sbatch, by their long names; they replace ours.
        image: container image of the pods, with dist_train in it.
        claim: claim of the volume that all pods share; "": there is one pod, and its run is at an object store.
        secret: name of the Secret whose entries are variables of the pods.
        mount: where that volume is in each pod; relative paths are from there.
        namespace, memory: of the pods, as Kubernetes takes them; "": not given.
        config_text: the configuration file, for pods that do not have it.
    """

    arguments: tuple[str, ...]
    run_dir: str
    home: str
    name: str = "run"
    python: str = "python"
    nodes: tuple[int, int] = (1, 1)
    nproc_per_node: int = 1
    restarts: int = 0
    port: int | None = None
    environment: tuple[tuple[str, str], ...] = ()
    endpoint: str = ""
    rdzv_id: str = ""
    local_addr: str = ""
    interface: str = ""
    is_host: bool | None = None
    node_rank: int | None = None
    shutdown_timeout: int = 45
    config_file: str = ""
    cpus_per_process: int = 1
    gpus_per_process: int = 0
    task_per_rank: bool = False
    time: str = ""
    partition: str = ""
    account: str = ""
    stop_before: int = 180
    requeues: int = 3
    sbatch: tuple[tuple[str, str], ...] = ()
    image: str = ""
    claim: str = ""
    secret: str = ""
    mount: str = "/workspace"
    namespace: str = ""
    memory: str = ""
    config_text: str = ""
    made_by: str = ""

    @property
    def processes(self) -> str:
        """N, or MIN:MAX where the number of nodes may vary; `cluster.rank_plan` compares it with the world size."""
        least, most = (nodes * self.nproc_per_node for nodes in self.nodes)
        return str(least) if least == most else f"{least}:{most}"

    @property
    def logs(self) -> str:
        return f"{self.home}/logs"

    @property
    def exit_file(self) -> str:
        """File that a rank makes when it finds its configuration wrong."""
        return f"{self.logs}/exit_78"


@dataclass(frozen=True)
class Command:
    """A command that starts a job on this machine: added variables, words, and files to write first."""

    words: tuple[str, ...]
    environ: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def shell(self) -> str:
        """Returns the command as text for a shell, to read or to paste."""
        lines = []
        for path, text in self.files.items():
            lines += [f"mkdir -p {shlex.quote(str(Path(path).parent))}"]
            lines += [f"cat > {shlex.quote(path)} <<'EOF'", text.rstrip("\n"), "EOF"]
        variables = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.environ.items())]
        return "\n".join([*lines, " ".join([*variables, shlex.join(self.words)])]) + "\n"


def environment(job: Job, **more: str) -> dict[str, str]:
    """Returns the variables of the ranks of `job`, without the launcher's own."""
    return {ASKED: job.processes, EXIT_FILE: job.exit_file, **more, **dict(job.environment)}


def _began(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> bool:
    """Tells from status.json before and after a launch whether its ranks began an attempt."""
    return after is not None and (before is None or after["restarts"] != before["restarts"])


def outcome(
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
    code: int,
    wrong: bool = False,
    asked: bool = False,
    elastic: bool = False,
) -> int:
    """Returns the exit code of a launch: agents turn 75 into 1, so status.json decides.

    Args:
        before, after: status.json before and after the launch; None where there was none.
        code: the launcher's exit code.
        wrong: True where a rank found its configuration wrong.
        asked: True where the launch was asked to stop.
        elastic: True where the run may go on without this node: it may be running again.
    """
    ours = _began(before, after)
    state = after["state"] if after is not None and (ours or code == 0) else "failed"  # else an earlier attempt's
    if state == "done":
        return EXIT_DONE
    before_the_ranks = asked and not ours and not wrong
    left = asked and elastic and state == "running"
    if state == "preempted" or before_the_ranks or left:
        return EXIT_PREEMPTED
    return EXIT_CONFIG if code == EXIT_CONFIG or wrong else EXIT_FAILED


def failure(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """Says why a launch failed, from status.json before and after it."""
    if after is None or not _began(before, after):
        return "the run failed before it began"
    if after["state"] == "failed":
        return f"the run failed: {after['error']}"
    where = f" in {after['stage']} at step {after['step']}" if after["stage"] else ""
    return f"the run failed{where}: its ranks ended without a word, as if killed"
