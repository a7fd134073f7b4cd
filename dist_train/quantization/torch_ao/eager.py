"""The eager backend, torch's classic flow: fuse, qconfig, prepare_qat, train, convert. Deprecated in torch.

The model itself marks its quantized part: it holds a QuantStub and a DeQuantStub, and its additions are FloatFunctional
modules. Its method `fuse_model(is_qat)` fuses convolutions with the modules after them. torchvision.models.quantization
has such models.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import DeQuantStub, QuantStub
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from dist_train import trees
from dist_train.config.stages import RuleConfig
from dist_train.errors import QuantizationError
from dist_train.programs.torchscript import integer_kernels
from dist_train.quantization.batch_norm_calls import settled_batch_norms
from dist_train.quantization.dry_run import dry_run
from dist_train.quantization.fake_quantize import ActivationFakeQuantize
from dist_train.quantization.float_checks import quietly
from dist_train.quantization.padding import refuse_uneven_padding
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.ranges import Ranges
from dist_train.quantization.rules import resolve_rules
from dist_train.quantization.torch_ao import common
from dist_train.quantization.torch_ao.float_output import use_float_outputs
from dist_train.quantization.torch_ao.integer_model import IntegerModel, TorchAOBackend
from dist_train.quantization.torch_ao.prepared_modules import PreparedModules, statistics_names
from dist_train.trees import Tree


class EagerBackend(TorchAOBackend):
    """Implements `dist_train.quantization.backend.QuantizationBackend`."""

    def check(self, model: nn.Module, rules: Sequence[RuleConfig] = (), example: Tree | None = None) -> None:
        """See QuantizationBackend.check. Refuses rules: only the model's author can put stubs around a module."""
        self._check_modules(model, rules)
        if example is not None:
            dry_run(self, model, example, rules, gradient_bound=self.gradient_bound)

    def _check_modules(self, model: nn.Module, rules: Sequence[RuleConfig]) -> None:
        if resolve_rules(model, rules):
            raise QuantizationError(
                "the eager backend takes no rules: the model itself says where integers begin and end",
                "--qat.rules '[]' with stubs around the module in the model, or --qat.backend pt2e",
            )
        kinds = {type(module) for module in model.modules()}
        missing = [kind.__name__ for kind in (QuantStub, DeQuantStub) if kind not in kinds]
        if not callable(getattr(model, "fuse_model", None)):
            missing.append("method fuse_model(is_qat)")
        if missing:
            raise QuantizationError(
                f"{type(model).__name__} has no {', no '.join(missing)}, which the eager backend needs",
                "--qat.backend pt2e or fx, which take any model; "
                "or one made for it, such as --model.name quantized_resnet18",
            )
        common.check_model(model)
        refuse_uneven_padding(model)

    def prepare(self, model: nn.Module, example: Tree, rules: Sequence[RuleConfig] = ()) -> PreparedModules:
        """See QuantizationBackend.prepare. The result is on the model's device and in its mode."""
        self._check_modules(model, rules)
        with quietly():
            prepared = common.make_ready(copy.deepcopy(model)).train()
            names, settled = statistics_names(prepared), settled_batch_norms(copy.deepcopy(prepared), example)
            prepared.fuse_model(is_qat=True)  # type: ignore[operator]
            _average_in_float(prepared, example)
            heads = _heads(prepared, example)
            prepared.qconfig = common.qconfig(self.engine)  # type: ignore[assignment]
            common.prepare_qat(prepared, inplace=True)
            for head in heads:
                prepared.get_submodule(head).activation_post_process = nn.Identity()
        result = PreparedModules(prepared, names, settled).eval()
        _drop_unused(result, example)
        return result.train(model.training)

    def convert(self, prepared: PreparedModel) -> IntegerModel:
        """See QuantizationBackend.convert."""
        assert isinstance(prepared, PreparedModules)
        Ranges(prepared).require_known()
        model = copy.deepcopy(prepared.model).cpu().eval()
        heads = [
            name
            for name, module in model.named_modules()
            if type(module) is torch.ao.nn.qat.Linear and isinstance(module.activation_post_process, nn.Identity)
        ]
        with quietly(), integer_kernels(self.engine):
            use_float_outputs(model, heads)
            return IntegerModel(common.convert(model, inplace=True), self.engine)


class _FloatAverage(nn.Module):
    """A pool between integers that averages in floating point; its output gets a range of its own."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.dequant, self.pool, self.quant = DeQuantStub(), pool, QuantStub()

    def forward(self, x: Tensor) -> Tensor:
        average: Tensor = self.quant(self.pool(self.dequant(x)))
        return average


class _Inside(Tensor):
    """Marks tensors between QuantStub and DeQuantStub, which become integers. Torch's functions keep the subclass."""


@torch.no_grad()
def _average_in_float(model: nn.Module, example: Tree) -> None:
    """Wraps averaging pools between stubs in `_FloatAverage`, in place. Functional pools cannot be reached."""
    inside, hooks, training = set[nn.Module](), [], model.training
    for module in model.modules():
        if isinstance(module, QuantStub):
            hooks.append(module.register_forward_hook(lambda _, args, output: output.as_subclass(_Inside)))
        elif isinstance(module, DeQuantStub):
            hooks.append(module.register_forward_hook(lambda _, args, output: output.as_subclass(Tensor)))
        elif isinstance(module, common.AVERAGES):
            hooks.append(
                module.register_forward_hook(
                    lambda pool, args, _: inside.add(pool) if isinstance(args[0], _Inside) else None
                )
            )
    try:
        trees.call(model.eval(), example)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    for owner in list(model.modules()):
        for name, child in list(owner._modules.items()):
            if child in inside:
                setattr(owner, name, _FloatAverage(child))


class _Readers(TorchFunctionMode):
    """Collects the names of the Linears whose outputs a function of torch reads.

    `results` holds the Linears' names and outputs; it grows while the model runs.
    """

    def __init__(self, results: list[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.results, self.read = results, set[str]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in (F.dropout, torch.dropout, Tensor.detach):  # the last is our own, in `stub`
            inputs = tree_leaves((args, kwargs))
            self.read.update(name for name, result in self.results if any(each is result for each in inputs))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def _heads(model: nn.Module, example: Tree) -> list[str]:
    """Returns the names of the Linears whose outputs go to DeQuantStubs only: these outputs need no integers."""
    results, found, training = list[tuple[str, Tensor]](), set[str](), model.training

    def stub(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        found.update(name for name, result in results if result is args[0])
        return args[0].detach()  # another tensor, so that functions behind the stub do not count

    hooks = [module.register_forward_pre_hook(stub) for module in model.modules() if isinstance(module, DeQuantStub)]
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            hooks.append(
                module.register_forward_hook(lambda _, args, result, name=name: results.append((name, result)))
            )
    readers = _Readers(results)
    try:
        with readers:
            trees.call(model.eval(), example)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    calls = [name for name, _ in results]
    return [name for name in found - readers.read if calls.count(name) == 1]


@torch.no_grad()
def _drop_unused(prepared: PreparedModules, example: Tree) -> None:
    """Removes fake quantization from modules that forward never calls: their ranges would stay unknown."""
    trees.call(prepared, example)
    for owner in list(prepared.modules()):
        quantizer = getattr(owner, "activation_post_process", None)
        if isinstance(quantizer, ActivationFakeQuantize) and torch.isinf(quantizer.step_low):
            owner.activation_post_process = nn.Identity()
            owner.qconfig = None  # type: ignore[assignment]
    Ranges(prepared).drop()
