"""`dist-train launch`: checks the configuration, starts the ranks or submits a job, and returns how they ended."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import click

from dist_train.cli.launch_checks import check, interface, option_text
from dist_train.cli.launch_options import LAUNCHERS, OPTIONS, options, takers
from dist_train.cli.verbs import SETTINGS, ConfigVerb, DottedVerb, Verbs, verb_name
from dist_train.cluster.interfaces import is_own
from dist_train.cluster.ports import is_free
from dist_train.cluster.replicas import LIGHTHOUSE, NUMBER
from dist_train.errors import EXIT_DONE, EXIT_FAILED, SetupError, UsageError, did_you_mean
from dist_train.launchers import accelerate, kubernetes, sbatch, slurm_script, torchrun
from dist_train.launchers.agent import wait
from dist_train.launchers.job import Command, Job, failure, outcome
from dist_train.run_dir.lease import wait_until_free
from dist_train.run_dir.paths import RunDir, refuse_foreign
from dist_train.run_dir.status import read_status

_PATIENCE_SECONDS = 20.0
_ELASTIC_RESTARTS = 10  # each node that leaves costs the others one
_SAVING_SECONDS = 15  # how much longer an agent waits than its ranks need at most
_SBATCH = re.compile(r"--[a-z][a-z-]*")


class _Launcher(ConfigVerb):
    """A launcher: the options before CONFIG are its own. Its function also gets all words, as `typed`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.params["typed"] = tuple(args)
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["[OPTION ...] CONFIG [--dotted.key VALUE ...]"]

    def refusal(self, ctx: click.Context, error: click.UsageError, args: Sequence[str]) -> UsageError:
        name = verb_name(ctx)
        if isinstance(error, click.MissingParameter):
            return UsageError(f"{name} needs a configuration", f"dist-train {name} [OPTION ...] CONFIG")
        if not isinstance(error, click.NoSuchOption):
            return super().refusal(ctx, error, args)
        option = error.option_name
        others = takers(option)
        if others:
            return UsageError(f"{option} is not for {self.name}", f"it is for {', '.join(others)}")
        hint = "" if "." in option else did_you_mean(option, [each.opts[0] for each in self.params], count=1)
        if self.name == "slurm" and _SBATCH.fullmatch(option):
            value = next((after for word, after in pairwise(args) if word == option and after[:1] != "-"), "true")
            hint = f"{hint} For an option of sbatch: --sbatch.{option.removeprefix('--')} {value}".strip()
        settings = f"options of the configuration come after it: {name} [OPTION ...] CONFIG [--dotted.key VALUE ...]"
        return UsageError(f"{name} has no option {option}", hint or settings)


class _Slurm(DottedVerb, _Launcher):
    section = "sbatch"

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["[OPTION ...] [--sbatch.KEY VALUE ...] CONFIG [--dotted.key VALUE ...]"]


class _Launch(Verbs):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            hint = f"dist-train launch {{{','.join(LAUNCHERS)}}} [OPTION ...] CONFIG"
            raise UsageError("launch needs a launcher", hint)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for launchers, group in OPTIONS.items():
            for option in group:
                names, text = option.get_help_record(ctx) or ("", "")
                rows.append((names, text if launchers == LAUNCHERS else f"{text} ({', '.join(launchers)})"))
        rows.append(("--sbatch.KEY VALUE", "Any other option of sbatch; true for a flag, false omits ours. (slurm)"))
        with formatter.section("Options of the launchers, before CONFIG"):
            formatter.write_dl(rows)
        self.format_commands(ctx, formatter)


@click.group(cls=_Launch, subcommand_metavar="{torchrun,accelerate,slurm,kubernetes} ...", epilog=SETTINGS)
def launch() -> None:
    """Starts the ranks of a run, here or as a batch job.

    torchrun and accelerate run on this machine (for several nodes type the command on each); slurm prints a batch
    script, or gives it to sbatch; kubernetes gives a JobSet to kubectl, or prints it. Each rank's output goes to
    RUN_DIR/logs, and rank 0's to the terminal too. In an array job (--sbatch.array 0-3) every task is a run of its
    own, RUN_DIR-TASK; %a in an option is the task's number.

    Exit codes: 0 done, 1 failed, 75 preempted (run the same command again), 78 wrong configuration.
    """


def _launch(
    launcher: str,
    config: str,
    settings: tuple[str, ...],
    typed: tuple[str, ...],
    dry_run: bool,
    env: tuple[tuple[str, str], ...],
    submit: bool = False,
    follow: bool = False,
    sbatch: Sequence[tuple[str, str]] = (),
    **values: Any,
) -> int:
    """Runs the verb; returns the exit code of the launch (see `launchers.job.outcome`).

    Raises:
        UsageError, ConfigError, SetupError: before anything is started.
    """
    from dist_train.config.load import load

    # This machine's variables are left out: the ranks will have others. Replicas are refused in other words than there.
    loaded = load(config, settings, environ={LIGHTHOUSE: "http://-", NUMBER: "0"}, elsewhere=launcher == "kubernetes")
    checked = loaded.config
    if checked.strategy == "ft":
        message = "launch starts ranks that stay together, and replicas under 'ft' start one by one"
        raise UsageError(
            message, f"{LIGHTHOUSE}=http://HOST:29510 {NUMBER}=0 dist-train run CONFIG, and {NUMBER}=1 ..."
        )
    base = checked.run.dir
    base = base if isinstance(base, str) else option_text(base or Path("runs") / checked.run.name)
    # The script, the agent and all ranks have one working copy, whatever each one's variables are.
    spool = (
        ("--run.spool", str(checked.run_dir.absolute().parent)) if checked.store and launcher != "kubernetes" else ()
    )
    grace = math.ceil(checked.stop.grace)
    defaults: dict[str, Any] = {
        "python": "python" if launcher == "kubernetes" else sys.executable,
        "rdzv_id": checked.run.name,
        "shutdown_timeout": grace + _SAVING_SECONDS,
        "stop_before": max(Job.stop_before, grace + 4 * _SAVING_SECONDS),
    }
    words = [word for word in (launcher, *typed) if word not in ("--submit", "--follow")]
    job = Job(
        arguments=(config, *settings, "--run.dir", base, *spool),
        run_dir=base,
        home=option_text(checked.run_dir.absolute() if checked.store else checked.run_dir),
        name=checked.run.name,
        environment=env,
        made_by=f"dist-train launch {shlex.join(words)}",
        sbatch=tuple((name.removeprefix("--sbatch."), value) for name, value in sbatch),
        **(defaults | {name: value for name, value in values.items() if value is not None}),
    )
    check(launcher, job)
    if launcher == "slurm":
        return _batch(job, dry_run, submit, follow)
    if launcher == "kubernetes":
        if values["restarts"] is None and job.nodes[0] < job.nodes[1]:
            job = replace(job, restarts=_ELASTIC_RESTARTS)
        text = kubernetes.manifest(replace(job, config_text=loaded.path.read_text(encoding="utf-8")))
        print(text if dry_run else kubernetes.apply(text), end="" if dry_run else "\n")
        return EXIT_DONE
    if launcher == "torchrun" and job.nodes[1] == 1 and not job.local_addr and not is_own(socket.getfqdn()):
        # The ranks would wait for ever for rank 0 at the host's name, as in a container whose name nobody knows.
        job = replace(job, local_addr="127.0.0.1")
    if job.local_addr and "GLOO_SOCKET_IFNAME" not in os.environ:
        job = replace(job, interface=interface(job.local_addr, dry_run))
    command = (torchrun if launcher == "torchrun" else accelerate).command(job)
    if dry_run:
        print(command.shell(), end="")
        return EXIT_DONE
    if job.is_host and job.nodes[1] > 1 and not is_free(torchrun.port(job)):
        raise SetupError(f"port {torchrun.port(job)} is taken on this node", "--port PORT, the same on all nodes")
    return start(job, command)


_HELP = {
    "torchrun": "Starts torchrun's agent on this machine, and the ranks under it.",
    "accelerate": "Starts `accelerate launch` on this machine.",
    "kubernetes": "Gives a JobSet to kubectl: a pod for each node, torchrun in each. --dry-run prints its manifest.",
    "slurm": "Prints a batch script, or gives it to sbatch.\n\nAny option of sbatch is --sbatch.KEY VALUE: true for a "
    "flag, false leaves ours out.",
}
for _name in LAUNCHERS:
    _kind = _Slurm if _name == "slurm" else _Launcher
    launch.add_command(_kind(_name, callback=partial(_launch, _name), params=options(_name), help=_HELP[_name]))


def start(job: Job, command: Command) -> int:
    """Starts the command in the foreground, waits for it, and returns the exit code of the launch."""
    if shutil.which(command.words[0]) is None:
        raise SetupError(f"{command.words[0]} is no program", "--python PATH, or leave the option out")
    home = RunDir(Path(job.home))
    before = _status_before(home)
    if job.nodes[1] == 1:  # else another node's ranks may be running already, and belong to this start
        wait_until_free(home.path, lambda text: print(f"dist-train: {text}", file=sys.stderr))
    Path(job.logs).mkdir(parents=True, exist_ok=True)
    for path, text in command.files.items():
        Path(path).write_text(text, encoding="utf-8")
    exit_file = Path(job.exit_file)
    exit_file.unlink(missing_ok=True)
    process = subprocess.Popen(command.words, env=os.environ | command.environ)
    with _passing_on(process.send_signal, home.stop) as asked:
        code = wait(process, job.shutdown_timeout + _PATIENCE_SECONDS)
    after = read_status(home)
    result = outcome(before, after, code, exit_file.exists(), bool(asked), elastic=job.nodes[0] < job.nodes[1])
    if result == EXIT_FAILED:
        print(f"dist-train: {failure(before, after)}\n  -> the ranks' output is in {job.logs}", file=sys.stderr)
    return result


def _status_before(home: RunDir) -> Any:
    """Returns status.json of an earlier attempt, or None.

    Raises:
        RunDirError: the directory belongs to something else.
    """
    refuse_foreign(home)
    return read_status(home)


@contextmanager
def _passing_on(send: Callable[[int], None], stop: Path) -> Iterator[list[int]]:
    """Passes SIGTERM on to the agent, which stops the ranks, and turns SIGUSR2 into the file STOP; yields both.

    SIGUSR2 itself would end the agent. Ctrl-C needs no help: the agent is in our process group.
    """

    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        send(number)

    def ask_by_file(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        stop.touch()

    def leave_to_the_agent(number: int, frame: FrameType | None) -> None:
        return None

    earlier = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
        signal.SIGINT: signal.signal(signal.SIGINT, leave_to_the_agent),
        signal.SIGUSR2: signal.signal(signal.SIGUSR2, ask_by_file),
    }
    try:
        yield asked
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
        raise UsageError("--follow shows one job, an array is several", "--submit, then tail -F slurm-JOB_TASK.out")
    home = RunDir(Path(job.home))
    before = _status_before(home)
    number = sbatch.submit(text)
    print(number, flush=True)
    if not follow:
        return EXIT_DONE
    code = sbatch.follow(number, sys.stdout)
    return outcome(before, read_status(home), code)
