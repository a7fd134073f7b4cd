"""One prepared network for the session: preparing takes seconds, copying it nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from dist_train.errors import BackendVersionError
from dist_train.quantization.pt2e.prepared_graph import PreparedGraph
from tests.support.tiny_nets import TinyNet, draw_statistics


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def _float_and_prepared() -> tuple[nn.Module, PreparedGraph]:
    try:
        from dist_train.quantization.pt2e.backend import PT2EBackend
    except BackendVersionError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    model = draw_statistics(TinyNet()).eval()
    return model, PT2EBackend().prepare(model, torch.zeros(1, 3, 16, 16))


@pytest.fixture
def tiny(_float_and_prepared: tuple[nn.Module, PreparedGraph]) -> nn.Module:
    """A TinyNet in evaluation mode, with drawn statistics."""
    return copy.deepcopy(_float_and_prepared[0])


@pytest.fixture
def prepared(_float_and_prepared: tuple[nn.Module, PreparedGraph]) -> PreparedGraph:
    """`tiny`, prepared but without ranges; in evaluation mode."""
    return copy.deepcopy(_float_and_prepared[1])


@pytest.fixture
def make_tiny() -> Callable[[], nn.Module]:
    return lambda: draw_statistics(TinyNet()).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
