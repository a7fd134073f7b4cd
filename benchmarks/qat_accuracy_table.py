"""Results of qat_accuracy.py: a row for each run, paired differences over the seeds, and the table of both."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student_t

from dist_train.config.stages import ConvertConfig

BAR = 0.1  # points
FIGURES = ("fp32", "ptq", "fake_quant", "int8")
GATE = ConvertConfig().agreement_bound


@dataclass(frozen=True)
class Row:
    """Top-1 of one float model and of the models that one backend made from it.

    `lowered`: top-1 of int8 in its runtime; None if it ran in none. `agreement`: share of the images on which int8 and
    the fake-quantized model decide alike, the lower one of in process and in the runtime.
    """

    model: str
    backend: str
    seed: int
    fp32: float
    ptq: float
    fake_quant: float
    int8: float
    lowered: float | None
    agreement: float
    seconds: float


@dataclass(frozen=True)
class Paired:
    """Mean over seeds of a difference to FP32 in points, and half its 95 % interval (None for one seed)."""

    mean: float
    half_width: float | None

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± " + ("-" if self.half_width is None else f"{self.half_width:.2f}")


def paired(differences_in_points: Sequence[float]) -> Paired:
    n = len(differences_in_points)
    mean = statistics.mean(differences_in_points)
    if n == 1:
        return Paired(mean, None)
    quantile = float(student_t.ppf(0.975, n - 1))
    return Paired(mean, quantile * statistics.stdev(differences_in_points) / n**0.5)


@dataclass(frozen=True)
class Summary:
    """Means of top-1 and differences to FP32 in points, over the seeds of one model and backend."""

    model: str
    backend: str
    seeds: int
    means: dict[str, float]
    ptq_minus_fp32: Paired
    int8_minus_fp32: Paired
    agreement: float
    """The lowest over the seeds."""

    @property
    def passed(self) -> bool:
        return abs(self.int8_minus_fp32.mean) <= BAR + 1e-9  # the mean of binary fractions may round up


def summaries(rows: Sequence[Row]) -> list[Summary]:
    found = []
    for model, backend in dict.fromkeys((row.model, row.backend) for row in rows):
        own = [row for row in rows if (row.model, row.backend) == (model, backend)]
        means = {name: statistics.mean(getattr(row, name) for row in own) for name in FIGURES}
        ptq, int8 = (paired([100 * (getattr(row, name) - row.fp32) for row in own]) for name in ("ptq", "int8"))
        agreement = min(row.agreement for row in own)
        found.append(Summary(model, backend, len(own), means, ptq, int8, agreement))
    return found


def table(found: Sequence[Summary]) -> str:
    head = f"{'model':19} {'backend':7} {'seeds':>5}" + "".join(f" {name:>10}" for name in FIGURES)
    lines = [f"{head} {'ptq - fp32':>16} {'int8 - fp32':>16} {'agree':>8}  bar"]
    for each in found:
        means = "".join(f" {mean:10.2%}" for mean in each.means.values())
        pairs, verdict = (each.ptq_minus_fp32, each.int8_minus_fp32), "passed" if each.passed else "MISSED"
        line = f"{each.model:19} {each.backend:7} {each.seeds:5}{means}" + "".join(f" {pair!s:>16}" for pair in pairs)
        refused = f", below the gate of {GATE:.0%}" if each.agreement < GATE else ""
        lines.append(f"{line} {each.agreement:8.2%}  {verdict}{refused}")
    return "\n".join(lines)
