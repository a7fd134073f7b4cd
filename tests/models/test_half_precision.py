"""Half precision: which one is chosen, what is cast, and what does not go."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_train.errors import DataError
from dist_train.models.half_precision import HalfModel, choose_dtype, require_half
from tests.support.converted_nets import float_net, images

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "expected", "why"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, "bf16", "avx512_bf16"),
        ({"amx_bf16": True}, "bf16", "amx_bf16"),
        ({"avx2": True}, "fp16", "does not compute in bf16"),
    ],
)
def test_auto_is_bf16_where_the_cpu_computes_in_it(
    capabilities: dict[str, bool], expected: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    dtype, reason = choose_dtype("auto", CPU)
    assert dtype == expected
    assert why in reason
    assert choose_dtype("fp16", CPU)[0] == "fp16"


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_parameters_and_buffers_are_cast_in_a_copy_and_outputs_are_float32(name: str, dtype: torch.dtype) -> None:
    net = float_net(channels_last=True)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    half = HalfModel(net, name)  # type: ignore[arg-type]
    with torch.no_grad():
        outputs, expected = half(images(5)), net(images(5))
    assert outputs.dtype == torch.float32
    assert not torch.equal(outputs, expected)
    assert (outputs - expected).abs().max() < 0.02 * expected.abs().max()
    assert {value.dtype for value in half.state_dict().values() if value.is_floating_point()} == {dtype}
    assert half.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_a_model_that_insists_on_float32_is_refused_with_its_reason() -> None:
    class Insisting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x + torch.ones(4))

    with pytest.raises(DataError, match=r"does not run in bf16: .*dtype(.|\n)*leave half out of the stages"):
        require_half(HalfModel(Insisting(), "bf16"), torch.zeros(2, 4))
