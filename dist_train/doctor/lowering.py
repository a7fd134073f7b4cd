"""Tests the export formats that are asked for: lowers a tiny int8 model, and compares its outputs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from dist_train import registry
from dist_train.doctor.base import Line, Subject, good
from dist_train.doctor.quantization import images, quantize, tiny_net
from dist_train.errors import DistTrainError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    Model = nn.Module | ExportedProgram
    Call = Callable[[Tensor], Tensor]

_BOUND = 0.1  # of the largest output


def check_openvino(subject: Subject) -> Iterator[Line]:
    yield _written(subject, "openvino")


def check_onnx(subject: Subject) -> Iterator[Line]:
    yield _written(subject, "onnx")


def check_executorch(subject: Subject) -> Iterator[Line]:
    yield _written(subject, "executorch")


def check_inductor(subject: Subject) -> Iterator[Line]:
    from dist_train.lowering import inductor

    if inductor.compiler() is None:
        text = "inductor: no C++ compiler, which torch.compile needs"
        yield subject.lacking("inductor", text, "apt-get install g++, or name one in CXX; openvino needs none")
        return
    if (line := subject.untried("inductor")) is not None:
        yield line
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # a cached result would not test the compiler
        yield _tried(
            subject,
            "inductor",
            lambda program: ("torch.compile", inductor.lower(program, images(), 1, (len(images()),)).call),
        )


def _written(subject: Subject, name: str) -> Line:
    entry = registry.export_formats.entry(name)
    if entry.missing():
        text = f"{name}: {', '.join(entry.missing())} not installed"
        extras = {"openvino": "openvino,onnx"}.get(name, name)
        return subject.lacking(name, text, f"pip install 'dist-train[{extras}]'")
    if (line := subject.untried(name)) is not None:
        return line
    write = registry.export_formats.get(name)

    def lower(model: Model) -> tuple[str, Call]:
        written = write(model, images(), 1)
        return written.runtime, written.call

    return _tried(subject, name, lower)


def _tried(subject: Subject, name: str, lower: Callable[[Model], tuple[str, Call]]) -> Line:
    """Compares a tiny int8 model with its lowered form. `lower` returns the runtime's name, and the model in it."""
    from dist_train.lowering import LoweringUnavailable

    hint = "report this with the versions above; the other formats do not depend on it"
    try:
        model, expected = _int8()
        runtime, call = lower(model)
    except (DistTrainError, LoweringUnavailable) as error:
        return subject.lacking(name, f"{name}: {error}", hint)
    difference = float((call(images()) - expected).abs().max() / expected.abs().max())
    said = f"{name}: an int8 model of a few layers runs in {runtime}, and differs by {difference:.1%}"
    return good(said) if difference < _BOUND else subject.lacking(name, said, hint)


def _int8() -> tuple[ExportedProgram, Tensor]:
    from dist_train.quantization.pt2e.backend import PT2EBackend, export_converted

    converted, _ = quantize(PT2EBackend(), tiny_net())
    return export_converted(converted, images()), converted(images()).detach()  # type: ignore[arg-type]
