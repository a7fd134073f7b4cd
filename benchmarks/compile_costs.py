"""Cost and gain of compiling a model's steps: the constants in dist_train/training/compile_costs.py.

    python benchmarks/compile_costs.py [--precision fp32 | bf16] [--qat] [--batch 128] [--rounds 8]

small_resnet on images of 28x28, channels_last, one process with one thread. Each run starts with an empty cache of
kernels, and does the same once more in a fresh process with the kernels of the first. It prints the seconds of the
first compiled step. Beside the estimate of `compile: auto` it prints the processor time of steps uncompiled and
compiled, the fastest of the rounds. With `--qat` it trains with fake quantization, of which the first of three graphs
is compiled.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.models.small import small_resnet
from dist_train.quantization.pt2e.backend import PT2EBackend
from dist_train.quantization.ranges import Ranges
from dist_train.training.compile_costs import work_of


def model_of(qat: bool, images: Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = small_resnet(10, 1).to(memory_format=torch.channels_last).train()
    if not qat:
        return model
    prepared = PT2EBackend().prepare(model, images[:2])
    ranges = Ranges(prepared)
    with torch.no_grad():
        prepared.eval().fake_quantize(False)
        prepared(images)
        ranges.update(ranges.observed(), averaging=1.0)
    prepared.fake_quantize(True)
    return prepared.train()


def measure(options: argparse.Namespace) -> None:
    images = torch.randn(options.batch, 1, 28, 28).contiguous(memory_format=torch.channels_last)
    targets = torch.randint(10, (options.batch,))
    model = model_of(options.qat, images)
    autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16) if options.precision == "bf16" else nullcontext

    def step(forward: nn.Module) -> float:
        start = time.process_time()
        with autocast():
            outputs = forward(images)
        F.cross_entropy(outputs.float(), targets).backward()
        model.zero_grad(set_to_none=True)
        return time.process_time() - start

    def fastest(forward: nn.Module) -> float:
        return min(step(forward) for _ in range(options.rounds))

    work = work_of(model, images[:2], autocast)
    step(model)
    plain = fastest(model)
    compiled: nn.Module = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    start = time.perf_counter()
    step(compiled)
    first = time.perf_counter() - start
    fused = fastest(compiled)
    print(f"  first compiled step {first:5.1f} s, of the estimate {work.compile_seconds(1):.0f} s without a cache")
    print(
        f"  a step {plain * 1000:.1f} ms uncompiled, {fused * 1000:.1f} compiled: {(plain - fused) * 1000:.1f} saved, "
        f"of the estimate {work.saved_seconds(options.batch, 'cpu', 1) * 1000:.1f}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--qat", action="store_true")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.child:
        measure(options)
        return 0
    print(f"{datetime.date.today()} torch {torch.__version__} ({os.cpu_count()} cores, load {os.getloadavg()[0]:.1f})")
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("empty", "warm"):
            print(f"{'qat' if options.qat else 'float'} {options.precision}, {cache} cache:", flush=True)
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--child"], env=environment, check=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
