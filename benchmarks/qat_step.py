"""Time of a QAT step against the float step of the same precision, on one process: stock FX, stock PT2E, and ours.

    pip install -e '.[quickstart]'
    python benchmarks/qat_step.py [--models small_resnet resnet18] [--precisions fp32 bf16]
        [--rounds 21] [--threads 2] [--profile]

A step is forward, backward, the optimizer's update and the update of the ranges. Ranges and BatchNorm's statistics are
learned in every step, which is the slowest part of a stage. `--frozen` also times the steps after both are frozen. All
tensors are channels_last. small_resnet takes 256 images of 28x28, torchvision's resnet18 64 of 32x32.

The methods:

- fx stock: torch.ao's prepare_qat_fx with its default for x86
- pt2e stock: torchao's prepare_qat_pt2e with X86InductorQuantizer's default
- ours: dist_train's default backend, with ranges that lag one step

All methods take turns within each round, one step each, in a rotating order. A figure is the median over rounds of a
step's time divided by the float step's time in the same round. The smallest and the largest ratio stand beside it. The
float step has the same mode: eager is compared with eager, compiled with compiled. The ratio of a compiled step to the
eager float step is printed as well. If a method cannot take a step, the reason is printed in its place.

The bar: ours, compiled, takes at most 1.3 times the float step, compiled, for every model and precision. A miss exits
with 1. It takes about 8 minutes on two idle cores, most of it compilation, which torch caches on disk.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch._inductor.config
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from torch.export import Dim
from torch.profiler import ProfilerActivity, profile
from torchao.quantization.pt2e import move_exported_model_to_train
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from dist_train.models.small import small_resnet
from dist_train.quantization.pt2e.backend import PT2EBackend
from dist_train.quantization.ranges import Ranges

BAR = 1.3
CLASSES, AVERAGING, WARM_UP = 10, 0.01, 2
PRECISIONS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "fp32": nullcontext,
    "bf16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
FLOAT, OURS = "float", "ours"


@dataclass(frozen=True)
class Case:
    """A model that was not trained, and a batch; both channels_last."""

    model: nn.Module
    images: Tensor
    targets: Tensor


def case(name: str) -> Case:
    torch.manual_seed(0)
    if name == "small_resnet":
        model, shape = small_resnet(CLASSES, 1), (256, 1, 28, 28)
    else:
        model, shape = torchvision.models.resnet18(num_classes=CLASSES), (64, 3, 32, 32)
    images = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    return Case(model.to(memory_format=torch.channels_last), images, torch.randint(CLASSES, (len(images),)))


class Step:
    """One optimizer step on one batch, always the same."""

    def __init__(self, model: nn.Module, case: Case, precision: str, compile: bool) -> None:
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
        self.ranges = Ranges(model)
        # Static shapes, as dist_train.training.loop has them.
        self.forward = torch.compile(model, dynamic=False) if compile else model
        self.autocast = PRECISIONS[precision]
        self.images, self.targets = case.images, case.targets

    def __call__(self) -> None:
        with self.autocast():
            outputs = self.forward(self.images)
        F.cross_entropy(outputs.float(), self.targets).backward()
        if len(self.ranges) and not self.ranges.frozen:
            self.ranges.update(self.ranges.observed(), AVERAGING)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def fx_stock(case: Case) -> nn.Module:
    mapping = get_default_qat_qconfig_mapping("x86")
    return prepare_qat_fx(copy.deepcopy(case.model).train(), mapping, (case.images[:2],))


def pt2e_stock(case: Case) -> nn.Module:
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    program = torch.export.export(
        copy.deepcopy(case.model).train(),
        (case.images[:2],),
        dynamic_shapes=({0: Dim("batch", min=1)},),
        strict=True,
    )
    prepared: nn.Module = move_exported_model_to_train(prepare_qat_pt2e(program.module(check_guards=False), quantizer))
    return prepared


def ours(case: Case, frozen: bool = False) -> nn.Module:
    prepared = PT2EBackend().prepare(case.model.train(), case.images[:2])
    ranges = Ranges(prepared)
    with torch.no_grad():
        prepared.eval().fake_quantize(False)
        prepared(case.images)
        ranges.update(ranges.observed(), averaging=1.0)
    prepared.fake_quantize(True)
    if frozen:
        prepared.freeze_batch_norm()
    return prepared.train()


def steps(case: Case, precision: str, frozen: bool) -> dict[tuple[str, str], Callable[[], Step]]:
    """Returns functions that make the step of each method and mode."""

    def maker(prepare: Callable[[Case], nn.Module], mode: str) -> Callable[[], Step]:
        return lambda: Step(prepare(case), case, precision, mode == "compiled")

    def frozen_step() -> Step:
        step = Step(ours(case, frozen=True), case, precision, compile=True)
        step.ranges.freeze()
        return step

    modes = ("eager", "compiled")
    methods = {FLOAT: lambda case: copy.deepcopy(case.model).train(), "pt2e stock": pt2e_stock, OURS: ours}
    makers = {(name, mode): maker(prepare, mode) for name, prepare in methods.items() for mode in modes}
    makers["fx stock", "eager"] = maker(fx_stock, "eager")
    if frozen:
        makers[OURS + " frozen", "compiled"] = frozen_step
    return makers


Key = tuple[str, str]


def able(makers: dict[Key, Callable[[], Step]]) -> tuple[dict[Key, Step], dict[Key, str]]:
    """Compiles the steps by taking each a few times; returns the working ones, and the errors of the others."""
    able, failed = dict[Key, Step](), dict[Key, str]()
    for key, make in makers.items():
        step = make()
        try:
            for _ in range(WARM_UP):
                step()
        except (RuntimeError, AssertionError) as error:  # compiled code asserts the metadata of operators
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            failed[key] = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
            continue
        able[key] = step
    return able, failed


def seconds(steps: dict[Key, Step], rounds: int, clock: Callable[[], float]) -> dict[Key, list[float]]:
    """Returns the seconds of each step in each round."""
    times: dict[Key, list[float]] = {key: [] for key in steps}
    keys = list(steps)
    for number in range(rounds):
        first = number % len(keys)
        for key in keys[first:] + keys[:first]:
            start = clock()
            steps[key]()
            times[key].append(clock() - start)
    return times


def ratios(own: list[float], base: list[float]) -> tuple[float, str]:
    each = [mine / floats for mine, floats in zip(own, base, strict=True)]
    middle = statistics.median(each)
    return middle, f"{middle:5.2f} ({min(each):.2f}..{max(each):.2f})"


def dearest(step: Step, label: str) -> None:
    """Prints the ten operations with the most time of their own."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            step()
    print(f"\n{label}, three steps:")
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=10, max_name_column_width=90))


def run(name: str, precision: str, options: argparse.Namespace) -> float:
    """Measures and prints; returns the ratio that is compared with the bar."""
    torch._dynamo.reset()
    taken, failed = able(steps(case(name), precision, options.frozen))
    times = seconds(taken, options.rounds, CLOCKS[options.clock])
    figure = float("nan")
    for key in sorted(times.keys() | failed.keys(), key=lambda key: (key[1] == "compiled", key)):
        method, mode = key
        label = f"{name:13} {precision} {method:11} {mode:8}"
        if key in failed:
            print(f"{label}  fails: {failed[key][:150]}")
            continue
        same, shown = ratios(times[key], times[FLOAT, mode])
        _, eager = ratios(times[key], times[FLOAT, "eager"])
        milliseconds = statistics.median(times[key]) * 1000
        print(f"{label} {milliseconds:8.1f} ms  {shown:22} of float {mode:8}  {eager:22} of float eager")
        if key == (OURS, "compiled"):
            figure = same
    if options.profile:
        for key in ((FLOAT, "compiled"), (OURS, "compiled")):
            if key in taken:
                dearest(taken[key], f"{name} {precision} {' '.join(key)}")
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["small_resnet", "resnet18"]
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--precisions", nargs="+", choices=sorted(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", choices=sorted(CLOCKS), default="wall", help="cpu, with one thread, bears a machine that is shared"
    )
    parser.add_argument(
        "--frozen", action="store_true", help="time ours with ranges and batch normalization frozen, too"
    )
    parser.add_argument(
        "--profile", action="store_true", help="show the dearest operations of float and ours, compiled"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    # Gives Inductor's kernels names in the profile; it costs a little at each.
    torch._inductor.config.cpp.enable_kernel_profile = options.profile
    print(
        f"{datetime.date.today()} torch {torch.__version__} "
        f"({os.cpu_count()} cores, {options.threads} threads, load {os.getloadavg()[0]:.1f} before)"
    )
    missed = []
    for name in options.models:
        for precision in options.precisions:
            figure = run(name, precision, options)
            passed = figure <= BAR
            print(
                f"{name:13} {precision} ours compiled: {figure:.2f} ({'passed' if passed else 'MISSED'})\n", flush=True
            )
            if not passed:
                missed.append(f"{name} {precision} {figure:.2f}")
    print(f"bar: ours compiled at most {BAR} of float compiled: {'; '.join(missed) or 'passed'}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
