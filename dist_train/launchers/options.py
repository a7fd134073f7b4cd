"""The options of `dist-train launch`, and what they make of a Job."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dist_train.errors import UsageError

LAUNCHERS = ("torchrun", "accelerate", "slurm")
_WITH_PORT = re.compile(r"([^:]*|\[.*\]):\d*")  # more colons are an IPv6 address
_SBATCH = re.compile(r"--[a-z][a-z-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)


def _count(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and int(text) >= least):
            raise ValueError(f"must be a whole number, at least {least}")
        return int(text)

    return parse


def _nodes(text: str) -> tuple[int, int]:
    least, _, most = text.partition(":")
    numbers = _count(1)(least), _count(1)(most or least)
    if numbers[0] > numbers[1]:
        raise ValueError("must be N or MIN:MAX")
    return numbers


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < 65536):
        raise ValueError("must be a port, 1 to 65535")
    return int(text)


def _host(text: str) -> str:
    host = _WITH_PORT.fullmatch(text)
    if host:
        raise ValueError(f"must be a host alone; a port has an option of its own: --endpoint {host[1]} --port PORT")
    return text


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("must be true or false")
    return text == "true"


def _variable(text: str) -> tuple[str, str]:
    if not _VARIABLE.fullmatch(text):
        raise ValueError("must be NAME=VALUE")
    name, _, value = text.partition("=")
    return name, value


@dataclass(frozen=True)
class Option:
    """One option: the field of Job that it sets, how its value is read (None: a flag), and for which launchers."""

    field: str
    value: str
    parse: Callable[[str], Any] | None
    help: str
    launchers: tuple[str, ...] = LAUNCHERS
    repeats: bool = False

    @property
    def name(self) -> str:
        return "--" + self.field.replace("_", "-")


_AGENTS, _SLURM = ("torchrun", "accelerate"), ("slurm",)
OPTIONS = (
    Option("dry_run", "", None, "print what would run, and run nothing"),
    Option("nodes", "N", _nodes, "nodes; MIN:MAX for torchrun and slurm"),
    Option("nproc_per_node", "P", _count(1), "processes on each node"),
    Option("restarts", "R", _count(0), "how often failed ranks are started again on the same nodes"),
    Option("port", "PORT", _port, "where the ranks meet; by default derived from the job"),
    Option("gpus_per_process", "G", _count(0), "GPUs of each process; 0: CPUs", ("accelerate", "slurm")),
    Option("shutdown_timeout", "SECONDS", _count(1), "between SIGTERM and SIGKILL: time for a checkpoint"),
    Option("env", "NAME=VALUE", _variable, "a variable for the ranks; repeatable", LAUNCHERS, repeats=True),
    Option("python", "PATH", str, "the interpreter of the ranks; by default this one"),
    Option("endpoint", "HOST", _host, "several nodes: the node where they meet", _AGENTS),
    Option("rdzv_id", "ID", str, "several nodes: the same on all; by default the run's name", _AGENTS),
    Option("local_addr", "ADDR", str, "this node's address, where its name does not resolve to it", ("torchrun",)),
    Option(
        "is_host", "true|false", _boolean, "whether this node is the endpoint, where names cannot tell", ("torchrun",)
    ),
    Option("node_rank", "K", _count(0), "several nodes: this one's number, from 0", ("accelerate",)),
    Option(
        "config_file",
        "FILE",
        str,
        "your own accelerate config file; its number of processes, or --nproc-per-node above 1",
        ("accelerate",),
    ),
    Option("submit", "", None, "give the script to sbatch, and print the job's id", _SLURM),
    Option("follow", "", None, "submit, show the job's output until it ends, and return its exit code", _SLURM),
    Option("task_per_rank", "", None, "srun starts every rank, instead of one torchrun a node", _SLURM),
    Option("cpus_per_process", "C", _count(1), "CPUs of each process", _SLURM),
    Option("time", "TIME", str, "as sbatch takes it: 2:00:00", _SLURM),
    Option("partition", "NAME", str, "", _SLURM),
    Option("account", "NAME", str, "", _SLURM),
    Option("stop_before", "SECONDS", _count(1), "how long before its end the job is told to save and stop", _SLURM),
    Option("requeues", "N", _count(0), "how often a preempted job goes back into the queue", _SLURM),
)
_BY_NAME = {option.name: option for option in OPTIONS}


def split(words: Sequence[str]) -> tuple[str, dict[str, Any], list[str]]:
    """The launcher, the values of the options before the configuration, and the rest: the configuration and its options.

    Raises:
        UsageError: an unknown launcher or option, or a value that it does not take.
    """
    if not words or words[0] not in LAUNCHERS:
        given = f"unknown launcher {words[0]}" if words else "launch needs a launcher"
        raise UsageError(given, f"dist-train launch {{{','.join(LAUNCHERS)}}} [OPTION ...] CONFIG")
    launcher, *rest = words
    values: dict[str, Any] = {"sbatch": (), "env": ()}
    while rest and rest[0].startswith("-"):
        name, equals, text = rest.pop(0).partition("=")
        option = _option(name, launcher, text if equals else next((word for word in rest[:1] if word[:1] != "-"), ""))
        if option.parse is None:
            if equals:
                raise UsageError(f"{name} takes no value", f"type {name} alone")
            values[option.field] = True
            continue
        if not equals and (not rest or rest[0].startswith("--")):
            raise UsageError(f"{name} has no value", f"type {name} {option.value}")
        try:
            value = option.parse(text if equals else rest.pop(0))
        except ValueError as error:
            raise UsageError(f"{name} {error}", f"type {name} {option.value}") from None
        values[option.field] = (*values[option.field], value) if option.repeats else value
    if not rest:
        raise UsageError(
            f"launch {launcher} needs a configuration", f"dist-train launch {launcher} [OPTION ...] CONFIG"
        )
    return launcher, values, rest


def _option(name: str, launcher: str, value: str) -> Option:
    if name.startswith("--sbatch.") and launcher == "slurm":
        key = name.removeprefix("--sbatch.")
        return Option("sbatch", "VALUE", lambda text: (key, text), "", _SLURM, repeats=True)
    option = _BY_NAME.get(name)
    if option is not None and launcher in option.launchers:
        return option
    if option is not None:
        raise UsageError(f"{name} is not for {launcher}", f"it is for {', '.join(option.launchers)}")
    known = [other.name for other in OPTIONS if launcher in other.launchers]
    alike = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if alike:
        raise UsageError(f"launch {launcher} has no option {name}", f"did you mean {alike[0]}?")
    if launcher == "slurm" and _SBATCH.fullmatch(name):
        hint = f"for an option of sbatch: --sbatch.{name.removeprefix('--')} {value or 'true'}; those of the configuration come after it"
        raise UsageError(f"launch {launcher} has no option {name}", hint)
    hint = "options of the configuration come after it: launch LAUNCHER [OPTION ...] CONFIG [--dotted.key VALUE ...]"
    raise UsageError(f"launch {launcher} has no option {name}", hint)


def details() -> str:
    """The options, as --help shows them."""
    rows = []
    for option in OPTIONS:
        where = "" if option.launchers == LAUNCHERS else f" ({', '.join(option.launchers)})"
        rows.append((f"{option.name} {option.value}".rstrip(), f"{option.help}{where}".strip()))
    rows.append(
        ("--sbatch.KEY VALUE", "any other option of sbatch; `true` for a flag, `false` leaves ours out (slurm)")
    )
    width = max(len(left) for left, _ in rows)
    return "\n".join(f"  {left:<{width}}  {right}" for left, right in rows)
