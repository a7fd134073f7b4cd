"""Inductor answers as the model that went in, by int8 kernels, and says so where it has no compiler."""

from __future__ import annotations

import pytest
import torch

from dist_train.cluster.instructions import sums_overflow
from dist_train.config.stages import RuleConfig
from dist_train.lowering import LoweringUnavailable
from dist_train.lowering.inductor import compiler, lower
from dist_train.quantization.pt2e.backend import PT2EBackend, export_converted
from dist_train.quantization.ranges import Ranges
from tests.support.compilers import hide_compiler
from tests.support.converted_nets import float_net, images
from tests.support.overflow import needs_vnni

pytestmark = pytest.mark.heavy

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


@pytest.mark.slow
@needs_compiler
@needs_vnni
def test_int8_answers_are_close_and_come_from_int8_kernels(converted):
    import torch._inductor.config
    from torch._dynamo.utils import counters

    counters.clear()
    threads = torch.get_num_threads()
    lowered = lower(converted, images(1), threads=1)
    with torch.no_grad():
        expected = converted(images(64))
    for count in (64, 1, 7):
        answer = lowered.call(images(64)[:count])
        assert (answer - expected[:count]).abs().max() < 0.02 * expected.abs().max()
        assert not answer.requires_grad
    assert lowered.name == "inductor"
    assert counters["inductor"]["qconv_weight_prepack_matcher_count"] > 0
    assert torch._inductor.config.freezing is False
    assert torch.get_num_threads() == threads


def test_without_a_compiler_it_says_what_to_install(converted, monkeypatch):
    hide_compiler(monkeypatch)
    with pytest.raises(LoweringUnavailable, match=r"install g\+\+"):
        lower(converted, images(1), threads=1)


@needs_compiler
@pytest.mark.slow
def test_int8_on_images_of_one_channel_is_right_at_every_batch_size():
    # Compiled for any batch size, Inductor 2.14's integer convolution answers in another order of memory than it said.
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(16, 1, 8, 8, generator=generator)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 16, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(1024, 10),
    ).eval()
    backend = PT2EBackend(engine="x86" if sums_overflow() else "auto")
    prepared = backend.prepare(net.to(memory_format=torch.channels_last), inputs[:2]).eval()
    ranges = Ranges(prepared)
    prepared(inputs)
    ranges.update(ranges.observed(), 1.0)
    program = export_converted(backend.convert(prepared), inputs[:2])
    expected = program.module()(inputs)
    lowered = lower(program, inputs[:1], 1)
    for rows in (1, 2, 5, 16):
        assert (lowered.call(inputs[:rows]) - expected[:rows]).abs().max() < 0.02 * expected.abs().max()


def test_zero_points_per_channel_are_refused_before_anything_is_compiled(monkeypatch):
    # Inductor fuses them into oneDNN's kernels, which ignore them: outputs are wrong by their own size, for any batch.
    monkeypatch.setattr("dist_train.lowering.inductor.compiler", lambda: "g++")
    monkeypatch.setattr(torch, "compile", None)
    program = affine("channel")
    with pytest.raises(LoweringUnavailable, match=r"ignores the zero points .*\(1 layers, by scheme affine"):
        lower(program, images(1), 1)


@needs_compiler
@pytest.mark.slow
def test_one_zero_point_for_all_channels_is_right():
    program = affine("tensor")
    expected = program.module()(images(4))
    assert (lower(program, images(1), 1).call(images(4)) - expected).abs().max() < 0.02 * expected.abs().max()


def affine(granularity):
    net = float_net()
    with torch.no_grad():
        net[7].weight += net[7].weight.std()
    rule = RuleConfig.model_validate(
        {"match": {"type": "Linear"}, "weight": {"scheme": "affine", "granularity": granularity}}
    )
    prepared = PT2EBackend().prepare(net, images(2), [rule]).eval()
    ranges = Ranges(prepared)
    prepared(images(16))
    ranges.update(ranges.observed(), 1.0)
    return export_converted(PT2EBackend().convert(prepared), images(2))
