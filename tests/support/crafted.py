"""Runs our readers on crafted files, in a child process whose memory is measured."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

MOST_MEGABYTES = 300.0  # above the imports
SECONDS = 120.0  # a generous end: the machine may be busy

_CHILD = """
import json, sys

def kibibytes(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))

from dist_train.errors import DistTrainError
{imports}
before = kibibytes("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins here
kind, text = "", ""
try:
    {call}
except DistTrainError as error:
    kind, text = type(error).__name__, str(error)
print(json.dumps([kind, text, (kibibytes("VmHWM") - before) / 1024]))
"""


@dataclass(frozen=True)
class Refusal:
    """The error of ours that a call ended with, "" for none; another error fails the test with its traceback."""

    kind: str
    text: str
    megabytes: float


def refusal(imports: str, call: str, *arguments: str | Path) -> Refusal:
    """Returns how `call` ended in a fresh process, where `sys.argv[1:]` are the arguments, and its peak memory."""
    child = subprocess.run(
        [sys.executable, "-c", _CHILD.format(imports=imports, call=call), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return Refusal(*json.loads(child.stdout.splitlines()[-1]))


def inflated(path: Path, name: str, size: int) -> None:
    """Writes an archive of a few MB, with one file that would have `size` bytes of zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w", force_zip64=True) as file:
        for _ in range(size // 2**24):
            file.write(bytes(2**24))
