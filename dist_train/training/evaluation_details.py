"""Collects an evaluation's details: confusion matrix or worst pairs, per-class accuracy, samples of highest loss.

They are collected during the evaluation, without a second pass. Each rank keeps a few candidate samples, so the ranks
exchange little at the end. report/<model>.json holds the result.
"""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from dist_train.data.arrays import Batch
from dist_train.distributed.world import World
from dist_train.tasks import Task
from dist_train.trees import Tree, is_image, leaves, map_leaves, rows_of

WORST = 16
_LARGEST_SIDE = 160  # pixels; larger images are scaled down in a report
_CAPTION_NUMBERS = 16  # a target with more numbers, such as a mask, is not shown


@dataclass(frozen=True)
class Sample:
    """A sample as ranks exchange it, without its input."""

    id: int
    loss: float
    target: Any
    decision: Any


class Details:
    """Collects this rank's part of the details of one evaluation."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self._metrics = task.details().to(device)
        self._task = task
        self._samples: list[Sample] = []
        self._inputs: list[torch.Tensor] = []
        self._marks: list[tuple[Tree, torch.Tensor]] = []  # target and decision, as a task draws them

    def update(self, batch: Batch, outputs: Any, losses: torch.Tensor | None, decisions: torch.Tensor) -> None:
        """Adds a batch, with the outputs, as the task takes them, `losses` [B] and `decisions` [B, ...] of its samples.

        losses: None where the task has none for each sample; then no sample is the worst.
        """
        self._metrics.update(outputs, batch.targets)
        if losses is None:
            return
        images = _images(batch.inputs)
        # A stable sort keeps the smallest ids among equal losses, independent of batches and ranks.
        by_id = torch.argsort(batch.ids).to(losses.device)
        worst = by_id[torch.sort(losses[by_id], descending=True, stable=True).indices[:WORST]]
        if len(self._samples) == WORST:
            worst = worst[losses[worst].double() >= self._samples[-1].loss]
        worst = worst.cpu()
        found = [
            Sample(int(batch.ids[row]), float(losses[row]), _target(batch.targets, row), _numbers(decisions[row]))
            for row in worst.tolist()
        ]
        marks = [(map_leaves(lambda leaf, row=row: leaf[row], batch.targets), decisions[row]) for row in worst.tolist()]
        ranked = sorted(
            [
                *zip(self._samples, self._inputs, self._marks, strict=True),
                *zip(found, images[worst.to(images.device)], marks, strict=True),
            ],
            key=lambda each: _rank(each[0]),
        )[:WORST]
        self._samples = [sample for sample, _, _ in ranked]
        self._inputs = [inputs for _, inputs, _ in ranked]
        self._marks = [mark for _, _, mark in ranked]

    def _drawn(self, marks: tuple[Tree, torch.Tensor], image: Image.Image, scale: float) -> Image.Image:
        if type(self._task).draw is Task.draw:
            return image
        image = image.convert("RGB")
        self._task.draw(image, scale, *marks)
        return image

    def gather(self, world: World, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
        """Returns the details over all ranks, JSON-serializable and equal at any world size. Collective.

        Args:
            mean, std: of each channel, with which the inputs were normalized.
        """
        with warnings.catch_warnings():
            # As in `evaluate`: a rank without samples adds nothing, which is correct.
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            metrics = {name: _numbers(_short(value), math.inf) for name, value in self._metrics.compute().items()}
        # The worst samples over all ranks are agreed first, so that only their images are sent.
        ranks = world.gather([_rank(sample) for sample in self._samples])
        chosen = set(sorted(key for keys in ranks for key in keys)[:WORST])
        own = [
            (sample, _png(inputs, mean, std, partial(self._drawn, marks)))
            for sample, inputs, marks in zip(self._samples, self._inputs, self._marks, strict=True)
            if _rank(sample) in chosen
        ]
        everything = sorted((pair for pairs in world.gather(own) for pair in pairs), key=lambda pair: _rank(pair[0]))
        return {"metrics": metrics, "worst": [{**vars(sample), "image": image} for sample, image in everything]}


def _images(inputs: Tree) -> torch.Tensor:
    """Returns what is shown of a batch: its tensor, or the first image of a tree; else nothing of each row."""
    if isinstance(inputs, torch.Tensor):
        return inputs
    return next((leaf for leaf in leaves(inputs) if is_image(leaf)), torch.empty(rows_of(inputs), 0))


def _target(targets: Tree, row: int) -> Any:
    """Returns a sample's target as `_numbers` does; None for a tree of targets."""
    return _numbers(targets[row]) if isinstance(targets, torch.Tensor) else None


def _rank(sample: Sample) -> tuple[float, int]:
    """Returns the sort key: highest loss first, ties by id."""
    return (-sample.loss, sample.id)


def _numbers(values: torch.Tensor, limit: float = _CAPTION_NUMBERS) -> Any:
    """Returns a tensor as a number or nested lists; None if it has more than `limit` elements.

    Elements that are not finite become None, as JSON has no NaN.
    """
    return _finite(values.tolist()) if values.numel() <= limit else None


def _short(values: torch.Tensor) -> torch.Tensor:
    """Returns float32 as the float64 of the fewest digits that stand for it: 0.6, not 0.6000000238418579."""
    if values.dtype != torch.float32:
        return values
    return torch.tensor([float(str(each)) for each in values.cpu().numpy().flat], dtype=torch.float64).view(
        values.shape
    )


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return value if math.isfinite(value) else None


def _png(
    inputs: torch.Tensor, mean: Sequence[float], std: Sequence[float], draw: Callable[[Image.Image, float], Image.Image]
) -> str | None:
    """Returns a normalized image [C, H, W] as a base64 PNG of at most 160 pixels a side; None if it is not an image.

    draw: draws on the picture, with its pixels for each of the image's.
    """
    if inputs.dim() != 3 or inputs.shape[0] not in (1, 3) or len(mean) != inputs.shape[0]:
        return None
    shape = (-1, 1, 1)
    pixels = inputs.detach().cpu().float() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    if not (float(pixels.min()) >= -0.01 and float(pixels.max()) <= 1.01):
        # The dataset normalized the image in its own way. Scaling to [0, 1] keeps contrasts, not brightness.
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-12)
    factor = _LARGEST_SIDE / max(pixels.shape[1:])
    if factor < 1:
        pixels = F.interpolate(pixels[None], scale_factor=factor, mode="bilinear", antialias=True)[0]
    rows = (pixels * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    file = io.BytesIO()
    # By Pillow, as importing torchvision's encoder takes seconds: it brings all of torchvision and torch's compiler.
    image = Image.fromarray((rows[:, :, 0] if rows.shape[2] == 1 else rows).contiguous().numpy())
    draw(image, min(factor, 1.0)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
