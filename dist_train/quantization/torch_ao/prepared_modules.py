"""Prepared models of the fx and eager backends: torch.ao's modules for training, with our fake quantization inside."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import FixedQParamsFakeQuantize
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from dist_train.errors import QuantizationError
from dist_train.models.batch_norm import batch_moments
from dist_train.models.recomputation import Recomputation
from dist_train.programs.torchscript import integer_kernels
from dist_train.quantization.fake_quantize import ActivationFakeQuantize, WeightFakeQuantize
from dist_train.quantization.fx_nodes import quantized_weights
from dist_train.quantization.layer_sqnr import compare_graphs, compare_modules
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.torch_ao.float_output import FloatOutputLinear
from dist_train.quantization.torch_ao.fx_grids import clamp_integers
from dist_train.quantization.torch_ao.integer_model import IntegerModel
from dist_train.quantization.torch_ao.tracing import by_position
from dist_train.trees import Tree

_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
_FAKE_QUANTIZERS = (ActivationFakeQuantize, FixedQParamsFakeQuantize)


def statistics_names(model: nn.Module) -> dict[int, str]:
    """Maps the address of each batch norm's running variance to the batch norm's name. Fusing keeps these tensors."""
    return {
        module.running_var.data_ptr(): name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_var is not None
    }


class PreparedModules(PreparedModel):
    """Prepared model of the eager backend. Names are of the fused modules in `model`: `bn1` is `model.conv1.bn`."""

    def __init__(self, model: nn.Module, float_names: Mapping[int, str], settled: Collection[str]) -> None:
        """
        Args:
            model: prepared by torch.ao.
            float_names: `statistics_names` of its float model.
            settled: batch norms of the float model that its own `train()` keeps in evaluation mode.
        """
        super().__init__()
        self.model = model
        self._dropout = False
        self._recomputation = Recomputation(self, ())
        self.batch_norms = {float_names[address]: name for address, name in statistics_names(self).items()}
        self._settled = frozenset(self.batch_norms[name] for name in settled if name in self.batch_norms)

    @property
    def fixed_fake_quantizers(self) -> list[nn.Module]:
        """See PreparedModel.fixed_fake_quantizers."""
        return [module for module in self.modules() if isinstance(module, FixedQParamsFakeQuantize)]

    def literals(self) -> Iterator[tuple[str, float]]:
        """See PreparedModel.literals."""
        for name, here in self.batch_norms.items():
            module = self.get_submodule(here)
            assert isinstance(module, _BatchNorm) and module.momentum is not None
            yield f"{name}.eps", module.eps
            yield f"{name}.momentum", module.momentum
        for name, module in self.model.named_modules():
            if isinstance(module, _DropoutNd):
                yield f"{name}.p", module.p

    def forward(self, *args: Any, **kwargs: Any) -> Tree:
        """Takes what the example has, with any batch size. Returns as the float model."""
        return self.model(*args, **kwargs)

    def keep_dropout(self) -> None:
        """See PreparedModel.keep_dropout."""
        self._dropout = True
        self.train(self.training)

    @contextmanager
    def batch_moments(self) -> Iterator[None]:
        """See PreparedModel.batch_moments."""
        with self.observing(False), batch_moments(self):
            yield

    def train(self, mode: bool = True) -> PreparedModules:
        """As any module's. Dropout stays off unless it is kept; frozen batch norms stay in eval mode."""
        super().train(mode)
        for name, module in self.model.named_modules(prefix="model"):
            if isinstance(module, _BatchNorm):
                off = self.batch_norm_frozen or name in self._settled
            else:
                off = not self._dropout and _may_drop_out(module)
            if off:
                module.training = False
        return self

    def recompute(self, names: Sequence[str]) -> None:
        """See PreparedModel.recompute."""
        self._recomputation.turn(False)
        self._recomputation = Recomputation(self, [f"model.{name}" for name in names])
        self._recomputation.turn(True)

    def float_names(self) -> dict[str, str]:
        """See PreparedModel.float_names."""
        owners = {here: name for name, here in self.batch_norms.items()}
        found = {}
        for name, _ in self.named_parameters():
            owner, _, own = name.rpartition(".")
            found[name] = f"{owners[owner]}.{own}" if owner in owners else self._float_name(name.removeprefix("model."))
        return found

    def modules_of_blocks(self, names: Sequence[str]) -> list[list[str]]:
        """See PreparedModel.modules_of_blocks."""
        return [[f"model.{name}"] for name in names]

    def _float_name(self, name: str) -> str:
        return name

    def integer_weights(self) -> Collection[str]:
        """See PreparedModel.integer_weights."""
        return [
            f"{name}.weight"
            for name, module in self.model.named_modules()
            if isinstance(getattr(module, "weight_fake_quant", None), WeightFakeQuantize)
        ]

    def layer_sqnr(self, converted: nn.Module, inputs: Tree) -> dict[str, float]:
        """See PreparedModel.layer_sqnr."""
        if not isinstance(converted, IntegerModel):  # of a backend with a conversion of its own
            return {}
        with integer_kernels(converted.engine):
            return self._compare(converted.model, _heads(converted.model), inputs)

    def _compare(self, integers: nn.Module, heads: Collection[str], inputs: Tree) -> dict[str, float]:
        return compare_modules(self.model, integers, heads, inputs, _FAKE_QUANTIZERS)


class TracedModules(PreparedModules):
    """Prepared model of the fx backend, whose `model` is a GraphModule."""

    model: GraphModule

    def recompute(self, names: Sequence[str]) -> None:
        """See PreparedModel.recompute. A GraphModule calls its layers by parts."""
        PreparedModel.recompute(self, names)

    def __init__(
        self, model: nn.Module, float_names: Mapping[int, str], settled: Collection[str], renamed: Mapping[str, str]
    ) -> None:
        """renamed: as of `tracing.Traced`. The other arguments are those of `PreparedModules`."""
        super().__init__(model, float_names, settled)
        self._renamed = dict(renamed)

    def keep_dropout(self) -> None:
        """See PreparedModel.keep_dropout. Functional dropout was traced as switched off.

        Dropout inside attention stays off, too.
        """
        for node in self.model.graph.nodes:
            if node.target in _DROPOUTS:
                raise QuantizationError(
                    f"{node.name}: the fx backend traced this functional dropout as one that is off",
                    "use nn.Dropout in the model, or --qat.backend pt2e, or --qat.dropout false",
                )
        super().keep_dropout()

    def modules_of_blocks(self, names: Sequence[str]) -> list[list[str]]:
        """See PreparedModel.modules_of_blocks. A GraphModule calls the layers of a block, not the block."""
        called = dict.fromkeys(str(node.target) for node in self.model.graph.find_nodes(op="call_module"))
        layers = [each for each in called if any(True for _ in self.model.get_submodule(each).parameters())]
        found = []
        for name in names:  # the inner blocks come first
            own = [each for each in layers if f"{self._float_name(each)}.".startswith(f"{name}.")]
            layers = [each for each in layers if each not in own]
            if own:
                found.append([f"model.{each}" for each in own])
        return found

    def integer_weights(self) -> Collection[str]:
        """See PreparedModel.integer_weights. Weights of functional calls are quantized by nodes of the graph."""
        return [self._float_name(name) for name in (*super().integer_weights(), *quantized_weights(self.model))]

    def literals(self) -> Iterator[tuple[str, float]]:
        """See PreparedModel.literals."""
        return ((self._float_name(name), value) for name, value in super().literals())

    def _float_name(self, name: str) -> str:
        top, dot, rest = name.partition(".")
        return self._renamed.get(top, top) + dot + rest

    def _compare(self, integers: nn.Module, heads: Collection[str], inputs: Tree) -> dict[str, float]:
        """A node's output is fake-quantized by the node after it, and lies on the grid of that node."""
        assert isinstance(integers, GraphModule)
        clamp_integers(self.model)
        modules = dict(self.model.named_modules(remove_duplicate=False))
        wanted = {
            user.name: node.name
            for node in self.model.graph.nodes
            for user in node.users
            if user.op == "call_module" and isinstance(modules[str(user.target)], _FAKE_QUANTIZERS)
        }
        # Outputs of heads stay in floating point.
        wanted |= {
            node.name: node.name for node in self.model.graph.find_nodes(op="call_module") if node.target in heads
        }
        leaves = by_position(self.model.graph, inputs)
        return compare_graphs(self.model, wanted, integers, leaves, _FAKE_QUANTIZERS)


def _heads(converted: nn.Module) -> set[str]:
    return {name for name, module in converted.named_modules() if isinstance(module, FloatOutputLinear)}


def _may_drop_out(module: nn.Module) -> bool:
    """True where the module's own forward may drop out, as a user's module may by functional dropout."""
    drops = isinstance(module, (_DropoutNd, nn.MultiheadAttention, nn.RNNBase))
    return drops or not type(module).__module__.startswith("torch.")
