"""Formats beside the program: what is written is what was read back, and what does not go says why."""

from __future__ import annotations

import pytest
import torch

from dist_train import registry
from dist_train.lowering.base import LoweringUnavailable
from dist_train.lowering.openvino import shared_core
from dist_train.models.half_precision import HalfModel
from tests.support.converted_nets import float_net, images
from tests.support.overflow import needs_vnni

pytestmark = pytest.mark.heavy


def write(name: str):
    entry = registry.export_formats.entry(name)
    if entry.missing():
        pytest.skip(f"not installed: {', '.join(entry.missing())}")
    return registry.export_formats.get(name)


@needs_vnni
@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_int8_goes_to_the_runtimes_of_qdq_with_any_batch(name, program, converted):
    written = write(name)(program, images(2), 1)
    with torch.no_grad():
        for rows in (16, 1):
            expected = converted(images(rows))
            assert (written.call(images(rows)) - expected).abs().max() < 0.02 * expected.abs().max()
    assert sum(map(len, written.files.values())) > 0
    assert written.runtime.startswith({"onnx": "onnxruntime ", "openvino": "openvino "}[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_fp16_goes_to_both_and_bf16_is_refused_with_the_runtime_s_reason(name):
    half = HalfModel(float_net(), "fp16")
    written = write(name)(half, images(2), 1)
    with torch.no_grad():
        assert (written.call(images(5)) - half(images(5))).abs().max() < 0.01 * half(images(5)).abs().max()
    with pytest.raises(
        LoweringUnavailable, match=r"(ONNX Runtime cannot run|OpenVINO cannot (read|compile)) this model: "
    ):
        write(name)(HalfModel(float_net(), "bf16"), images(2), 1)


def test_openvino_s_files_are_read_by_openvino_itself(tmp_path, float_model):
    written = write("openvino")(float_model, images(2), 1)

    for suffix, data in written.files.items():
        (tmp_path / f"model.{suffix}").write_bytes(data)
    graph = shared_core().read_model(tmp_path / "model.xml")
    with torch.no_grad():
        expected = float_model(images(3))
    graph.reshape([3, 3, 16, 16])
    answer = shared_core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images(3).numpy())[0]
    torch.testing.assert_close(torch.from_numpy(answer), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_float_and_half_go_to_executorch(float_model):
    for model in (float_model, HalfModel(float_model, "fp16")):
        written = write("executorch")(model, images(2), 1)
        with torch.no_grad():
            expected = model(images(5))
        assert (written.call(images(5)) - expected).abs().max() < 0.01 * expected.abs().max()
