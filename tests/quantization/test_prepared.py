"""A prepared model behaves as a module does: modes, state, copies, compilation."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.ranges import Ranges
from tests.support.tiny_nets import calibrate


def statistics(prepared: PreparedModel) -> list[Tensor]:
    return [value.clone() for name, value in prepared.named_buffers() if "running_" in name]


def unchanged(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_without_fake_quantization_a_training_step_is_that_of_the_float_model(
    tiny: nn.Module, prepared: PreparedModel, images: Tensor
) -> None:
    tiny.train()
    tiny.get_submodule("dropout").eval()  # it is off in the prepared model
    prepared.train()
    prepared.fake_quantize(False)
    for _ in range(3):
        for model in (tiny, prepared):
            model.zero_grad()
            model(images).square().sum().backward()
    for name, value in tiny.named_parameters():
        grad = prepared.get_parameter(name).grad
        assert value.grad is not None and grad is not None
        assert (value.grad - grad).norm() <= 1e-4 * value.grad.norm() + 1e-5, name
    for name in ("bn1", "bn2"):  # momentum 0.01 and 0.3, each kept
        for kind in ("running_mean", "running_var"):
            torch.testing.assert_close(
                prepared.get_buffer(f"{name}.{kind}"), tiny.get_buffer(f"{name}.{kind}"), rtol=1e-4, atol=1e-5
            )


def test_modes_flip_without_a_trace(prepared: PreparedModel, images: Tensor) -> None:
    calibrate(prepared, images).observe(False)
    first = prepared.eval()(images)
    before = statistics(prepared)
    for _ in range(3):
        prepared.train()
        prepared.eval()
    assert torch.equal(prepared(images), first)
    assert unchanged(before, statistics(prepared)), "evaluation leaves running statistics alone"
    prepared.train()(images)
    assert not unchanged(before, statistics(prepared)), "training updates them"


def test_dropout_is_off_in_training_and_its_probability_is_kept(prepared: PreparedModel, images: Tensor) -> None:
    dropouts = [node for node in prepared.graph_module().graph.nodes if "dropout" in str(node.target)]
    assert [node.args[1:] for node in dropouts] == [(0.2, False)]
    copied = copy.deepcopy(prepared)  # as a forward moves the running statistics, and with them the folded weights
    assert torch.equal(prepared.train()(images), copied.train()(images))


def test_freezing_batch_norm_stops_statistics_and_lets_gradients_flow(prepared: PreparedModel, images: Tensor) -> None:
    calibrate(prepared, images).train()
    prepared.freeze_batch_norm()
    before = statistics(prepared)
    prepared(images).sum().backward()
    assert unchanged(before, statistics(prepared))
    for name, parameter in prepared.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    with torch.no_grad():
        assert torch.equal(prepared.train()(images), prepared.eval()(images))


def test_state_has_the_float_names_and_each_tensor_once(tiny: nn.Module, prepared: PreparedModel) -> None:
    state = prepared.state_dict()
    assert {name: value.shape for name, value in tiny.state_dict().items()} == {
        name: state[name].shape for name in tiny.state_dict()
    }
    assert all(name.startswith("quantizers.") for name in set(state) - set(tiny.state_dict()))
    pointers = [value.data_ptr() for value in state.values()]
    assert len(pointers) == len(set(pointers))
    assert {name for name, _ in prepared.named_parameters()} == {name for name, _ in tiny.named_parameters()}


def test_float_state_loads_and_changes_what_is_computed(
    tiny: nn.Module, prepared: PreparedModel, images: Tensor
) -> None:
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.mul_(1.5)
    result = prepared.load_state_dict(tiny.state_dict(), strict=False)
    assert not result.unexpected_keys and all(name.startswith("quantizers.") for name in result.missing_keys)
    prepared.fake_quantize(False)
    torch.testing.assert_close(prepared(images), tiny(images), rtol=1e-4, atol=1e-5)


def test_state_makes_the_round_trip_bit_by_bit(prepared: PreparedModel, images: Tensor) -> None:
    fresh = copy.deepcopy(prepared)
    calibrate(prepared, images).train()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    prepared(images).sum().backward()
    optimizer.step()
    fresh.load_state_dict(prepared.state_dict())
    for model in (prepared, fresh):
        model.eval()
    assert torch.equal(prepared(images), fresh(images))
    assert Ranges(prepared).digest() == Ranges(fresh).digest()


def test_a_copy_shares_nothing_with_its_original(prepared: PreparedModel, images: Tensor) -> None:
    calibrate(prepared, images)
    copied = copy.deepcopy(prepared)
    expected = prepared(images)
    with torch.no_grad():
        for value in [*prepared.parameters(), *prepared.buffers()]:
            value.fill_(1)
    assert torch.equal(copied(images), expected)


def test_observing_and_quantizing_switch_all_modules(prepared: PreparedModel, images: Tensor) -> None:
    calibrate(prepared, images).observe(False)
    ranges = Ranges(prepared)
    quantized = prepared(images)
    assert torch.isinf(ranges.observed()).all()
    prepared.fake_quantize(False)
    assert not torch.equal(prepared(images), quantized)
    prepared.observe(True)
    prepared(images)
    assert torch.isfinite(ranges.observed()).all()
    assert len(prepared.fake_quantizers) == len(ranges)
    assert prepared.batch_norms == {"bn1": "bn1", "bn2": "bn2"}


def test_bfloat16_autocast_trains(prepared: PreparedModel, images: Tensor) -> None:
    calibrate(prepared, images).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = prepared(images)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(
        parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in prepared.parameters()
    )


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU"
)
def test_a_compiled_model_trains_as_the_eager_one_and_flipping_modes_compiles_nothing_new(
    prepared: PreparedModel, images: Tensor
) -> None:
    calibrate(prepared, images).train()
    compiled, labels = copy.deepcopy(prepared), torch.arange(8) % 5
    torch._dynamo.reset()
    compiled.compile()
    counts = torch._dynamo.utils.counters["stats"]
    for model in (prepared, compiled):
        optimizer, ranges = torch.optim.SGD(model.parameters(), lr=0.01), Ranges(model)
        for _ in range(3):
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            ranges.update(ranges.observed(), 0.1)
    for (name, eager), fused in zip(prepared.state_dict().items(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(fused.float(), eager.float(), rtol=0.02, atol=2e-3, msg=name)

    def flip() -> None:
        compiled.eval()
        with torch.no_grad():
            compiled(images)
        compiled.train()(images)

    flip()
    seen = counts["unique_graphs"]
    for _ in range(5):
        flip()
    assert counts["unique_graphs"] == seen
