"""The runtimes that open each built-in format's files, for comparing them: names, what to install, how to open."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dist_train.lowering import executorch, inductor, onnx, openvino
from dist_train.lowering.base import Call, LoweringUnavailable
from dist_train.lowering.latency import OneByOne, Requests
from dist_train.programs.program import Program, open_program
from dist_train.programs.pt2 import load_program
from dist_train.trees import Tree


@dataclass(frozen=True)
class Opened:
    """A model that a runtime opened.

    Attributes:
        runtime: its name, with the version where it has one of its own.
        call: the model's inputs on the CPU to its outputs, for any batch size.
        requests: the model under load; the same calls one after the other, unless the runtime can do better.
    """

    runtime: str
    call: Call
    requests: Requests


Open = Callable[[Sequence[bytes], Tree, int, Sequence[str]], Opened]


@dataclass(frozen=True)
class Runtime:
    """A runtime of a format.

    Attributes:
        module: the Python module that it needs, which pip installs under the same name.
        open: from the format's files, an example [1, ...], the number of threads and the names of the outputs. Raises
            LoweringUnavailable.
    """

    name: str
    module: str
    open: Open

    def opened(self, files: Sequence[bytes], example: Tree, threads: int, outputs: Sequence[str] = ("",)) -> Opened:
        """Opens the files. Raises LoweringUnavailable where the runtime is not installed, or refuses the model."""
        if importlib.util.find_spec(self.module) is None:
            raise LoweringUnavailable(f"{self.module} not installed: pip install {self.module}")
        return self.open(files, example, threads, outputs)


def _one_by_one(runtime: str, call: Call) -> Opened:
    return Opened(runtime, call, OneByOne(call))


def _onnxruntime(files: Sequence[bytes], example: Tree, threads: int, outputs: Sequence[str]) -> Opened:
    call, runtime = onnx.open_onnx(files[0], threads, outputs)
    return _one_by_one(runtime, call)


def _openvino(files: Sequence[bytes], example: Tree, threads: int, outputs: Sequence[str]) -> Opened:
    call = openvino.open_files(files, example, threads, outputs)
    return Opened(openvino.runtime(), call, openvino.Streams(files, example, threads, outputs))


def _executorch(files: Sequence[bytes], example: Tree, threads: int, outputs: Sequence[str]) -> Opened:
    return _one_by_one(executorch.runtime(), executorch.open_program(files[0], outputs))


_OPENVINO = Runtime("openvino", "openvino", _openvino)
RUNTIMES: dict[str, tuple[Runtime, ...]] = {
    "onnx": (Runtime("onnxruntime", "onnxruntime", _onnxruntime), _OPENVINO),
    "openvino": (_OPENVINO,),
    "executorch": (Runtime("executorch", "executorch", _executorch),),
}
"""By built-in format, beside the program itself."""


def program_runtimes(program: Program) -> tuple[Runtime, ...]:
    """Returns the runtimes of a program: torch, and Inductor where it can take it."""

    def torch(files: Sequence[bytes], example: Tree, threads: int, outputs: Sequence[str]) -> Opened:
        return _one_by_one("torch" if program.lowers else "torchscript", open_program(program))

    def compiled(files: Sequence[bytes], example: Tree, threads: int, outputs: Sequence[str]) -> Opened:
        return _one_by_one("inductor", inductor.lower(load_program(program.data), example, threads).call)

    return (Runtime("torch", "torch", torch), *([Runtime("inductor", "torch", compiled)] if program.lowers else []))
