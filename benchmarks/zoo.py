"""Forty models of timm and torchvision to int8 by each backend, and on to two runtimes, as a Markdown table.

    pip install -e '.[quickstart,timm]'

    python benchmarks/zoo.py [--models timm/resnet18 ...] [--backends pt2e fx] [--size 64] [--timeout 900]
        [--out zoo.md]

Each pair of a model and a backend has a process of its own: forwards in training mode, which settle the statistics of
random weights; the backend's check at set-up, which compares outputs and gradients with the float model's and converts
a copy; ranges from 64 images of smooth noise; two steps of QAT; convert; the program. Then int8 is written for ONNX
Runtime and for OpenVINO, unless it is TorchScript. On a CPU without VNNI activations keep to 127 steps (`qat.engine`),
as the runtimes would overflow.

A cell says int8 with the share of the weights in integers and of 64 decisions that are kept: by the integers of those
of fake quantization, and by each runtime of the integers'; or the first line of the refusal. The nets are untrained and
multiply roundings, so the shares of decisions are shown and are no gates. The table is written anew after each pair, to
--out, with the outcomes beside it as JSON: pairs that are there already are not run again. A pair takes 20 to 90
seconds on an idle core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODELS = (
    *("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "shufflenet_v2_x1_0"),
    *("squeezenet1_1", "densenet121", "googlenet", "inception_v3", "mnasnet1_0", "regnet_y_400mf", "convnext_tiny"),
    *("timm/resnet18", "timm/resnet26d", "timm/resnetv2_50x1_bit", "timm/seresnet18", "timm/skresnet18"),
    *("timm/regnetx_002", "timm/nf_regnet_b0", "timm/repvgg_a0", "timm/mobileone_s0", "timm/mobilenetv2_100"),
    *("timm/mobilenetv3_small_100", "timm/mobilenetv4_conv_small", "timm/lcnet_050", "timm/mixnet_s"),
    *("timm/hardcorenas_a", "timm/tinynet_e", "timm/ghostnet_100", "timm/efficientnet_lite0", "timm/efficientvit_b0"),
    *("timm/fastvit_t8", "timm/repvit_m0_9", "timm/mobilevit_xxs", "timm/edgenext_xx_small", "timm/convnext_atto"),
    *("timm/deit_tiny_patch16_224", "timm/xcit_nano_12_p16_224", "timm/dla34"),
)
SIZES = {"timm/deit_tiny_patch16_224": 224, "timm/xcit_nano_12_p16_224": 224, "inception_v3": 96}
"""Pixels, for models that take no small images."""

_ROWS, _BATCH, _CLASSES = 64, 16, 10
_SETTLING = 30  # forwards of a batch


def trial(model_name: str, backend_name: str, size: int) -> str:
    """Takes a model the whole way in this process; returns the cell's text.

    Raises:
        DistTrainError: the model is refused.
    """
    import torch

    from dist_train.artifact.bundle import write_format
    from dist_train.artifact.deployable import deploy_int8
    from dist_train.cluster.instructions import sums_overflow
    from dist_train.config.data import ModelConfig
    from dist_train.config.stages import QATConfig
    from dist_train.errors import DistTrainError
    from dist_train.lowering.trial import Trial
    from dist_train.models.build import build_model
    from dist_train.quantization.backend import build_backend
    from dist_train.quantization.int8_share import int8_share
    from dist_train.quantization.ranges import Ranges

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = build_model(ModelConfig(name=model_name), _CLASSES, 3)
    coarse = torch.randn(_ROWS, 3, max(2, size // 8), max(2, size // 8))
    images = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    images += 0.2 * torch.randn(images.shape)
    labels = torch.arange(_ROWS) % _CLASSES
    with torch.no_grad():
        for start in range(_SETTLING):
            model.train()(images[torch.arange(start * 7, start * 7 + _BATCH) % _ROWS])
    settings = QATConfig(backend=backend_name, engine="x86" if sums_overflow() and backend_name == "pt2e" else "auto")
    backend = build_backend(settings)
    backend.check(model, (), images[:2])
    prepared = backend.prepare(model.eval(), images[:2])
    ranges = Ranges(prepared)
    with torch.no_grad():
        for batch in images.split(_BATCH):
            prepared(batch)
    ranges.update(ranges.observed(), 1.0)
    optimizer = torch.optim.SGD(prepared.train().parameters(), lr=1e-4)
    for step in range(2):
        rows = slice(step * _BATCH, (step + 1) * _BATCH)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(prepared(images[rows]), labels[rows]).backward()
        optimizer.step()
        ranges.update(ranges.observed(), settings.averaging)
    prepared.eval().observe(False)
    with torch.no_grad():
        expected = prepared(images)
        converted = backend.convert(prepared)
        integers = converted(images[:_BATCH])
        program = backend.serialize(converted, images[:2])
    deployed = deploy_int8(program, integers)

    def kept(call: Any, wanted: torch.Tensor) -> float:
        with torch.no_grad():
            got = torch.cat([call(batch) for batch in images.split(_BATCH)])
        return float((got.argmax(1) == wanted.argmax(1)).double().mean())

    share = int8_share(model, prepared)
    parts = [f"int8, {share.share:.1%}" if share is not None else "int8", f"{kept(deployed.call, expected):.2f}"]
    with torch.no_grad():
        wanted = torch.cat([deployed.call(batch) for batch in images.split(_BATCH)])
    for format in ("onnx", "openvino") if program.lowers else ():
        try:
            written = write_format(deployed, format, images[:_BATCH], 1)
            tried = Trial(written.runtime, format)
            tried.compare(written.call, deployed, images[:_BATCH], None)
            parts.append(f"{format} {tried.left_out or f'{kept(written.call, wanted):.2f}'}")
        except DistTrainError as error:
            parts.append(f"{format}: {error.message.splitlines()[0]}")
    return "; ".join(parts)


def child(model: str, backend: str, size: int) -> None:
    """Prints the cell of `trial`, or of its refusal, as the last line."""
    from dist_train.errors import DistTrainError

    try:
        cell = trial(model, backend, size)
    except DistTrainError as error:
        cell = f"refused: {error.message.splitlines()[0]} -> {error.hint}"
    print(cell.replace("\n", " "))


def outcome(model: str, backend: str, size: int, timeout: float) -> str:
    """Runs `trial` in a process of its own, and says what came of it, in one line."""
    started = time.monotonic()
    command = [sys.executable, __file__, "--child", model, backend, str(size)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"no end within {timeout:g} s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or [""]
    if done.returncode:
        return f"failed ({done.returncode}): {lines[-1][:300]}"
    return f"{lines[-1]} ({time.monotonic() - started:.0f} s)"


def table(found: dict[str, dict[str, str]], backends: Sequence[str]) -> str:
    """The outcomes as a Markdown table."""
    lines = ["| model | " + " | ".join(f"`{each}`" for each in backends) + " |", "|---" * (1 + len(backends)) + "|"]
    for model, cells in found.items():
        row = " | ".join(cells.get(each, "").replace("|", "\\|") for each in backends)
        lines.append(f"| `{model}` | {row} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--backends", nargs="+", default=["pt2e", "fx"])
    parser.add_argument("--size", type=int, default=64, help="pixels of a side; some models have their own")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for a pair")
    parser.add_argument("--out", type=Path, default=Path("zoo.md"))
    parser.add_argument("--child", nargs=3, metavar=("MODEL", "BACKEND", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        model, backend, size = arguments.child
        return child(model, backend, int(size))
    os.environ["OMP_NUM_THREADS"] = "1"
    record = arguments.out.with_suffix(".json")
    found: dict[str, dict[str, str]] = json.loads(record.read_text()) if record.exists() else {}
    for model in arguments.models:
        for backend in arguments.backends:
            cells = found.setdefault(model, {})
            if backend not in cells:
                size = SIZES.get(model, arguments.size)
                cells[backend] = outcome(model, backend, size, arguments.timeout)
                print(f"{model} by {backend}: {cells[backend]}", flush=True)
                record.write_text(json.dumps(found, indent=2) + "\n")
                arguments.out.write_text(table(found, arguments.backends))


if __name__ == "__main__":
    main()
