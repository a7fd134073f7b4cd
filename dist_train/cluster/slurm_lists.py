"""Slurm's short forms: lists of hosts, and tasks per node."""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import product

_PART = re.compile(r"([^\[\],]|\[[^\[\]]*\])+")
_PIECE = re.compile(r"\[([^\[\]]*)\]|([^\[\]]+)")
_COUNT = re.compile(r"([1-9]\d*)(?:\(x([1-9]\d*)\))?")


def parse_hostlist(text: str) -> list[str]:
    """Returns the hosts of a Slurm host list, in its order: `gpu[01-03,7],login1` has five.

    Raises:
        ValueError: it is no host list.
    """
    hosts: list[str] = []
    position = 0
    while position < len(text):
        part = _PART.match(text, position)
        if part is None:
            raise ValueError(f"not a host list: {text!r}")
        pieces = [_numbers(inner) if literal == "" else [literal] for inner, literal in _PIECE.findall(part.group())]
        hosts += ["".join(name) for name in product(*pieces)]
        position = part.end()
        if position < len(text):
            if text[position] != "," or position + 1 == len(text):
                raise ValueError(f"not a host list: {text!r}")
            position += 1
    if not hosts:
        raise ValueError("an empty host list")
    return hosts


def _numbers(inner: str) -> list[str]:
    """Expands `01-03,7` to texts; leading zeros are kept."""
    found = []
    for item in inner.split(","):
        first, dash, last = item.partition("-")
        if not first.isdecimal() or (dash and (not last.isdecimal() or int(last) < int(first))):
            raise ValueError(f"not a range of numbers: [{inner}]")
        found += [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
    return found


def show_hostnames(nodelist: str) -> list[str]:
    """Returns the hosts of a list, expanded by Slurm's scontrol, or by `parse_hostlist` where that is not installed.

    Raises:
        ValueError: it is no host list.
    """
    if shutil.which("scontrol") is None:
        return parse_hostlist(nodelist)
    answer = subprocess.run(
        ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, timeout=30, check=False
    )
    return answer.stdout.split() if answer.returncode == 0 and answer.stdout else parse_hostlist(nodelist)


def parse_tasks_per_node(text: str) -> list[int]:
    """Returns the tasks of each node: `2(x3),1` is 2, 2, 2, 1.

    Raises:
        ValueError: it is not of this form.
    """
    tasks: list[int] = []
    for item in text.split(","):
        match = _COUNT.fullmatch(item)
        if match is None:
            raise ValueError(f"not a list of tasks per node: {text!r}")
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks
