"""Augments batches on the images' device, as a function of (seed, epoch, sample id) alone."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.data.augment.normalize import Normalization
from dist_train.data.permutation import derive_key

# SplitMix64's finaliser (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014), its
# unsigned constants as int64.
_FACTORS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
_GRAY = (0.2989, 0.587, 0.114)  # ITU-R BT.601 luma, with torchvision's digits


class Step(Protocol):
    """An augmentation of a batch [B, C, H, W], uint8 or float32 on the scale 0..255; keeps shape and scale."""

    @property
    def draws(self) -> tuple[str, ...]:
        """Names of the random numbers that a sample needs; each number is a function of its name too."""

    def __call__(self, images: Tensor, *draws: Tensor) -> Tensor:
        """Augments the images; `draws`: for each name float32 [B], uniform in [0, 1)."""


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch shifts int64 arithmetically, so the copies of the sign bit are masked away."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def draw_keys(seed: int, epoch: int, salts: Sequence[str]) -> Tensor:
    """Keys for `uniform`, two per salt: int64 [2, S, 1]. A salt tells apart the draws of one sample."""
    keys = [[derive_key("uniform", seed, epoch, salt, half) - (1 << 63) for salt in salts] for half in (0, 1)]
    return torch.tensor(keys, dtype=torch.int64).unsqueeze(-1)


def uniform(ids: Tensor, keys: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) as a hash of (id, key): the same bits in every batch, on every device.

    A counter-based generator (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) with SplitMix64's
    finaliser, in int64, where multiplication and addition wrap modulo 2**64.

    Args:
        ids: int64 [B].
        keys: int64 [2, S, 1] on the same device, from `draw_keys`.

    Returns:
        float32 [S, B], multiples of 2**-24.
    """
    first, second = keys
    hashed = ids + first
    hashed = (hashed ^ _shifted(hashed, 30)) * _FACTORS[0]
    # A second key in the middle: with the first alone, draws with different salts would be shifted copies of one
    # sequence.
    hashed = (hashed ^ _shifted(hashed, 27) ^ second) * _FACTORS[1]
    hashed = hashed ^ _shifted(hashed, 31)
    return _shifted(hashed, 40).to(torch.float32) * 2.0**-24


class RandomCrop:
    """Crops a window of the original size at a random place of the image, padded with `padding` zeros on each side."""

    draws = ("top", "left")

    def __init__(self, settings: Any) -> None:
        self.padding: int = settings.padding

    def __call__(self, images: Tensor, *draws: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        padded = F.pad(images, [self.padding] * 4).contiguous()
        padded_height, padded_width = padded.shape[2:]
        places = 2 * self.padding + 1
        # An odd number of places: the product never rounds up to it, however near to 1 the draw is.
        top, left = ((draw * places).to(torch.int64) for draw in draws)
        # Rows are runs of the flat padded batch: copying whole runs is an order of magnitude faster than gathering
        # pixels.
        runs = padded.as_strided((padded.numel() - width + 1, width), (1, 1))
        plane = torch.arange(batch * channels, device=images.device).view(batch, channels, 1) * (
            padded_height * padded_width
        )
        row = torch.arange(height, device=images.device) * padded_width
        starts = plane + row + (top * padded_width + left).view(batch, 1, 1)
        return runs.index_select(0, starts.view(-1)).view(batch, channels, height, width)


class RandomHorizontalFlip:
    """Mirrors a sample left to right with probability p."""

    draws = ("flip",)

    def __init__(self, settings: Any) -> None:
        self.p: float = settings.p

    def __call__(self, images: Tensor, *draws: Tensor) -> Tensor:
        batch = images.shape[0]
        chosen = torch.arange(batch, device=images.device) + (draws[0] < self.p) * batch
        return torch.cat([images, images.flip(-1)]).index_select(0, chosen)


class ColorJitter:
    """Changes brightness, contrast and saturation, in this order, each by a factor uniform in [max(0, 1 - v), 1 + v].

    Same formulas as torchvision.transforms.v2.functional for float images; results are clamped to 0..255. An image
    without three channels is its own grayscale image, so saturation does not change it.
    """

    draws = ("brightness", "contrast", "saturation")

    def __init__(self, settings: Any) -> None:
        self.amounts: list[float] = [getattr(settings, name) for name in self.draws]

    def __call__(self, images: Tensor, *draws: Tensor) -> Tensor:
        images = images.to(torch.float32)
        for name, amount, draw in zip(self.draws, self.amounts, draws, strict=True):
            if amount == 0 or (name == "saturation" and images.shape[1] != 3):
                continue
            low, high = max(0.0, 1.0 - amount), 1.0 + amount
            factor = (draw * (high - low) + low).view(-1, 1, 1, 1)
            images = (images * factor + _blended_with(name, images) * (1.0 - factor)).clamp_(0.0, 255.0)
        return images


def _blended_with(name: str, images: Tensor) -> Tensor:
    """Returns the image at factor 0: black, the mean gray of each image, or the gray image."""
    if name == "brightness":
        return images.new_zeros(())
    gray = images
    if images.shape[1] == 3:
        red, green, blue = images.unbind(1)
        gray = (red * _GRAY[0] + green * _GRAY[1] + blue * _GRAY[2]).unsqueeze(1)
    if name == "saturation":
        return gray
    # A sum of integers does not depend on the order. The last bits of float means depend on the batch's size (seen at
    # 224x224 with 2 threads).
    total = (gray * 2.0**16).round().to(torch.int64).sum(dim=(1, 2, 3), keepdim=True)
    return total.to(torch.float32) * (2.0**-16 / gray[0].numel())


STEPS: dict[str, Callable[[Any], Step]] = {
    "random_crop": RandomCrop,
    "random_horizontal_flip": RandomHorizontalFlip,
    "color_jitter": ColorJitter,
}
"""Steps by name, built from their settings. Random erasing also needs the data's mean and is built apart."""


class Augmentation:
    """Augments and normalizes batches of images.

    A sample in an epoch gives the same pixels, alone or in any batch, on any rank.

    Args:
        steps: settings with a `name`, in the order in which they apply. No steps: images are only normalized.
        seed: any integer.
        mean, std: per channel, for pixels on the scale 0..1.
    """

    def __init__(self, steps: Sequence[Any], *, seed: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.seed = seed
        self.normalize = Normalization(mean, std)
        self._steps: list[Step] = []
        self._salts: list[str] = []
        self._keys: tuple[tuple[int, torch.device], Tensor] | None = None
        seen: Counter[str] = Counter()
        for settings in steps:
            erases = settings.name == "random_erasing"
            step: Step = RandomErasing(settings, mean) if erases else STEPS[settings.name](settings)
            self._steps.append(step)
            # Two steps of one name draw different numbers; adding a step does not change the draws of the others.
            self._salts += [f"{settings.name}.{seen[settings.name]}.{draw}" for draw in step.draws]
            seen[settings.name] += 1

    def __call__(self, images: Tensor, ids: Tensor, epoch: int) -> Tensor:
        """Returns augmented, normalized images.

        Args:
            images: uint8 [B, C, H, W]; not changed.
            ids: int64 [B], the samples' ids, on any device.
            epoch: any integer.

        Returns:
            float32 [B, C, H, W] on the images' device.
        """
        if self._steps:
            # All random numbers at once: on small batches each operation costs more than its arithmetic.
            draws = iter(uniform(ids.to(images.device), self._epoch_keys(epoch, images.device)))
            for step in self._steps:
                images = step(images, *islice(draws, len(step.draws)))
        return self.normalize(images)

    def _epoch_keys(self, epoch: int, device: torch.device) -> Tensor:
        if self._keys is None or self._keys[0] != (epoch, device):
            self._keys = (epoch, device), draw_keys(self.seed, epoch, self._salts).to(device)
        return self._keys[1]

    @property
    def changes_images(self) -> bool:
        """True where there is an augmentation besides normalization."""
        return bool(self._steps)


_TRIES = 10  # rectangles drawn until one fits, as in torchvision
_LEVELS = 1024  # of the ratio


class RandomErasing:
    """Fills a rectangle with the data's mean, with probability p (Zhong et al. 2020, arXiv:1708.04896, algorithm 1).

    Its area is uniform in `scale` times the image's, its ratio of height to width log-uniform in `ratio`. The first of
    ten such rectangles that fits into the image is placed uniformly. An image into which none fits is not changed.
    """

    draws = ("erase", *(f"{name}{attempt}" for attempt in range(_TRIES) for name in ("area", "ratio")), "top", "left")

    def __init__(self, settings: Any, mean: Sequence[float]) -> None:
        self.p: float = settings.p
        self.scale: tuple[float, float] = settings.scale
        # From a table: the last bit of an exponential may depend on the sample's index in the batch.
        low, high = np.log(settings.ratio)
        levels = np.exp(low + (high - low) * (np.arange(_LEVELS) + 0.5) / _LEVELS)
        self._roots = torch.from_numpy(np.sqrt(levels).astype(np.float32))
        self._fill = torch.tensor([255.0 * each for each in mean], dtype=torch.float32).view(-1, 1, 1)

    def __call__(self, images: Tensor, *draws: Tensor) -> Tensor:
        batch, _, height, width = images.shape
        erase, *rest, top, left = draws
        areas, ratios = torch.stack(rest[0::2]), torch.stack(rest[1::2])
        least, most = self.scale
        sides = ((areas * (most - least) + least) * (height * width)).sqrt()
        roots = self._roots.to(images.device)[(ratios * _LEVELS).long()]
        heights, widths = (sides * roots).round().long(), (sides / roots).round().long()
        fits = (heights < height) & (widths < width)
        first = fits.long().argmax(0, keepdim=True)
        chosen = (erase < self.p) & fits.any(0)
        tall, wide = heights.gather(0, first)[0], widths.gather(0, first)[0]
        rows = _inside(tall, top, height)
        columns = _inside(wide, left, width)
        hole = (chosen.view(batch, 1, 1) & rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)
        return torch.where(hole, self._fill.to(images.device), images.to(torch.float32))


def _inside(length: Tensor, draw: Tensor, size: int) -> Tensor:
    """Marks the pixels of an interval of `length` [B] in range(size), placed by `draw` in [0, 1): bool [B, size]."""
    # In double the product cannot round up to the number of places.
    start = (draw.double() * (size - length + 1)).long().unsqueeze(1)
    place = torch.arange(size, device=length.device)
    return (place >= start) & (place < start + length.unsqueeze(1))
