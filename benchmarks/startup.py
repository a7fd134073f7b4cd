"""Seconds from the command to the first step, and the memory of a rank, beside `import torch` alone.

    pip install -e '.[quickstart]'
    python benchmarks/startup.py [--rounds 5]

One process of one thread trains an epoch of configs/quickstart.yaml (digits, small_resnet). `wall` is the time of the
first line of metrics, which follows the first step. `user` and `MB` are the processor time and the largest resident
memory of the whole process, as the kernel counts them (os.wait4). Both ways take turns; medians count.

The bars: the first step within 1.5 s of `import torch`, and 450 MB. A miss exits with 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS, MEGABYTES = 1.5, 450


def ended(words: list[str], printed: Path) -> tuple[float, resource.struct_rusage]:
    """Runs a command to its end; returns the time of its start and what the kernel counted."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with printed.open("wb") as out:
        begin = time.time()
        process = subprocess.Popen([sys.executable, *words], env=environment, stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}:\n{printed.read_text()[-4000:]}")
    return begin, usage


def ours(folder: Path) -> tuple[float, float, float]:
    """Returns seconds to the first step, user seconds, and MB."""
    words = ["-m", "dist_train", "run", str(ROOT / "configs" / "quickstart.yaml"), "--run.dir", str(folder)]
    words += ["--stages", "[train]", "--train.epochs", "1", "--log.every_steps", "1"]
    begin, usage = ended(words, folder.with_suffix(".txt"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = next(line["time"] for line in lines if "loss" in line)
    return first - begin, usage.ru_utime, usage.ru_maxrss / 1024


def torch_alone(folder: Path) -> tuple[float, float, float]:
    begin, usage = ended(["-c", "import torch"], folder.with_suffix(".txt"))
    return time.time() - begin, usage.ru_utime, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, load {load:.1f} before", flush=True)
    found: dict[str, list[tuple[float, float, float]]] = {"dist_train": [], "import torch": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            found["dist_train"].append(ours(Path(folder) / f"run-{number}"))
            found["import torch"].append(torch_alone(Path(folder) / f"torch-{number}"))
    middle = {}
    for name, rows in found.items():
        middle[name] = [statistics.median(column) for column in zip(*rows, strict=True)]
        wall, user, size = middle[name]
        print(f"{name:12} wall {wall:5.2f} s, user {user:5.2f} s, {size:6,.0f} MB")
    more, size = middle["dist_train"][0] - middle["import torch"][0], middle["dist_train"][2]
    missed = more > SECONDS or size > MEGABYTES
    print(f"bar: torch + {SECONDS} s and {MEGABYTES} MB: torch + {more:.2f} s and {size:,.0f} MB", end=" ")
    print("(MISSED)" if missed else "(passed)")
    sys.exit(missed)


if __name__ == "__main__":
    main()
