"""Postprocessing of a detector as an ONNX file: from the dense outputs of one image to its boxes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dist_train.errors import first_line
from dist_train.lowering.base import FAILURES, LoweringUnavailable, quiet
from dist_train.tasks.detector import BoxesOfImage, Detector

OUTPUTS = ("boxes", "scores", "labels")
_CLOSE = 1e-3  # pixels, or a score: other runtimes round exp otherwise


def boxes_onnx(detector: Detector, outputs: Mapping[str, Tensor]) -> bytes:
    """Exports `BoxesOfImage` as ONNX, and checks its answers in ONNX Runtime on outputs that are drawn.

    outputs: of the dense part, for shapes and names.

    Raises:
        LoweringUnavailable: it cannot be exported, or answers otherwise.
    """
    import onnxruntime

    names = [name for name in ("cls_logits", "bbox_regression", "bbox_ctrness") if name in outputs]
    generator = torch.Generator().manual_seed(0)
    drawn = tuple(torch.randn(1, *outputs[name].shape[1:], generator=generator) for name in names)
    model = BoxesOfImage(detector).eval()
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                model, drawn, dynamo=True, verbose=False, input_names=names, output_names=list(OUTPUTS)
            )
            assert program is not None  # it is, with dynamo=True
            data: bytes = program.model_proto.SerializeToString()
            session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
            found = session.run(None, {name: each.numpy() for name, each in zip(names, drawn, strict=True)})
            expected = model(*drawn)
    except (*FAILURES, torch._dynamo.exc.TorchDynamoException) as error:
        raise LoweringUnavailable(f"the detector's boxes cannot be exported: {first_line(error)}") from error
    for name, one, other in zip(OUTPUTS, found, expected, strict=True):
        if not torch.allclose(torch.from_numpy(one).double(), other.double(), rtol=0, atol=_CLOSE):
            raise LoweringUnavailable(f"the detector's {name} by ONNX Runtime are others than torch's")
    return data
