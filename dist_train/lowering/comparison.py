"""Comparison of models in runtimes: are their outputs right, and how long do they take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from dist_train import trees
from dist_train.lowering import inductor, openvino
from dist_train.lowering.base import Call, Lowered, LoweringUnavailable, Reference
from dist_train.lowering.latency import compare_latency
from dist_train.programs.program import tree_call
from dist_train.programs.signature import Dynamic
from dist_train.programs.torchscript import trace
from dist_train.trees import Tree

# Integer kernels round differently from the simulation. Measured: up to 0.072 for right runtimes, 0.8 and more for
# wrong ones. A network may amplify roundings, though: see `is_rounding`.
LARGEST_DIFFERENCE = 0.2


def drawn_from(rows: Tree, seed: int) -> Callable[[int], Tree]:
    """Returns a function that draws batches of any size from `rows`, [N, ...], with replacement."""
    generator = torch.Generator().manual_seed(seed)
    return lambda size: trees.take(rows, torch.randint(trees.rows_of(rows), (size,), generator=generator))


def relative_difference(actual: Tree, expected: Tree) -> float:
    """Largest absolute difference, in units of the largest expected output; NaN where an output is NaN.

    The largest of the leaves, where the outputs are a tree. Of integers it is the share that differs.
    """
    if isinstance(actual, Tensor) and isinstance(expected, Tensor):
        return _leaf_difference(actual, expected)
    found, right = dict(trees.named_leaves(trees.plain(actual))), dict(trees.named_leaves(trees.plain(expected)))
    if found.keys() != right.keys():
        return math.nan
    return largest(_leaf_difference(leaf, right[name]) for name, leaf in found.items())


def _leaf_difference(actual: Tensor, expected: Tensor) -> float:
    if not expected.is_floating_point():
        return float((actual != expected).double().mean())
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
def compare_outputs(call: Call, reference: Reference, batches: Sequence[Tree]) -> Comparison:
    """Compares a runtime with the model in memory.

    Args:
        call: the model in the runtime.
        batches: [B, ...] each; include a batch of one row, for which OpenVINO alone was seen to go wrong.
    """
    differences = [relative_difference(call(batch), reference.call(batch)) for batch in batches]
    rounding = all(is_rounding(each, reference, batch) for each, batch in zip(differences, batches, strict=True))
    return Comparison(largest(differences), rounding)


@torch.no_grad()
def is_rounding(difference: float, reference: Reference, images: Tree) -> bool:
    """Decides whether a relative difference of a runtime's outputs may be rounding.

    Rounding is up to 0.2. An int8 program may also differ by as much as its own outputs change when its inputs move by
    a tenth of a uint8 step.

    In an untrained MobileNetV2 each layer amplifies the roundings of the layers before. Measured there: one row at a
    time, the program in process differed by 0.27 from its outputs for the batch. For moved inputs it differed by 0.47.
    ONNX Runtime and XNNPACK differed by 0.44.
    """
    if difference <= LARGEST_DIFFERENCE or not reference.quantized:
        return difference <= LARGEST_DIFFERENCE
    return difference <= relative_difference(reference.call(trees.map_leaves(_moved, images)), reference.call(images))


def _moved(images: Tensor) -> Tensor:
    """Returns images moved by a tenth of a uint8 step (root mean square): of pixels, one in a hundred by a step.

    Other integers, such as indices, stay as they are.
    """
    generator = torch.Generator().manual_seed(0)
    if images.dtype == torch.uint8:
        chosen = torch.rand(images.shape, generator=generator) < 0.01
        up = torch.where(images < 255, images + 1, images - 1)
        return torch.where(chosen, up, images)
    if not images.is_floating_point():
        return images
    step = float(images.max() - images.min()) / 255
    return images + 0.1 * step * torch.randn(images.shape, generator=generator)


def time_models(
    models: Mapping[str, Reference], images: Callable[[int], Tree], batch_sizes: Sequence[int], threads: int
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Measures the latency of each model in the fastest runtime whose outputs are right.

    Without TorchScript, fp32 and int8 both run in OpenVINO, or in Inductor where that is missing. A half model runs
    there too if the runtime computes in its precision, else in eager mode. With TorchScript, which no runtime takes,
    the int8 model runs unchanged and fp32 is traced and frozen.

    Args:
        models: by name: fp32, bf16, fp16 or int8.
        images: batch size to inputs [B, ...].

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
            lowered[name] = Lowered("torchscript", tree_call(trace(each.source, images(2))))
        elif script:
            lowered[name] = Lowered("eager", each.call)
        elif each.half is None:
            lowered[name] = lower(each.source, images(1), threads, each.dynamic)
            for rows in batch_sizes:
                require_same_outputs(name, lowered[name], each, images(rows))
        else:
            lowered[name] = _lower_half(each, models.get("fp32"), images, batch_sizes, threads)

    def without_gradients(call: Call) -> Call:
        def timed(batch: Tree) -> Tree:
            with torch.no_grad():
                return call(batch)

        return timed

    times = compare_latency({name: without_gradients(each.call) for name, each in lowered.items()}, images, batch_sizes)
    return times, {name: each.name for name, each in lowered.items()}


def _lower_half(
    half: Reference, fp32: Reference | None, images: Callable[[int], Tree], batch_sizes: Sequence[int], threads: int
) -> Lowered:
    """Lowers the half model to the others' runtime if its outputs are right there; else keeps it in eager mode."""
    precision: openvino.Precision = "bf16" if half.half == "bf16" else "f16"
    assert half.source is not None
    try:
        if not openvino.missing_modules():
            if fp32 is None or fp32.source is None or not openvino.computes_in(precision):
                return Lowered("eager", half.call)
            lowered = openvino.lower(fp32.source, images(1), threads, precision, fp32.dynamic)
        else:
            lowered = inductor.lower(half.source, images(1), threads)
        for rows in batch_sizes:
            require_same_outputs(half.half or "half", lowered, half, images(rows))
    except LoweringUnavailable:
        return Lowered("eager", half.call)
    return lowered


def require_same_outputs(name: str, lowered: Lowered, reference: Reference, images: Tree) -> None:
    """Checks a runtime before it is timed: the speed of wrong outputs is meaningless.

    Raises:
        LoweringUnavailable: the runtime's outputs differ by more than rounding.
    """
    found = compare_outputs(lowered.call, reference, [images])
    if not found.rounding:
        raise LoweringUnavailable(
            f"latency was not measured: {lowered.name} answers differently for {name} at batch {trees.rows_of(images)} "
            f"({found.difference:.2g} of the largest output)"
        )


def lower(model: nn.Module | ExportedProgram, example: Tree, threads: int, dynamic: Dynamic | None = None) -> Lowered:
    """Lowers `model` to the first runtime of this machine. To compare models, check that their `name`s are equal.

    Args:
        model: a converted model (Q/DQ), or a float one in eval mode.
        example: real rows [B, ...]; of floats only the shape counts.
        dynamic: dimensions that vary besides the batch.

    Raises:
        LoweringUnavailable: there is no runtime (the message says what to install), or it refuses the model.
    """
    missing = openvino.missing_modules()
    if not missing:
        return openvino.lower(model, example, threads, dynamic=dynamic)
    if inductor.compiler() is not None:
        return inductor.lower(model, example, threads)
    raise LoweringUnavailable(
        f"latency was not measured: {', '.join(missing)} not installed, and no C++ compiler for Inductor; "
        "pip install 'dist-train[openvino,onnx]'"
    )
