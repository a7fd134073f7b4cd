"""`dist-train launch`: checks the configuration, settles the run directory, starts the ranks, and says what became of them."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from dist_train.cluster.interfaces import interface_of, interfaces
from dist_train.cluster.ports import is_free
from dist_train.errors import EXIT_DONE, SetupError, UsageError
from dist_train.launchers import accelerate, sbatch, slurm_script, torchrun
from dist_train.launchers.agent import wait
from dist_train.launchers.job import Command, Job, outcome
from dist_train.launchers.options import details, split
from dist_train.run_dir.files import read_json
from dist_train.run_dir.paths import RunDir, refuse_foreign

USAGE = "{torchrun,accelerate,slurm} [OPTION ...] CONFIG [--dotted.key VALUE ...]"
_PATIENCE_SECONDS = 20.0
_SAVING_SECONDS = 15  # that an agent waits longer than its ranks need at most
_ACTIONS = ("dry_run", "submit", "follow")


def help_text(settings: str) -> str:
    return f"""\
Options of the launcher come before CONFIG, those of the configuration after it.
{details()}

torchrun and accelerate run on this machine (for several nodes type the command on each); slurm prints a batch script,
or gives it to sbatch. Each rank's output goes to RUN_DIR/logs, that of rank 0 to the terminal too. In an array job
(--sbatch.array 0-3) every task is a run of its own, RUN_DIR-TASK; %a in an option is the task's number.
Exit codes: 0 done, 1 failed, 75 preempted (run the same command again), 78 wrong configuration.

{settings}"""


def launch(arguments: list[str]) -> int:
    """Runs the verb; returns the exit code of law 7.

    Raises:
        UsageError, ConfigError, SetupError: before anything is started.
    """
    launcher, values, words = split(arguments)
    from dist_train.config.load import load

    # Of this machine's variables none: the ranks will have others, and a batch job other files.
    config = load(words[0], words[1:], environ={}).config
    base = config.run.dir or Path("runs") / config.run.name
    actions = {name: values.pop(name, False) for name in _ACTIONS}
    environment = values.pop("env")
    grace = math.ceil(config.stop.grace)
    defaults: dict[str, Any] = {
        "python": sys.executable,
        "rdzv_id": config.run.name,
        "shutdown_timeout": grace + _SAVING_SECONDS,
        "stop_before": max(Job.stop_before, grace + 4 * _SAVING_SECONDS),
    }
    job = Job(
        arguments=(*words, "--run.dir", str(base)),
        run_dir=str(base),
        home=str(config.run_dir),
        name=config.run.name,
        environment=environment,
        made_by="dist-train launch " + shlex.join(word for word in arguments if word not in ("--submit", "--follow")),
        **(defaults | values),
    )
    _check(launcher, job)
    if launcher == "slurm":
        return _batch(job, **actions)
    if job.local_addr and "GLOO_SOCKET_IFNAME" not in os.environ:
        job = replace(job, interface=_interface(job.local_addr, actions["dry_run"]))
    command = (torchrun if launcher == "torchrun" else accelerate).command(job)
    if actions["dry_run"]:
        print(command.shell(), end="")
        return EXIT_DONE
    if job.is_host and job.nodes[1] > 1 and not is_free(torchrun.port(job)):
        raise SetupError(f"port {torchrun.port(job)} is taken on this node", "--port PORT, the same on all nodes")
    return run(job, command)


def _interface(address: str, dry_run: bool) -> str:
    """Where this node's ranks shall meet the others'; "" where no interface says that it has the address.

    Raises:
        SetupError: no other machine could reach this one at the address.
    """
    try:
        return interface_of(address) or ""
    except OSError as error:
        if dry_run:  # for another node, perhaps
            print(f"dist-train: on a node that has {address}, GLOO_SOCKET_IFNAME is set too", file=sys.stderr)
            return ""
        reason = error.strerror or str(error)
        here = [f"{each.addresses[0]} ({each.name})" for each in interfaces() if each.reaches_others]
        raise SetupError(
            f"--local-addr is {address}, at which this machine cannot listen: {reason}",
            f"--local-addr ADDR, one of this machine's own: {', '.join(here) or 'it has none that others reach'}",
        ) from None


def _check(launcher: str, job: Job) -> None:
    least, most = job.nodes
    if job.task_per_rank and job.restarts:
        raise UsageError("--restarts is for torchrun's agents, and --task-per-rank has none", "leave one of them out")
    if launcher == "accelerate" and least != most:
        raise UsageError("accelerate starts on a fixed number of nodes", f"--nodes {most}")
    if launcher != "slurm" and most > 1:
        needed = ["--endpoint"] + (["--node-rank"] if launcher == "accelerate" else [])
        given = {"--endpoint": job.endpoint, "--node-rank": job.node_rank}
        missing = [name for name in needed if given[name] in ("", None)]
        if missing:
            hint = f"on every node: --endpoint HOST{' --node-rank K' if launcher == 'accelerate' else ''}, HOST being the first"
            raise UsageError(f"several nodes need {' and '.join(missing)}", hint)


def run(job: Job, command: Command) -> int:
    """Starts the command in the foreground, with our terminal, and waits for it."""
    if shutil.which(command.words[0]) is None:
        raise SetupError(f"{command.words[0]} is no program", "--python PATH, or nothing for the one that runs this")
    home = RunDir(Path(job.home))
    before = _status_before(home)
    Path(job.logs).mkdir(parents=True, exist_ok=True)
    for path, text in command.files.items():
        Path(path).write_text(text, encoding="utf-8")
    exit_file = Path(job.exit_file)
    exit_file.unlink(missing_ok=True)
    process = subprocess.Popen(command.words, env=os.environ | command.environ)
    with _passing_on(process.send_signal, home.stop):
        code = wait(process, job.shutdown_timeout + _PATIENCE_SECONDS)
    return outcome(before, read_json(home.status), code, exit_file.exists())


def _status_before(home: RunDir) -> Any:
    """status.json of an earlier attempt, or None.

    Raises:
        RunDirError: the directory belongs to something else.
    """
    status = read_json(home.status)
    if status is None:
        refuse_foreign(home)
    return status


@contextmanager
def _passing_on(send: Callable[[int], None], stop: Path) -> Iterator[None]:
    """SIGTERM goes on to the agent, which stops the ranks; Ctrl-C reaches it without us, being in our process group.

    SIGUSR2, which would end the agent, becomes the STOP file.
    """

    def pass_on(number: int, frame: FrameType | None) -> None:
        send(number)

    def ask_by_file(number: int, frame: FrameType | None) -> None:
        stop.touch()

    def leave_to_the_agent(number: int, frame: FrameType | None) -> None:
        return None

    earlier = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
        signal.SIGINT: signal.signal(signal.SIGINT, leave_to_the_agent),
        signal.SIGUSR2: signal.signal(signal.SIGUSR2, ask_by_file),
    }
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _batch(job: Job, dry_run: bool, submit: bool, follow: bool) -> int:
    text = slurm_script.script(job)
    if dry_run or not (submit or follow):
        print(text, end="")
        if not dry_run:
            print("dist-train: not submitted: add --submit, or --follow", file=sys.stderr)
        return EXIT_DONE
    if follow and any(name == "array" for name, _ in job.sbatch):
        raise UsageError("--follow shows one job, and an array is several", "--submit, then tail -F slurm-JOB_TASK.out")
    home = RunDir(Path(job.home))
    before = _status_before(home)
    number = sbatch.submit(text)
    print(number, flush=True)
    if not follow:
        return EXIT_DONE
    code = sbatch.follow(number, sys.stdout)
    return outcome(before, read_json(home.status), code)
