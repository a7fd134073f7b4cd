"""All checks in the order of their output; each runs in a process of its own, with a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Collection
from dataclasses import asdict, dataclass

from dist_train.doctor.base import Line, Section, Subject, bad


@dataclass(frozen=True)
class Check:
    """A check of one section.

    Attributes:
        name: its name in messages.
        function: "module:function"; it takes a Subject and returns Lines.
        deadline: seconds.
        alone: True where it measures a time, and no other check may run meanwhile.
    """

    section: str
    name: str
    function: str
    deadline: float = 60.0
    alone: bool = False


_HERE = "dist_train.doctor"
CHECKS = (
    Check("ranks", "the rank plan", f"{_HERE}.ranks:check", 20.0),
    Check("versions", "versions", f"{_HERE}.versions:check"),
    Check("devices", "devices", f"{_HERE}.devices:check"),
    Check("network", "interfaces", f"{_HERE}.network:check_interfaces", 20.0),
    Check("network", "the host name", f"{_HERE}.network:check_host_name", 20.0),
    Check("network", "ports", f"{_HERE}.network:check_ports", 20.0),
    Check("all-reduce", "the all-reduce of two ranks", f"{_HERE}.all_reduce:check", alone=True),
    Check("machine", "shared memory", f"{_HERE}.machine:check_shared_memory", 20.0),
    Check("machine", "limits", f"{_HERE}.machine:check_limits", 20.0),
    Check("machine", "the run directory's disk", f"{_HERE}.disk:check", 30.0, alone=True),
    Check("machine", "the object store", f"{_HERE}.object_store:check", 120.0),
    Check("slurm", "Slurm", f"{_HERE}.slurm:check", 30.0),
    Check("wandb", "wandb", f"{_HERE}.wandb:check"),
    Check("quantization", "pt2e", f"{_HERE}.quantization:check_pt2e"),
    Check("quantization", "fx", f"{_HERE}.quantization:check_fx"),
    Check("quantization", "eager", f"{_HERE}.quantization:check_eager"),
    Check("lowering", "openvino", f"{_HERE}.lowering:check_openvino"),
    Check("lowering", "onnx", f"{_HERE}.lowering:check_onnx"),
    Check("lowering", "executorch", f"{_HERE}.lowering:check_executorch"),
    Check("lowering", "inductor", f"{_HERE}.lowering:check_inductor", 120.0),
)
SECTIONS = tuple(dict.fromkeys(check.section for check in CHECKS))
_AT_ONCE = 4


async def examine(subject: Subject, names: Collection[str] = SECTIONS) -> AsyncIterator[Section]:
    """Yields the sections of these names in order, each as soon as its checks are done."""
    chosen = [check for check in CHECKS if check.section in names]
    found: dict[str, list[Line]] = {}
    for check in chosen:
        if check.alone:
            found[check.function] = await run(check, subject)
    slots = asyncio.Semaphore(max(2, min(_AT_ONCE, len(os.sched_getaffinity(0)))))

    async def in_turn(check: Check) -> list[Line]:
        async with slots:
            return await run(check, subject)

    async with contextlib.AsyncExitStack() as stack:
        tasks = {}
        for check in chosen:
            if check.function not in found:
                tasks[check.function] = task = asyncio.ensure_future(in_turn(check))
                stack.callback(task.cancel)
        for name in SECTIONS:
            lines: list[Line] = []
            for check in chosen:
                if check.section == name:
                    lines += found.get(check.function) or await tasks[check.function]
            if lines:
                yield Section(name, tuple(lines))


async def run(check: Check, subject: Subject) -> list[Line]:
    """Runs a check and returns its lines; a bad line where it crashes or is late. Ends all that it started."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"{_HERE}.child", check.function, json.dumps(asdict(subject))),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        answer, complaint = await asyncio.wait_for(process.communicate(), check.deadline)
    except asyncio.TimeoutError:
        hint = "look at the load of this machine (top), and at file systems and name servers that do not answer"
        return [bad(f"{check.name}: no answer within {check.deadline:g} s", hint)]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    try:
        return [Line(**each) for each in json.loads(answer)]
    except ValueError:
        return [bad(f"{check.name}: {_ending(process.returncode, complaint.decode(errors='replace'))}", _again(check))]


def _again(check: Check) -> str:
    return f"for the whole message: python -m {_HERE}.child {check.function}"


def _ending(code: int | None, complaint: str) -> str:
    if code is not None and code < 0:
        return f"the check was ended by {signal.Signals(-code).name}"
    last = next((line for line in reversed(complaint.splitlines()) if line.strip()), "it said nothing")
    return f"the check failed: {last.strip()}"
