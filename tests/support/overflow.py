"""Marks tests of int8 models with activations of 255 steps, which runtimes of CPUs without VNNI compute otherwise."""

from __future__ import annotations

import pytest

from dist_train.cluster.instructions import WITHOUT_VNNI, sums_overflow

needs_vnni = pytest.mark.xfail(sums_overflow(), reason=WITHOUT_VNNI, strict=False)
