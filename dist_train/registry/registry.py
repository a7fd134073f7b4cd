"""Registries: names to "module:attr" strings, which are imported only when used, so that names need no torch."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, TypeVar

from dist_train.errors import SetupError, did_you_mean

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """An entry of a registry.

    Attributes:
        target: the registered object, or "module:attr" for one that is imported when first used.
        settings: for a stage, the pydantic model of its section of the config, or "module:attr".
        requires: importable modules that it needs, with the pip requirement that brings each.
        weights: for a model with trained weights by name, a function of (model name, weights name) or "module:attr"; it
            checks the names and returns a function that fetches the state_dict.
        extra: the extra of dist-train that brings all that it needs, where there is one.
    """

    target: Any
    settings: Any = None
    requires: dict[str, str] = field(default_factory=dict)
    weights: Any = None
    extra: str = ""

    def missing(self) -> list[str]:
        """Returns the pip requirements that are not installed. Imports nothing."""
        return [pip for module, pip in self.requires.items() if importlib.util.find_spec(module) is None]

    def to_install(self) -> str:
        """Returns the command that installs what is missing."""
        packages = f"'dist-train[{self.extra}]'" if self.extra else " ".join(self.missing())
        return f"pip install {packages}"


class Registry:
    """Names of one kind (models, datasets, ...): built in, from entry points, and from modules given by `--import`."""

    def __init__(
        self, kind: str, group: str, builtin: dict[str, Entry], prefixes: dict[str, Entry] | None = None
    ) -> None:
        """Takes built-in entries, and `prefixes` of names that another library knows ("timm/"); entries come first."""
        self.kind = kind
        self._group = group
        self._entries = dict(builtin)
        self._prefixes = prefixes or {}
        self._entry_points_read = False

    def _read_entry_points(self) -> None:
        if not self._entry_points_read:
            self._entry_points_read = True
            for point in entry_points(group=self._group):
                self._entries.setdefault(point.name, Entry(point.value))

    def register(self, name: str, *, settings: Any = None) -> Callable[[T], T]:
        """Returns a decorator that registers a function or class under `name`.

        Raises:
            SetupError: the name is taken by another object.
        """

        def decorate(target: T) -> T:
            self._read_entry_points()
            taken = self._entries.get(name)
            if taken is not None and not _same_place(taken.target, target):
                raise SetupError(
                    f"the {self.kind} name {name!r} is taken",
                    f"register it under another name: @register_{self.kind}(...)",
                )
            self._entries[name] = Entry(target, settings)
            return target

        return decorate

    def names(self) -> list[str]:
        self._read_entry_points()
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        self._read_entry_points()
        return name in self._entries or self._prefix(name) is not None

    def _prefix(self, name: str) -> Entry | None:
        matches = (entry for prefix, entry in self._prefixes.items() if name.startswith(prefix) and name != prefix)
        return next(matches, None)

    def entry(self, name: str) -> Entry:
        self._read_entry_points()
        found = self._entries.get(name) or self._prefix(name)
        if found is None:
            raise SetupError(f"unknown {self.kind} {name!r}", self.suggestion(name))
        return found

    def suggestion(self, name: str, also: Sequence[str] = ()) -> str:
        """Returns the hint for an unknown name: the nearest names, else the first ones and how to register one.

        `also` are names that are valid beside the registered ones.
        """
        some = [*also, *self.names()]
        guess = did_you_mean(name, some, count=3)
        if guess:
            return guess
        shown = ", ".join(some[:12]) + (f", ... ({len(some)} in all)" if len(some) > 12 else "")
        return f"one of: {shown}; or bring your own with --import MODULE and @dist_train.register_{self.kind}"

    def get(self, name: str) -> Any:
        """Returns the registered object, imported if need be.

        Raises:
            SetupError: the name is unknown, or a package that it needs is not installed.
        """
        entry = self.entry(name)
        missing = entry.missing()
        if missing:
            raise SetupError(f"the {self.kind} {name!r} needs {', '.join(missing)}", entry.to_install())
        return resolve(entry.target)

    def settings(self, name: str) -> Any:
        """Returns the pydantic model of the settings of `name`, or None."""
        if self.entry(name).settings is None and isinstance(self.entry(name).target, str):
            # An entry point names only the object: importing it may register it again, with its settings' model.
            thing = resolve(self.entry(name).target)
            if self.entry(name).settings is None:
                return getattr(thing, "settings_model", None)
        settings = self.entry(name).settings
        return None if settings is None else resolve(settings)


def resolve(target: Any) -> Any:
    """Imports "module:attr"; returns anything else as it is."""
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _same_place(known: Any, new: Any) -> bool:
    """Tells whether both are one object: a module imported twice (as __main__ and by name) registers it twice."""
    if isinstance(known, str):
        known_place = known.partition(":")[::2]
        return known_place == (new.__module__, new.__qualname__)
    return bool(known.__qualname__ == new.__qualname__)
