"""Detectors: torchvision's by name, and a small one; the dense part alone, of which a task makes boxes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torchvision.models.detection as zoo
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD, SSDHead

from dist_train.models.first_conv import replace_first_conv
from dist_train.models.torchvision import named_weights as _named_weights
from dist_train.tasks.detector import Detector, Level


class DenseDetector(nn.Module):
    """The dense part of a detector, with torchvision's names: `backbone` (with the neck) and `head`.

    Inputs float [B, C, H, W] of one size; outputs a dict, see `dist_train.tasks.detector.Outputs`.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, describe: Callable[..., Detector]) -> None:
        """describe: makes the description from the images' height and width and those of each feature map."""
        super().__init__()
        self.backbone = backbone
        self.head = head
        self._describe = describe

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = self.head(self._features(images))
        return outputs

    def _features(self, images: Tensor) -> list[Tensor]:
        features = self.backbone(images)
        return list(features.values()) if isinstance(features, dict) else [features]

    @torch.no_grad()
    def detector(self, images: Tensor) -> Detector:
        """Describes the outputs for images of this size, [B, C, H, W]; the model stays as it is."""
        training = self.training
        self.eval()
        try:
            grids = [tuple(feature.shape[-2:]) for feature in self._features(images[:1])]
        finally:
            self.train(training)
        return self._describe(tuple(images.shape[-2:]), grids)


def build(name: str, num_classes: int, in_channels: int, **args: Any) -> nn.Module:
    """Builds the dense part of torchvision's detector `name`, untrained, with num_classes + 1 columns of classes.

    All its layers train, with BatchNorm that is not frozen. `args` are torchvision's, such as score_thresh.
    """
    given: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": num_classes + 1}
    model: Any = getattr(zoo, name)(**(given | args))
    if in_channels != 3:
        replace_first_conv(model, in_channels)
    limits = {
        "score": model.score_thresh,
        "overlap": model.nms_thresh,
        "candidates": model.topk_candidates,
        "most": model.detections_per_img,
    }
    return DenseDetector(model.backbone, model.head, _describer(model, model.anchor_generator, limits))


def _describer(
    model: Any, generator: DefaultBoxGenerator | AnchorGenerator, limits: Mapping[str, Any]
) -> Callable[..., Detector]:
    if isinstance(model, SSD):
        return _of_default_boxes(generator, limits)
    assert isinstance(model, (RetinaNet, FCOS)) and isinstance(generator, AnchorGenerator)
    kind = "fcos" if isinstance(model, FCOS) else "retinanet"
    cells = [tuple(_size(cell) for cell in level.tolist()) for level in generator.cell_anchors]

    def describe(size: tuple[int, int], grids: Sequence[tuple[int, int]]) -> Detector:
        levels = tuple(
            Level(grid, (size[0] // grid[0], size[1] // grid[1]), 0.0, each)
            for grid, each in zip(grids, cells, strict=True)
        )
        return Detector(kind, size, levels, **limits)  # type: ignore[arg-type]

    return describe


def _size(cell: Sequence[float]) -> tuple[float, float]:
    return cell[2] - cell[0], cell[3] - cell[1]


def _of_default_boxes(generator: Any, limits: Mapping[str, Any]) -> Callable[..., Detector]:
    """Returns what describes SSD's default boxes, whose sizes are shares of the image's."""
    shares = [pairs.clamp(0, 1).tolist() for pairs in generator._wh_pairs]

    def describe(size: tuple[int, int], grids: Sequence[tuple[int, int]]) -> Detector:
        levels = tuple(
            Level(
                grid,
                (size[0] / grid[0], size[1] / grid[1]),
                0.5,
                tuple((width * size[1], height * size[0]) for width, height in each),
            )
            for grid, each in zip(grids, shares, strict=True)
        )
        return Detector("ssd", size, levels, (10.0, 10.0, 5.0, 5.0), **limits)

    return describe


def named_weights(name: str, weights: str) -> Callable[[], dict[str, Tensor]]:
    """Like `torchvision.named_weights`, with the names of today's heads: files of RetinaNet have those of 2021."""
    fetch = _named_weights(name, weights)
    return lambda: renamed(fetch()) if name.startswith("retinanet") else fetch()


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns RetinaNet's tensors under the names of its heads' layers since torchvision 0.14: conv.2 is conv.1.0."""
    if not any(".conv.6." in key for key in state):
        return dict(state)
    found = {}
    for key, value in state.items():
        before, middle, after = key.partition("_head.conv.")
        place, _, kind = after.partition(".")
        found[f"{before}{middle}{int(place) // 2}.0.{kind}" if middle else key] = value
    return found


class _SmallBackbone(nn.Module):
    """Convolutions that halve the image; the maps at an eighth and a sixteenth of it."""

    def __init__(self, in_channels: int, width: int, norm: bool) -> None:
        super().__init__()
        widths = [in_channels, width, 2 * width, 4 * width, 4 * width]
        self.layers = nn.ModuleList(_halving(*pair, norm) for pair in pairwise(widths))
        self.out_channels = widths[-2:]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = []
        for layer in self.layers:
            x = layer(x)
            found.append(x)
        return OrderedDict([("0", found[-2]), ("1", found[-1])])


def _halving(inputs: int, outputs: int, norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels, stride in ((inputs, 2), (outputs, 1)):
        layers.append(nn.Conv2d(channels, outputs, 3, stride, 1, bias=not norm))
        layers += [nn.BatchNorm2d(outputs)] if norm else []
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def small_ssd(num_classes: int, in_channels: int, width: int = 16, norm: bool = True) -> nn.Module:
    """An SSD (Liu et al. 2016, arXiv:1512.02325) of two levels for images of 32 to 128 pixels.

    Args:
        width: channels at half of the image's size; four times as many at a sixteenth of it.
        norm: BatchNorm behind each convolution of the backbone.
    """
    generator = DefaultBoxGenerator([[2], [2]], scales=[0.25, 0.5, 0.8])
    backbone = _SmallBackbone(in_channels, width, norm)
    head = SSDHead(backbone.out_channels, generator.num_anchors_per_location(), num_classes + 1)
    limits = {"score": 0.05, "overlap": 0.45, "candidates": 100, "most": 100}
    return DenseDetector(backbone, head, _of_default_boxes(generator, limits))
