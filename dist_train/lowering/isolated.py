"""Compiles a quantized model by OpenVINO in a process of its own first, as some crash it: the run would go with it."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_train.lowering.base import LoweringUnavailable

_SECONDS = 900.0
_MARKS = (b"QuantizeLinear", b'type="FakeQuantize"', b'"Convert_')  # of operators, in ONNX and in IR
_ended_by: dict[str, int] = {}  # by the hash of a model: a run opens the same one several times
_PROGRAM = """\
import json, sys
sys.modules["openvino_telemetry"] = None
import openvino
files, shapes, settings = map(json.loads, sys.argv[1:])
core = openvino.Core()
model = core.read_model(*files)
model.reshape(dict(enumerate(shapes)))
core.compile_model(model, "CPU", settings)
"""


def refuse_crash(
    graph: bytes, weights: bytes | None, shapes: Sequence[Sequence[int]], settings: Mapping[str, Any]
) -> None:
    """Refuses a quantized model that ends the process that compiles it. Other errors are left to the compilation.

    OpenVINO 2026.4.1 was seen to end by a segmentation fault for concatenations of quantized tensors (timm's GhostNet).

    Args:
        graph, weights: ONNX and None, or IR's xml and bin.
        shapes: of the inputs, [B, ...], -1 for a size that varies; settings: of `compile_model`.

    Raises:
        LoweringUnavailable: a signal ended the process.
    """
    if not any(mark in graph for mark in _MARKS):
        return
    key = hashlib.sha256(b"".join([graph, weights or b"", str([list(shape) for shape in shapes]).encode()])).hexdigest()
    if key not in _ended_by:
        _ended_by[key] = _signal_of(graph, weights, shapes, settings)
    if _ended_by[key]:
        name = signal.Signals(_ended_by[key]).name
        raise LoweringUnavailable(f"OpenVINO crashes ({name}) when it compiles this model, in a process of its own")


def _signal_of(
    graph: bytes, weights: bytes | None, shapes: Sequence[Sequence[int]], settings: Mapping[str, Any]
) -> int:
    """Returns the number of the signal that ended the compilation; 0 where none did."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [folder / "model.onnx"] if weights is None else [folder / "model.xml", folder / "model.bin"]
        for path, data in zip(files, (graph, weights or b""), strict=False):
            path.write_bytes(data)
        command = [sys.executable, "-I", "-c", _PROGRAM, json.dumps([str(path) for path in files])]
        try:
            done = subprocess.run(
                [*command, json.dumps([list(shape) for shape in shapes]), json.dumps(dict(settings))],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return 0
    return max(0, -done.returncode)
