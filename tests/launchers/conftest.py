"""The Slurm of the tests in this folder, started once; and two machines for each test that wants them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import network_namespaces as namespaces
from tests.support import slurm_cluster as slurm
from tests.support.network_namespaces import TwoMachines
from tests.support.slurm_cluster import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    reason = slurm.why_not()
    if reason is not None:
        pytest.skip(reason)
    with Cluster() as running:
        yield running
    assert running.processes() == {}, "a process is left behind"


@pytest.fixture
def machines() -> Iterator[TwoMachines]:
    reason = namespaces.why_not()
    if reason is not None:
        pytest.skip(reason)
    with TwoMachines() as joined:
        yield joined
    assert joined.left_behind() == []
