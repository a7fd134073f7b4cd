"""int8 accuracy and activation ranges of QAT where each rank sees other classes: stock QAT under DDP against ours.

    python benchmarks/qat_ddp.py [--train 12000] [--epochs 2] [--batch 128] [--seeds 1] [--json qat_ddp.json]

Two real gloo ranks on Fashion-MNIST. Shards `mixed`: rows at random. Shards `by class`: rank 0 sees classes 0 to 4, rank 1 classes 5 to
9. All methods get the same rows in the same steps on the same ranks, from one float model that was trained on mixed rows, with the same
rate, schedule and freezing (BatchNorm's statistics after 30 % of the steps, observers after 50 %):

    stock         torch.ao's FX QAT, its default observers, DistributedDataParallel as it comes (buffers of rank 0 are broadcast)
    ours fx       the same integer kernels, dist_train's loop: BatchNorm's statistics and ranges of all ranks
    ours pt2e     dist_train's loop and its default backend

A range's error: how far its two ends are off, in units of its right width. Right is what the finished model itself shows on mixed rows of
the training set: the mean over batches of a batch's smallest and largest value, in evaluation mode. What it shows: shards by class are the
worst case of ranks whose data differ (federated sites, sorted files); with mixed shards, which most training has, both must be close.
It does not show what SyncBatchNorm would change: in each method BatchNorm normalises by its own rank's rows until it is frozen.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import io
import json
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn.intrinsic.qat import freeze_bn_stats
from torch.ao.quantization import FakeQuantizeBase, disable_observer, get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx
from torch.nn.parallel import DistributedDataParallel

from dist_train.config import RunConfig
from dist_train.config_data import DataConfig
from dist_train.config_fit import FitConfig, QATConfig
from dist_train.data.arrays import ImageArrays, Splits, open_splits
from dist_train.data.augment import Augmentation
from dist_train.data.idx import fashion_mnist
from dist_train.data.loader import EstimationLoader, EvaluationLoader, Source, TrainLoader
from dist_train.data.sampler import ElasticDistributedSampler
from dist_train.evaluate import Evaluation, evaluate
from dist_train.forming import join
from dist_train.hooks import FreezeSchedule, Hook
from dist_train.ledger import NoLedger
from dist_train.loop import Fit, fit
from dist_train.models.small import small_resnet
from dist_train.progress import Progress
from dist_train.quantization.backend import build_backend
from dist_train.quantization.fake_quantize import ActivationFakeQuantize
from dist_train.quantization.ranges import Ranges
from dist_train.reduction import StepReduction
from dist_train.reestimation import estimate_ranges
from dist_train.strategies.ddp import DDP
from dist_train.tasks import Classification
from dist_train.trackers.base import Trackers
from dist_train.world import World

RANKS, CLASSES, FREEZE_BATCH_NORM, FREEZE_RANGES = 2, 10, 0.3, 0.5
SHARDS = ("mixed", "by class")


@dataclass
class Row:
    """Of one method on one kind of shards: top-1 of the test set, and errors of the activations' ranges."""

    shards: str
    method: str
    seed: int
    fake_quant: float
    int8: float
    range_error_median: float
    range_error_max: float
    seconds: float


class NoCheckpoints:
    def save_step(self, *_: Any) -> None:
        return

    def load_step(self, stage: str, step: int) -> dict[str, Any]:
        raise AssertionError("the last model is handed on")


class Bench:
    """The data, on this rank, and what every method does with it."""

    def __init__(self, world: World, splits: Splits, options: argparse.Namespace, seed: int) -> None:
        assert isinstance(splits.train, ImageArrays)
        self.world, self.splits, self.options, self.seed = world, splits, options, seed
        self.task = Classification(CLASSES, {})
        self.example = torch.zeros(2, *splits.input_shape)

    def source(self, arrays: Any) -> Source:
        augmentation = Augmentation([], seed=self.seed, mean=self.splits.mean, std=self.splits.std)
        return Source(arrays, augmentation, self.world.device, False, 0, self.seed)

    def arranged(self, shards: str, epochs: int) -> ImageArrays:
        """The rows of all steps in the order of their use; of each global batch the first half is rank 0's."""
        rng, batch, train = np.random.default_rng(self.seed), self.options.batch, self.splits.train
        assert isinstance(train, ImageArrays)
        targets = train.targets.numpy()
        pools = [
            rng.permutation(np.flatnonzero(targets // 5 == half))[: self.options.train // 2] for half in range(RANKS)
        ]
        steps, orders = self.options.train // batch, []
        for _ in range(epochs):
            if shards == "mixed":
                orders.append(rng.permutation(np.concatenate(pools))[: steps * batch])
            else:
                halves = [rng.permutation(pool)[: steps * batch // 2].reshape(steps, batch // 2) for pool in pools]
                orders.append(np.concatenate(halves, axis=1).reshape(-1))
        rows = torch.from_numpy(np.concatenate(orders))
        return ImageArrays(train.images[rows], train.targets[rows])

    def evaluate(self, call: Callable[[Tensor], Tensor]) -> float:
        loader = EvaluationLoader(self.source(self.splits.eval), 250, RANKS, self.world.rank, self.options.test)
        return float(evaluate(call, loader, self.task, self.world).metrics["top1"])

    def estimation(self) -> EstimationLoader:
        return EstimationLoader(
            self.source(self.splits.train),
            8 * self.options.batch,
            self.options.batch,
            self.seed,
            RANKS,
            self.world.rank,
        )

    def fit(
        self, model: nn.Module, arrays: ImageArrays, lr: float, reduction: StepReduction, hooks: list[Hook]
    ) -> None:
        """dist_train's own loop over the rows in their order."""
        rank, batch = self.world.rank, self.options.batch
        sampler = ElasticDistributedSampler(range(len(arrays)), RANKS, rank, shuffle=False, global_batch_size=batch)
        loader = TrainLoader(self.source(arrays), sampler, None)
        run = Fit(
            stage="qat",
            seed=self.seed,
            config=FitConfig.model_validate({"optim": {"lr": lr}}),
            epochs=1,
            steps_per_epoch=loader.steps_per_epoch,
            loader=loader,
            task=self.task,
            strategy=DDP(self.world, "fp32"),
            reduction=reduction,
            hooks=hooks,
            evaluate=lambda chosen: Evaluation({"top1": 0.0, "loss": 0.0, "count": 0}, torch.empty(0)),
            checkpoints=NoCheckpoints(),
            checkpoint_every=None,
            ledger=NoLedger(),
            trackers=Trackers([]),
            log_every=10**9,
            progress=Progress(False, 1e9, io.StringIO()),
            compile=False,
        )
        fit(run, model, None)

    def float_model(self) -> nn.Module:
        torch.manual_seed(self.seed)
        model = small_resnet(CLASSES, 1, width=self.options.width)
        self.fit(model, self.arranged("mixed", self.options.float_epochs), 0.1, StepReduction(self.world, model), [])
        return model.eval()

    def ours(self, model: nn.Module, arrays: ImageArrays, backend_name: str) -> tuple[float, float, list[float]]:
        """Top-1 of fake quantization and of int8, and the ranges' errors."""
        settings = QATConfig.model_validate(
            {"backend": backend_name, "freeze_batch_norm": FREEZE_BATCH_NORM, "freeze_ranges": FREEZE_RANGES}
        )
        backend = build_backend(settings)
        prepared = backend.prepare(model, self.example)
        prepared.fake_quantize(False)
        estimate_ranges(prepared, self.estimation(), self.world)
        prepared.fake_quantize(True)
        ranges = Ranges(prepared)
        reduction = StepReduction(self.world, prepared, ranges, settings.averaging)
        steps = len(arrays) // self.options.batch
        self.fit(
            prepared, arrays, self.options.lr, reduction, [FreezeSchedule(settings, steps, prepared, ranges, reduction)]
        )
        prepared.eval()
        found = {each: (float(each.low), float(each.high)) for each in prepared.fake_quantizers}
        return self.evaluate(prepared), self.evaluate(backend.convert(prepared)), self.errors(prepared, found)

    def stock(self, model: nn.Module, arrays: ImageArrays) -> tuple[float, float, list[float]]:
        """As `ours`, by a loop as people write it."""
        prepared = prepare_qat_fx(copy.deepcopy(model).train(), get_default_qat_qconfig_mapping("x86"), (self.example,))
        wrapped, rank, half = DistributedDataParallel(prepared), self.world.rank, self.options.batch // RANKS
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=self.options.lr, momentum=0.9)
        steps = len(arrays) // self.options.batch
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        rows = (
            np.arange(first, first + half)
            for first in range(rank * half, steps * self.options.batch, self.options.batch)
        )
        for step, batch in enumerate(self.source(arrays).batches(rows, None)):
            if step == round(FREEZE_BATCH_NORM * steps):
                prepared.apply(freeze_bn_stats)
            if step == round(FREEZE_RANGES * steps):
                prepared.apply(disable_observer)
            optimizer.zero_grad()
            F.cross_entropy(wrapped(batch.inputs), batch.targets).backward()
            optimizer.step()
            schedule.step()
        for buffer in prepared.buffers():  # what would be saved: rank 0's
            dist.broadcast(buffer, src=0)
        prepared.apply(disable_observer)
        prepared.eval()
        found = {
            each: (float(each.activation_post_process.min_val), float(each.activation_post_process.max_val))
            for each in prepared.modules()
            if isinstance(each, FakeQuantizeBase) and each.dtype == torch.quint8
        }
        return self.evaluate(prepared), self.evaluate(convert_fx(copy.deepcopy(prepared))), self.errors(prepared, found)

    @torch.no_grad()
    def errors(self, prepared: nn.Module, found: dict[nn.Module, tuple[float, float]]) -> list[float]:
        """Of each range in `found`, by its fake-quantize module."""
        seen: dict[nn.Module, list[tuple[float, float]]] = {each: [] for each in found}

        def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[module].append((float(inputs[0].min()), float(inputs[0].max())))

        for each in found:
            if isinstance(each, ActivationFakeQuantize):
                each.observing = False
        handles = [each.register_forward_pre_hook(look) for each in found]
        for batch in self.estimation():
            prepared(batch.inputs)
        for handle in handles:
            handle.remove()
        sums = torch.tensor([[sum(ends) for ends in zip(*seen[each], strict=True)] for each in found])
        right = self.world.all_reduce(sums, "sum") / (len(next(iter(seen.values()))) * RANKS)
        return [
            (abs(low - float(right_low)) + abs(high - float(right_high))) / float(right_high - right_low)
            for (low, high), (right_low, right_high) in zip(found.values(), right, strict=True)
        ]


def measure(world: World, splits: Splits, options: argparse.Namespace) -> tuple[list[Row], list[float]]:
    rows, float_top1 = [], []
    for seed in range(options.seeds):
        bench = Bench(world, splits, options, seed)
        model = bench.float_model()
        float_top1.append(bench.evaluate(model))
        for shards in SHARDS:
            arrays = bench.arranged(shards, options.epochs)
            methods: dict[str, Callable[[], tuple[float, float, list[float]]]] = {
                "stock": lambda: bench.stock(model, arrays),  # noqa: B023 (called in this round)
                "ours fx": lambda: bench.ours(model, arrays, "fx"),  # noqa: B023
                "ours pt2e": lambda: bench.ours(model, arrays, "pt2e"),  # noqa: B023
            }
            for name, run in methods.items():
                start = time.perf_counter()
                fake_quant, int8, errors = run()
                seconds = time.perf_counter() - start
                rows.append(Row(shards, name, seed, fake_quant, int8, statistics.median(errors), max(errors), seconds))
    return rows, float_top1


def table(rows: Iterable[Row], float_top1: list[float]) -> str:
    rows = list(rows)
    lines = [f"{'shards':9} {'method':10} {'fake-quant':>11} {'int8':>8} {'range error: median':>20} {'max':>8}"]
    for shards in SHARDS:
        for method in dict.fromkeys(row.method for row in rows):
            own = [row for row in rows if (row.shards, row.method) == (shards, method)]
            means = [statistics.mean(getattr(row, name) for row in own) for name in list(Row.__annotations__)[3:7]]
            lines.append(f"{shards:9} {method:10} {means[0]:11.2%} {means[1]:8.2%} {means[2]:20.1%} {means[3]:8.1%}")
    return "\n".join([f"FP32 top-1 {statistics.mean(float_top1):.2%}", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=12_000, help="rows of an epoch")
    parser.add_argument("--test", type=int, default=10_000, help="rows that are evaluated")
    parser.add_argument("--float-epochs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2, help="of QAT")
    parser.add_argument("--batch", type=int, default=128, help="global batch")
    parser.add_argument("--lr", type=float, default=0.01, help="of QAT")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=1)
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
        rows, float_top1 = measure(world, splits, options)
        assert all(math.isfinite(row.int8) for row in rows)
        if not world.is_main:
            return
    seconds = time.perf_counter() - start
    print(
        f"{datetime.date.today()} torch {torch.__version__}, {RANKS} ranks, {os.cpu_count()} cores (load {load:.1f} before)"
    )
    print(
        f"{options.train} rows x {options.epochs} epochs, batch {options.batch}, {options.seeds} seed(s), {seconds:.0f} s\n"
    )
    print(table(rows, float_top1))
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    found = {"settings": settings, "fp32": float_top1, "rows": [asdict(row) for row in rows], "seconds": seconds}
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nwritten: {options.json}")


if __name__ == "__main__":
    main()
