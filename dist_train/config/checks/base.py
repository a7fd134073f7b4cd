"""The form of a check of the configuration, with the settings that it depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from dist_train.config.tree import Config
from dist_train.errors import Problem

Check = Callable[[Config, Mapping[str, str]], Iterable[Problem]]
Checks = list[tuple[tuple[str, ...], Check]]


def about(checks: Checks, *keys: str) -> Callable[[Check], Check]:
    """Returns a decorator that adds a check to `checks`, with the dotted keys of the settings that it depends on."""

    def add(check: Check) -> Check:
        checks.append((keys, check))
        return check

    return add


def ignored(section: str, settings: Any, names: Iterable[str], chosen_by: str = "name") -> Iterator[Problem]:
    """Yields each changed setting that the chosen name does not use. Dumped configs give all defaults: these pass."""
    for name in names:
        if getattr(settings, name) != type(settings).model_fields[name].default:
            key, hint = f"{section}.{name}", f"remove it, or choose another {section}.{chosen_by}"
            yield Problem(key, f"is ignored by {getattr(settings, chosen_by)!r}", hint=hint)
