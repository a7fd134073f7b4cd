"""Tests strategy dp: buffers merge the rows of all replicas; on CPUs with torch's replicas, on GPUs as it is."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.data.items import item_of
from dist_train.data.stack import Stack
from dist_train.distributed.world import World
from dist_train.errors import SetupError
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.pt2e.backend import PT2EBackend
from dist_train.quantization.ranges import Ranges
from dist_train.strategies.data_parallel import DP, Replicated
from dist_train.strategies.single import Single
from dist_train.training.loop import fit
from dist_train.trees import call, map_leaves, named_leaves, plain, rows_of, take
from tests.support.tiny_nets import TinyNet, calibrate
from tests.support.training_loops import flat, make, normed
from tests.support.tree_parts import Bag, Pair, Pairs, Texts


class OnCPU(Replicated):
    """An nn.DataParallel with `count` CPU replicas instead of GPUs, by torch's `_replicate_for_data_parallel`."""

    def __init__(self, module: nn.Module, count: int) -> None:
        super().__init__(module)
        self.device_ids, self.output_device = list(range(count)), 0
        self.src_device_obj, self.dim = torch.device("cpu"), 0

    def scatter(self, inputs: tuple[Any, ...], kwargs: Any, device_ids: Sequence[Any]) -> Any:
        places = torch.arange(rows_of(inputs or kwargs)).chunk(len(device_ids))
        return [take(inputs, rows) for rows in places], [take(kwargs, rows) for rows in places]

    def replicate(self, module: nn.Module, device_ids: Sequence[Any]) -> list[nn.Module]:
        return [_replica(module, first=number == 0) for number in range(len(device_ids))]

    def gather(self, outputs: Any, output_device: Any) -> Any:
        return map_leaves(lambda *parts: torch.cat(parts), *outputs)


def _replica(module: nn.Module, first: bool) -> nn.Module:
    """Makes a replica as torch's `replicate` does.

    Its parameters are plain attributes, and its buffers are clones except on the first device.
    """
    replica: nn.Module = module._replicate_for_data_parallel()
    for name, parameter in module.named_parameters(recurse=False):
        setattr(replica, name, parameter * 1)
    for name, buffer in module.named_buffers(recurse=False):
        replica._buffers[name] = buffer if first else buffer.clone()
    for name, child in module.named_children():
        replica._modules[name] = _replica(child, first)
    return replica


@pytest.fixture
def apply_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the replicas one after the other; torch's parallel_apply needs a GPU's stream."""

    def in_turn(replicas: Sequence[nn.Module], inputs: Any, kwargs: Any, devices: Any) -> list[Any]:
        return [replica(*given, **named) for replica, given, named in zip(replicas, inputs, kwargs, strict=True)]

    monkeypatch.setattr(importlib.import_module("torch.nn.parallel.data_parallel"), "parallel_apply", in_turn)


class Centre(nn.Module):
    """Subtracts a mean that it learns from its rows, from step `first` on."""

    centre: torch.Tensor
    steps: torch.Tensor

    def __init__(self, first: int = 0) -> None:
        super().__init__()
        self.register_buffer("centre", torch.tensor(0.0))
        self.register_buffer("steps", torch.tensor(0))
        self._first = first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            if self.steps >= self._first:
                self.centre.lerp_(x.detach().mean(), 0.1)
            self.steps.add_(1)
        return x - self.centre


class CPUDP(DP):
    def wrap(self, model: nn.Module) -> nn.Module:
        self._replicated = OnCPU(model, 2)
        return self._replicated


def prepared_net() -> PreparedModel:
    torch.manual_seed(3)
    net = TinyNet().train()
    return calibrate(PT2EBackend().prepare(net, torch.zeros(2, 3, 8, 8)), torch.rand(4, 3, 8, 8))


def step(model: nn.Module, images: torch.Tensor, replicas: int) -> torch.Tensor:
    """Runs forward and backward as the strategy does."""
    strategy = DP(World(), "fp32")
    strategy._replicated = OnCPU(model, replicas)
    outputs: torch.Tensor = strategy._replicated(images)
    strategy.backward(outputs.square().mean())
    return outputs.detach()


@pytest.mark.heavy
@pytest.mark.usefixtures("apply_in_turn")
def test_ranges_under_dp_are_those_of_all_replicas_rows_and_not_the_first_gpus() -> None:
    torch.manual_seed(0)
    images = torch.rand(6, 3, 8, 8)
    images[4:] *= 10  # only the last replica sees these rows
    whole = prepared_net()
    whole.freeze_batch_norm()  # batch statistics would make the activations differ
    split, first = copy.deepcopy(whole), copy.deepcopy(whole)
    expected = whole(images)
    outputs = step(split, images, replicas=3)
    first(images[:2])
    assert torch.allclose(outputs, expected, atol=1e-6)
    observed = Ranges(split).observed()
    assert torch.isfinite(observed).all()
    assert torch.allclose(observed, Ranges(whole).observed(), atol=1e-6)
    assert float(observed.max()) > 5 * float(Ranges(first).observed().max())


@pytest.mark.usefixtures("apply_in_turn")
def test_batch_norm_under_dp_is_averaged_over_replicas_by_their_rows() -> None:
    model = normed().train()
    images = torch.rand(5, 1, 4, 4)
    images[3:] += 4
    before = copy.deepcopy(model.state_dict())
    step(model, images, replicas=2)
    alone = []
    for rows in (images[:3], images[3:]):
        one = normed().train()
        one.load_state_dict(before)
        one(rows)
        alone.append(one.get_buffer("1.running_mean"))
    mean = model.get_buffer("1.running_mean")
    assert torch.allclose(mean, alone[0] * 0.6 + alone[1] * 0.4, atol=1e-6)
    assert float((mean - alone[0]).abs().max()) > 0.01, "not the first replica's"
    assert int(model.get_buffer("1.num_batches_tracked")) == 1


@pytest.mark.usefixtures("apply_in_turn")
def test_statistics_that_stand_still_are_not_rounded() -> None:
    model = normed().eval()
    with torch.no_grad():
        model.get_buffer("1.running_mean").copy_(torch.tensor([0.1, 1 / 3, -2 / 7]))
    before = model.get_buffer("1.running_mean").clone()
    for _ in range(5):
        step(model, torch.rand(7, 1, 4, 4), replicas=3)
    assert torch.equal(model.get_buffer("1.running_mean"), before)


@pytest.mark.usefixtures("apply_in_turn")
@pytest.mark.parametrize("first", [0, 3])
def test_a_buffer_that_follows_each_replicas_own_data_is_refused_by_name(first: int) -> None:
    model = nn.Sequential(Centre(first), nn.Flatten(), nn.Linear(16, 4)).train()
    made = make(World(), model, strategy_class=CPUDP, checkpoint_every=2)
    with pytest.raises(SetupError, match=r"the buffer 0\.centre differs between the GPUs"):
        fit(made.run, None)
    assert made.memory.saved == ([2] if first else [])


@dataclass
class Scores:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]
    loss: torch.Tensor | None = None


class OfDataclass(Bag):
    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        return Scores(super().forward(ids, mask)["logits"], (ids * 2, mask))


@pytest.mark.usefixtures("apply_in_turn")
@pytest.mark.parametrize("kind", [Bag, OfDataclass, Pair])
def test_trees_under_dp_are_cut_and_joined_by_leaf(kind: type[nn.Module]) -> None:
    dataset: Any = Pairs(7) if kind is Pair else Texts(7)
    inputs = Stack("data")([item_of(index, dataset[index], dataset) for index in range(7)])[0].inputs
    whole = kind()
    split = copy.deepcopy(whole)
    expected = plain(call(whole, inputs))
    strategy = DP(World(), "fp32")
    strategy._replicated = OnCPU(split, 3)
    outputs = call(strategy._replicated, inputs)
    pairs = list(zip(named_leaves(expected), named_leaves(outputs), strict=True))
    assert all(one[0] == other[0] and torch.allclose(one[1], other[1]) for one, other in pairs)
    for run, found in ((strategy.backward, outputs), (torch.Tensor.backward, expected)):
        scores = found if isinstance(found, torch.Tensor) else found["logits"]
        run(scores.square().mean())
    for mine, theirs in zip(split.parameters(), whole.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None and torch.allclose(mine.grad, theirs.grad)


@pytest.mark.usefixtures("apply_in_turn")
def test_training_under_dp_is_that_of_one_process_on_every_tail() -> None:
    """37 rows in batches of 10, micro-batches of 4: the tails leave replicas with one row."""
    weights = []
    for strategy in (Single, CPUDP):
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
        torch.manual_seed(1)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        fit(make(World(), model, micro=4, strategy_class=strategy).run, None)
        weights.append(flat(model))
    assert weights[1] == pytest.approx(weights[0], abs=1e-5)


class Spare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.old = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(x.flatten(1))
        return outputs


class Broadcast(torch.autograd.Function):
    """Copies all parameters at once, as torch's does: backward gives zeros for those that nothing used."""

    @staticmethod
    def forward(ctx: Any, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(parameter.clone() for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradients


class BroadcastingDP(DP):
    def __init__(self, world: World, precision: Any) -> None:
        super().__init__(world, precision)
        self.find_unused_parameters = True

    def wrap(self, model: nn.Module) -> nn.Module:
        class Broadcasting(OnCPU):
            def replicate(self, module: nn.Module, device_ids: Sequence[int]) -> list[nn.Module]:
                replicas = super().replicate(module, device_ids)
                names, parameters = zip(*module.named_parameters(), strict=True)
                for replica in replicas:
                    for name, copied in zip(names, Broadcast.apply(*parameters), strict=True):
                        layer, _, attribute = name.rpartition(".")
                        setattr(replica.get_submodule(layer), attribute, copied)
                return replicas

        self._replicated = Broadcasting(model, 2)
        self._replicated.notes_gradients = self.find_unused_parameters
        return self._replicated


@pytest.mark.usefixtures("apply_in_turn")
def test_what_no_replica_uses_keeps_its_values_under_decay() -> None:
    optim = {"lr": 0.1, "weight_decay": 0.1, "decay_norm_and_bias": True}
    weights = []
    for strategy in (Single, BroadcastingDP):
        torch.manual_seed(1)
        model = Spare()
        fit(make(World(), model, micro=4, strategy_class=strategy, config={"optim": optim}).run, None)
        weights.append(flat(model))
    assert weights[1] == pytest.approx(weights[0], abs=1e-5)


@pytest.mark.gpu
def test_dp_on_gpus_trains_as_one_gpu_does_and_keeps_the_ranges_of_all() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("only on a machine with two CUDA devices")
    world = World(device=torch.device("cuda", 0))
    torch.manual_seed(0)
    images = torch.rand(8, 3, 8, 8, device="cuda:0")
    images[4:] *= 10
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for strategy in (Single(world, "fp32"), DP(world, "fp32")):
        model = prepared_net().to("cuda:0").train()
        model.freeze_batch_norm()
        outputs = strategy.wrap(model)(images)
        strategy.backward(outputs.square().mean())
        gradients = [each.grad.flatten() for each in model.parameters() if each.grad is not None]
        found.append((torch.cat(gradients), Ranges(model).observed()))
    (gradient, observed), (dp_gradient, dp_observed) = found
    assert torch.allclose(dp_gradient, gradient, rtol=1e-3, atol=1e-5)
    assert torch.allclose(dp_observed, observed, rtol=1e-5)
