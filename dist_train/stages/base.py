"""Defines the interface of a stage."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any

from dist_train.stages.context import Context


class Stage(ABC):
    """One step of a run. Register your own by `@dist_train.register_stage(name, settings=Model)`."""

    def __init__(self, name: str, settings: Any) -> None:
        self.name = name
        self.settings = settings

    @abstractmethod
    def run(self, context: Context) -> dict[str, Any]:
        """Runs the stage on all ranks and updates `context.results`. Continues from `context.resume` if that is set.

        Returns:
            the product: tensors, numbers, strings, bytes, lists and dicts. Later stages find it in `context.products`
                under the stage's name.
        """

    @abstractmethod
    def restore(self, context: Context, product: dict[str, Any]) -> None:
        """Loads the product into the models that stages share, after `run` or when a run resumes after this stage."""


class Stopwatch:
    """Measures the seconds since its creation."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self._start, 3)
