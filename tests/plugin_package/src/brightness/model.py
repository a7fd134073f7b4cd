"""A model."""

import torch
from torch import nn

import dist_train


class _Net(nn.Module):
    def __init__(self, num_classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, 2)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.conv(x)).mean((2, 3))
        return self.head(torch.relu(self.hidden(features)))


@dist_train.register_model("brightness_net")
def brightness_net(num_classes: int, in_channels: int, width: int = 8) -> nn.Module:
    """Inputs float [B, in_channels, H, W], outputs [B, num_classes]."""
    return _Net(num_classes, in_channels, width)
