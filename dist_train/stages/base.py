"""The interface of a stage."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any

from dist_train.stages.context import Context


class Stage(ABC):
    """One step of a run. A third party's stage is registered by `@dist_train.register_stage(name, settings=Model)`."""

    def __init__(self, name: str, settings: Any) -> None:
        self.name = name
        self.settings = settings

    @abstractmethod
    def run(self, context: Context) -> dict[str, Any]:
        """Does the work on all ranks, continuing from `context.resume` where it is set; updates `context.results`.

        Returns:
            the product, of tensors, numbers, strings, bytes, lists and dicts. Later stages find it in `context.products`
            under the stage's name.
        """

    @abstractmethod
    def restore(self, context: Context, product: dict[str, Any]) -> None:
        """Loads the product into the models that stages share: after `run`, and when a run is resumed behind this stage."""


class Stopwatch:
    """Measures seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self._start, 3)
