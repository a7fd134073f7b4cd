"""QAT under DDP with different classes on each rank: ranges from rank 0, as in stock QAT, or from all ranks.

    python benchmarks/qat_ddp.py [--seeds 3] [--train 4096] [--epochs 2] [--batch 128] [--json qat_ddp.json]

Two real gloo ranks on Fashion-MNIST. Shards `by class`: rank 0 sees classes 0 to 4, rank 1 classes 5 to 9. This is the
worst case of ranks whose data differ (federated sites, sorted files). Shards `mixed`, the control: random rows, as in
most training. For each seed one float model is trained on mixed rows, and calibrated once on mixed rows. Every method
starts from it with the same ranges, and has these in common:

- the same rows in the same steps, optimizer and schedule
- the same averaging of ranges, and weight scales that follow the weights
- torch.ao's x86 kernels
- the same freezing: BatchNorm's statistics after 30 % of the steps, ranges after 50 %

The methods:

- stock: torch.ao's FX QAT and observers in DistributedDataParallel, which broadcasts rank 0's buffers
- ours, rank 0: dist_train's loop with ranges and BatchNorm's statistics from rank 0, as in stock
- ours: dist_train's loop with ranges and statistics of all ranks

The last two differ only in the source of ranges and statistics. Stock and `ours, rank 0` also quantize differently.
Stock's range already includes the batch, and ours lags by one step. Stock quantizes at more places: averages and
logits, whose ranges are not counted.

Each method is also run by one process on the concatenated batches (`stock, one`, `ours, one`). A range's error is the
distance of its two ends from the same range there, in units of that range's width. It is not 0 for ours either. Until
BatchNorm is frozen, it normalizes by a rank's own rows in every method, so that weights differ too; SyncBatchNorm
would change this.

The benchmark shows the cost of learning from one rank's data, in ranges and in int8 accuracy on the whole test set.
It does so for one small network that is trained briefly. After the 32 steps until ranges freeze, their start still has
a weight of 0.95 ** 32 = 19 %. Three seeds tell a large effect from none, not a small one.

The learning rate is the default of `qat`. At ten times that rate, QAT of a more briefly trained float model diverged as
soon as BatchNorm was frozen. It did so in one process too, with stock as with ours. By a count of steps and of their
processor time it takes about 7 minutes on 2 idle cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from qat_ddp_methods import QAT, RANKS, SHARDS, Bench, Row

from dist_train.config.data import DataConfig
from dist_train.config.tree import RunConfig
from dist_train.data.datasets.mnist import fashion_mnist
from dist_train.data.open_splits import open_splits
from dist_train.distributed.process_group import join
from dist_train.distributed.world import World


def table(rows: list[Row], fp32: list[float]) -> str:
    """Returns lines with the mean over seeds and the value of each seed."""
    lines = [f"{'shards':9} {'method':13} {'int8':>8}  {'of each seed':24} range error: median, max (each seed)"]
    for shards in SHARDS:
        for method in dict.fromkeys(row.method for row in rows):
            own = [row for row in rows if (row.shards, row.method) == (shards, method)]
            line = f"{shards:9} {method:13} {statistics.mean(row.int8 for row in own):8.2%}"
            line += f"  {' '.join(f'{row.int8:.2%}' for row in own):24}"
            errors = [
                f"{row.range_error_median:.1%}, {row.range_error_max:.1%}"
                for row in own
                if row.range_error_max is not None
            ]
            lines.append(f"{line} {'; '.join(errors)}".rstrip())
    each = " ".join(f"{value:.2%}" for value in fp32)
    return "\n".join([f"FP32 top-1 {statistics.mean(fp32):.2%} ({each})", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=4_096, help="rows of an epoch of QAT")
    parser.add_argument("--test", type=int, default=10_000, help="rows that are evaluated")
    parser.add_argument("--float-train", type=int, default=12_000, help="rows of an epoch of float training")
    parser.add_argument("--float-epochs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2, help="of QAT")
    parser.add_argument("--batch", type=int, default=128, help="global batch")
    parser.add_argument("--lr", type=float, default=QAT.optim.lr, help="of QAT")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--root", type=Path, default=None, help="folder of Fashion-MNIST's four files")
    parser.add_argument("--json", type=Path, default=Path("qat_ddp.json"))
    options = parser.parse_args()
    if "RANK" not in os.environ:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS), __file__]
        os.execv(sys.executable, [sys.executable, *command, *sys.argv[1:]])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    load, start = os.getloadavg()[0], time.perf_counter()
    with join(RunConfig(device="cpu")) as world, tempfile.TemporaryDirectory() as folder:
        data = DataConfig(name="fashion_mnist", root=options.root, cache_dir=Path(folder))
        splits = open_splits(lambda: fashion_mnist(data), Path(folder), World())
        rows, fp32 = list[Row](), list[float]()
        for seed in range(options.seeds):
            bench = Bench(world, splits, options, seed)
            fp32.append(bench.fp32)
            for shards in SHARDS:
                rows += bench.rows(shards)
        assert all(math.isfinite(row.int8) for row in rows)
        if not world.is_main:
            return
    seconds = time.perf_counter() - start
    machine = f"{os.cpu_count()} cores (load {load:.1f} before)"
    print(f"{datetime.date.today()} torch {torch.__version__}, {RANKS} ranks, {machine}")
    sizes = f"{options.train} rows x {options.epochs} epochs, batch {options.batch}, {options.seeds} seed(s)"
    print(f"{sizes}, {seconds:.0f} s\n")
    print(table(rows, fp32))
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    found = {"settings": settings, "fp32": fp32, "rows": [asdict(row) for row in rows], "seconds": seconds}
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nwritten: {options.json}")


if __name__ == "__main__":
    main()
