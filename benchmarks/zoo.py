"""Forty models of timm and torchvision, the whole way to int8 by each backend, as a Markdown table.

    pip install -e '.[quickstart,timm]'

    python benchmarks/zoo.py [--models timm/resnet18 ...] [--backends pt2e fx] [--size 64] [--timeout 900]
        [--out zoo.md]

Each pair of a model and a backend is a run in a process of its own: 30 steps of float training from random weights,
which settle the statistics; prepare with its gates; ranges; two steps of QAT; convert with its gates; the artifact,
verified in a fresh process. Then int8 is written for ONNX Runtime and for OpenVINO, unless it is TorchScript.

A cell says int8 with the share of the weights in integers and of the decisions that each runtime keeps, or the first
line of the refusal. The nets are untrained and multiply roundings, so the gates of decisions ask for `--bound` only.
The table is written anew after each pair, to --out, with the outcomes beside it as JSON: pairs that are there already
are not run again. A pair takes one to three minutes on an idle core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

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

_CONFIG = """\
run: {{name: zoo, dir: {folder}/run, threads_per_rank: 1, device: cpu}}
data:
  name: fake
  args: {{num_train: 16, num_eval: 64, channels: 3, height: {size}, width: {size}}}
  cache_dir: {folder}/cache
  global_batch_size: 8
  eval_batch_size: 16
model: {{name: "{model}"}}
stages: [train, qat, convert, export]
train: {{epochs: 15, optim: {{lr: 0.001}}}}
ptq: {{samples: 16}}
qat: {{backend: {backend}, epochs: 1, optim: {{lr: 0.0001}}}}
convert: {{agreement_bound: {bound}}}
export: {{latency: false}}
"""


def call(arguments: Sequence[str], timeout: float) -> str:
    """Runs dist_train. Returns "" where it succeeds, else the first lines of its error."""
    command = [sys.executable, "-m", "dist_train", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"no end within {timeout:g} s"
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    starts = [index for index, line in enumerate(lines) if line.startswith("dist-train: ")]
    said = lines[starts[-1] :] if starts else lines[-1:]
    return " ".join(said)[:300] or f"exit code {done.returncode}"


def outcome(model: str, backend: str, size: int, bound: float, timeout: float) -> str:
    """Takes a model the whole way by a backend, and says what came of it, in one line."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "zoo.yaml"
        config.write_text(_CONFIG.format(folder=folder, size=size, model=model, backend=backend, bound=bound))
        said = call(["run", str(config)], timeout)
        if said:
            return said
        results = json.loads((folder / "run" / "results.json").read_text())
        parts = [f"int8, {results['models']['int8']['weights']['share']:.1%}"]
        for format in ("onnx", "openvino") if (folder / "run" / "export" / "model.pt2").exists() else ():
            said = call(["export", str(folder / "run"), "--model", "int8", "--format", format], timeout)
            manifest = json.loads((folder / "run" / "export" / "manifest.json").read_text())
            written = manifest["models"]["int8"].get("formats", {}).get(format)
            parts.append(f"{format} {written['agreement']:.2f}" if written else f"{format}: {said}")
    return f"{'; '.join(parts)} ({time.monotonic() - started:.0f} s)"


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
    parser.add_argument("--bound", type=float, default=0.5, help="the smallest share of equal decisions")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for a command")
    parser.add_argument("--out", type=Path, default=Path("zoo.md"))
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    record = arguments.out.with_suffix(".json")
    found: dict[str, dict[str, str]] = json.loads(record.read_text()) if record.exists() else {}
    for model in arguments.models:
        for backend in arguments.backends:
            cells = found.setdefault(model, {})
            if backend not in cells:
                size = SIZES.get(model, arguments.size)
                cells[backend] = outcome(model, backend, size, arguments.bound, arguments.timeout)
                print(f"{model} by {backend}: {cells[backend]}", flush=True)
                record.write_text(json.dumps(found, indent=2) + "\n")
                arguments.out.write_text(table(found, arguments.backends))


if __name__ == "__main__":
    main()
