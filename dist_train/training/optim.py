"""Builds torch's optimizers, and registered ones, with parameter groups."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dist_train import registry
from dist_train.config.fit import GroupConfig, OptimConfig
from dist_train.errors import SetupError
from dist_train.strategies.shards import has_shards
from dist_train.training.several import Several

Group = dict[str, Any]

REFUSALS = (TypeError, ValueError, LookupError, ArithmeticError, AssertionError)
"""Errors with which torch's optimizers and schedules meet arguments of a wrong type, length or value."""


def build_optimizer(
    model: nn.Module,
    config: OptimConfig,
    fused: bool = True,
    groups: Sequence[Collection[str]] = (),
    names: Mapping[str, str] | None = None,
) -> torch.optim.Optimizer:
    """Builds the optimizer over the trainable parameters.

    One-dimensional parameters (norms, biases) get no weight decay unless `decay_norm_and_bias` is set (He et al. 2019,
    arXiv:1812.01187).

    Args:
        fused: let sgd, adam and adamw use torch's kernels that update a parameter in one pass, where the parameters
            allow it.
        groups: names of the parameters of each of `config.groups`, as of `parts.Parts`.
        names: from the names of the model's parameters to those in `groups`, where they differ.

    Raises:
        SetupError: torch or the registered function refuses the parameters.
    """
    names = names or {}
    trained = {
        names.get(name, name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    grouped = {name for each in groups for name in each}
    members: list[tuple[GroupConfig | None, list[nn.Parameter]]] = [
        (None, [each for name, each in trained.items() if name not in grouped])
    ]
    members += [
        (group, [trained[name] for name in trained if name in own])
        for group, own in zip(config.groups, groups, strict=True)
    ]
    named: dict[str, list[Group]] = {}
    for group, parameters in members:
        own_name = config.name if group is None or group.name is None else group.name
        named.setdefault(own_name, []).extend(_groups(config, group, parameters))
    parts = {name: made for name, made in named.items() if made}
    if parts.keys() <= {config.name}:
        return _of_groups(model, config, named[config.name], fused)
    return Several(
        [
            _of_groups(model, config if name == config.name else _another(config, name), made, fused=False)
            for name, made in parts.items()
        ]
    )


def _another(config: OptimConfig, name: str) -> OptimConfig:
    """Returns the settings for groups of another optimizer: `args` are for the section's own."""
    return config.model_copy(update={"name": name, "args": {}})


def _of_groups(model: nn.Module, config: OptimConfig, made: list[Group], fused: bool) -> torch.optim.Optimizer:
    if not config.own:
        return _by_name(config, made)
    parameters = [parameter for each in made for parameter in each["params"]]
    one_pass = (fused and _may_fuse(model, parameters)) or None
    optimizer: torch.optim.Optimizer
    if config.name == "sgd":
        one_pass = None if has_shards(model) else one_pass  # DTensors have no such kernel
        optimizer = torch.optim.SGD(
            made, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=one_pass
        )
    else:
        adam = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
        optimizer = adam(made, lr=config.lr, betas=config.betas, eps=config.eps, fused=one_pass)
    if one_pass:
        complete_momenta(optimizer)
        optimizer.register_step_pre_hook(_lay_out_gradients)
    return optimizer


def complete_momenta(optimizer: torch.optim.Optimizer) -> None:
    """Gives fused SGD all its momenta: the kernel needs all or none, and a parameter may be unused in the first steps.

    Called again where a schedule gives it a momentum.
    """
    if isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["fused"]:
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["momentum"] else ():
                if "momentum_buffer" not in optimizer.state[parameter]:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def decays(optimizer: Callable[..., Any]) -> bool:
    """Tells whether an optimizer takes `weight_decay`; a registered function gets it in its groups anyway."""
    taken = inspect.signature(optimizer).parameters
    return "weight_decay" in taken or not inspect.isclass(optimizer)


def _groups(config: OptimConfig, group: GroupConfig | None, parameters: Sequence[nn.Parameter]) -> list[Group]:
    """Returns the groups of parameters that decay, and of those that do not, where there are any."""
    own: Group = {}
    decay, also_norms = config.weight_decay, config.decay_norm_and_bias
    if group is not None:
        own = {name: tuple(value) if isinstance(value, list) else value for name, value in group.args.items()}
        if group.lr is not None:
            own["lr"] = group.lr
        decay = decay if group.weight_decay is None else group.weight_decay
        also_norms = also_norms if group.decay_norm_and_bias is None else group.decay_norm_and_bias
    decayed = [each for each in parameters if each.dim() > 1 or also_norms]
    spared = [each for each in parameters if not (each.dim() > 1 or also_norms)]
    return [
        {"params": params, "weight_decay": share, **own}
        for params, share in ((decayed, decay), (spared, 0.0))
        if params
    ]


def _by_name(config: OptimConfig, groups: list[Group]) -> torch.optim.Optimizer:
    make = registry.optimizers.get(config.name)
    expected = {id(parameter) for group in groups for parameter in group["params"]}
    if not decays(make):
        groups = [{name: value for name, value in group.items() if name != "weight_decay"} for group in groups]
    args = {name: tuple(value) if isinstance(value, list) else value for name, value in config.args.items()}
    try:
        made: object = make(groups, lr=config.lr, **args)
    except REFUSALS as error:
        raise SetupError(
            f"the optimizer {config.name} cannot be made: {error}", "change optim.args, or take another optim.name"
        ) from error
    if not isinstance(made, torch.optim.Optimizer):
        raise SetupError(
            f"the registered optimizer {config.name} returned a {type(made).__name__}",
            "return a torch.optim.Optimizer: register a function of (params, lr, **args)",
        )
    held = {id(parameter) for group in made.param_groups for parameter in group["params"]}
    if held != expected:
        raise SetupError(
            f"the registered optimizer {config.name} has {len(held)} parameters, not the {len(expected)} that it got",
            "give `params`, which are groups of parameters, to torch.optim.Optimizer as they are",
        )
    return made


def _lay_out_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Gives every gradient the strides of its parameter: fused kernels on a CPU read both in the order of memory.

    With other strides they take one element's gradient for another's, without a word (torch 2.14).
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.layout != torch.strided:  # of an embedding's function, which no module tells
                gradient = parameter.grad = gradient.to_dense()
            if gradient.stride() != parameter.stride():
                parameter.grad = torch.empty_like(parameter).copy_(gradient)


def _may_fuse(model: nn.Module, parameters: list[nn.Parameter]) -> bool:
    """Tells whether torch's fused kernels take these parameters: dense floats with dense gradients, on CPU or CUDA.

    On some CPUs fused SGD leaves bfloat16 and float16 parameters as they are (pytorch#191763).
    """
    return all(
        each.dtype in (torch.float32, torch.float64)
        and each.device.type in ("cpu", "cuda")
        and torch.empty_like(each).stride() == each.stride()
        for each in parameters
    ) and not any(getattr(module, "sparse", False) for module in model.modules())
