"""The float model, the data and the methods that qat_ddp.py compares, on this rank."""

from __future__ import annotations

import argparse
import copy
import io
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn.intrinsic.qat import freeze_bn_stats
from torch.ao.quantization import (
    FakeQuantizeBase,
    QConfig,
    QConfigMapping,
    disable_fake_quant,
    disable_observer,
    get_default_qat_qconfig,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx
from torch.fx import GraphModule, Interpreter, Node
from torch.nn.parallel import DistributedDataParallel

from dist_train.config.fit import FitConfig, steps_in
from dist_train.config.stages import QATConfig
from dist_train.config.tree import Config
from dist_train.console.progress import Progress
from dist_train.data.arrays import ImageArrays
from dist_train.data.augment.steps import Augmentation
from dist_train.data.loader import EstimationLoader, EvaluationLoader, Source, TrainLoader
from dist_train.data.sampler import ElasticDistributedSampler
from dist_train.data.splits import Splits
from dist_train.distributed.world import World
from dist_train.models.batch_norm import running_statistics
from dist_train.models.small import small_resnet
from dist_train.quantization.backend import build_backend
from dist_train.quantization.fake_quantize import ActivationFakeQuantize
from dist_train.quantization.ranges import Ranges
from dist_train.run_dir.ledger import NoLedger
from dist_train.strategies.base import Strategy
from dist_train.strategies.ddp import DDP
from dist_train.strategies.single import Single
from dist_train.tasks import Classification
from dist_train.trackers.base import Trackers
from dist_train.training.compilation import Uncompiled
from dist_train.training.evaluate import Evaluation
from dist_train.training.hooks import FreezeSchedule, Hook
from dist_train.training.learner import Learner
from dist_train.training.loop import Fit, fit
from dist_train.training.optim import build_optimizer
from dist_train.training.profiler import NoProfile
from dist_train.training.reduction import PendingMeans, StepReduction, StepSums
from dist_train.training.rounds import Together
from dist_train.training.schedule import build_schedule

RANKS, CLASSES = 2, 10
SHARDS = ("mixed", "by class")
QAT = QATConfig.model_validate({"backend": "fx", "engine": "x86", "freeze_batch_norm": 0.3, "freeze_ranges": 0.5})
Ends = dict[str, tuple[float, float]]
"""The lower and the upper end of each activation's range, by its place."""


@dataclass
class Row:
    """Results of one method: top-1 of the test set, and errors of the activations' ranges.

    Errors are relative to the run of one process, for which they are None.
    """

    shards: str
    method: str
    seed: int
    int8: float
    ranges: Ends
    range_error_median: float | None = None
    range_error_max: float | None = None

    def against(self, one: Row) -> None:
        """Fills in the errors of the ranges, relative to `one`."""
        errors = []
        for name, (low, high) in self.ranges.items():
            right_low, right_high = one.ranges[name]
            errors.append((abs(low - right_low) + abs(high - right_high)) / (right_high - right_low))
        self.range_error_median, self.range_error_max = statistics.median(errors), max(errors)


class NoCheckpoints:
    def save_step(self, *_: Any) -> None:
        return

    def settle(self) -> None:
        return

    def load_step(self, stage: str, step: int) -> dict[str, Any]:
        raise AssertionError("the last model is handed on")


class Unmeasured(Learner):
    """A model in training that is not evaluated between its epochs."""

    def __init__(self, model: nn.Module, reduction: StepReduction, hooks: Sequence[Hook]) -> None:
        super().__init__(model, reduction)
        self._hooks = hooks

    def hooks(self, total_steps: int) -> Sequence[Hook]:
        return self._hooks

    def evaluate(self, model: nn.Module) -> Evaluation:
        return Evaluation({"top1": 0.0, "loss": 0.0, "count": 0}, torch.empty(0))

    def recalibrate(self, averaged: nn.Module) -> None:
        return


class OfRank0(StepReduction):
    """Ranges and BatchNorm's statistics of rank 0's rows alone; loss and counts of all."""

    def __init__(self, world: World, model: nn.Module, ranges: Ranges) -> None:
        super().__init__(world, model, ranges, QAT.averaging)
        self._own, self._of_model = ranges, running_statistics(model)

    def begin(self, sums: StepSums, loss: Tensor, strategy: Strategy) -> Tensor:
        self._after_forward = [buffer.clone() for buffer in self._of_model]
        if dist.get_rank() != 0:
            self._own.drop()  # the maximum over ranks is then rank 0's
        return super().begin(sums, loss, strategy)

    def finish(self, step: int) -> PendingMeans:
        pending = super().finish(step)
        for buffer, own in zip(self._of_model, self._after_forward, strict=True):
            dist.broadcast(own, src=0)
            buffer.copy_(own)
        return pending


def activations(prepared: Any) -> dict[str, Any]:  # the modules of a graph are typed as Tensor or Module
    """Returns the fake-quantize modules of activations, ours or torch.ao's, by the name of their input node."""
    found = dict[nn.Module, str]()  # some are shared, by torch.ao under several names
    for node in prepared.graph.find_nodes(op="call_module"):
        module = prepared.get_submodule(str(node.target))
        if isinstance(module, ActivationFakeQuantize) or (
            isinstance(module, FakeQuantizeBase) and getattr(module, "dtype", None) == torch.quint8
        ):
            found.setdefault(module, node.all_input_nodes[0].name)
    return {name: module for module, name in found.items()}


class Bench:
    """Data and float model of one seed on this rank, and the methods that start from them."""

    def __init__(self, world: World, splits: Splits, options: argparse.Namespace, seed: int) -> None:
        assert isinstance(splits.train, ImageArrays)
        self.world, self.splits, self.options, self.seed = world, splits, options, seed
        self.task = Classification(CLASSES, {})
        self.example = torch.zeros(2, *splits.input_shape)
        self.model = self.float_model()
        self.fp32 = self.evaluate(self.model, world)
        self.start = self.calibrated()

    def source(self, arrays: Any) -> Source:
        augmentation = Augmentation([], seed=self.seed, mean=self.splits.mean, std=self.splits.std)
        return Source(arrays, augmentation, self.world.device, False, 0, self.seed)

    def arranged(self, shards: str, rows_of_epoch: int, epochs: int) -> ImageArrays:
        """Returns the rows of all steps in order; the first half of each global batch belongs to rank 0."""
        rng, batch, train = np.random.default_rng(self.seed), self.options.batch, self.splits.train
        assert isinstance(train, ImageArrays)
        halves = train.targets.numpy() // (CLASSES // RANKS)
        pools = [rng.permutation(np.flatnonzero(halves == half))[: rows_of_epoch // RANKS] for half in range(RANKS)]
        steps, orders = rows_of_epoch // batch, []
        for _ in range(epochs):
            if shards == "mixed":
                orders.append(rng.permutation(np.concatenate(pools))[: steps * batch])
            else:
                parts = [rng.permutation(pool)[: steps * batch // RANKS].reshape(steps, -1) for pool in pools]
                orders.append(np.concatenate(parts, axis=1).reshape(-1))
        rows = torch.from_numpy(np.concatenate(orders))
        return ImageArrays(train.images[rows], train.targets[rows])

    @torch.no_grad()
    def evaluate(self, call: Callable[[Tensor], Tensor], world: World) -> float:
        """Returns top-1 of the test set, split over the ranks of `world`."""
        # Not by torchmetrics, which reduces over all ranks, whatever `world` is.
        source = self.source(self.splits.eval)
        right = torch.zeros(2)
        for batch in EvaluationLoader(source, 250, world.world_size, world.rank, self.options.test):
            right += torch.tensor([(call(batch.inputs).argmax(1) == batch.targets).sum(), len(batch.targets)])
        hits, count = world.all_reduce(right, "sum").tolist()
        return float(hits / count)

    def fit(
        self,
        model: nn.Module,
        arrays: ImageArrays,
        lr: float,
        world: World,
        reduction: StepReduction,
        hooks: list[Hook],
    ) -> None:
        """Runs dist_train's own loop over the rows in their order."""
        size, batch = world.world_size, self.options.batch
        sampler = ElasticDistributedSampler(
            range(len(arrays)), size, world.rank, shuffle=False, global_batch_size=batch
        )
        loader = TrainLoader(self.source(arrays), sampler, None)
        run = Fit(
            stage="qat",
            config=Config.model_validate({"run": {"seed": self.seed}, "log": {"every_steps": 10**9}}),
            settings=fit_config(lr),
            epochs=1,
            steps_per_epoch=loader.steps_per_epoch,
            loader=loader,
            rounds=Together(loader, loader.steps_per_epoch),
            task=self.task,
            strategy=DDP(world, "fp32") if size > 1 else Single(world, "fp32"),
            compilation=Uncompiled(),
            learner=Unmeasured(model, reduction, hooks),
            checkpoints=NoCheckpoints(),
            ledger=NoLedger(),
            trackers=Trackers([]),
            progress=Progress(False, 1e9, io.StringIO()),
            profile=NoProfile(),
            example=self.example,
        )
        fit(run, None)

    def float_model(self) -> nn.Module:
        torch.manual_seed(self.seed)
        model = small_resnet(CLASSES, 1, width=self.options.width)
        rows = self.arranged("mixed", self.options.float_train, self.options.float_epochs)
        self.fit(model, rows, 0.1, self.world, StepReduction(self.world, model), [])
        return model.eval()

    @torch.no_grad()
    def calibrated(self) -> Ends:
        """Returns the ranges that all methods start from: of mixed rows on all ranks, for every node of the graph."""
        prepared = self.stock_model().eval()
        prepared.apply(disable_observer).apply(disable_fake_quant)
        ends, batch, world = dict[str, Tensor](), self.options.batch, self.world  # -low and high

        class Watch(Interpreter):
            def run_node(self, node: Node) -> Any:
                result = super().run_node(node)
                if isinstance(result, Tensor):
                    seen = torch.stack([-result.amin(), result.amax()])
                    ends[node.name] = torch.maximum(ends.get(node.name, seen), seen)
                return result

        rows = EstimationLoader(
            self.source(self.splits.train), 8 * batch, batch, self.seed, world.world_size, world.rank
        )
        for samples in rows:
            Watch(prepared).run(samples.inputs)
        found = world.all_reduce(torch.stack(list(ends.values())), "max")
        return {name: (-float(low), float(high)) for name, (low, high) in zip(ends, found, strict=True)}

    def ours(self, arrays: ImageArrays, world: World, of_rank_0: bool = False) -> tuple[float, Ends]:
        """Trains with dist_train's loop; returns top-1 of int8, and the ranges."""
        backend = build_backend(QAT)
        prepared = backend.prepare(self.model, self.example)
        ranges, quantizers = Ranges(prepared), activations(prepared.model)
        known = {module: self.start[name] for name, module in quantizers.items()}
        ranges.assign(*torch.tensor([known[each] for each in ranges.modules]).unbind(1))
        reduction = (
            OfRank0(world, prepared, ranges) if of_rank_0 else StepReduction(world, prepared, ranges, QAT.averaging)
        )
        steps = len(arrays) // self.options.batch
        hooks: list[Hook] = [FreezeSchedule(QAT, steps, prepared, ranges, reduction)]
        self.fit(prepared, arrays, self.options.lr, world, reduction, hooks)
        prepared.eval()
        found = {name: (float(each.low), float(each.high)) for name, each in quantizers.items()}
        return self.evaluate(backend.convert(prepared), world), found

    def stock_model(self) -> GraphModule:
        default = get_default_qat_qconfig("x86")
        qconfig = QConfig(
            activation=default.activation.with_args(averaging_constant=QAT.averaging),
            weight=default.weight.with_args(averaging_constant=1.0),
        )
        return prepare_qat_fx(copy.deepcopy(self.model).train(), QConfigMapping().set_global(qconfig), (self.example,))

    def stock(self, arrays: ImageArrays, world: World) -> tuple[float, Ends]:
        """Does the same as `ours` with torch's own parts."""
        prepared = self.stock_model()
        observers = {name: each.activation_post_process for name, each in activations(prepared).items()}
        for name, observer in observers.items():
            low, high = self.start[name]
            observer.min_val.fill_(low)
            observer.max_val.fill_(high)
        together = world.world_size > 1
        called = DistributedDataParallel(prepared) if together else prepared
        steps, config = len(arrays) // self.options.batch, fit_config(self.options.lr)
        optimizer = build_optimizer(prepared, config.optim)
        schedule = build_schedule(optimizer, config.schedule, steps, steps)
        for step, batch in enumerate(self.source(arrays).batches(self.shares(len(arrays), world), None)):
            if step == steps_in(QAT.freeze_batch_norm, steps):
                prepared.apply(freeze_bn_stats)
            if step == steps_in(QAT.freeze_ranges, steps):
                for each in activations(prepared).values():
                    disable_observer(each)
            F.cross_entropy(called(batch.inputs), batch.targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if together:
            for buffer in prepared.buffers():  # a checkpoint would hold rank 0's
                dist.broadcast(buffer, src=0)
        prepared.apply(disable_observer).eval()
        found = {name: (float(each.min_val), float(each.max_val)) for name, each in observers.items()}
        return self.evaluate(convert_fx(prepared), world), found

    def shares(self, rows: int, world: World) -> Iterator[np.ndarray]:
        share = self.options.batch // world.world_size
        for first in range(0, rows, self.options.batch):
            yield np.arange(first + world.rank * share, first + (world.rank + 1) * share)

    def rows(self, shards: str) -> list[Row]:
        arrays = self.arranged(shards, self.options.train, self.options.epochs)
        # Each rank is the one process of one method, at the same time.
        alone = self.stock(arrays, World()) if self.world.is_main else self.ours(arrays, World())
        outcomes = dict(zip(("stock, one", "ours, one"), self.world.gather(alone), strict=True))
        outcomes["stock"] = self.stock(arrays, self.world)
        outcomes["ours, rank 0"] = self.ours(arrays, self.world, of_rank_0=True)
        outcomes["ours"] = self.ours(arrays, self.world)
        # The places that all methods have.
        compared = [name for name in outcomes["ours"][1] if name in outcomes["stock"][1]]
        rows = {
            method: Row(shards, method, self.seed, int8, {name: ranges[name] for name in compared})
            for method, (int8, ranges) in outcomes.items()
        }
        for method, row in rows.items():
            if not method.endswith(", one"):
                row.against(rows[f"{method.split(',')[0]}, one"])
        return list(rows.values())


def fit_config(lr: float) -> FitConfig:
    return FitConfig.model_validate({"optim": {"lr": lr}})
