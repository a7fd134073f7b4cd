"""What a check of the configuration is, and the settings that it rests on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from dist_train.config import Config
from dist_train.errors import Problem

Check = Callable[[Config, Mapping[str, str]], Iterable[Problem]]
Checks = list[tuple[tuple[str, ...], Check]]


def about(checks: Checks, *keys: str) -> Callable[[Check], Check]:
    """Adds a check to `checks`, with the dotted keys of the settings that it rests on."""

    def add(check: Check) -> Check:
        checks.append((keys, check))
        return check

    return add
