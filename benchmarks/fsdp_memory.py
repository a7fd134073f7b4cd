"""Memory of a rank under ddp and fsdp: parameters, gradients and optimizer states, on 1, 2 and 4 ranks.

    pip install -e .
    python benchmarks/fsdp_memory.py [--ranks 1 2 4] [--layers 8] [--width 512]

The model is a transformer of `--layers` encoder layers, trained by AdamW on real gloo ranks of this machine, a few
steps through the strategies' own code. The figures, of the rank that holds most:

- held: bytes of parameters, gradients and optimizer states between backward and update, counted from the tensors of
  this rank. Under ddp it is all of them; the bar for fsdp is 1/n of them plus one block
- whole: the most bytes of parameters that a rank holds whole at any layer's forward or backward, counted alike
- RSS: growth of the process's resident memory from before the model was built to the end of the last step, and at its
  peak. It has activations and buffers of the collectives. glibc is told to give freed blocks of 64 KiB and more back
  (MALLOC_MMAP_THRESHOLD_): by default it keeps what fsdp frees, and RSS is larger than ddp's

1 rank of fsdp runs as single, as in a run. A miss of the bar exits with 1. It takes about 2 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from dist_train.config.tree import Config, RunConfig
from dist_train.distributed.process_group import join
from dist_train.strategies.base import Strategy
from dist_train.strategies.ddp import DDP
from dist_train.strategies.fsdp import FSDP
from dist_train.strategies.shards import in_shards, local
from dist_train.strategies.single import Single
from dist_train.training.optim import build_optimizer
from dist_train.training.parts import resolve_parts

ROOT = Path(__file__).resolve().parents[1]
STEPS, ROWS, LENGTH = 3, 2, 16
MIB = 2**20


class Model(nn.Module):
    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(32, width)
        kinds = [nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True) for _ in range(layers)]
        self.layers = nn.ModuleList(kinds)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        outputs: Tensor = self.head(x.mean(1))
        return outputs


def size(tensors: Iterable[Tensor | None]) -> int:
    return sum(local(each).nbytes for each in tensors if each is not None)


def measured(strategy: Strategy, layers: int, width: int) -> dict[str, float]:
    """Trains a few steps and returns the bytes of this rank."""
    config = Config.model_validate({"strategy": "fsdp", "train": {"optim": {"name": "adamw", "lr": 1e-3}}})
    process = psutil.Process()
    before, peak_before = process.memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.manual_seed(0)
    model = Model(layers, width)
    block = size(model.layers[0].parameters())
    strategy.shard(model, [[name] for name in resolve_parts(config, "train", model).blocks])
    optimizer = build_optimizer(model, config.train.optim)
    wrapped = strategy.wrap(model)
    whole = 0

    def look(*_: Any) -> None:
        nonlocal whole
        whole = max(whole, sum(each.untyped_storage().nbytes() for each in model.parameters() if not in_shards(each)))

    for layer in model.layers:
        layer.register_forward_pre_hook(look)
        layer.register_full_backward_pre_hook(look)
    held = 0
    for _ in range(STEPS):
        wrapped(torch.randn(ROWS, LENGTH, 32)).square().mean().backward()
        states = [each for state in optimizer.state.values() for each in state.values()]
        parameters = list(model.parameters())
        held = max(held, size(parameters) + size(each.grad for each in parameters) + size(states))
        strategy.step(optimizer, model, 1.0)
        optimizer.zero_grad(set_to_none=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"held": held, "whole": whole, "block": block, "rss": process.memory_info().rss - before}
    return {**found, "peak": max(found["rss"], peak - before if peak > peak_before else 0)}


def as_rank(name: str, layers: int, width: int) -> None:
    torch.set_num_threads(1)
    with join(RunConfig(device="cpu", timeout=300)) as world:
        kind = {"ddp": DDP, "fsdp": FSDP}[name] if world.world_size > 1 else Single
        measured(kind(world, "fp32"), 1, 32)  # what torch imports in a first step is no memory of the model
        found = world.gather(measured(kind(world, "fp32"), layers, width))
        if world.is_main:
            print(json.dumps({key: max(each[key] for each in found) for key in found[0]}))


def on_ranks(name: str, ranks: int, arguments: argparse.Namespace) -> dict[str, float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, __file__, "--as-rank", name, "--layers", str(arguments.layers)]
    processes = []
    for rank in range(ranks):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        sizes |= {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        environ = {**os.environ, "PYTHONPATH": str(ROOT), **sizes, **(variables if ranks > 1 else {})}
        if ranks == 1:
            environ = {key: value for key, value in environ.items() if key not in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        full = [*command, "--width", str(arguments.width)]
        processes.append(subprocess.Popen(full, env=environ, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{name} on {ranks} ranks failed")
    found: dict[str, float] = json.loads(outputs[0].splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--as-rank", choices=["ddp", "fsdp"])
    arguments = parser.parse_args()
    if arguments.as_rank:
        as_rank(arguments.as_rank, arguments.layers, arguments.width)
        return 0
    print("| strategy | ranks | held, MiB | of ddp's | bar | whole in a step, MiB | RSS, MiB | peak RSS, MiB |")
    print("|---|---|---|---|---|---|---|---|")
    missed = False
    for ranks in arguments.ranks:
        all_of_it = 0.0
        for name in ("ddp", "fsdp"):
            found = on_ranks(name, ranks, arguments)
            all_of_it = found["held"] if name == "ddp" else all_of_it
            bar = all_of_it / ranks + found["block"] if name == "fsdp" else all_of_it
            missed |= found["held"] > bar
            figures = [found["held"] / MIB, found["held"] / all_of_it, bar / MIB]
            figures += [found[key] / MIB for key in ("whole", "rss", "peak")]
            held, share, most, whole, rss, peak = figures
            counted = f"{held:.1f} | {share:.3f} | {most:.1f} | {whole:.1f}"
            print(f"| {name} | {ranks} | {counted} | {rss:.0f} | {peak:.0f} |", flush=True)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
