"""Comparison of models in runtimes: are their outputs right, and how long do they take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from dist_train.lowering import inductor, openvino
from dist_train.lowering.base import Call, Lowered, LoweringUnavailable, Reference
from dist_train.lowering.latency import compare_latency
from dist_train.programs.torchscript import trace

# Integer kernels round differently from the simulation. Measured: up to 0.072 for right runtimes, 0.8 and more for
# wrong ones. A network may amplify roundings, though: see `is_rounding`.
LARGEST_DIFFERENCE = 0.2


def drawn_from(rows: Tensor, seed: int) -> Callable[[int], Tensor]:
    """Returns a function that draws batches of any size from `rows`, [N, ...], with replacement."""
    generator = torch.Generator().manual_seed(seed)
    return lambda size: rows[torch.randint(len(rows), (size,), generator=generator)]


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, in units of the largest expected output; NaN where an output is NaN."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def largest(differences: Iterable[float]) -> float:
    """Largest of some differences; NaN, which passes no bound, where one is NaN."""
    return float(torch.tensor(list(differences), dtype=torch.float64).max())


@dataclass(frozen=True)
class Comparison:
    """Outputs of a runtime against those of the model in memory.

    Attributes:
        difference: the largest `relative_difference` of the batches, NaN where one is NaN.
        rounding: True where the differences of all batches may be rounding.
    """

    difference: float
    rounding: bool


@torch.no_grad()
def compare_outputs(call: Call, reference: Reference, batches: Sequence[Tensor]) -> Comparison:
    """Compares a runtime with the model in memory.

    Args:
        call: the model in the runtime.
        batches: float32 [B, C, H, W] each; include a batch of one row, for which OpenVINO alone was seen to go wrong.
    """
    differences = [relative_difference(call(batch), reference.call(batch)) for batch in batches]
    rounding = all(is_rounding(each, reference, batch) for each, batch in zip(differences, batches, strict=True))
    return Comparison(largest(differences), rounding)


@torch.no_grad()
def is_rounding(difference: float, reference: Reference, images: Tensor) -> bool:
    """Decides whether a relative difference of a runtime's outputs may be rounding.

    Rounding is up to 0.2. An int8 program may also differ by as much as its own outputs change when its inputs move by
    a tenth of a uint8 step.

    In an untrained MobileNetV2 each layer amplifies the roundings of the layers before. Measured there: one row at a
    time, the program in process differed by 0.27 from its outputs for the batch. For moved inputs it differed by 0.47.
    ONNX Runtime and XNNPACK differed by 0.44.
    """
    if difference <= LARGEST_DIFFERENCE or not reference.quantized:
        return difference <= LARGEST_DIFFERENCE
    step = float(images.max() - images.min()) / 255
    moved = images + 0.1 * step * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return difference <= relative_difference(reference.call(moved), reference.call(images))


def time_models(
    models: Mapping[str, Reference], images: Callable[[int], Tensor], batch_sizes: Sequence[int], threads: int
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Measures the latency of each model in the fastest runtime whose outputs are right.

    Without TorchScript, fp32 and int8 both run in OpenVINO, or in Inductor where that is missing. A half model runs
    there too if the runtime computes in its precision, else in eager mode. With TorchScript, which no runtime takes,
    the int8 model runs unchanged and fp32 is traced and frozen.

    Args:
        models: by name: fp32, bf16, fp16 or int8.
        images: batch size to float32 [B, C, H, W].

    Returns:
        Median milliseconds by model and batch size, measured in turns; and the runtime's name by model.

    Raises:
        LoweringUnavailable: fp32 or int8 have no runtime, or a runtime's outputs are wrong.
    """
    lowered: dict[str, Lowered] = {}
    script = any(each.source is None for each in models.values())
    for name, each in models.items():
        if each.source is None:
            lowered[name] = Lowered("torchscript", each.call)
        elif script and isinstance(each.source, nn.Module) and each.half is None:
            lowered[name] = Lowered("torchscript", trace(each.source, images(2)))
        elif script:
            lowered[name] = Lowered("eager", each.call)
        elif each.half is None:
            lowered[name] = lower(each.source, images(1), threads)
            for rows in batch_sizes:
                require_same_outputs(name, lowered[name], each, images(rows))
        else:
            lowered[name] = _lower_half(each, models.get("fp32"), images, batch_sizes, threads)

    def without_gradients(call: Call) -> Call:
        def timed(batch: Tensor) -> Tensor:
            with torch.no_grad():
                return call(batch)

        return timed

    times = compare_latency({name: without_gradients(each.call) for name, each in lowered.items()}, images, batch_sizes)
    return times, {name: each.name for name, each in lowered.items()}


def _lower_half(
    half: Reference, fp32: Reference | None, images: Callable[[int], Tensor], batch_sizes: Sequence[int], threads: int
) -> Lowered:
    """Lowers the half model to the others' runtime if its outputs are right there; else keeps it in eager mode."""
    precision: openvino.Precision = "bf16" if half.half == "bf16" else "f16"
    assert half.source is not None
    try:
        if not openvino.missing_modules():
            if fp32 is None or fp32.source is None or not openvino.computes_in(precision):
                return Lowered("eager", half.call)
            lowered = openvino.lower(fp32.source, images(1), threads, precision)
        else:
            lowered = inductor.lower(half.source, images(1), threads)
        for rows in batch_sizes:
            require_same_outputs(half.half or "half", lowered, half, images(rows))
    except LoweringUnavailable:
        return Lowered("eager", half.call)
    return lowered


def require_same_outputs(name: str, lowered: Lowered, reference: Reference, images: Tensor) -> None:
    """Checks a runtime before it is timed: the speed of wrong outputs is meaningless.

    Raises:
        LoweringUnavailable: the runtime's outputs differ by more than rounding.
    """
    found = compare_outputs(lowered.call, reference, [images])
    if not found.rounding:
        raise LoweringUnavailable(
            f"latency was not measured: {lowered.name} answers differently for {name} at batch {len(images)} "
            f"({found.difference:.2g} of the largest output)"
        )


def lower(model: nn.Module | ExportedProgram, example: Tensor, threads: int) -> Lowered:
    """Lowers `model` to the first runtime of this machine. To compare models, check that their `name`s are equal.

    Args:
        model: a converted model (Q/DQ), or a float one in eval mode.
        example: float32 [B, C, H, W]; only its shape counts.

    Raises:
        LoweringUnavailable: there is no runtime (the message says what to install), or it refuses the model.
    """
    missing = openvino.missing_modules()
    if not missing:
        return openvino.lower(model, example, threads)
    if inductor.compiler() is not None:
        return inductor.lower(model, example, threads)
    raise LoweringUnavailable(
        f"latency was not measured: {', '.join(missing)} not installed, and no C++ compiler for Inductor; "
        "pip install 'dist-train[openvino,onnx]'"
    )
