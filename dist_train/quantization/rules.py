"""Rules of the config: which modules are exempt from quantization."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from typing import Protocol

from dist_train.errors import QuantizationError


class Rule(Protocol):
    """An exception for the modules whose names match (fnmatch: `layer1.*`, `fc`). `skip` leaves them in floating point."""

    @property
    def match(self) -> str: ...

    @property
    def skip(self) -> bool: ...


def skipped_modules(names: Sequence[str], rules: Sequence[Rule]) -> list[str]:
    """The module names, in their order, that a rule leaves in floating point.

    Raises:
        QuantizationError: a rule matches no module, or asks for anything but `skip: true`.
    """
    names = [name for name in names if name]  # the root is not a layer
    skipped: set[str] = set()
    for rule in rules:
        if not rule.skip:
            raise QuantizationError(
                f"the quantization rule {rule.match!r} does nothing", "write skip: true, or remove the rule"
            )
        matched = fnmatch.filter(names, rule.match)
        if not matched:
            near = difflib.get_close_matches(rule.match, names, n=3, cutoff=0.4) or names[:5]
            raise QuantizationError(
                f"the quantization rule {rule.match!r} matches no module",
                f"did you mean {' or '.join(near)}?" if near else "",
            )
        skipped.update(matched)
    return [name for name in names if name in skipped]
