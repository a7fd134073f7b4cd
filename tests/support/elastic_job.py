"""A run on nodes that come and go under torchrun: agents on this machine, each a node of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from dist_train.run_dir.files import read_json
from dist_train.run_dir.ledger import check
from dist_train.run_dir.paths import RunDir
from tests.support.ranks import ROOT, free_port

CONFIG = """
run: {name: elastic, device: cpu, threads_per_rank: 1}
data: {name: paced, global_batch_size: 8, workers: 0}
model: {name: mlp, args: {size: 8, hidden: 8}}
stages: [train]
train: {epochs: 100, evaluate_every: 25, optim: {lr: 0.01}}
log: {every_steps: 1}
trackers: [jsonl]
debug: {ledger: true}
"""
DEADLINE = 240.0


class Node:
    """An agent with its ranks."""

    def __init__(self, name: str, words: list[str], folder: Path) -> None:
        self.name = name
        self._out = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the node)
        variables = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "SLURM", "PET_"))}
        variables |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", *words], cwd=folder, env=variables, stdout=self._out, stderr=subprocess.STDOUT
        )

    def leave(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def printed(self) -> str:
        self._out.seek(0)
        return self._out.read()

    def kill(self) -> None:
        try:
            family = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.kill()
        self.process.wait(30)
        self._out.close()


class Job:
    """One run on MIN:MAX nodes. The first one hosts the rendezvous, unless `hosted`: then none does."""

    def __init__(self, folder: Path, nodes: str) -> None:
        (folder / "paced.yaml").write_text(CONFIG)
        self._folder, self._range, self.port = folder, nodes, str(free_port())
        self.hosted = False
        self.nodes: list[Node] = []
        self.run_dir = RunDir(folder / "run")
        self._settings = ["paced.yaml", "--import", "tests.support.paced_data", "--run.dir", "run"]

    def node(self, *settings: str, addr: str = "127.0.0.1", restarts: int = 5, ranks: int = 1) -> Node:
        """Starts an agent by torchrun's own command, with a short wait for further nodes."""
        words = [
            *("torch.distributed.run", "--nnodes", self._range, "--nproc-per-node", str(ranks)),
            *("--max-restarts", str(restarts), "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{self.port}"),
            *(
                "--rdzv-id",
                "elastic",
                "--rdzv-conf",
                f"last_call_timeout=1,is_host={self._is_host()}",
                "--local-addr",
                addr,
            ),
            *("-m", "dist_train", "run", *self._settings, *settings),
        ]
        return self._started(words)

    def launch(self, *settings: str) -> Node:
        """Starts an agent by `dist-train launch`."""
        words = [
            *("dist_train", "launch", "torchrun", "--nodes", self._range, "--nproc-per-node", "1", "--restarts", "5"),
            *("--endpoint", "127.0.0.1", "--port", self.port, "--is-host", self._is_host()),
            *("--local-addr", "127.0.0.1", *self._settings, *settings),
        ]
        return self._started(words)

    def _is_host(self) -> str:
        return str(not self.nodes and not self.hosted).lower()

    def _started(self, words: list[str]) -> Node:
        self.nodes.append(Node(f"node {len(self.nodes)}", words, self._folder))
        return self.nodes[-1]

    def make(self, name: str) -> None:
        (self._folder / name).touch()

    def remove(self, name: str) -> None:
        (self._folder / name).unlink()

    def status(self) -> Any:
        return read_json(self.run_dir.status)

    def steps(self) -> list[dict[str, Any]]:
        """Returns rank 0's lines of the ledger, without a last one that is being written."""
        file = self.run_dir.ledger_of(0)
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def reaches(self, world_size: int) -> None:
        """Waits until the newest attempt has made steps with this number of ranks, in one that began after now."""
        began = max((step["attempt"] for step in self.steps()), default=-1)

        def reached() -> bool:
            steps = self.steps()
            return bool(steps) and steps[-1]["world_size"] == world_size and steps[-1]["attempt"] > began

        self.until(reached, f"{world_size} ranks")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < end, f"no {what} within {DEADLINE:.0f} s:\n{self.printed()}"
            time.sleep(0.1)

    def code(self, node: Node) -> int:
        try:
            return node.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{node.name} still runs after {DEADLINE:.0f} s:\n{self.printed()}") from None

    def printed(self) -> str:
        return "\n".join(f"--- {node.name}\n{node.printed()}" for node in self.nodes)

    def ends_done(self) -> None:
        assert self.status()["state"] == "done", self.printed()
        report = check(self.run_dir.path)
        assert report.ok, str(report)
