"""Batch norms that synchronise, in one process; and the moments of a batch, of modules and of prepared models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dist_train.distributed.world import World
from dist_train.errors import SetupError
from dist_train.models.batch_norm import (
    SyncBatchNorm,
    batch_moments,
    running_statistics,
    synchronised,
    synchronised_batch_norms,
)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, momentum=0.3),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.BatchNorm1d(16, affine=False),
    )


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3), (5, 4, 3, 2), (2, 4, 3, 2, 2)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_one_process_it_is_a_plain_batch_norm_on_the_real_rows(
    shape: tuple[int, ...], affine: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    plain = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](4, affine=affine)
    if affine:
        nn.init.normal_(plain.weight), nn.init.normal_(plain.bias)
    ours = SyncBatchNorm.of(copy.deepcopy(plain))
    # A mean far from 0 beside its deviation: a difference of squares in float32 would be off by a tenth.
    x = (torch.randn(shape) + 300 * (dtype == torch.float32)).to(dtype)
    filler = torch.full((2, *shape[1:]), 1e6, dtype=dtype)
    ins = [x.clone().requires_grad_() for _ in range(2)]
    expected = plain(ins[0])
    with synchronised(World(), len(x)):
        found = ours(torch.cat([ins[1], filler]))[: len(x)]
    assert found.dtype == expected.dtype
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(found, expected, **tolerance)
    weights = torch.randn(shape)
    for outputs in (expected, found):
        (outputs.float() * weights).sum().backward()
    torch.testing.assert_close(ins[1].grad, ins[0].grad, **tolerance)
    for (name, value), other in zip(plain.state_dict().items(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(other, value, **tolerance, msg=name)
    for (name, parameter), other in zip(plain.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, **tolerance, msg=name)


def test_where_no_rank_has_a_row_nothing_is_learned_and_gradients_are_finite() -> None:
    norm = SyncBatchNorm.of(nn.BatchNorm1d(3))
    inputs = torch.randn(2, 3, requires_grad=True)
    with synchronised(World(), 0):
        (norm(inputs) * 0).sum().backward()
    assert norm.running_mean is not None and norm.running_var is not None and inputs.grad is not None
    assert norm.running_mean.tolist() == [0, 0, 0] and norm.running_var.tolist() == [1, 1, 1]
    assert inputs.grad.eq(0).all() and all(
        each.grad is not None and each.grad.eq(0).all() for each in norm.parameters()
    )


def test_a_model_has_synchronised_norms_on_its_own_tensors_for_a_while() -> None:
    model = net()
    kinds, state = [type(each) for each in model], model.state_dict(keep_vars=True)
    norm = model[1]
    with synchronised_batch_norms(model, World()):
        assert [type(each) for each in model] == [nn.Conv2d, SyncBatchNorm, nn.Dropout, nn.Flatten, SyncBatchNorm]
        assert all(value is state[name] for name, value in model.state_dict(keep_vars=True).items())
        assert model.state_dict().keys() == state.keys()
        copied = copy.deepcopy(model)  # as the moving average is
        model.eval()
    assert [type(each) for each in model] == kinds and model[1] is norm and not norm.training
    inputs = torch.randn(6, 3, 4, 4)
    assert torch.equal(copied.eval()(inputs), model(inputs)), "outside the loop's forward it is a plain one"


def test_a_norm_with_a_forward_of_its_own_is_refused_by_name() -> None:
    class Activated(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.Conv2d(1, 2, 3), Activated(2))
    with (
        pytest.raises(SetupError, match=r"1 is a Activated, which sync_batchnorm cannot replace.*\n.*nn.BatchNorm1d"),
        synchronised_batch_norms(model, World()),
    ):
        raise AssertionError("not reached")


def test_a_forward_leaves_its_batchs_moments_and_nothing_else() -> None:
    model = net().train()
    model[4].eval()
    inputs = torch.randn(8, 3, 4, 4) + 2
    with torch.no_grad(), batch_moments(model):
        first = model(inputs)
        assert torch.equal(model(inputs), first), "dropout is off"
        convolved = model[0](inputs)
    found = running_statistics(model)
    torch.testing.assert_close(found[0], convolved.mean((0, 2, 3)))
    torch.testing.assert_close(found[1], convolved.transpose(0, 1).flatten(1).var(1))
    assert [each.training for each in model] == [True, True, True, True, False] and model[1].momentum == 0.3
    assert int(model[1].num_batches_tracked) == 0
