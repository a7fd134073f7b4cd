"""Common parts of the fx and eager backends: torch.ao's QConfigs with our fake quantization, and its integer engines.

torch.ao.quantization is deprecated and will be removed (pytorch/ao#2259). Importing this module then raises
QuantizationError.
"""

from __future__ import annotations

import platform
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from dist_train.errors import BackendVersionError, QuantizationError
from dist_train.quantization.fake_quantize import SMALLEST_SCALE, ActivationFakeQuantize, WeightFakeQuantize
from dist_train.quantization.float_checks import (
    keep_invertible,
    quietly,
    refuse_cumulative_average,
    refuse_names,
    refuse_untracked_statistics,
)
from dist_train.quantization.padding import number_paddings

try:
    from torch.ao.quantization import FakeQuantizeBase, QConfig, get_default_qat_qconfig
    from torch.ao.quantization.observer import _with_args
    from torch.ao.quantization.quantize import convert, prepare_qat
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx
except ImportError as error:
    raise BackendVersionError(
        f"the fx and eager backends need torch.ao.quantization, which torch {torch.__version__} no longer has",
        "--qat.backend pt2e",
    ) from error

__all__ = [
    "AVERAGES",
    "check_model",
    "choose_engine",
    "convert",
    "convert_fx",
    "make_ready",
    "prepare_qat",
    "prepare_qat_fx",
    "qconfig",
]

# Kept in floating point. On the grid of its inputs an average is coarse, as averages take up a small part of that
# range. It may also fall in the middle between two integers (a quarter of all means of 2 x 2 do), where kernel and
# simulation round differently.
AVERAGES = (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)

# torch.ao finds fake-quantize modules by this base.
for ours in (ActivationFakeQuantize, WeightFakeQuantize):
    FakeQuantizeBase.register(ours)


def choose_engine(name: str) -> str:
    """Resolves `qat.engine` to the name of an engine.

    Raises:
        QuantizationError: this build of torch does not have its kernels.
    """
    if name == "auto":
        name = "x86" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "qnnpack"
    supported = [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]
    if name not in supported:
        raise QuantizationError(
            f"this torch has no integer kernels {name!r}",
            f"--qat.engine {' or '.join(supported)}" if supported else "--qat.backend pt2e",
        )
    return name


def qconfig(engine: str, per_tensor: bool | None = None) -> QConfig:
    """Returns torch.ao's default for the engine, with our fake quantization and the default's range of activations.

    per_tensor: True for one scale of the weights, False for one for each output channel; None for the engine's default.
    """
    default = get_default_qat_qconfig(engine)
    with quietly():
        activation, weight = default.activation(), default.weight()
    qscheme = weight.qscheme
    if per_tensor is not None:
        qscheme = torch.per_tensor_symmetric if per_tensor else torch.per_channel_symmetric
    return QConfig(
        activation=_with_args(_activation, range_max=activation.activation_post_process.quant_max),
        weight=_with_args(_weight, qscheme=qscheme),
    )


@dataclass(frozen=True)
class _Bounds:
    """Replaces the observer in a fake-quantize module: torch.ao reads its range, to check it against the kernels."""

    quant_min: int
    quant_max: int
    eps: float = SMALLEST_SCALE


def _activation(range_max: int, factory_kwargs: object = None) -> ActivationFakeQuantize:
    quantizer = ActivationFakeQuantize(dtype=torch.quint8, range_max=range_max)
    quantizer.activation_post_process = _Bounds(quantizer.quant_min, quantizer.quant_max)
    return quantizer


def _weight(qscheme: torch.qscheme, factory_kwargs: object = None) -> WeightFakeQuantize:
    """factory_kwargs: device and dtype, which some of torch.ao's modules pass; unused."""
    quantizer = WeightFakeQuantize(dtype=torch.qint8, qscheme=qscheme, settle_in_forward=True)
    quantizer.activation_post_process = _Bounds(quantizer.quant_min, quantizer.quant_max)
    return quantizer


def check_model(model: nn.Module, skipped: Collection[str] = ()) -> None:
    """Raises QuantizationError for a layer that torch.ao cannot prepare for training, by name.

    skipped: modules that stay in floating point.
    """
    refuse_cumulative_average(model)
    refuse_names(model)
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_var is None:
            raise refuse_untracked_statistics(name)
        if isinstance(module, (_ConvNd, nn.Linear)) and is_parametrized(module, "weight") and name not in skipped:
            kinds = ", ".join(type(each).__name__ for each in module.parametrizations["weight"])  # type: ignore[index]
            raise QuantizationError(
                f"{name}: its weight is computed by {kinds}, which the fx and eager backends cannot train with",
                "--qat.backend pt2e, or "
                "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') in the model",
            )
        if name not in skipped:
            _refuse_hooks(name, module)


def _refuse_hooks(name: str, module: nn.Module) -> None:
    """Raises QuantizationError for a hook of a layer that is replaced by another, which would lose it in silence."""
    if next(module.children(), None) is not None or not type(module).__module__.startswith("torch.nn."):
        return
    computed = [type(hook).__name__ for hook in module._forward_pre_hooks.values() if hasattr(hook, "name")]
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    if computed:
        raise QuantizationError(
            f"{name}: its weight is computed by {', '.join(computed)}, which fx and eager cannot train with",
            "--qat.backend pt2e, or remove_weight_norm, remove_spectral_norm, prune.remove of torch.nn.utils in it",
        )
    if any(hooks):
        raise QuantizationError(
            f"{name} has a hook, which would be lost when the fx or eager backend replaces the layer",
            "remove the hook, or put what it computes into the forward of a module of your own",
        )


def make_ready(model: nn.Module) -> nn.Module:
    """Gives every batch norm a weight by which QAT can divide, and convolutions numbers as padding, in place.

    BatchNorm without affine parameters gets a fixed weight 1 and bias 0.
    """
    number_paddings(model)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.weight is None:
                assert module.running_var is not None  # check_model
                module.weight = nn.Parameter(torch.ones_like(module.running_var), requires_grad=False)
                module.bias = nn.Parameter(torch.zeros_like(module.running_var), requires_grad=False)
                module.affine = True  # torch.ao fuses no others
            keep_invertible(module.weight)
    return model
