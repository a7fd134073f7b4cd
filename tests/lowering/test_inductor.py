"""Inductor answers as the model that went in, by int8 kernels, and says so where it has no compiler."""

from __future__ import annotations

import pytest

from dist_train.lowering import LoweringUnavailable
from dist_train.lowering.inductor import compiler, lower
from tests.converted_nets import images

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


@needs_compiler
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
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(LoweringUnavailable, match=r"install g\+\+"):
        lower(converted, images(1), threads=1)
