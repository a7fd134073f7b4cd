"""The options of `dist-train launch`, each with the launchers that take it; their names are fields of Job."""

from __future__ import annotations

from typing import Any

import click

from dist_train.cli.verbs import Valued

LAUNCHERS = ("torchrun", "accelerate", "slurm")
_AGENTS, _SLURM = ("torchrun", "accelerate"), ("slurm",)


def _nodes(text: str) -> tuple[int, int]:
    least, _, most = text.partition(":")
    numbers = [int(part) if part.isascii() and part.isdecimal() else 0 for part in (least, most or least)]
    if not 1 <= numbers[0] <= numbers[1]:
        raise click.BadParameter(f"must be N or MIN:MAX, at least 1, not {text}")
    return numbers[0], numbers[1]


def _host(text: str) -> str:
    host, colon, port = text.rpartition(":")
    bare_ipv6 = ":" in host and not host.startswith("[")
    if colon and not bare_ipv6 and (port.isdecimal() or not port) and not text.endswith("]"):
        raise click.BadParameter(
            f"must be a host alone; a port has an option of its own: --endpoint {host} --port PORT"
        )
    return text


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (equals and name.isascii() and name.isidentifier()):
        raise click.BadParameter("must be NAME=VALUE")
    return name, value


def _flag(name: str, help: str) -> click.Option:
    return click.Option([name], is_flag=True, help=help)


def _option(name: str, metavar: str, type: Any, help: str, multiple: bool = False) -> click.Option:
    return Valued([name], metavar=metavar, type=type, help=help, multiple=multiple)


_ONE, _ZERO = click.IntRange(1), click.IntRange(0)
OPTIONS: tuple[tuple[tuple[str, ...], click.Option], ...] = (
    (LAUNCHERS, _flag("--dry-run", "Print what would run, and run nothing.")),
    (LAUNCHERS, _option("--nodes", "N", _nodes, "Nodes; MIN:MAX for torchrun and slurm.")),
    (LAUNCHERS, _option("--nproc-per-node", "P", _ONE, "Processes on each node.")),
    (LAUNCHERS, _option("--restarts", "R", _ZERO, "How often failed ranks are started again on the same nodes.")),
    (
        LAUNCHERS,
        _option("--port", "PORT", click.IntRange(1, 65535), "Where the ranks meet; by default derived from the job."),
    ),
    (("accelerate", "slurm"), _option("--gpus-per-process", "G", _ZERO, "GPUs of each process; 0: CPUs.")),
    (
        LAUNCHERS,
        _option("--shutdown-timeout", "SECONDS", _ONE, "Between SIGTERM and SIGKILL: time for a checkpoint."),
    ),
    (LAUNCHERS, _option("--env", "NAME=VALUE", _variable, "A variable for the ranks; repeatable.", multiple=True)),
    (
        LAUNCHERS,
        _option("--python", "PATH", click.Path(), "The interpreter of the ranks; by default this one."),
    ),
    (_AGENTS, _option("--endpoint", "HOST", _host, "Several nodes: the node where they meet.")),
    (_AGENTS, _option("--rdzv-id", "ID", str, "Several nodes: the same on all; by default the run's name.")),
    (("torchrun",), _option("--local-addr", "ADDR", str, "This node's address, if its name does not resolve to it.")),
    (
        ("torchrun",),
        _option(
            "--is-host",
            "true|false",
            click.BOOL,
            "Says that this node is the endpoint, or is not, where names cannot tell.",
        ),
    ),
    (("accelerate",), _option("--node-rank", "K", _ZERO, "Several nodes: this one's number, from 0.")),
    (
        ("accelerate",),
        _option(
            "--config-file",
            "FILE",
            click.Path(),
            "Your own accelerate config file; its number of processes, or --nproc-per-node above 1.",
        ),
    ),
    (_SLURM, _flag("--submit", "Give the script to sbatch, and print the job's id.")),
    (_SLURM, _flag("--follow", "Submit, show the job's output until it ends, and return its exit code.")),
    (_SLURM, _flag("--task-per-rank", "srun starts every rank, instead of one torchrun a node.")),
    (_SLURM, _option("--cpus-per-process", "C", _ONE, "CPUs of each process.")),
    (_SLURM, _option("--time", "TIME", str, "As sbatch takes it: 2:00:00.")),
    (_SLURM, _option("--partition", "NAME", str, "As sbatch takes it.")),
    (_SLURM, _option("--account", "NAME", str, "As sbatch takes it.")),
    (
        _SLURM,
        _option("--stop-before", "SECONDS", _ONE, "How long before its end the job is told to save and stop."),
    ),
    (_SLURM, _option("--requeues", "N", _ZERO, "How often a preempted job goes back into the queue.")),
)


def options(launcher: str) -> list[click.Parameter]:
    return [option for launchers, option in OPTIONS if launcher in launchers]


def takers(name: str) -> list[str]:
    """Returns the launchers that take the option of this name."""
    return [launcher for launchers, option in OPTIONS if name in option.opts for launcher in launchers]
