"""State goes through the codec, JSON and safetensors unchanged, or is refused by its path."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter, OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dist_train.config.fit import OptimConfig, ScheduleConfig
from dist_train.errors import CheckpointError
from dist_train.run_dir import state_codec as codec
from dist_train.training.optim import build_optimizer
from dist_train.training.schedule import build_schedule

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
]


def through(value: Any) -> Any:
    """Encodes, writes to bytes, reads, decodes."""
    tree, tensors = codec.encode(value)
    text, data = json.dumps(tree, allow_nan=False), safetensors.torch.save(tensors)
    return codec.decode(json.loads(text), safetensors.torch.load(data))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same(left: Any, right: Any) -> bool:
    """Equal to the bit, with types, order of keys, and for tensors dtype, shape and strides."""
    if isinstance(left, torch.Tensor):
        described = [(each.dtype, each.shape, each.stride() if each.numel() else None) for each in (left, right)]
        return described[0] == described[1] and bits(left) == bits(right)
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return struct.pack("d", left) == struct.pack("d", right) or (math.isnan(left) and math.isnan(right))
    if isinstance(left, dict):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left.items(), right.items(), strict=True))
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any dtype, 0 to 4 dimensions (also empty ones), in any order of dimensions in memory."""
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    count = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    data = draw(st.binary(min_size=count, max_size=count))
    if dtype == torch.bool:
        data = bytes(byte & 1 for byte in data)
    order = draw(st.permutations(range(len(shape))))
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape([shape[place] for place in order]).permute([order.index(place) for place in range(len(shape))])


texts = st.text(alphabet=st.characters(exclude_categories=()), max_size=5) | st.sampled_from(
    ["$tensor", "$tuple", "$dict", "$float", "a.b", "", "\ud800"]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.binary(max_size=9)
keys = (
    texts
    | st.integers()
    | st.booleans()
    | st.none()
    | st.floats(allow_nan=False)
    | st.binary(max_size=3)
    | st.tuples(st.integers(), texts)
)
states = st.recursive(
    scalars | tensors(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(texts, inner, max_size=4)
        | st.dictionaries(keys, st.integers(), max_size=4).map(Counter)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(states)
def test_every_state_comes_back_to_the_bit(state: Any) -> None:
    assert same(through(state), state), (through(state), state)


def test_paths_that_read_alike_stay_apart() -> None:
    state = {
        "a.b": torch.tensor(1),
        "a": {"b": torch.tensor(2)},
        "c": {0: torch.tensor(3), "0": torch.tensor(4)},
        "d": {b"x": 1, b"y": 2},
    }
    assert same(through(state), state)


def test_channels_last_weights_stay_channels_last() -> None:
    weight = torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last)
    back = through({"weight": weight})["weight"]
    assert (
        back.is_contiguous(memory_format=torch.channels_last) and not back.is_contiguous() and torch.equal(back, weight)
    )


def test_one_memory_is_one_memory_again() -> None:
    weight = torch.randn(3, 4)
    parameter = nn.Parameter(weight)
    back = through(
        {
            "embedding": weight,
            "head": {"weight": parameter},
            "transposed": weight.t(),
            "flat": weight.view(-1),
            "apart": weight.clone(),
        }
    )
    back["embedding"][1, 2] = 77.0
    assert back["head"]["weight"][1, 2] == 77.0 and back["transposed"][2, 1] == 77.0 and back["flat"][6] == 77.0
    assert back["apart"][1, 2] == weight[1, 2] != 77.0


def test_shared_memory_is_stored_once() -> None:
    weight = torch.randn(100)
    _, stored = codec.encode([weight, weight, weight.view(10, 10)])
    assert sum(tensor.numel() for tensor in stored.values()) == 100


def test_tensors_that_overlap_only_partly_keep_their_values() -> None:
    whole = torch.arange(10.0)
    state = {
        "whole": whole,
        "head": whole[:4],
        "middle": whole[3:7],
        "tail": whole[5:],
        "gaps": whole[::3],
        "repeated": whole[:2].expand(3, 2),
    }
    back = through(state)
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name


def test_slices_of_one_storage_do_not_drag_it_along() -> None:
    bucket = torch.randn(1000)
    assert len(safetensors.torch.save(codec.encode({"slice": bucket[10:20]})[1])) < 400


def test_views_that_are_conjugate_or_negative_come_back_as_what_they_show() -> None:
    complex_ = torch.tensor([1 + 2j, 3 - 4j])
    assert torch.equal(through(complex_.conj()), complex_.conj()) and torch.equal(
        through(complex_.conj().imag), torch.tensor([-2.0, 4.0])
    )


def test_parameters_come_back_as_detached_tensors() -> None:
    back = through(nn.Parameter(torch.ones(2)))
    assert type(back) is torch.Tensor and not back.requires_grad


def test_numbers_that_json_lacks_come_back() -> None:
    back = through([math.inf, -math.inf, math.nan, -0.0, 1e-323, 2**200, True, 1, 1.0])
    assert same(back, [math.inf, -math.inf, math.nan, -0.0, 1e-323, 2**200, True, 1, 1.0])
    assert math.copysign(1, back[3]) == -1


def test_a_state_dict_comes_back_as_a_mapping_that_a_model_loads() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    state = model.state_dict()
    assert isinstance(state, OrderedDict)
    assert not model.load_state_dict(through(state)).missing_keys


class _Loaded:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("unpickled",))


class _Pair(NamedTuple):
    left: int
    right: int


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (_Loaded(), "_Loaded"),
        ({1, 2}, "set"),
        (1j, "complex"),
        (np.float32(1), "float32"),
        (np.zeros(2), "ndarray"),
        (torch.float32, "dtype"),
        (print, "builtin_function"),
        (_Pair(1, 2), "_Pair"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.empty(2, device="meta"), "meta"),
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
        (torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8), "qint8"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_refused_by_its_place(value: Any, kind: str) -> None:
    with pytest.raises(CheckpointError, match=rf"state\.optimizer\.groups\.1\.odd is a .*{kind}"):
        codec.encode({"optimizer": {"groups": [{}, {"odd": value}]}})


def _model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).to(
        memory_format=torch.channels_last
    )


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(5, 2, 4, 4, generator=generator).to(memory_format=torch.channels_last)
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


OPTIMIZERS = [
    OptimConfig(lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    OptimConfig(name="adamw", lr=0.01, weight_decay=0.1),
]
SCHEDULES = [
    ScheduleConfig(name="cosine", warmup=0.25),
    ScheduleConfig(name="step", step_epochs=1.5),
    ScheduleConfig(name="linear", warmup=0.1),
    ScheduleConfig(name="constant"),
]


@pytest.mark.parametrize("optim", OPTIMIZERS, ids=lambda config: config.name)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda config: config.name)
@pytest.mark.filterwarnings("ignore")
def test_a_restored_optimizer_and_schedule_go_on_to_the_bit(optim: OptimConfig, schedule: ScheduleConfig) -> None:
    def parts() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = _model()
        optimizer = build_optimizer(model, optim)
        return model, optimizer, build_schedule(optimizer, schedule, 12, 4)

    undisturbed = parts()
    _steps(*undisturbed, 0, 5)
    saved = through([part.state_dict() for part in undisturbed])
    _steps(*undisturbed, 5, 12)
    resumed = parts()
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    _steps(*resumed, 5, 12)
    for left, right in zip(undisturbed, resumed, strict=True):
        assert same(through(left.state_dict()), through(right.state_dict()))


def test_multi_step_milestones_come_back_as_a_counter_of_ints() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5])
    back = through(schedule.state_dict())["milestones"]
    assert type(back) is Counter and back == Counter({2: 2, 5: 1})
