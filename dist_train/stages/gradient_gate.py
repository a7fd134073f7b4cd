"""Checks the gate `gradients`: with fake quantization off, the prepared model must learn as the float model does."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from dist_train.data.arrays import Batch
from dist_train.data.loader import EvaluationLoader
from dist_train.quantization.prepared import PreparedModel
from dist_train.run_dir.gates import Gate
from dist_train.stages.context import Context
from dist_train.tasks import Task

# A gradient below this share of the model's largest is compared with the share instead of with itself: a bias before a
# BatchNorm has none but rounding.
_FLOOR = 1e-2
_NOTHING = 1e-6  # of the model's largest gradient: what counts as none
_FLOAT32_BOUND = 0.25  # a value that crosses a kink moved MobileNetV2's gradients by up to 0.2
_SHOWN = 0.1  # from which difference on a failure names the parameter
_MOST_LINES = 8
_ROWS = 16


def gate_gradients(context: Context, prepared: PreparedModel) -> None:
    """Checks the gradients of a loss on real rows for every parameter, with fake quantization off.

    The prepared model's parameters must equal the float model's, as before the first step.

    Raises:
        GateError: on every rank, if a gradient differs, or only one of the models has it.
    """
    source = context.data.source(context.data.splits.train, 0)
    batch = next(iter(EvaluationLoader(source, _ROWS, 1, 0, _ROWS)))
    prepared.fake_quantize(False)
    prepared.observe(False)
    worst, lines, dtype = gradient_difference(prepared, context.model, batch, context.task)
    prepared.fake_quantize(True)
    prepared.observe(True)
    shown = lines[:_MOST_LINES] + ([f"and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else [])
    bound = context.config.qat.gradient_bound if dtype is torch.float64 else _FLOAT32_BOUND
    context.gates.check(
        Gate(
            name="gradients",
            value=worst,
            bound=bound,
            passed=worst <= bound,
            hint="the prepared model would train otherwise than the float model: it lost a torch.no_grad(), an "
            "autograd.Function, a train() of the model's own or a subclass of BatchNorm; use another --qat.backend, "
            "or write that part of the model otherwise",
            detail="".join(f"\n  {line}" for line in shown),
        )
    )


def gradient_difference(
    prepared: PreparedModel, model: nn.Module, batch: Batch, task: Task
) -> tuple[float, list[str], torch.dtype]:
    """Compares the gradients of the loss of `batch` for every parameter, in evaluation and in training mode.

    Copies in float64 are compared where both models compute in it: in float32 rounding moves values across the kink of
    a ReLU. Training mode is left out where the float model draws random numbers by itself, as functional dropout does.

    Args:
        prepared: with fake quantization and observers off, and the float model's parameters.

    Returns:
        the largest difference relative to the float model's gradients by their norms, inf where only one model has a
        gradient; a line for each parameter that is off by more than a tenth; and the dtype of the comparison.
    """
    try:
        return *_compared(prepared, model, batch, task, torch.float64), torch.float64
    except (RuntimeError, TypeError):  # something in it is written for float32
        return *_compared(prepared, model, batch, task, torch.float32), torch.float32


def _compared(
    prepared: PreparedModel, model: nn.Module, batch: Batch, task: Task, dtype: torch.dtype
) -> tuple[float, list[str]]:
    worst, lines = 0.0, list[str]()
    pairs = _pairs(model, prepared)
    batch = dataclasses.replace(batch, inputs=batch.inputs.to(dtype))
    for training in (False, True):
        actual, reference = (copy.deepcopy(each).to(dtype).train(training) for each in (prepared, model))
        _switch_dropout_off(reference)
        expected = _gradients(reference, batch, task)
        if training and not _equal(expected, _gradients(reference, batch, task)):
            continue
        differences = _differences(expected, _gradients(actual, batch, task), pairs)
        worst = max([worst, *differences.values()], key=lambda value: math.inf if math.isnan(value) else value)
        mode = "training" if training else "evaluation"
        shown = {name: value for name, value in differences.items() if not value <= _SHOWN}
        lines += [f"{name}: off by {value:.2g} in {mode} mode" for name, value in shown.items()]
    return worst, lines


def _switch_dropout_off(model: nn.Module) -> None:
    """Puts dropout modules into evaluation mode, as a prepared model drops nothing out."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.training = False


def _gradients(model: nn.Module, batch: Batch, task: Task) -> dict[str, Tensor | None]:
    """Returns the gradient of the batch's mean loss for each trained parameter; None where there is none."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.enable_grad():
        loss = task.loss(model(batch.inputs), batch.targets).mean()
        if not loss.requires_grad:
            return dict.fromkeys(trained)
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return dict(zip(trained, found, strict=True))


def _equal(left: dict[str, Tensor | None], right: dict[str, Tensor | None]) -> bool:
    pairs = [(left[name], right[name]) for name in left]
    return all(
        one is other or (one is not None and other is not None and torch.equal(one, other)) for one, other in pairs
    )


def _pairs(model: nn.Module, prepared: PreparedModel) -> dict[str, str]:
    """Maps the float model's parameters to the prepared model's, by their values, and equal ones by their order."""
    here: dict[object, list[str]] = {}
    for name, parameter in prepared.named_parameters():
        here.setdefault(_key(parameter), []).append(name)
    return {name: here[key].pop(0) for name, parameter in model.named_parameters() if here.get(key := _key(parameter))}


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
