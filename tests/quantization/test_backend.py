"""A backend of a third party that lacks a method, or prepares something else, is refused in words."""

from __future__ import annotations

from typing import Any

import pytest

from dist_train import registry
from dist_train.config.stages import QATConfig
from dist_train.errors import EXIT_CONFIG, QuantizationError
from dist_train.quantization.backend import build_backend


class HalfDone:
    def check(self, *_: Any) -> None: ...

    def prepare(self, *_: Any) -> None: ...


def test_a_backend_that_lacks_methods_is_refused_with_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.quantization_backends._entries, "half_done", registry.Entry(HalfDone))
    with pytest.raises(QuantizationError, match="half_done has no method convert and no serialize") as error:
        build_backend(QATConfig(backend="half_done"))
    assert error.value.exit_code == EXIT_CONFIG and "check, prepare, convert, serialize" in error.value.hint
