"""The prepared model of torch.ao: its modules, fused for training, with our fake quantization inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import FixedQParamsFakeQuantize
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from dist_train.errors import QuantizationError
from dist_train.models.batch_norm import batch_moments
from dist_train.quantization.prepared import PreparedModel

_FUNCTIONS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


def statistics_names(model: nn.Module) -> dict[int, str]:
    """The address of each batch norm's running variance, and the batch norm's name. Fusing moves the tensors and keeps them."""
    return {
        module.running_var.data_ptr(): name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_var is not None
    }


class PreparedModules(PreparedModel):
    """What fx and eager make. Names are those of the fused modules, behind `model.`: `bn1` is `model.conv1.bn`."""

    def __init__(self, model: nn.Module, float_names: Mapping[int, str]) -> None:
        """model: what torch.ao prepared. float_names: `statistics_names` of the float model that it was made of."""
        super().__init__()
        self.model = model
        self._dropout = False
        self.batch_norms = {float_names[address]: name for address, name in statistics_names(self).items()}

    @property
    def fixed_fake_quantizers(self) -> list[nn.Module]:
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

    def forward(self, x: Tensor) -> Tensor:
        """x: shaped as the example, with any batch size. What the float model returns."""
        outputs: Tensor = self.model(x)
        return outputs

    def keep_dropout(self) -> None:
        """See PreparedModel.keep_dropout. Functional dropout in a traced graph is a constant."""
        if isinstance(self.model, GraphModule):
            for node in self.model.graph.nodes:
                if node.target in _FUNCTIONS:
                    raise QuantizationError(
                        f"{node.name}: the fx backend traced this functional dropout as one that is off",
                        "use nn.Dropout in the model, or --qat.backend pt2e, or --qat.dropout false",
                    )
        self._dropout = True
        self.train(self.training)

    @contextmanager
    def batch_moments(self) -> Iterator[None]:
        """See PreparedModel.batch_moments."""
        with self.observing(False), batch_moments(self):
            yield

    def train(self, mode: bool = True) -> PreparedModules:
        """As any module's, but dropout stays off unless it is kept, and so do the statistics of batch norms once they are frozen."""
        super().train(mode)
        for module in self.model.modules():
            if isinstance(module, _BatchNorm):
                off = self.batch_norm_frozen
            else:
                off = not self._dropout and _may_drop_out(module)
            if off:
                module.training = False
        return self


def _may_drop_out(module: nn.Module) -> bool:
    """Whether its own forward may: a module that is not torch's may call functional dropout, by its own `training`."""
    drops = isinstance(module, (_DropoutNd, nn.MultiheadAttention, nn.RNNBase))
    return drops or not type(module).__module__.startswith("torch.")
