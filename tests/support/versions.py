"""A mark for tests that need pt2e, which refuses versions of torch and torchao that it was not tested with."""

from __future__ import annotations

import pytest

from dist_train.errors import BackendVersionError
from dist_train.quantization.versions import check_versions


def _refusal() -> str:
    try:
        check_versions()
    except BackendVersionError as error:
        return error.message
    return ""


NEEDS_PT2E = pytest.mark.skipif(bool(_refusal()), reason=_refusal())
