"""Throughput: requests in streams give each batch its own answer, and rates are of all batches."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dist_train.lowering import openvino
from dist_train.lowering.latency import OneByOne, Spread, compare_throughput
from dist_train.lowering.runtimes import RUNTIMES
from tests.support.converted_nets import images
from tests.support.overflow import needs_vnni

needs_openvino = pytest.mark.skipif(bool(openvino.missing_modules()), reason="not installed")


@needs_vnni
@needs_openvino
@pytest.mark.heavy
@pytest.mark.parametrize("rows", [1, 3])
def test_requests_in_streams_are_answered_in_their_order(rows: int, program: torch.export.ExportedProgram) -> None:
    written = openvino.write(program, images(1), threads=2)
    (runtime,) = RUNTIMES["openvino"]
    opened = runtime.opened(list(written.files.values()), images(1), 2)
    batches = list(images(rows * 40).split(rows))
    answers = opened.requests(batches)
    assert len(answers) == 40 and opened.requests.at_once(rows) >= 1
    for batch, answer in zip(batches, answers, strict=True):
        torch.testing.assert_close(answer, opened.call(batch), rtol=1e-4, atol=1e-4)


@needs_openvino
@pytest.mark.heavy
def test_an_onnx_file_is_opened_by_both_runtimes(float_model: torch.nn.Module) -> None:
    from dist_train.lowering.onnx import onnx_bytes

    with torch.no_grad():
        expected = float_model(images(4))
    for runtime in RUNTIMES["onnx"]:
        opened = runtime.opened([onnx_bytes(float_model, images(1))], images(1), 1)
        for answer in (opened.call(images(4)), *opened.requests([images(4), images(4)])):
            torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)


def test_a_turn_is_four_requests_for_each_that_is_computed_at_once() -> None:
    sizes: list[int] = []

    class Wide(OneByOne):
        def __call__(self, batches: Sequence[Tensor]) -> list[Tensor]:
            sizes.append(len(batches))
            return super().__call__(batches)

        def at_once(self, rows: int) -> int:
            return 3

    rates = compare_throughput({"wide": Wide(lambda batch: batch)}, torch.zeros, batch_sizes=(2,), seconds=0.0)
    assert len(sizes) == 2 + 5 and min(sizes) == 12
    assert rates["wide"]["2"].median > 0


def test_spread_is_median_and_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
