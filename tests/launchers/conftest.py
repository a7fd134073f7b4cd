"""The Slurm of the tests in this folder, started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm import Cluster, why_not


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with Cluster() as running:
        yield running
    assert running.processes() == {}, "a process is left behind"
