"""Models for the lowerings, built once."""

from __future__ import annotations

import pytest

from tests.support.converted_nets import converted_net, float_net, program_of


@pytest.fixture(scope="session")
def float_model():
    return float_net()


@pytest.fixture(scope="session")
def converted(float_model):
    return converted_net(float_model)


@pytest.fixture(scope="session")
def program(converted):
    return program_of(converted)
