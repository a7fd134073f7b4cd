"""Seconds from the command to the first new step after a SIGKILL in mid-epoch: ours, accelerate, Lightning.

    python benchmarks/resume.py [--rows 60000 10000000] [--rounds 3] [--interval 100] [--kill-after 320] [--ranks 2]

A small perceptron on rows that are made of their number, so that 10 million take no memory; batches of 128 over two CPU
ranks, each with one data worker, and a checkpoint every 100 steps. All ranks are killed after step 320, and the same
command starts them again. The methods, which take turns:

- ours: `dist-train run`, with the ledger off and a line of metrics for each step
- accelerate: `save_state`, then `load_state` with `skip_first_batches`
- lightning: `ModelCheckpoint`, then `fit(ckpt_path=...)`

Beside the seconds stand those to the first step of a new run, and the steps that were done before the kill and are done
again. A ratio is a peer's seconds divided by ours, in the same round; the median counts. The bars: ours resumes within
one second more than it starts, by the medians, and loses no more steps than the interval; else the script exits with 1.
It takes about ten minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MORE = 1.0  # seconds that a resume may take beyond a start
ROOT = Path(__file__).resolve().parents[1]
METHODS = ("ours", "accelerate", "lightning")
DEADLINE = 600.0


def command(method: str, rows: int, options: argparse.Namespace, folder: Path, attempt: int) -> list[str]:
    if method != "ours":
        told = {"rows": rows, "batch": options.batch, "interval": options.interval, "folder": str(folder)}
        told["out"] = str(folder / f"steps-{attempt}")
        return [sys.executable, str(ROOT / "benchmarks" / "resume_peers.py"), method, json.dumps(told)]
    config = {
        "run": {"name": "resume", "dir": str(folder / "run"), "device": "cpu", "threads_per_rank": 1},
        "data": {"name": "numbered_rows", "args": {"rows": rows}, "global_batch_size": options.batch, "workers": 1},
        "model": {"name": "mlp", "args": {"size": 8}},
        "stages": ["train"],
        "train": {"epochs": 1000, "optim": {"lr": 0.01}, "schedule": {"name": "constant"}},
        "checkpoint": {"every_steps": options.interval},
        "log": {"every_steps": 1},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    return [sys.executable, "-m", "dist_train", "run", str(path), "--import", "resume_peers"]


@contextmanager
def ranks(words: list[str], size: int, printed: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Starts the ranks, and kills all their processes at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    with printed.open("wb") as out:
        for rank in range(size):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            environment = {
                **os.environ,
                **{name: str(value) for name, value in variables.items()},
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
                "ACCELERATE_USE_CPU": "1",
                "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "benchmarks"))),
            }
            started.append(
                subprocess.Popen(words, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
            )
        try:
            yield started
        finally:
            for process in started:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            for process in started:
                process.wait()


def steps(method: str, folder: Path, attempt: int) -> list[tuple[float, int]]:
    """Returns (time, step) of the steps that an attempt has done, counted from 1."""
    path = folder / "run" / "metrics.jsonl" if method == "ours" else folder / f"steps-{attempt}"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    if method != "ours":
        return [(at, step) for at, step in lines]
    return [(each["time"], each["step"] + 1) for each in lines if each.get("attempt") == attempt and "loss" in each]


def until(method: str, folder: Path, attempt: int, least: int, started: list[subprocess.Popen[bytes]]) -> None:
    """Waits until an attempt has done the step `least`."""
    end = time.monotonic() + DEADLINE
    while not any(step >= least for _, step in steps(method, folder, attempt)):
        ended = any(process.poll() is not None for process in started)
        if ended or time.monotonic() > end:
            raise SystemExit(f"{method} did not come to step {least}:\n{(folder / 'printed').read_text()[-4000:]}")
        time.sleep(0.1)


def measure(method: str, rows: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    seconds, done = [], 0
    for attempt, least in enumerate((options.kill_after, 1)):
        begin = time.time()
        words = command(method, rows, options, folder, attempt)
        with ranks(words, options.ranks, folder / "printed") as started:
            until(method, folder, attempt, least, started)
        found = steps(method, folder, attempt)
        seconds.append(found[0][0] - begin)
        lost = done - found[0][1] + 1
        done = max(step for _, step in found)
    row = {"method": method, "rows": rows, "start": seconds[0], "resume": seconds[1], "lost": lost}
    print(
        f"{rows:10,} rows {method:10} start {row['start']:5.1f} s, resume {row['resume']:5.1f} s, {lost} steps again",
        flush=True,
    )
    return row


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> list[str]:
    """Prints medians and ratios; returns what misses the bars."""
    missed = []
    for size in options.rows:
        own = {each: [row for row in rows if row["rows"] == size and row["method"] == each] for each in options.methods}
        middle = {
            (method, key): statistics.median(row[key] for row in found)
            for method, found in own.items()
            for key in ("start", "resume")
        }
        for method, found in own.items():
            ratio = ""
            if "ours" in own and method != "ours":
                each = [theirs["resume"] / ours["resume"] for theirs, ours in zip(found, own["ours"], strict=True)]
                ratio = f", {statistics.median(each):.2f} ({min(each):.2f}..{max(each):.2f}) of ours"
            most = max(row["lost"] for row in found)
            print(
                f"{size:10,} rows {method:10} start {middle[method, 'start']:.1f} s, resume "
                f"{middle[method, 'resume']:.1f} s, at most {most} steps again{ratio}"
            )
        if "ours" in own:
            beyond = middle["ours", "resume"] - middle["ours", "start"]
            if beyond > MORE:
                missed.append(f"{size:,} rows: a resume takes {beyond:.1f} s more than a start")
            if any(row["lost"] > options.interval for row in own["ours"]):
                missed.append(f"{size:,} rows: more steps are lost than the interval")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[60_000, 10_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--interval", type=int, default=100, help="steps between two checkpoints")
    parser.add_argument("--kill-after", type=int, default=320, help="step after which all ranks are killed")
    parser.add_argument("--batch", type=int, default=128, help="over all ranks")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json", type=Path, default=Path("resume.json"))
    options = parser.parse_args()
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for number in range(options.rounds):
            first = number % len(options.methods)
            for size in options.rows:
                for method in options.methods[first:] + options.methods[:first]:
                    rows.append(measure(method, size, options, Path(name) / f"{method}-{size}-{number}"))
    missed = report(rows, options)
    options.json.write_text(json.dumps({"rows": rows, "missed": missed}, indent=1))
    print(f"bars: a resume within a start + {MORE:.0f} s, steps within the interval: {'; '.join(missed) or 'passed'}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
