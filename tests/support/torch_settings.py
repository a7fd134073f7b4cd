"""Settings of torch that a run changes for its whole process, which other tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_FRESH = (False, False, True)  # deterministic, only warning, filling uninitialized memory


@contextmanager
def own_torch_settings() -> Iterator[None]:
    """Restores threads and determinism after the body. Imports no torch."""
    torch: Any = sys.modules.get("torch")
    threads = None if torch is None else torch.get_num_threads()
    enabled, warn_only, filling = _FRESH if torch is None else _determinism(torch)
    try:
        yield
    finally:
        torch = sys.modules.get("torch")
        if torch is not None and _determinism(torch) != (enabled, warn_only, filling):
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
            torch.utils.deterministic.fill_uninitialized_memory = filling
        if threads is not None and torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def _determinism(torch: Any) -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
