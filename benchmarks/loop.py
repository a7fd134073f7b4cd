"""Time of a training step: ours, bare and with everything on, against loops by hand and by other frameworks.

    pip install -e . lightning pytorch-ignite transformers
    python benchmarks/loop.py [--ranks 1 2] [--rounds 5] [--steps 600] [--only ours_all dataloader]

The model is an MLP 784-64-10 (`mlp`), the data 19,200 images of 28x28 in memory, 32 to a rank in each step, SGD with
momentum, a cosine schedule, float32 on CPUs. With so small a model, the step is what a framework adds to it.

- ours: `dist_train run`, a line of metrics every 100 steps
- ours_all: the same with a moving average, clipping, the ledger, and a line of metrics at every step
- tensors: a loop by hand, as fast as we can write one: batches are indexed out of normalized tensors
- dataloader: the loop that one writes: DistributedSampler, DataLoader in the loop's process, DDP, the loss read every
  100 steps
- accelerate, fabric, lightning, ignite, transformers (Trainer): their own way of the same, with as little as possible
  switched on; left out if not installed

All take turns within a round; every turn is a program of its own. A turn's figure is the mean time of the steps after
the first 100, on rank 0. The table has medians over the rounds: milliseconds, and the ratio to `dataloader` of the same
round. The bars: ours_all at most 1.0 on two ranks, at most 1.1 on one. A miss exits with 1.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
WARM_UP, ROWS = 100, 19_200
BARS = {1: 1.1, 2: 1.0}
# name: the package that it needs
PEERS = {
    "tensors": "torch",
    "dataloader": "torch",
    "accelerate": "accelerate",
    "fabric": "lightning",
    "lightning": "lightning",
    "ignite": "ignite",
    "transformers": "transformers",
}
OURS = {
    "ours": ["--log.every_steps", "100"],
    "ours_all": [
        *("--log.every_steps", "1", "--train.ema_decay", "0.999", "--train.clip_grad_norm", "1"),
        *("--debug.ledger", "true"),
    ],
}
CONFIG = """
run: {{name: loop, seed: 0, threads_per_rank: 1}}
data:
  name: fake
  args: {{num_train: {rows}, num_eval: 64, channels: 1, height: 28, width: 28}}
  global_batch_size: {batch}
model: {{name: mlp}}
stages: [train]
train:
  epochs: {epochs}
  evaluate_every: {epochs}
  optim: {{name: sgd, lr: 0.05}}
  schedule: {{name: cosine}}
"""


def command(ranks: int, *words: str) -> list[str]:
    if ranks == 1:
        return [sys.executable, *words]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *words]


def run(words: list[str], folder: Path) -> str:
    """Returns what the program printed; raises CalledProcessError with it where the program failed."""
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        words, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stdout[-3000:]}")
    return done.stdout


def ours(name: str, ranks: int, steps: int, folder: Path) -> float:
    """Returns milliseconds per step, from the times of metrics.jsonl."""
    batch = 32 * ranks
    # Epochs of 300 steps or more, so that their ends do not count; the last line is that of the last step.
    epochs = -(-(WARM_UP + steps) * batch // ROWS)
    (folder / "loop.yaml").write_text(CONFIG.format(rows=ROWS, batch=batch, epochs=epochs))
    place = folder / f"run-{len(list(folder.iterdir()))}"
    run(command(ranks, "-m", "dist_train", "run", "loop.yaml", "--run.dir", str(place), *OURS[name]), folder)
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    times = {line["step"]: line["time"] for line in lines if "samples_per_second" in line}
    first, last = WARM_UP, max(step for step in times if step <= WARM_UP + steps)
    return 1000 * (times[last] - times[first]) / (last - first)


def peer(name: str, ranks: int, steps: int, folder: Path) -> float:
    script = str(HERE / "loop_peers.py")
    printed = run(command(ranks, script, name, str(steps), str(WARM_UP), str(ROWS)), folder)
    (line,) = [line for line in printed.splitlines() if line.startswith("ms per step ")]
    return float(line.rpartition(" ")[2])


def measured(names: list[str], ranks: int, steps: int, rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            with tempfile.TemporaryDirectory() as folder:
                found[name].append((ours if name in OURS else peer)(name, ranks, steps, Path(folder)))
            print(f"{ranks} rank(s), round {number + 1}: {name} {found[name][-1]:.3f} ms", file=sys.stderr)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--only", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])
    options = parser.parse_args()
    missing = [name for name in options.only if name in PEERS and importlib.util.find_spec(PEERS[name]) is None]
    names = [name for name in options.only if name not in missing]
    if "dataloader" not in names:
        parser.error("--only needs dataloader, to which the others are compared")
    print(
        f"{datetime.date.today()} torch {torch.__version__}, {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f}), "
        f"{options.rounds} rounds of {options.steps} steps" + (f"; not installed: {', '.join(missing)}" * bool(missing))
    )
    failed = False
    for ranks in options.ranks:
        found = measured(names, ranks, options.steps, options.rounds)
        print(f"\n{ranks} rank(s)       ms a step   to dataloader (smallest to largest)")
        for name, times in found.items():
            ratios = [mine / base for mine, base in zip(times, found["dataloader"], strict=True)]
            middle = statistics.median(ratios)
            print(f"{name:16}{statistics.median(times):8.3f}{middle:12.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
            failed |= name == "ours_all" and middle > BARS.get(ranks, 1.0)
    if "ours_all" in names:
        print(f"\nbars for ours_all: {BARS[2]} on two ranks, {BARS[1]} on one: {'missed' if failed else 'met'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
