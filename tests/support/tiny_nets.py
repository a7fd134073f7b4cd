"""Small networks whose batch norms have settings that PT2E loses, and their first ranges."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.ranges import Ranges


class TinyNet(nn.Module):
    """Two convolutions (one with a bias), different batch norms, a residual sum, dropout, a head of 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8, eps=1e-3, momentum=0.01)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8, eps=1e-2, momentum=0.3)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(x + self.bn2(self.conv2(x)))
        return self.fc(self.dropout(x.mean((2, 3))))


def draw_statistics(model: nn.Module) -> nn.Module:
    """Draws variances from 1e-5 to 10, as in a trained network: near 1 a wrong eps would not show."""
    with torch.no_grad():
        for module in model.modules():
            if (
                isinstance(module, nn.BatchNorm2d)
                and module.running_var is not None
                and module.running_mean is not None
            ):
                module.running_var.copy_(10 ** (torch.rand_like(module.running_var) * 6 - 5))
                module.running_mean.normal_(0, 0.1)
                # Scale the weight with the deviation, or activations would grow a hundredfold per layer.
                deviation = torch.sqrt(module.running_var + module.eps)
                module.weight.copy_(deviation * (0.5 + torch.rand_like(deviation)))
    return model


def calibrate(prepared: PreparedModel, *batches: Tensor) -> PreparedModel:
    """Observes the first ranges on `batches`; keeps the mode and leaves observing on."""
    ranges, mode = Ranges(prepared), prepared.training
    prepared.eval()
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    ranges.update(ranges.observed(), 1.0)
    return prepared.train(mode)
