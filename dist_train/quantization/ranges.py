"""Ranges of a prepared model's activations: observation in a step, update between steps, and digest."""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor, nn

from dist_train.errors import QuantizationError
from dist_train.quantization.fake_quantize import ActivationFakeQuantize, affine_parameters, symmetric_parameters


class Ranges:
    """All activation ranges of `model`, in the order of its modules, as one tensor.

    In a step, after forward and backward of every micro-batch: `merged = ranges.observed()`, one MAX all-reduce of
    `merged`, then `ranges.update(merged, averaging)`. All ranks then have bitwise equal ranges.

    Args:
        observer: as `qat.observer`: "moving_average", or "min_max" for the smallest and largest value of all steps.
    """

    def __init__(self, model: nn.Module, observer: Literal["moving_average", "min_max"] = "moving_average") -> None:
        self._observer = observer
        named = [(name, module) for name, module in model.named_modules() if isinstance(module, ActivationFakeQuantize)]
        self.names = [name for name, _ in named]
        self.modules = [module for _, module in named]
        self.frozen = False
        self._grids: tuple[Tensor, Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.modules)

    def observed(self) -> Tensor:
        """Returns this step's ranges, float32 [2 * len(self)]: -low of each module, then high; -inf for unseen modules.

        With low negated, ranks are merged by one elementwise maximum.
        """
        lows, highs = self._stacked("step_low"), self._stacked("step_high")
        return torch.cat([-lows, highs])

    @torch.no_grad()
    def update(self, merged: Tensor, averaging: float) -> None:
        """Updates the ranges by those of a step, recomputes scales and zero points, and forgets the step.

        A module's first range is taken unchanged. Later ones move it by `averaging` of the difference (an exponential
        moving average), or only widen it for the observer "min_max". A range that was not seen, or is not finite,
        changes nothing.

        Args:
            merged: from `observed()`, after the MAX over ranks.
            averaging: in (0, 1]; of no effect for "min_max".
        """
        if not self.modules:
            return
        step_low, step_high = (-merged[: len(self)], merged[len(self) :])
        seen = torch.isfinite(step_low) & torch.isfinite(step_high)
        initialized = self._stacked("initialized")
        low, high = self._stacked("low"), self._stacked("high")
        # Unseen ranges are infinite. They are replaced before the arithmetic, as 0 * inf is NaN.
        step_low, step_high = torch.where(seen, step_low, low), torch.where(seen, step_high, high)
        if self._observer == "min_max":
            low = torch.where(initialized, torch.minimum(low, step_low), step_low)
            high = torch.where(initialized, torch.maximum(high, step_high), step_high)
        else:
            weight = torch.where(initialized, averaging, 1.0).to(step_low.dtype)
            low, high = torch.lerp(low, step_low, weight), torch.lerp(high, step_high, weight)
        self._put(low, high, initialized | seen)
        self.drop()

    @torch.no_grad()
    def assign(self, low: Tensor, high: Tensor) -> None:
        """Sets every range, float32 [len(self)] each, for instance to the result of a range search."""
        self._put(low, high, torch.ones_like(low, dtype=torch.bool))

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Returns the low and the high ends, float32 [len(self)] each."""
        return self._stacked("low"), self._stacked("high")

    def _put(self, low: Tensor, high: Tensor, initialized: Tensor) -> None:
        if not all(module.calibrated for module in self.modules):  # reads the device only until all are
            for module, known in zip(self.modules, initialized.tolist(), strict=True):
                module.calibrated = known
        scale, zero_point = self._quantization_parameters(low, high)
        updated = {"low": low, "high": high, "scale": scale, "zero_point": zero_point, "initialized": initialized}
        for name, values in updated.items():
            torch._foreach_copy_([getattr(module, name) for module in self.modules], list(values.unbind()))

    def simulate(self, values: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Quantizes and dequantizes values, float32 [len(self), N], with ranges for each module, [len(self)] each."""
        quant_min, quant_max, _ = (grid[:, None] for grid in self._grids_on(values.device))
        scale, zero_point = (each[:, None] for each in self._quantization_parameters(low, high))
        q = torch.clamp(torch.round(values / scale) + zero_point, quant_min, quant_max)
        return (q - zero_point) * scale

    def _quantization_parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the modules' scales and zero points for these ranges, [len(self)] each."""
        quant_min, quant_max, symmetric = self._grids_on(low.device)
        affine = affine_parameters(low, high, quant_min, quant_max)
        mirrored = symmetric_parameters(low, high, quant_min, quant_max)
        return torch.where(symmetric, mirrored[0], affine[0]), torch.where(symmetric, mirrored[1], affine[1])

    def drop(self) -> None:
        """Forgets this step's ranges: of a filler rank's copied rows, a skipped step, or a forward that was a trial."""
        if self.modules:
            for name, value in (("step_low", float("inf")), ("step_high", float("-inf"))):
                tensors = [getattr(module, name) for module in self.modules]
                torch._foreach_copy_(tensors, [torch.full_like(tensor, value) for tensor in tensors])

    def freeze(self) -> None:
        """Stops observing for good: `update` changes nothing from now on."""
        self.frozen = True
        for module in self.modules:
            module.observing = False
        self.drop()

    def unknown(self) -> list[str]:
        """Returns the names of the modules that have no range yet."""
        return [name for name, module in zip(self.names, self.modules, strict=True) if not module.calibrated]

    def require_known(self) -> None:
        """Raises QuantizationError for activations without a range, by name."""
        unknown = self.unknown()
        if unknown:
            names = ", ".join(unknown[:5]) + (" ..." if len(unknown) > 5 else "")
            raise QuantizationError(
                f"{len(unknown)} of {len(self)} activations have no range: {names}",
                "calibrate on data before training or converting: put ptq before qat and convert in `stages`",
            )

    def digest(self) -> str:
        """Returns the SHA-256, in hex, of all ranges' names and bytes. It is equal on all ranks, and after a resume."""
        digest = hashlib.sha256()
        values = torch.stack(
            [self._stacked(name).float() for name in ("low", "high", "scale", "zero_point", "initialized")]
        )
        digest.update("\n".join(self.names).encode())
        digest.update(values.cpu().numpy().astype("<f4").tobytes())
        return digest.hexdigest()

    def _stacked(self, name: str) -> Tensor:
        return torch.stack([getattr(module, name) for module in self.modules]) if self.modules else torch.empty(0)

    def _grids_on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the integers of the ranges' low and high ends, float32, and whether modules are symmetric, bool.

        [len(self)] each; copied to the device once.
        """
        if self._grids is None or self._grids[0].device != device:
            low = torch.tensor([float(module.quant_min) for module in self.modules], device=device)
            high = torch.tensor([float(module.range_max) for module in self.modules], device=device)
            symmetric = torch.tensor([module.symmetric for module in self.modules], device=device)
            self._grids = low, high, symmetric
        return self._grids
