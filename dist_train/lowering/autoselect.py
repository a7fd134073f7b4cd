"""Choice of a format for `format: auto`: the fastest installed runtime whose outputs are right."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dist_train import registry, trees
from dist_train.lowering import inductor
from dist_train.lowering.agreement import Decisions
from dist_train.lowering.base import Call, LoweringUnavailable, Reference, Written
from dist_train.lowering.comparison import compare_outputs
from dist_train.lowering.latency import compare_latency
from dist_train.lowering.trial import Trial
from dist_train.programs.program import tree_call
from dist_train.programs.torchscript import trace
from dist_train.trees import Tree

_NOISE = 1.05  # two measurements of one model's median differ by less

Make = Callable[[Reference], tuple[Call, Written | None]]


@dataclass(frozen=True)
class Choice:
    """All trials of a model and the best one; None where no runtime is installed and right."""

    model: str
    trials: list[Trial]
    best: Trial | None

    def rows(self) -> list[dict[str, Any]]:
        """Returns the table of runtimes, as JSON."""
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
        """Returns the table and the reason of the choice, as lines for the user."""
        said = [f"{self.model}: {each.runtime} left out: {each.left_out}" for each in self.trials if each.left_out]
        measured = [each for each in self.trials if not each.left_out]
        if self.best is None:
            return [*said, f"{self.model}: no runtime to choose from; pip install 'dist-train[openvino,onnx]'"]
        for each in measured:
            assert each.agreed is not None
            times = "; ".join(f"{name} {_milliseconds(values)}" for name, values in each.latency_ms.items())
            chosen = ", chosen" if each is self.best else ""
            said.append(
                f"{self.model}: {each.runtime}: {times}; "
                f"same decision {each.agreed.share:.1%} of {each.agreed.samples:,}, "
                f"differs by {each.difference:.2g} of the largest output{chosen}"
            )
        others = sorted(self._cost(each) for each in measured if each is not self.best)
        why = f"the next takes {others[0] / self._cost(self.best):.2f} times as long" if others else "the only one"
        said.append(f"{self.model}: {self.best.format} for {self.best.runtime}, the fastest that answers right ({why})")
        return said + [line for each in measured for line in slower_than_float(each.latency_ms, each.runtime)]

    def why(self) -> str:
        """Returns the reason of the choice, for the manifest: without times, which depend on machine and hour."""
        assert self.best is not None
        measured = [each.runtime for each in self.trials if not each.left_out]
        left_out = [f"{each.runtime} left out: {each.left_out}" for each in self.trials if each.left_out]
        fastest = f"the fastest of {', '.join(measured)}" if len(measured) > 1 else "the only one that answers right"
        return "; ".join([f"{fastest} on the machine that exported it", *left_out])

    def _cost(self, trial: Trial) -> float:
        return cost(trial.latency_ms[self.model])


def cost(latency_ms: Mapping[str, float]) -> float:
    """Geometric mean over the batch sizes: twice as slow at one weighs as much as twice as fast at another."""
    return math.exp(sum(map(math.log, latency_ms.values())) / len(latency_ms))


def slower_than_float(latency_ms: Mapping[str, Mapping[str, float]], runtime: str) -> list[str]:
    """Returns a warning for each batch size for which int8 is slower than FP32 in the same runtime."""
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
    models: Mapping[str, Reference],
    probe: Tree,
    images: Callable[[int], Tree],
    batch_sizes: Sequence[int],
    threads: int,
    decisions: Decisions,
) -> Choice:
    """Tries a model in the runtime of each registered format and under Inductor; TorchScript runs unchanged.

    Args:
        name: of the model to choose for.
        models: `models[name]` and, to compare with in the same runtime, fp32.
        probe: [rows, ...]; outputs are compared on it and on its first row.
        images: batch size to inputs [B, ...], for the latency. All runtimes are measured in turns.
        decisions: of the model in memory; a runtime whose decisions do not agree with them is left out.
    """
    others = {"fp32": models["fp32"]} if name != "fp32" and "fp32" in models else {}
    trials = [
        _try(trial, make, name, models[name], others, probe, decisions)
        for trial, make in _runtimes(models[name], probe, threads)
    ]
    running = [each for each in trials if not each.left_out]
    calls = {f"{place} {model}": call for place, each in enumerate(running) for model, call in each.calls.items()}
    if calls:
        times = compare_latency(calls, images, batch_sizes)
        for place, each in enumerate(running):
            each.latency_ms = {model: times[f"{place} {model}"] for model in each.calls}
    best = min(running, key=lambda each: cost(each.latency_ms[name]), default=None)
    return Choice(name, trials, best)


def _runtimes(model: Reference, probe: Tree, threads: int) -> list[tuple[Trial, Make]]:
    """Returns a trial for each runtime, and the function that lowers a model to it."""
    if model.source is None:
        return [(Trial("torchscript", "pt2"), lambda each: (_as_script(each, probe), None))]

    def writer(format: str) -> Make:
        def make(each: Reference) -> tuple[Call, Written]:
            missing = registry.export_formats.entry(format).missing()
            if missing:
                raise LoweringUnavailable(f"pip install {' '.join(missing)}")
            written = written_as(format, each, trees.take(probe, slice(1)), threads)
            return written.call, written

        return make

    def compiled(each: Reference) -> tuple[Call, None]:
        assert each.source is not None
        return inductor.lower(each.source, trees.take(probe, slice(1)), threads).call, None

    formats = [(Trial(format, format), writer(format)) for format in registry.export_formats.names()]
    return [*formats, (Trial("inductor", "pt2"), compiled)]


def written_as(format: str, model: Reference, example: Tree, threads: int) -> Written:
    """Writes a model that has a source in a registered format. Raises as its function does."""
    write: Callable[..., Written] = registry.export_formats.get(format)
    # A format of another package may not know of dimensions that vary.
    return write(model.source, example, threads, **({"dynamic": model.dynamic} if model.dynamic else {}))


def _as_script(model: Reference, probe: Tree) -> Call:
    return tree_call(trace(model.source, probe)) if isinstance(model.source, nn.Module) else model.call


def _try(
    trial: Trial,
    make: Make,
    name: str,
    model: Reference,
    others: Mapping[str, Reference],
    probe: Tree,
    decisions: Decisions,
) -> Trial:
    """Fills in `trial`: its calls and the comparison with the model in memory, or the reason why it is left out."""
    try:
        trial.calls[name], trial.written = make(model)
        if trial.written is not None:
            trial.runtime = trial.written.runtime
        trial.compare(trial.calls[name], model, probe, decisions)
        if trial.agreed is not None and not trial.agreed.passed:
            trial.left_out = f"{trial.agreed.in_words()} (it differs by {trial.difference:.2g} of the largest output)"
    except LoweringUnavailable as reason:
        trial.left_out = str(reason)
    for other, reference in others.items() if not trial.left_out else ():
        try:
            call, _ = make(reference)
        except LoweringUnavailable:
            continue  # the format is chosen for int8 all the same; only the comparison with fp32 is missing
        if compare_outputs(call, reference, [probe]).rounding:
            trial.calls[other] = call
    return trial
