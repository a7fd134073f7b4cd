"""Synchronised batch norms on real ranks give the results of one process on the global batch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.config.data import MixConfig
from dist_train.distributed.world import World
from dist_train.models.batch_norm import SyncBatchNorm, synchronised, synchronised_batch_norms
from dist_train.strategies.base import Strategy
from dist_train.training.loop import fit
from tests.support.ranks import call
from tests.support.training_loops import flat, make

SHARES = {2: [(4, 4), (5, 3), (6, 0)], 3: [(3, 3, 2), (4, 0, 3), (1, 5, 2)]}
SIZE, BATCH = 55, 24  # an epoch's last global batch has 7 rows: too few for a micro-batch on each of three ranks
WHOLE = 12  # world x micro-batch


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3, momentum=0.3),
        nn.ReLU(),
        nn.Conv2d(3, 5, 2),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5, 4),
    )


def _layer(world: World, shares: list[int]) -> dict[str, Any]:
    """Outputs and gradients of this rank's rows, and the statistics; a rank without rows has two copies at weight 0."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    rows, weights = torch.randn(sum(shares), 3, 4, 2) * 3 + 10, torch.randn(sum(shares), 3, 4, 2)
    start, own = sum(shares[: world.rank]), shares[world.rank]
    inputs = rows[start : start + own].clone() if own else rows[:2] * 100
    inputs.requires_grad_()
    used = SyncBatchNorm.of(norm) if world.world_size > 1 else norm
    with synchronised(world, own):
        outputs = used(inputs)[:own]
    (outputs * weights[start : start + own]).sum().backward()
    assert inputs.grad is not None and norm.weight.grad is not None and norm.bias.grad is not None
    gradients = torch.stack([norm.weight.grad, norm.bias.grad])
    return {
        "outputs": outputs.flatten().tolist(),
        "of inputs": inputs.grad[:own].flatten().tolist(),
        "of filler": inputs.grad[own:].abs().sum().item(),
        "of weights": world.all_reduce(gradients, "sum").flatten().tolist(),
        "statistics": torch.cat([each.flatten() for each in norm.buffers()]).tolist(),
    }


def _losses(
    world: World, micro: int | None, mixed: bool = False, strategy: type[Strategy] | None = None
) -> dict[str, Any]:
    model = net()
    made = make(
        world,
        model,
        size=SIZE,
        batch=BATCH,
        joint_micro=micro,
        mix=MixConfig(mixup=0.4) if mixed else None,
        config={"clip_grad_norm": 0.5, "ema_decay": 0.8},
        strategy_class=strategy,
    )
    with synchronised_batch_norms(model, world) if world.world_size > 1 else nullcontext():
        fit(made.run, None)
    return {
        "losses": made.recorder.of("loss"),
        "weights": flat(model),
        "statistics": [value for name, each in model.named_buffers() for value in each.flatten().tolist()],
        "metrics": made.recorder.of("eval_loss"),
    }


def everything(world: World) -> dict[str, Any]:
    shares = [SHARES[world.world_size]] if world.world_size > 1 else SHARES.values()
    return {
        **{str(each): _layer(world, each if world.world_size > 1 else [sum(each)]) for some in shares for each in some},
        "whole": _losses(world, None),
        "accumulated": _losses(world, WHOLE // world.world_size),
        "mixed": _losses(world, WHOLE // world.world_size, mixed=True),
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return everything(World())


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return call(request.param, "tests.models.test_sync_batchnorm_integration:everything")


@pytest.mark.slow
def test_a_layer_over_ranks_is_one_on_the_concatenated_rows(alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    for shares in SHARES[len(ranks)]:
        expected, found = alone[str(shares)], [answer[str(shares)] for answer in ranks]
        for name in ("outputs", "of inputs"):
            assert [value for each in found for value in each[name]] == pytest.approx(expected[name], abs=1e-5)
        for each in found:
            assert each["of weights"] == pytest.approx(expected["of weights"], rel=1e-5, abs=1e-5)
            assert each["statistics"] == pytest.approx(expected["statistics"], abs=1e-5)
            assert each["of filler"] == 0
        assert all(each["statistics"] == found[0]["statistics"] for each in found), "to the bit"


@pytest.mark.parametrize("kind", ["whole", "accumulated", "mixed"])
def test_losses_are_those_of_one_process_at_equal_world_times_micro_batch(
    kind: str, alone: dict[str, Any], ranks: list[dict[str, Any]]
) -> None:
    reference = alone[kind]
    assert len(reference["losses"]) == 6
    for answer in ranks:
        for name in ("losses", "weights", "statistics", "metrics"):
            assert answer[kind][name] == pytest.approx(reference[name], rel=1e-5, abs=1e-5), name
        assert answer[kind] == ranks[0][kind], "equal on all ranks to the bit"
    assert alone["accumulated"]["losses"] != pytest.approx(alone["whole"]["losses"], abs=1e-3), "micro-batches matter"


def _unsynchronised(world: World) -> list[float]:
    model = net()
    made = make(world, model, size=SIZE, batch=BATCH, config={"clip_grad_norm": 0.5, "ema_decay": 0.8})
    fit(made.run, None)
    return made.recorder.of("loss")


def _in_other_ways(world: World) -> dict[str, Any]:
    from dist_train.strategies.accelerate import Accelerate

    model = net()
    made = make(world, model, size=SIZE, batch=BATCH, joint_micro=WHOLE // 2, compile=True)
    with synchronised_batch_norms(model, world):
        fit(made.run, None)
    eager = net()
    plain = make(world, eager, size=SIZE, batch=BATCH, joint_micro=WHOLE // 2)
    with synchronised_batch_norms(eager, world):
        fit(plain.run, None)
    return {
        "unsynchronised": _unsynchronised(world),
        "compiled": made.recorder.of("loss"),
        "eager": plain.recorder.of("loss"),
        "accelerate": _losses(world, WHOLE // 2, strategy=Accelerate)["losses"],
    }


@pytest.mark.slow
def test_compiled_and_under_accelerate_they_are_the_same_and_without_them_losses_differ(alone: dict[str, Any]) -> None:
    for found in call(2, "tests.models.test_sync_batchnorm_integration:_in_other_ways"):
        assert found["compiled"] == pytest.approx(found["eager"], abs=1e-4)
        assert found["accelerate"] == pytest.approx(alone["accumulated"]["losses"], rel=1e-4, abs=2e-5)
        assert found["unsynchronised"] != pytest.approx(alone["whole"]["losses"], abs=1e-3)


@pytest.mark.gpu
def test_on_a_gpu_torchs_own_normalises_the_real_rows() -> None:
    model = net().cuda()
    world = World(device=torch.device("cuda", 0))
    with synchronised_batch_norms(model, world):
        assert isinstance(model.get_submodule("1"), nn.SyncBatchNorm)
