"""A model in a runtime that is fast on the CPU: OpenVINO where it is installed, else Inductor where a compiler is."""

from __future__ import annotations

from dist_train.lowering.base import Lowered, LoweringUnavailable
from dist_train.lowering.comparison import lower
from dist_train.lowering.latency import compare_latency, measure_latency

__all__ = ["Lowered", "LoweringUnavailable", "compare_latency", "lower", "measure_latency"]
