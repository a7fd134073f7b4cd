"""Are the answers right, and how long do they take: models side by side, each in the fastest runtime that is right for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from dist_train.lowering import inductor, openvino
from dist_train.lowering.base import Lowered, LoweringUnavailable
from dist_train.lowering.latency import compare_latency
from dist_train.programs.torchscript import trace

# Integer kernels round otherwise than the simulation does: up to 0.072 was seen where a runtime was right, 0.8 and more where it was
# not. A network may multiply roundings, though: see `is_rounding`.
LARGEST_DIFFERENCE = 0.2


@dataclass(frozen=True)
class Candidate:
    """A model to be timed.

    Attributes:
        call: the model in memory, on the CPU: float32 [B, ...] to float32. What the runtime must answer, too.
        source: what a runtime is given: a float module in eval mode or a PT2E program; None for TorchScript, which runs as it is.
        half: bf16 or fp16 where that is the model's precision.
    """

    call: Callable[[Tensor], Tensor]
    source: nn.Module | ExportedProgram | None
    half: str | None = None


def drawn_from(rows: Tensor, seed: int) -> Callable[[int], Tensor]:
    """Batches of any size for `time_models` and `choose_format`: rows of `rows`, [N, ...], drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    return lambda size: rows[torch.randint(len(rows), (size,), generator=generator)]


@torch.no_grad()
def relative_difference(
    call: Callable[[Tensor], Tensor], expected: Callable[[Tensor], Tensor], images: Tensor
) -> float:
    """Largest difference of the outputs, in units of the largest expected output; NaN where an output is NaN."""
    right = expected(images)
    return float((call(images) - right).abs().max() / right.abs().max().clamp(min=1e-12))


@torch.no_grad()
def is_rounding(difference: float, model: Candidate, images: Tensor) -> bool:
    """Whether a runtime that differs so much may be right: by 0.2, or no more than an int8 model from itself on inputs moved by
    a tenth of a step of uint8.

    In an untrained MobileNetV2 each layer multiplies the roundings of those before: the same program in process, asked one row at a
    time, differed from its answers to the batch by 0.27, and by 0.47 on inputs that were moved; ONNX Runtime and XNNPACK by 0.44.
    """
    if difference <= LARGEST_DIFFERENCE or not isinstance(model.source, ExportedProgram):
        return difference <= LARGEST_DIFFERENCE
    step = float(images.max() - images.min()) / 255
    moved = images + 0.1 * step * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return difference <= relative_difference(lambda batch: model.call(moved), model.call, images)


def time_models(
    candidates: Mapping[str, Candidate], images: Callable[[int], Tensor], batch_sizes: Sequence[int], threads: int
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Median milliseconds of each model by batch size, and the name of the runtime that each ran in, all in turns.

    candidates: by name, fp32, bf16, fp16 or int8. images: batch size -> float32 [B, C, H, W].
    Without TorchScript: OpenVINO, else Inductor, for fp32 and int8 alike; a half model where that runtime computes in its
    precision, else eager. TorchScript goes into neither: it is timed as it is, fp32 traced and frozen beside it.

    Raises LoweringUnavailable where fp32 or int8 have no runtime, or a runtime's answers are wrong.
    """
    lowered: dict[str, Lowered] = {}
    script = any(each.source is None for each in candidates.values())
    for name, each in candidates.items():
        if each.source is None:
            lowered[name] = Lowered("torchscript", each.call)
        elif script and isinstance(each.source, nn.Module) and each.half is None:
            lowered[name] = Lowered("torchscript", trace(each.source, images(2)))
        elif script:
            lowered[name] = Lowered("eager", each.call)
        elif each.half is None:
            lowered[name] = lower(each.source, images(1), threads)
            for rows in batch_sizes:
                require_same_answers(name, lowered[name], each, images(rows))
        else:
            lowered[name] = _lower_half(each, candidates.get("fp32"), images, batch_sizes, threads)

    def quietly(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def without_gradients(batch: Tensor) -> Tensor:
            with torch.no_grad():
                return call(batch)

        return without_gradients

    times = compare_latency({name: quietly(each.call) for name, each in lowered.items()}, images, batch_sizes)
    return times, {name: each.name for name, each in lowered.items()}


def _lower_half(
    half: Candidate, fp32: Candidate | None, images: Callable[[int], Tensor], batch_sizes: Sequence[int], threads: int
) -> Lowered:
    """The half model in the runtime of the others where it is right there, else as it is."""
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
            require_same_answers(half.half or "half", lowered, half, images(rows))
    except LoweringUnavailable:
        return Lowered("eager", half.call)
    return lowered


def require_same_answers(name: str, lowered: Lowered, model: Candidate, images: Tensor) -> None:
    """The speed of wrong answers is not a figure.

    Raises:
        LoweringUnavailable: the runtime's outputs differ by more than rounding, in units of the largest output.
    """
    difference = relative_difference(lowered.call, model.call, images)
    if not is_rounding(difference, model, images):
        raise LoweringUnavailable(
            f"latency was not measured: {lowered.name} answers differently for {name} at batch {len(images)} "
            f"({difference:.2g} of the largest output)"
        )


def lower(model: nn.Module | ExportedProgram, example: Tensor, threads: int) -> Lowered:
    """`model` in the first runtime that this machine has. Models to be compared must get the same one: compare `name`s.

    model: a converted model (Q/DQ) or a float one in eval mode. example: float32 [B, C, H, W], for its shape.

    Raises LoweringUnavailable, with what to install, where there is none; and where the model does not go into it.
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
