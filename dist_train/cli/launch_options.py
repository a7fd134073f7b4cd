"""The options of `dist-train launch`, by the launchers that take them. Each sets the field of Job of its name."""

from __future__ import annotations

import re
from typing import Any

import click

from dist_train.cli.verbs import Valued, Whole

LAUNCHERS = ("torchrun", "accelerate", "slurm", "kubernetes")
_WITH_PORT = re.compile(r"([^:]*|\[.*\]):\d*")  # more colons are an IPv6 address
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)


def _nodes(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", text, re.ASCII)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most:
        raise click.BadParameter("must be N or MIN:MAX, at least 1")
    return least, most


def _host(text: str) -> str:
    if host := _WITH_PORT.fullmatch(text):
        raise click.BadParameter(f"must be a host alone; the port has its own option: --endpoint {host[1]} --port PORT")
    return text


def _variable(text: str) -> tuple[str, str]:
    if not _VARIABLE.fullmatch(text):
        raise click.BadParameter("must be NAME=VALUE")
    name, _, value = text.partition("=")
    return name, value


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise click.BadParameter(f"must be true or false, not {text!r}")
    return text == "true"


def _absolute(text: str) -> str:
    if not text.startswith("/"):
        raise click.BadParameter(f"must be an absolute path, not {text!r}")
    return text


def _flag(name: str, help: str) -> click.Option:
    return click.Option([name], is_flag=True, help=help)


def _option(name: str, metavar: str, help: str, type: Any = str, multiple: bool = False) -> click.Option:
    return Valued([name], metavar=metavar, type=type, help=help, multiple=multiple)


_ONE, _ZERO, _PORT = Whole(1), Whole(0), Whole(1, 65535)
OPTIONS = {
    LAUNCHERS: [
        _flag("--dry-run", "Print what would run, and run nothing."),
        _option("--nodes", "N", "Nodes; MIN:MAX except for accelerate.", _nodes),
        _option("--nproc-per-node", "P", "Processes on each node.", _ONE),
        _option("--restarts", "R", "How often failed ranks are started again on the same nodes.", _ZERO),
        _option("--port", "PORT", "Where the ranks meet; by default derived from the job.", _PORT),
        _option("--shutdown-timeout", "SECONDS", "Between SIGTERM and SIGKILL: time for a checkpoint.", _ONE),
        _option("--env", "NAME=VALUE", "A variable for the ranks; repeatable.", _variable, multiple=True),
        _option("--python", "PATH", "The interpreter of the ranks; by default this one, or the image's.", click.Path()),
    ],
    ("torchrun", "accelerate"): [
        _option("--endpoint", "HOST", "Several nodes: the node where they meet.", _host),
        _option("--rdzv-id", "ID", "Several nodes: the same on all; by default the run's name."),
    ],
    ("torchrun",): [
        _option("--local-addr", "ADDR", "This node's address, if its name does not resolve to it."),
        _option("--is-host", "true|false", "Is this node the endpoint? Where names cannot tell.", _truth),
    ],
    ("accelerate",): [
        _option("--node-rank", "K", "Several nodes: this one's number, from 0.", _ZERO),
        _option(
            "--config-file", "FILE", "Your own accelerate config; it or --nproc-per-node says how many.", click.Path()
        ),
    ],
    ("accelerate", "slurm", "kubernetes"): [
        _option("--gpus-per-process", "G", "GPUs of each process; 0: CPUs.", _ZERO)
    ],
    ("slurm",): [
        _flag("--submit", "Give the script to sbatch, and print the job's id."),
        _flag("--follow", "Submit, show the job's output until it ends, and return its exit code."),
        _flag("--task-per-rank", "srun starts every rank, instead of one torchrun a node."),
        _option("--time", "TIME", "As sbatch takes it: 2:00:00."),
        _option("--partition", "NAME", "As sbatch takes it."),
        _option("--account", "NAME", "As sbatch takes it."),
        _option("--stop-before", "SECONDS", "How long before its end the job is told to save and stop.", _ONE),
    ],
    ("slurm", "kubernetes"): [
        _option("--cpus-per-process", "C", "CPUs of each process.", _ONE),
        _option(
            "--requeues", "N", "How often a preempted job is queued again, or pods that failed start again.", _ZERO
        ),
    ],
    ("kubernetes",): [
        _option("--image", "IMAGE", "The pods' container image, with dist_train in it."),
        _option("--claim", "NAME", "The claim of a volume that all pods may write: it holds the run directory."),
        _option("--secret", "NAME", "A Secret whose entries are variables of the pods, as credentials of a store."),
        _option(
            "--mount", "PATH", "Where that volume is in the pods, and their working directory: /workspace.", _absolute
        ),
        _option("--namespace", "NAME", "As kubectl takes it."),
        _option("--memory", "SIZE", "Memory of each pod: 32Gi."),
    ],
}


def options(launcher: str) -> list[click.Parameter]:
    """Returns the options that a launcher takes."""
    return [option for launchers, group in OPTIONS.items() if launcher in launchers for option in group]


def takers(name: str) -> tuple[str, ...]:
    """Returns the launchers that take the option of this name."""
    groups = (launchers for launchers, group in OPTIONS.items() for option in group if name in option.opts)
    return next(groups, ())
