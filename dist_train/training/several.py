"""Several of torch's optimizers as one, for groups of parameters with optimizers of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class Several(torch.optim.Optimizer):
    """Steps optimizers of disjoint parameters, one after the other; groups and state are one list and one dict.

    So schedules, checkpoints and gradient scaling see one optimizer. Its defaults are those of the first.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        groups = [group for part in parts for group in part.param_groups]
        super().__init__([{"params": group["params"]} for group in groups], parts[0].defaults)
        self.param_groups = groups
        self._parts = list(parts)
        self._counts = [len(part.param_groups) for part in parts]

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Steps each. `closure` is refused: no optimizer here takes one."""
        assert closure is None
        start = 0
        for part, count in zip(self._parts, self._counts, strict=True):
            # Again in each step, as load_state_dict replaces both.
            part.param_groups, part.state = self.param_groups[start : start + count], self.state
            part.step()
            start += count
