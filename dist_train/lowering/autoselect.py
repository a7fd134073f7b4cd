"""`format: auto`: a model in every runtime that is installed, FP32 beside it, and the fastest of those that answer right."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dist_train import registry
from dist_train.lowering import inductor
from dist_train.lowering.agreement import Agreement, Decisions
from dist_train.lowering.base import LoweringUnavailable, Written
from dist_train.lowering.comparison import Candidate, is_rounding, relative_difference
from dist_train.lowering.latency import compare_latency
from dist_train.programs.torchscript import trace

Call = Callable[[Tensor], Tensor]
_NOISE = 1.05  # medians of one model, measured twice, were seen to differ by less


@dataclass
class Trial:
    """A model in one runtime.

    Attributes:
        runtime: its name, with the version where it has one of its own.
        format: what is written for it; pt2 for the program itself.
        left_out: why it was not measured, "" where it was.
        difference: the largest one of its answers from those of the model in memory, in units of the largest answer.
        agreed: how often it decides the same, as the task counts it; None where it was not asked.
        latency_ms: median milliseconds by model (this one, and fp32) and batch size.
        written: what a format's writer gave.
    """

    runtime: str
    format: str
    left_out: str = ""
    difference: float = math.nan
    agreed: Agreement | None = None
    latency_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    written: Written | None = None
    calls: dict[str, Call] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """All trials, and the best of them: None where no runtime is installed or right."""

    model: str
    trials: list[Trial]
    best: Trial | None

    def rows(self) -> list[dict[str, Any]]:
        """The table, as JSON."""
        measured = [
            {
                "runtime": each.runtime,
                "format": each.format,
                "latency_ms": each.latency_ms,
                "difference": each.difference,
                "agreement": each.agreed.share,
                "samples": each.agreed.samples,
                "chosen": each is self.best,
            }
            for each in self.trials
            if not each.left_out and each.agreed is not None
        ]
        return measured + [
            {"runtime": each.runtime, "format": each.format, "left_out": each.left_out, "chosen": False}
            for each in self.trials
            if each.left_out
        ]

    def lines(self) -> list[str]:
        """The table and the reason, for people."""
        said = [f"{self.model}: {each.runtime} left out: {each.left_out}" for each in self.trials if each.left_out]
        measured = [each for each in self.trials if not each.left_out]
        if self.best is None:
            return [*said, f"{self.model}: no runtime to choose from; pip install 'dist-train[openvino,onnx]'"]
        for each in measured:
            assert each.agreed is not None
            times = "; ".join(f"{name} {_milliseconds(values)}" for name, values in each.latency_ms.items())
            chosen = ", chosen" if each is self.best else ""
            said.append(
                f"{self.model}: {each.runtime}: {times}; same decision {each.agreed.share:.1%} of {each.agreed.samples:,}, "
                f"differs by {each.difference:.2g} of the largest output{chosen}"
            )
        others = sorted(self._cost(each) for each in measured if each is not self.best)
        why = f"the next takes {others[0] / self._cost(self.best):.2f} times as long" if others else "the only one"
        said.append(f"{self.model}: {self.best.format} for {self.best.runtime}, the fastest that answers right ({why})")
        return said + [line for each in measured for line in slower_than_float(each.latency_ms, each.runtime)]

    def why(self) -> str:
        """Why the best one is it, without the times, which are of this machine and this hour."""
        assert self.best is not None
        measured = [each.runtime for each in self.trials if not each.left_out]
        left_out = [f"{each.runtime} left out: {each.left_out}" for each in self.trials if each.left_out]
        fastest = f"the fastest of {', '.join(measured)}" if len(measured) > 1 else "the only one that answers right"
        return "; ".join([f"{fastest} on the machine that exported it", *left_out])

    def _cost(self, trial: Trial) -> float:
        return cost(trial.latency_ms[self.model])


def cost(latency_ms: Mapping[str, float]) -> float:
    """The geometric mean over the batch sizes: twice as slow at one weighs as much as twice as fast at another."""
    return math.exp(sum(map(math.log, latency_ms.values())) / len(latency_ms))


def slower_than_float(latency_ms: Mapping[str, Mapping[str, float]], runtime: str) -> list[str]:
    """A warning for each batch size at which int8 is slower than FP32 in the same runtime."""
    if not {"int8", "fp32"} <= latency_ms.keys():
        return []
    return [
        f"warning: in {runtime} int8 is slower than FP32 at batch {size}: {value:.3g} ms against {other:.3g}"
        for size, value in latency_ms["int8"].items()
        if size in latency_ms["fp32"] and value > _NOISE * (other := latency_ms["fp32"][size])
    ]


def _milliseconds(latency_ms: Mapping[str, float]) -> str:
    sizes, times = "/".join(latency_ms), "/".join(f"{value:.3g}" for value in latency_ms.values())
    return f"{times} ms at batch {sizes}"


@torch.no_grad()
def choose_format(
    name: str,
    candidates: Mapping[str, Candidate],
    probe: Tensor,
    images: Callable[[int], Tensor],
    batch_sizes: Sequence[int],
    threads: int,
    decisions: Decisions,
) -> Choice:
    """Tries `candidates[name]` in every registered format's runtime and under Inductor; TorchScript runs as it is.

    candidates: `name` and, to compare with in the same runtime, fp32. probe: float32 [rows, C, H, W], what answers are compared on, one
    row too. images: batch size -> float32 [B, C, H, W]. decisions: of the model in memory, as which a runtime must decide. All that
    are measured take turns.
    """
    others = {"fp32": candidates["fp32"]} if name != "fp32" and "fp32" in candidates else {}
    trials = [
        _try(trial, make, name, candidates[name], others, probe, decisions)
        for trial, make in _runtimes(candidates[name], probe, threads)
    ]
    running = [each for each in trials if not each.left_out]
    calls = {f"{place} {model}": call for place, each in enumerate(running) for model, call in each.calls.items()}
    if calls:
        times = compare_latency(calls, images, batch_sizes)
        for place, each in enumerate(running):
            each.latency_ms = {model: times[f"{place} {model}"] for model in each.calls}
    best = min(running, key=lambda each: cost(each.latency_ms[name]), default=None)
    return Choice(name, trials, best)


Make = Callable[[Candidate], tuple[Call, Written | None]]


def _runtimes(candidate: Candidate, probe: Tensor, threads: int) -> list[tuple[Trial, Make]]:
    if candidate.source is None:
        return [(Trial("torchscript", "pt2"), lambda each: (_as_script(each, probe), None))]

    def writer(format: str) -> Make:
        def make(each: Candidate) -> tuple[Call, Written]:
            missing = registry.export_formats.entry(format).missing()
            if missing:
                raise LoweringUnavailable(f"pip install {' '.join(missing)}")
            written: Written = registry.export_formats.get(format)(each.source, probe[:1], threads)
            return written.call, written

        return make

    def compiled(each: Candidate) -> tuple[Call, None]:
        assert each.source is not None
        return inductor.lower(each.source, probe[:1], threads).call, None

    formats = [(Trial(format, format), writer(format)) for format in registry.export_formats.names()]
    return [*formats, (Trial("inductor", "pt2"), compiled)]


def _as_script(each: Candidate, probe: Tensor) -> Call:
    return trace(each.source, probe) if isinstance(each.source, nn.Module) else each.call


def _try(
    trial: Trial,
    make: Make,
    name: str,
    model: Candidate,
    others: Mapping[str, Candidate],
    probe: Tensor,
    decisions: Decisions,
) -> Trial:
    """`trial` with its calls and its fidelity, or why it is left out."""
    try:
        trial.calls[name], trial.written = make(model)
        if trial.written is not None:
            trial.runtime = trial.written.runtime
        sizes = (probe, probe[:1])
        differences = [relative_difference(trial.calls[name], model.call, rows) for rows in sizes]
        trial.difference = float(torch.tensor(differences).max())  # NaN where one is
        if not all(is_rounding(found, model, rows) for found, rows in zip(differences, sizes, strict=True)):
            trial.left_out = f"it answers differently ({trial.difference:.2g} of the largest output)"
        else:
            trial.agreed = decisions.agreement(trial.calls[name])
            if not trial.agreed.passed:
                trial.left_out = (
                    f"{trial.agreed.in_words()} (it differs by {trial.difference:.2g} of the largest output)"
                )
    except LoweringUnavailable as reason:
        trial.left_out = str(reason)
    for other, candidate in others.items() if not trial.left_out else ():
        try:
            call, _ = make(candidate)
        except LoweringUnavailable:
            continue  # a format for int8 is chosen all the same; only the comparison is missing
        if is_rounding(relative_difference(call, candidate.call, probe), candidate, probe):
            trial.calls[other] = call
    return trial
