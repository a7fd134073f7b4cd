"""int8 and FP32 latency by each runtime, against NNCF's own post-training quantization in OpenVINO.

    pip install -e '.[quickstart,bench]'

    python benchmarks/int8_latency.py [--models resnet18 resnet50 mobilenet_v2] [--batches 1 32 256]
        [--rounds 7] [--runtimes openvino onnxruntime inductor] [--threads 2] [--size 224] [--throughput]

Ours: `ptq` with the pt2e backend, lowered as `export` does it. The peer: nncf.quantize of the same torch model on the
same images, with its default and its mixed preset; the faster one counts. Weights are random, and BatchNorm gets the
statistics of the images: latency does not depend on them. FP32 and int8 of all runtimes take turns within each round,
each with the same number of threads. Medians count.

Answers are checked before the clock starts. The error of an int8 model against FP32 may be at most 1.5 times the error
of the converted model in memory. Runtimes cannot be compared to the last bits, because a random network amplifies each
rounding. A model above this bound fails the benchmark.

`--throughput` measures images a second under load instead, in OpenVINO alone: requests that are all there from the
beginning, in streams and asynchronous (its hint THROUGHPUT), for ours and NNCF's. Each answer is checked against the
same model's one-by-one call first. `--seconds` is the time for each model and batch size.

`--no-peer` leaves NNCF out and compares with the fastest FP32 instead, which ours must not be slower than:

    python benchmarks/int8_latency.py --no-peer --models vit_b_16 swin_t --batches 1 32 --runtimes openvino onnxruntime

The bar: the fastest of ours takes at most 1.05 times the peer's time, for every model and batch size (throughput: at
least 1 / 1.05 of the peer's images a second). A miss exits with 1. The defaults take about 10 minutes, most of it batch
256. `--fp32-largest` sets the largest batch size timed in FP32.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from dist_train.lowering import inductor, onnx, openvino
from dist_train.lowering.base import LoweringUnavailable, quiet
from dist_train.lowering.comparison import LARGEST_DIFFERENCE, relative_difference
from dist_train.lowering.latency import compare_throughput
from dist_train.quantization.pt2e.backend import PT2EBackend, export_converted
from dist_train.quantization.ranges import Ranges

BAR = 1.05
FARTHER = 1.5
PEER = "nncf"
Call = Callable[[Tensor], Tensor]
RUNTIMES: dict[str, Callable[[Any, Tensor, int], Any]] = {
    "openvino": openvino.lower,
    "onnxruntime": onnx.write,
    "inductor": inductor.lower,
}


def float_model(name: str, images: Tensor) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = getattr(torchvision.models, name)(weights=None)
    for parameter in model.parameters():
        if parameter.dim() == 2 and not parameter.any():  # vit's head: with it all answers were 0
            nn.init.trunc_normal_(parameter, std=0.02)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over all images
    with torch.no_grad():
        model.train()(images)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


@torch.no_grad()
def quantized(model: nn.Module, images: Tensor) -> Any:  # a GraphModule
    backend = PT2EBackend()
    prepared = backend.prepare(model, images[:2]).eval()
    ranges = Ranges(prepared)
    prepared.fake_quantize(False)
    prepared(images)
    ranges.update(ranges.observed(), averaging=1.0)
    prepared.fake_quantize(True)
    return backend.convert(prepared)


def peers(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Returns NNCF's models, `openvino.Model`s, by the name of the peer."""
    openvino.shared_core()  # imports OpenVINO without its telemetry
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # and NNCF's
    import nncf
    import openvino as ov

    nncf.set_log_level(logging.ERROR)
    graphs = {}
    for suffix, preset in (("", nncf.QuantizationPreset.PERFORMANCE), (" mixed", nncf.QuantizationPreset.MIXED)):
        shape = ov.PartialShape([-1, *images.shape[1:]])
        with quiet():
            graph = ov.convert_model(model, example_input=images[:2], input=[shape])
            data = nncf.Dataset([image.numpy() for image in images.split(1)])
            graphs[PEER + suffix] = nncf.quantize(graph, data, preset=preset, subset_size=len(images))
    return graphs


def peer_call(graph: Any, example: Tensor, threads: int) -> Call:
    """Opens one of NNCF's models as ours are: compiled for each batch size, with the same settings."""
    return openvino.open_files(list(openvino.serialized(graph).values()), example, threads)


def relative_error(call: Call, expected: Tensor, images: Tensor) -> float:
    """Returns the norm of the difference divided by the norm of `expected`."""
    answers = torch.cat([call(image) for image in images.split(1)])
    return float((answers - expected).norm() / expected.norm())


@torch.no_grad()
def lowered(name: str, images: Tensor, options: argparse.Namespace) -> tuple[dict[str, Call], list[str]]:
    """Returns calls by "runtime model", without the wrong ones, and the names of the wrong ones."""
    model = float_model(name, images)
    converted = quantized(model, images)
    expected = model(images)
    bound = FARTHER * relative_error(converted, expected, images)
    program = export_converted(converted, images[:2])
    calls: dict[str, Call] = {}
    for runtime in options.runtimes:
        for kind, source in (("fp32", model), ("int8", program)):
            try:
                calls[f"{runtime} {kind}"] = RUNTIMES[runtime](source, images[:1], options.threads).call
            except LoweringUnavailable as reason:
                print(f"{name}: {runtime} {kind} left out: {reason}")
    graphs = {} if options.no_peer else peers(model, images)
    calls |= {f"{peer} int8": peer_call(graph, images[:1], options.threads) for peer, graph in graphs.items()}
    wrong = []
    for label, call in calls.items():
        error, allowed = relative_error(call, expected, images), 1e-3 if label.endswith("fp32") else bound
        if not error <= allowed:
            wrong.append(label)
        print(f"{name:13} {label:18} differs from FP32 by {error:.2g}{' WRONG' if label in wrong else ''}")
    return {label: call for label, call in calls.items() if label not in wrong}, wrong


@torch.no_grad()
def medians(calls: dict[str, Call], batch: Tensor, rounds: int) -> dict[str, float]:
    """Returns milliseconds. An untimed call begins each turn, so that caches and threads are the runtime's own."""
    times: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(rounds):
        for label, call in calls.items():
            call(batch)
            repeats = max(1, 16 // len(batch))
            start = time.perf_counter()
            for _ in range(repeats):
                call(batch)
            times[label].append((time.perf_counter() - start) / repeats * 1000)
    return {label: statistics.median(values) for label, values in times.items()}


@torch.no_grad()
def under_load(name: str, images: Tensor, options: argparse.Namespace) -> tuple[dict[str, openvino.Streams], list[str]]:
    """Returns ours and NNCF's int8 models in streams, without the wrong ones, and the names of the wrong ones."""
    model = float_model(name, images)
    converted = quantized(model, images)
    expected = model(images)
    bound = FARTHER * relative_error(converted, expected, images)
    program = export_converted(converted, images[:2])
    files = {"openvino int8": [onnx.onnx_bytes(program, images[:1])]}
    files |= {f"{peer} int8": list(openvino.serialized(graph).values()) for peer, graph in peers(model, images).items()}
    streams: dict[str, openvino.Streams] = {}
    wrong = []
    for label, content in files.items():
        call = openvino.open_files(content, images[:1], options.threads)
        if not (error := relative_error(call, expected, images)) <= bound:
            print(f"{name:13} {label:18} differs from FP32 by {error:.2g} WRONG")
            wrong.append(label)
        found = openvino.Streams(content, images[:1], options.threads)
        for size in options.batches:
            batches = [images[torch.randint(len(images), (size,))] for _ in range(4 * found.at_once(size) + 1)]
            pairs = zip(found(batches), map(call, batches), strict=True)
            difference = max(relative_difference(answer, alone) for answer, alone in pairs)
            right = difference <= LARGEST_DIFFERENCE
            print(
                f"{name:13} batch {size:<4} {label:18} {found.at_once(size)} at once, differs from its calls by "
                f"{difference:.2g}{'' if right else ' WRONG'}"
            )
            if not right:
                wrong.append(f"{label} batch {size}")
        streams[label] = found
    return {label: found for label, found in streams.items() if not any(label in each for each in wrong)}, wrong


def throughput(name: str, images: Tensor, options: argparse.Namespace) -> list[str]:
    """Measures and prints images a second; returns what missed the bar."""
    streams, wrong = under_load(name, images, options)
    missed = [f"{name} {label}: wrong answers" for label in wrong]
    for size in options.batches:
        rates = compare_throughput(
            streams, lambda rows: torch.randn(rows, *images.shape[1:]), batch_sizes=[size], seconds=options.seconds
        )
        found = {label: each[str(size)] for label, each in rates.items()}
        theirs = max((each.median for label, each in found.items() if label.startswith(PEER)), default=float("nan"))
        for label, each in found.items():
            print(
                f"{name:13} batch {size:<4} {label:18} {each.median:10.1f} images/s ({each.low:.1f} to {each.high:.1f})"
                f"  {each.median / theirs:6.2f} of the peer's",
                flush=True,
            )
        ratio = max(each.median for label, each in found.items() if not label.startswith(PEER)) / theirs
        if not ratio >= 1 / BAR:
            missed.append(f"{name} batch {size}: {ratio:.2f} of the peer's images/s")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50", "mobilenet_v2"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--runtimes", nargs="+", choices=sorted(RUNTIMES), default=list(RUNTIMES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--images", type=int, default=16, help="for calibration and for the check of answers")
    parser.add_argument("--throughput", action="store_true", help="images a second under load, instead of latency")
    parser.add_argument("--no-peer", action="store_true", help="compare with FP32 instead of NNCF")
    parser.add_argument("--seconds", type=float, default=5.0, help="of throughput, for each model and batch size")
    parser.add_argument("--fp32-largest", type=int, default=32, help="largest batch size that FP32 is timed at")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"{datetime.date.today()} torch {torch.__version__} "
        f"({os.cpu_count()} cores, {options.threads} threads, load {os.getloadavg()[0]:.1f} before)"
    )
    generator = torch.Generator().manual_seed(0)
    bar, whose = (1.0, "FP32's") if options.no_peer else (BAR, "the peer's")
    missed = []
    for name in options.models:
        images = torch.randn(options.images, 3, options.size, options.size, generator=generator)
        if options.throughput:
            missed += throughput(name, images, options)
            continue
        calls, wrong = lowered(name, images, options)
        missed += [f"{name} {label}: wrong answers" for label in wrong]
        for size in options.batches:
            batch = torch.randn(size, 3, options.size, options.size, generator=generator)
            timed = {
                label: call for label, call in calls.items() if label.endswith("int8") or size <= options.fp32_largest
            }
            times = medians(timed, batch, options.rounds)
            compared = [
                value
                for label, value in times.items()
                if (label.endswith("fp32") if options.no_peer else label.startswith(PEER))
            ]
            theirs = min(compared, default=float("nan"))
            for label, value in times.items():
                print(f"{name:13} batch {size:<4} {label:18} {value:10.2f} ms  {value / theirs:6.2f} of {whose}")
            ours = {
                label: value for label, value in times.items() if label.endswith("int8") and not label.startswith(PEER)
            }
            best = min(ours, key=ours.__getitem__, default=None)
            ratio = ours[best] / theirs if best is not None else float("nan")
            passed = ratio <= bar
            print(
                f"{name:13} batch {size:<4} best: {best}, ratio {ratio:.2f} ({'passed' if passed else 'MISSED'})",
                flush=True,
            )
            if not passed:
                missed.append(f"{name} batch {size}: ratio {ratio:.2f}")
    print(f"bar: at most {bar} of {whose} time: {'; '.join(missed) or 'passed'}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
