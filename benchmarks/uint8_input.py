"""Gain of `export.input: uint8`: int8 and FP32 models that take pixels, against normalizing first and then calling.

    pip install -e '.[quickstart]'

    python benchmarks/uint8_input.py [--models resnet18 mobilenet_v2] [--batches 1 32] [--seconds 3] [--threads 2]
        [--runtimes openvino onnxruntime]

Both ways begin with the same uint8 images in memory and end with the outputs, and take turns. `float` normalizes by two
operations of torch, as dist_train's loader does, and hands four bytes a value to the runtime. `uint8` hands over one.
The outputs are compared first. No bar.
"""

from __future__ import annotations

import argparse
import datetime
import os
from collections.abc import Callable
from typing import Any

import torch
from int8_latency import RUNTIMES, float_model, quantized
from torch import Tensor

from dist_train.artifact.pixel_input import PixelInput
from dist_train.data.augment.steps import Augmentation
from dist_train.lowering.comparison import relative_difference
from dist_train.lowering.latency import compare_spread
from dist_train.programs.pt2 import export_program
from dist_train.quantization.pt2e.backend import export_converted

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Call = Callable[[Tensor], Tensor]


@torch.no_grad()
def calls(name: str, pixels: Tensor, options: argparse.Namespace) -> dict[str, Call]:
    """Returns calls that take uint8 images, by "runtime model input"."""
    normalize = Augmentation([], seed=0, mean=MEAN, std=STD).normalize
    taken = PixelInput(MEAN, STD, pixels.shape[1:])
    images = normalize(pixels)
    model = float_model(name, images)
    converted = quantized(model, images)
    program = export_converted(converted, images[:2])
    pixel_program = export_program(taken.before(program.module(check_guards=False)), pixels[:1])
    sources: dict[str, tuple[Any, Any]] = {"fp32": (model, taken.before(model)), "int8": (program, pixel_program)}
    found: dict[str, Call] = {}
    for kind, (source, pixel_source) in sources.items():
        for runtime in options.runtimes:
            found[f"{runtime} {kind} float"] = after(
                normalize, RUNTIMES[runtime](source, images[:1], options.threads).call
            )
            found[f"{runtime} {kind} uint8"] = RUNTIMES[runtime](pixel_source, pixels[:1], options.threads).call
            pair = (found[f"{runtime} {kind} {each}"](pixels) for each in ("uint8", "float"))
            print(f"{name:13} {runtime} {kind}: uint8 differs from float by {relative_difference(*pair):.2g}")
    return found


def after(normalize: Call, call: Call) -> Call:
    return lambda pixels: call(normalize(pixels))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--runtimes", nargs="+", choices=sorted(RUNTIMES), default=["openvino", "onnxruntime"])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each way at each batch size")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"{datetime.date.today()} torch {torch.__version__} "
        f"({os.cpu_count()} cores, {options.threads} threads, load {os.getloadavg()[0]:.1f} before)"
    )
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int) -> Tensor:
        return torch.randint(256, (rows, 3, options.size, options.size), generator=generator, dtype=torch.uint8)

    for name in options.models:
        found = calls(name, draw(16), options)
        with torch.no_grad():
            times = compare_spread(found, draw, options.batches, options.seconds, untimed=1)
        for size in map(str, options.batches):
            for label in found:
                if label.endswith("uint8"):
                    pixels, floats = times[label][size].median, times[label.replace("uint8", "float")][size].median
                    kilobytes = int(size) * 3 * options.size**2 / 1000
                    print(
                        f"{name:13} batch {size:<4} {label.removesuffix(' uint8'):18} "
                        f"float {floats:8.2f} ms ({4 * kilobytes:,.0f} kB), "
                        f"uint8 {pixels:8.2f} ms ({kilobytes:,.0f} kB): {pixels / floats:.2f}"
                    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
