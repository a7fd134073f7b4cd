"""Checks the gate `prepare`: with fake quantization off, the prepared model must equal the float model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_train.data.loader import EvaluationLoader
from dist_train.lowering.comparison import largest, relative_difference
from dist_train.quantization.float_checks import float_literals
from dist_train.quantization.prepared import PreparedModel
from dist_train.run_dir.gates import Gate
from dist_train.stages.context import Context
from dist_train.trees import Tree, call, leaves, plain

_VARIANCES = (1e-5, 10.0)  # variances of an untrained network are near 1, which would hide a wrong eps


@torch.no_grad()
def gate_prepare(context: Context, prepared: PreparedModel) -> None:
    """Checks that the prepared model with fake quantization off gives the float model's outputs.

    The comparison is repeated with extreme BatchNorm variances. Literals that only training uses must equal the float
    model's: eps and momentum of batch norms, dropout's probability. Each batch norm that the float model calls must be
    in the prepared one: as an operation with fixed numbers it would give equal outputs, and never learn.

    Raises:
        GateError: on every rank, if the models differ.
    """
    inputs = next(iter(EvaluationLoader(context.data.source(context.data.splits.train, 0), 16, 1, 0, 16))).inputs
    prepared.fake_quantize(False)
    prepared.observe(False)
    pairs = [
        (prepared.get_submodule(name), context.model.get_submodule(float_name))
        for float_name, name in prepared.batch_norms.items()
    ]
    tensors = [
        getattr(module, kind)
        for pair in pairs
        for module in pair
        for kind in ("running_var", "weight")
        if getattr(module, kind) is not None
    ]
    originals = [tensor.clone() for tensor in tensors]
    with _called_batch_norms(context.model) as called:
        differences = [_relative_difference(prepared.eval(), context.model.eval(), inputs)]
    _draw_variances(pairs, context.config.run.seed)
    differences.append(_relative_difference(prepared, context.model, inputs))
    for tensor, original in zip(tensors, originals, strict=True):
        tensor.copy_(original)
    prepared.fake_quantize(True)
    prepared.observe(True)
    worst = largest(differences)
    bound = context.config.qat.prepare_bound
    changed = _missing_batch_norms(context.model, prepared, called) + _changed_literals(context.model, prepared)
    hint = "the backend changed the model: report it with the model's name, or use another --qat.backend"
    context.gates.check(
        Gate(
            name="prepare",
            value=worst,
            bound=bound,
            passed=worst <= bound and not changed,
            hint=hint + ("" if changed else "; or loosen --qat.prepare_bound"),
            detail="".join(f"\n  {line}" for line in changed),
        )
    )


@contextmanager
def _called_batch_norms(model: nn.Module) -> Iterator[set[nn.Module]]:
    """Collects the batch norms with running statistics that are called in this context."""
    called = set[nn.Module]()
    hooks = [
        module.register_forward_hook(lambda module, args, output: called.add(module))
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_var is not None
    ]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def _missing_batch_norms(model: nn.Module, prepared: PreparedModel, called: Collection[nn.Module]) -> list[str]:
    """Returns a line for each called batch norm that the prepared model has no counterpart of."""
    present = {model.get_submodule(name) for name in prepared.batch_norms}
    return [
        f"{name}: this {type(module).__name__} is no batch norm in the prepared model, and would never learn"
        for name, module in model.named_modules()
        if module in called and module not in present
    ]


def _changed_literals(model: nn.Module, prepared: PreparedModel) -> list[str]:
    """Returns a line for each literal of the float model whose value differs in the prepared model."""
    expected = float_literals(model)
    lines = (
        f"{name} is {value:g}, but {expected[name]:g} in the float model"
        for name, value in prepared.literals()
        if name in expected and value != expected[name]
    )
    return list(dict.fromkeys(lines))


def _draw_variances(pairs: Sequence[tuple[nn.Module, nn.Module]], seed: int) -> None:
    """Draws the same variances for both batch norms of a pair, and scales their weights by the standard deviation.

    Each batch norm's overall factor stays the same, so outputs do not change and no layer of a deep model overflows.
    If a backend changed eps, the factors differ and the comparison shows it.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = (torch.tensor(bound).log() for bound in _VARIANCES)
    for module, float_module in pairs:
        assert isinstance(float_module, _BatchNorm) and float_module.running_var is not None
        drawn = torch.rand(float_module.running_var.shape, generator=generator)
        variance, eps = torch.exp(low + (high - low) * drawn), float_module.eps
        growth = torch.sqrt((variance + eps) / (float_module.running_var.cpu() + eps))
        for each in (module, float_module):
            each.get_buffer("running_var").copy_(variance)
            if float_module.weight is not None:
                weight = each.get_parameter("weight")
                weight.mul_(growth.to(weight.device))


def _relative_difference(actual: nn.Module, expected: nn.Module, inputs: Tree) -> float:
    """Returns the largest difference of the outputs' tensors."""
    pair = [
        [each for each in leaves(plain(call(model, inputs))) if isinstance(each, torch.Tensor)]
        for model in (actual, expected)
    ]
    return largest(relative_difference(one.double(), other.double()) for one, other in zip(*pair, strict=True))
