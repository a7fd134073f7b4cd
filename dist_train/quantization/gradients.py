"""Compares gradients of the float model and the prepared model, with fake quantization off."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from dist_train import trees
from dist_train.quantization.prepared import PreparedModel
from dist_train.trees import Tree

FLOAT32_BOUND = 0.25
"""Difference in float32 up to which models are equal: a value that crossed a kink moved MobileNetV2's by up to 0.2."""

# A gradient below this share of the model's largest is compared with the share instead of with itself: a bias before a
# BatchNorm has none but rounding.
_FLOOR = 1e-2
_NOTHING = 1e-6  # of the model's largest gradient: what counts as none
_RANDOM = 1e-3  # difference beyond which random numbers of the model's own could be the cause
_SHOWN = 0.1  # from which difference on a failure names the parameter
_MOST_LINES = 8

Loss = Callable[[Tree], Tensor]


def gradient_difference(
    prepared: PreparedModel, model: nn.Module, inputs: Tree, loss: Loss, quick: bool = False
) -> tuple[float, list[str], torch.dtype]:
    """Compares the gradients of a loss for every parameter, in evaluation and in training mode. Changes nothing.

    Copies in float64 are compared where both models compute in it: in float32 rounding moves values across the kink of
    a ReLU. Training mode is left out where the float model draws random numbers by itself, as functional dropout does;
    a mode in which its gradients are not finite, too.

    Args:
        prepared: with fake quantization and observers off, and the float model's parameters.
        inputs: [B, ...], as the models take them.
        loss: returns a scalar of the model's outputs.
        quick: leaves evaluation mode out where training mode can be compared.

    Returns:
        the largest difference relative to the float model's gradients by their norms, inf where only one model has a
        gradient; a line for each parameter that is off by more than a tenth; and the dtype of the comparison.
    """
    device = trees.first_leaf(inputs).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            return *_compared(prepared, model, inputs, loss, quick, torch.float64), torch.float64
        except (RuntimeError, TypeError):  # something in it is written for float32
            return *_compared(prepared, model, inputs, loss, quick, torch.float32), torch.float32


def in_lines(lines: list[str]) -> str:
    """Formats the lines of `gradient_difference` as the details of an error, the first ones only."""
    more = [f"and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    return "".join(f"\n  {line}" for line in lines[:_MOST_LINES] + more)


def _compared(
    prepared: PreparedModel, model: nn.Module, inputs: Tree, loss: Loss, quick: bool, dtype: torch.dtype
) -> tuple[float, list[str]]:
    worst, lines = 0.0, list[str]()
    pairs = _pairs(model, prepared)
    inputs = trees.map_leaves(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, inputs)
    for training in (True, False):
        actual, reference = (copy.deepcopy(each).to(dtype).train(training) for each in (prepared, model))
        _switch_dropout_off(reference)
        _use_weights_of(actual, reference, prepared.batch_norms)
        expected = _gradients(reference, inputs, loss)
        if not _finite(expected):
            continue
        differences = _differences(expected, _gradients(actual, inputs, loss), pairs)
        largest = max(differences.values(), key=lambda value: math.inf if math.isnan(value) else value, default=0.0)
        if not largest <= _RANDOM and training and not _equal(expected, _gradients(reference, inputs, loss)):
            continue
        worst = max(worst, largest, key=lambda value: math.inf if math.isnan(value) else value)
        mode = "training" if training else "evaluation"
        shown = {name: value for name, value in differences.items() if not value <= _SHOWN}
        lines += [f"{name}: off by {value:.2g} in {mode} mode" for name, value in shown.items()]
        if quick:
            break
    return worst, lines


@torch.no_grad()
def _use_weights_of(prepared: nn.Module, model: nn.Module, batch_norms: Mapping[str, str]) -> None:
    """Moves batch norms' zeros as preparing did: from 0 to 1e-8 a value may cross the kink of a ReLU."""
    for name, here in batch_norms.items():
        weight, moved = model.get_submodule(name).weight, prepared.get_submodule(here).weight
        if isinstance(weight, nn.Parameter) and isinstance(moved, Tensor) and torch.allclose(weight, moved, atol=1e-7):
            weight.copy_(moved)


def _switch_dropout_off(model: nn.Module) -> None:
    """Puts dropout modules into evaluation mode, as a prepared model drops nothing out."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.training = False


def _gradients(model: nn.Module, inputs: Tree, loss: Loss) -> dict[str, Tensor | None]:
    """Returns the gradient of the loss for each trained parameter; None where there is none."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.enable_grad():
        value = loss(trees.call(model, inputs))
        if not value.requires_grad:
            return dict.fromkeys(trained)
        found = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
    return dict(zip(trained, found, strict=True))


def _finite(gradients: dict[str, Tensor | None]) -> bool:
    return all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients.values())


def _equal(left: dict[str, Tensor | None], right: dict[str, Tensor | None]) -> bool:
    pairs = [(left[name], right[name]) for name in left]
    return all(
        one is other or (one is not None and other is not None and torch.equal(one, other)) for one, other in pairs
    )


def _pairs(model: nn.Module, prepared: PreparedModel) -> dict[str, str]:
    """Maps the float model's parameters to the prepared model's: of batch norms by name, as preparing may move zeros.

    Others have the same values in both, and are told apart by name or else by order where several are equal.
    """
    there = dict(prepared.named_parameters())
    found = dict[str, str]()
    for norm, here in prepared.batch_norms.items():
        for kind in ("weight", "bias"):
            if f"{here}.{kind}" in there:
                found[f"{norm}.{kind}"] = f"{here}.{kind}"
    by_values: dict[object, list[str]] = {}
    for name in (each for each in there if each not in set(found.values())):
        by_values.setdefault(_key(there[name]), []).append(name)
    left = list[tuple[str, list[str]]]()
    for name, parameter in model.named_parameters():
        if name in found:
            continue
        equal = by_values.get(_key(parameter), [])
        same = next((each for each in equal if each == name or each.endswith(f".{name}")), None)
        if same is None:
            left.append((name, equal))
        else:
            found[name] = same
            equal.remove(same)
    return found | {name: equal.pop(0) for name, equal in left if equal}


def _key(parameter: Tensor) -> object:
    # Flat first: with sizes of 1, channels_last counts as contiguous, and its last stride is not 1.
    values = parameter.detach().cpu().flatten().contiguous()
    return tuple(parameter.shape), hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).digest()


def _differences(
    expected: dict[str, Tensor | None], found: dict[str, Tensor | None], pairs: dict[str, str]
) -> dict[str, float]:
    """Returns the norm of each parameter's difference, relative to that of its gradient in the float model."""
    norms = {name: 0.0 if gradient is None else float(gradient.norm()) for name, gradient in expected.items()}
    nothing = _NOTHING * max(norms.values(), default=0.0)
    floor = _FLOOR * max(norms.values(), default=0.0)
    differences = {}
    for name, gradient in expected.items():
        other = found.get(pairs.get(name, ""))
        has, should = other is not None and float(other.norm()) > nothing, norms[name] > nothing
        if has != should:
            differences[name] = math.inf
        elif other is not None and gradient is not None:
            differences[name] = float((other - gradient).norm()) / max(norms[name], floor) if should else 0.0
    for name in pairs.keys() - expected.keys():  # frozen by the user
        if found.get(pairs[name]) is not None:
            differences[name] = math.inf
    return differences
