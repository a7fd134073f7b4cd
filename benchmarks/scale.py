"""Counts, for 1 to 100,000 ranks and up to 10^12 samples, what a run costs beside its arithmetic, ours beside torch's.

    python benchmarks/scale.py sampler      # memory and time to the first rows; DistributedSampler where it still runs
    python benchmarks/scale.py collectives  # bytes a step by strategy: formulas, and two real ranks that check them
    python benchmarks/scale.py checkpoint   # files and bytes: two real ranks, ours and DCP; seconds by bandwidth

Each line says which figures are measured and which computed. Bytes are counted by the kernel: the ranks run in a
network namespace of their own (`unshare --net`, as root), whose loopback carries nothing else. A count that is off its
formula by more than 5 % exits with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RANKS = (1, 2, 8, 64, 1024, 100_000)
SAMPLES = (10**4, 10**6, 10**8, 10**10, 10**12)
TOLERANCE = 0.05
LINEAR, ROWS = (3 * 32 * 32 * 256 + 256, 256 * 10 + 10), 16  # parameters of the measured model's layers; rows a step
RESNET50, BILLIONS = 25_557_032, 7_000_000_000
SHORT, LONG = 20, 120  # steps of two runs: their difference has no start and no end
CONFIG = """\
run: {name: scale, threads_per_rank: 1, device: cpu}
data: {name: fake, args: {num_eval: 16, num_classes: 10, channels: 3, height: 32, width: 32}, global_batch_size: 16}
model: {name: mlp, args: {size: 32, hidden: 256}}
stages: [train]
train: {epochs: 1, optim: {name: sgd, lr: 0.01, momentum: 0.9}}
compile: false
"""
# Prints seconds from the construction to the first rows of this rank, and how much more memory that took at most.
SAMPLER = """\
import resource, sys, time
import torch.utils.data
from dist_train import ElasticDistributedSampler
kind, ranks, samples = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
if kind == "ours":
    sampler = ElasticDistributedSampler(range(samples), ranks, ranks - 1, global_batch_size=4 * ranks)
    rows = sampler.rank_slice(sampler.num_steps // 2).ids.tolist()  # as a run that resumes within an epoch
else:
    sampler = torch.utils.data.DistributedSampler(range(samples), ranks, ranks - 1)
    rows = [next(iter(sampler))]
assert rows and all(0 <= row < samples for row in rows)
print(time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def all_reduce(size: float, ranks: int) -> float:
    """Returns the bytes that each rank sends for an all-reduce of `size` bytes by a ring (Patarasuk and Yuan, 2009)."""
    return 2 * (ranks - 1) / ranks * size


def all_gather(size: float, ranks: int) -> float:
    """Returns the bytes that each rank sends so that all have `size` bytes; those of a reduce-scatter are as many."""
    return (ranks - 1) / ranks * size


def ddp(parameters: float, ranks: int) -> float:
    """Returns the bytes that each rank sends a step: the gradients' all-reduce, in float32."""
    return all_reduce(4 * parameters, ranks)


def fsdp(parameters: float, ranks: int, root: float = 0.0) -> float:
    """Returns the bytes that each rank sends a step with shards: blocks are gathered twice, the root once.

    Args:
        parameters: of blocks and root.
        root: parameters of the root, outside all blocks; they stay gathered between forward and backward.
    """
    return all_gather(4 * (2 * (parameters - root) + root), ranks) + all_gather(4 * parameters, ranks)


def distributed_sampler_bytes(samples: int) -> int:
    """Returns DistributedSampler's memory: a tensor of int64, and a list with a pointer and an int for each sample."""
    return samples * (8 + 8 + 32)


def sampler(options: argparse.Namespace) -> bool:
    print("| ranks | samples | ours: memory, MB | first rows, ms | DistributedSampler: memory, MB | first row, s |")
    print("|---|---|---|---|---|---|")
    for ranks in options.ranks:
        for samples in options.samples:
            if samples < ranks:
                continue
            seconds, more = measured("ours", ranks, samples)
            line = f"| {ranks:,} | {samples:,} | {more / 1024:.1f} | {1000 * seconds:.1f} | "
            size = distributed_sampler_bytes(samples)
            if size <= options.most_memory * 2**30:
                seconds, more = measured("torch", ranks, samples)
                print(f"{line}{more / 1024:,.0f} | {seconds:.2f} |", flush=True)
            else:
                print(f"{line}{size / 2**20:,.0f} (computed) | not run |", flush=True)
    return True


def measured(kind: str, ranks: int, samples: int) -> tuple[float, int]:
    """Returns seconds, and KiB of resident memory at most, of a new process."""
    words = [sys.executable, "-c", SAMPLER, kind, str(ranks), str(samples)]
    seconds, more = subprocess.check_output(words, text=True, env=environment()).split()
    return float(seconds), int(more)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}


def collectives(options: argparse.Namespace) -> bool:
    from dist_train import registry

    parameters, right = sum(LINEAR), True
    print(f"two real ranks, gloo, {parameters:,} parameters, bytes a step of both ranks together:")
    for strategy, each_rank, settings in (("ddp", ddp, []), ("fsdp", fsdp, ["--fsdp.wrap", '["1", "3"]'])):
        want = 2 * each_rank(parameters, 2)
        if strategy not in registry.strategies:
            print(f"  {strategy}: not in this version, computed {want:,.0f}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            short, long = (counted(Path(folder), strategy, steps, settings) for steps in (SHORT, LONG))
        each = (long - short) / (LONG - SHORT)
        print(f"  {strategy}: counted {each:,.0f}, computed {want:,.0f}, ratio {each / want:.4f}", flush=True)
        right &= abs(each / want - 1) <= TOLERANCE
    print("\ncomputed: MB that each rank sends a step, for float32 gradients, in rings")
    print("| ranks | single | ddp, ResNet-50 | fsdp, ResNet-50 | ddp, 7e9 parameters | fsdp, 7e9 parameters |")
    print("|---|---|---|---|---|---|")
    for ranks in options.ranks:
        row = [way(size, ranks) / 1e6 for size in (RESNET50, BILLIONS) for way in (ddp, fsdp)]
        print(f"| {ranks:,} | 0 | " + " | ".join(f"{each:,.0f}" for each in row) + " |")
    return right


def counted(folder: Path, strategy: str, steps: int, settings: Sequence[str]) -> int:
    """Returns the bytes on the loopback of a namespace in which two ranks train."""
    (folder / "scale.yaml").write_text(CONFIG)
    words = [*("launch", "torchrun", "--nproc-per-node", "2", "scale.yaml", "--strategy", strategy, *settings)]
    words += ["--run.dir", f"{strategy}-{steps}", "--data.args.num_train", str(steps * ROWS)]
    shell = 'ip link set lo up && "$@" && sed -n "s/^ *lo: *//p" /proc/net/dev'
    command = ["unshare", "--net", "sh", "-c", shell, "sh", sys.executable, "-m", "dist_train", *words]
    answer = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    if answer.returncode:
        raise SystemExit(f"two ranks did not train in a network namespace, which takes root:\n{answer.stderr[-2000:]}")
    return int(answer.stdout.splitlines()[-1].split()[0])


def checkpoint(options: argparse.Namespace) -> bool:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "scale.yaml").write_text(CONFIG)
        launch = [sys.executable, "-m", "dist_train", "launch", "torchrun", "--nproc-per-node", "2", "scale.yaml"]
        launch += ["--data.args.num_train", str(SHORT * ROWS)]
        sharded = [*launch, "--strategy", "fsdp", "--fsdp.wrap", '["1", "3"]', "--run.dir", "fsdp"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        dcp = [*torchrun, str(Path(__file__).resolve()), "dcp", str(folder / "dcp")]
        for words in ([*launch, "--run.dir", "ddp"], sharded, dcp):
            subprocess.run(words, cwd=folder, env=environment(), check=True, capture_output=True)
        ours = {
            name: next(path for path in (folder / name / "checkpoints").iterdir() if path.is_dir())
            for name in ("ddp", "fsdp")
        }
        print("two real ranks, parameters and momentum of the same size:")
        titles = {f"ours, {name}": path for name, path in ours.items()}
        for title, path in {**titles, "dcp.save": folder / "dcp"}.items():
            files = sorted((file.name, file.stat().st_size) for file in path.iterdir())
            print(f"  {title}: {len(files)} files, {sum(size for _, size in files):,} bytes: {json.dumps(dict(files))}")
    print("\ncomputed: files, and seconds to write a checkpoint of float32 parameters and Adam's two moments")
    print("| ranks | parameters | GB | ddp: files | seconds at 0.2, 1, 10 GB/s | fsdp: files | DCP: files | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for ranks in options.ranks:
        for parameters in (RESNET50, BILLIONS):
            size = 12 * parameters / 1e9
            one, many = (", ".join(shown(size / rate / of) for rate in (0.2, 1, 10)) for of in (1, ranks))
            print(f"| {ranks:,} | {parameters:,} | {size:.2f} | 3 | {one} | {ranks + 3:,} | {ranks + 1:,} | {many} |")
    print("The last seconds are those of fsdp and of DCP, whose ranks write their own parts, each with that bandwidth.")
    return True


def shown(seconds: float) -> str:
    return "< 0.01" if seconds < 0.01 else f"{seconds:,.2f}" if seconds < 10 else f"{seconds:,.0f}"


def save_with_dcp(folder: str) -> None:
    """Saves, on each rank of torchrun, a replicated state of the measured model's size by DCP."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    dist.init_process_group("gloo")
    sizes = dict(enumerate(LINEAR))
    dcp.save(
        {f"{kind}.{key}": torch.zeros(size) for kind in ("model", "momentum") for key, size in sizes.items()},
        checkpoint_id=folder,
    )
    dist.destroy_process_group()


def head() -> Iterator[str]:
    import torch

    yield f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, torch {torch.__version__}"
    yield f"load {os.getloadavg()[0]:.1f} before"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("sampler", "collectives", "checkpoint", "dcp"))
    parser.add_argument("folder", nargs="?", help="of part dcp, which part checkpoint starts on two ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--samples", type=int, nargs="+", default=SAMPLES)
    parser.add_argument("--most-memory", type=float, default=8.0, help="GiB up to which DistributedSampler is run")
    options = parser.parse_args()
    if options.part == "dcp":
        save_with_dcp(options.folder)
        return
    print(", ".join(head()), flush=True)
    right = {"sampler": sampler, "collectives": collectives, "checkpoint": checkpoint}[options.part](options)
    sys.exit(not right)


if __name__ == "__main__":
    main()
