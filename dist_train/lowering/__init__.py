"""Lowering of models to fast CPU runtimes (OpenVINO, Inductor) and to other formats (ONNX, ExecuTorch)."""

from __future__ import annotations

from dist_train.lowering.base import Lowered, LoweringUnavailable
from dist_train.lowering.comparison import lower
from dist_train.lowering.latency import compare_latency, measure_latency

__all__ = ["Lowered", "LoweringUnavailable", "compare_latency", "lower", "measure_latency"]
