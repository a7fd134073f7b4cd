"""A machine without a C++ compiler, for one test."""

from __future__ import annotations

import pytest


def hide_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets CXX to a command that does not exist, for the rest of the test."""
    # inductor reads CXX once, when it is imported: imported now, it would keep this one for the tests that follow.
    import torch._inductor.config  # noqa: F401

    monkeypatch.setenv("CXX", "no-such-compiler")
