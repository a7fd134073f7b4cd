"""Dry run of a backend before training: libraries refuse more models than checks can foresee."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dist_train import trees
from dist_train.config.stages import QATConfig, RuleConfig
from dist_train.errors import QuantizationError, first_line
from dist_train.programs.signature import rows
from dist_train.quantization.backend import QuantizationBackend
from dist_train.quantization.error_location import graph_error_location
from dist_train.quantization.gradient_causes import gradient_causes, refuse_random
from dist_train.quantization.gradients import FLOAT32_BOUND, gradient_difference, in_lines
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.ranges import Ranges
from dist_train.quantization.rules import resolve_rules, skipped_modules
from dist_train.trees import Tree

FAILURES = (QuantizationError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors that our backends, torchao, torch.ao and their kernels raise for a model that they cannot take."""

GRADIENT_BOUND: float = QATConfig().gradient_bound
"""Default of `qat.gradient_bound`."""

# Random rows of an untrained model in float32: batches of few rows amplify rounding, what is lost is off by 1 or more.
_UNTRAINED_FLOAT32_BOUND = 2 * FLOAT32_BOUND
_ROWS = 4
_SEED = 0


def dry_run(
    backend: QuantizationBackend,
    model: nn.Module,
    example: Tree,
    rules: Sequence[RuleConfig],
    instead: str = "pt2e",
    serialize: bool = True,
    gradient_bound: float = GRADIENT_BOUND,
) -> None:
    """Prepares a copy of `model`, compares its gradients, converts it with meaningless ranges, and runs the result.

    Args:
        example: as of `QuantizationBackend.prepare`.
        instead: backends to name in the hint.
        serialize: serializes the result, which runs it on batches of several sizes; else it is run on `example` only.
        gradient_bound: as `qat.gradient_bound`.

    Raises:
        QuantizationError: one of these steps fails, or the prepared model would not train as `model` does.
    """
    model = _drawn(model)
    try:
        prepared = backend.prepare(model, example, rules).eval()
    except QuantizationError:
        raise
    except FAILURES as error:
        layer, place = graph_error_location(error)
        skipped = layer in skipped_modules(resolve_rules(model, rules))
        rule = (
            f"--qat.rules '[{{match: \"{layer}\", skip: true}}]'" if layer and not skipped else "change what is named"
        )
        raise QuantizationError(
            f"{type(model).__name__} cannot be prepared for quantization{place}: {first_line(error)}",
            f"{rule}, or --qat.backend {instead}",
        ) from error
    inputs = _rows(example)
    refuse_random(model, inputs)
    _require_equal_gradients(prepared, model, inputs, gradient_bound, instead)
    ranges = Ranges(prepared)
    ends = torch.ones(len(ranges), device=trees.first_leaf(example).device)
    ranges.assign(-ends, ends)  # arbitrary: the ranges of an untrained model may not be finite
    with torch.no_grad():
        try:
            converted = backend.convert(prepared)
            if serialize:
                backend.serialize(converted, example)
            else:
                trees.call(converted, trees.map_leaves(lambda leaf: leaf.cpu(), example))
        except QuantizationError:
            raise
        except FAILURES as error:
            layer, place = graph_error_location(error)
            raise QuantizationError(
                f"the integer kernels cannot compute {type(model).__name__} on inputs {_shapes(example)}"
                f"{place}: {first_line(error)}",
                _instead_of_kernels(layer, first_line(error), instead),
            ) from error


def _instead_of_kernels(layer: str, message: str, instead: str) -> str:
    """Returns the hint for an error of the integer kernels at `layer`, "" where it is not known."""
    if "required rank 4" in message:  # of a mean over maps of one pixel, whose kernel wants channels_last
        return f"--qat.backend {instead}, or x.flatten(1) instead of a mean over maps of one pixel"
    rule = f"--qat.rules '[{{match: \"{layer}\", skip: true}}]'" if layer else "change the operation in the model"
    return f"--qat.backend {instead}, or {rule}"


@torch.no_grad()
def _drawn(model: nn.Module) -> nn.Module:
    """Copies an untrained model, with random numbers in place of parameters of one value.

    Equal parameters could not be told apart, and a branch that ends in zeros would pass any gradient.
    """
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(_SEED)
    for parameter in model.parameters():
        if parameter.is_floating_point() and bool((parameter == parameter.flatten()[:1]).all()):
            parameter.add_(0.5 * torch.rand(parameter.shape, generator=generator).to(parameter))
    return model


def _rows(example: Tree) -> Tree:
    """Returns rows of the example; of a float tensor alone random ones."""
    inputs, device = rows(example, _ROWS), trees.first_leaf(example).device
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        inputs.normal_(generator=torch.Generator().manual_seed(_SEED))
    return trees.map_leaves(lambda leaf: leaf.to(device), inputs)


def _shapes(example: Tree) -> str:
    """`[3, 32, 32]`, or `ids [7], mask [7]`."""
    return ", ".join(f"{name} {list(leaf.shape[1:])}".strip() for name, leaf in trees.named_leaves(example))


def _require_equal_gradients(
    prepared: PreparedModel, model: nn.Module, inputs: Tree, bound: float, instead: str
) -> None:
    """Raises QuantizationError where `prepared` would train otherwise than `model`; see the gate `gradients`."""

    def weighted(output: Tensor) -> Tensor:
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(_SEED))
        return (output * weights.to(output)).mean()

    def loss(outputs: Tree) -> Tensor:
        floats = [leaf for leaf in trees.leaves(trees.plain(outputs)) if leaf.is_floating_point()]
        return torch.stack([weighted(leaf) for leaf in floats]).sum()

    prepared.fake_quantize(False)
    prepared.observe(False)
    worst, lines, dtype = gradient_difference(prepared, model, inputs, loss, quick=True)
    prepared.fake_quantize(True)
    prepared.observe(True)
    if dtype is not torch.float64:
        bound = max(bound, _UNTRAINED_FLOAT32_BOUND)
    if worst <= bound:
        return
    causes, hints = gradient_causes(model, inputs)
    lost = "\n  it has ".join(["", *causes]) or "\n  found by comparing the two, with fake quantization off"
    raise QuantizationError(
        f"{type(model).__name__} prepared for quantization would train otherwise than the float model: "
        f"gradients differ by {worst:.3g} (bound {bound:g}){lost}{in_lines(lines)}",
        "; ".join(hints or [f"--qat.backend {instead}"]),
    )
