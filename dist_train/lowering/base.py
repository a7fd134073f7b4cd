"""Types of a lowering: the model in memory, the model in a runtime, and the reason why there is none."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn
from torch.export import ExportedProgram

from dist_train.programs.program import Call, tree_call
from dist_train.programs.signature import Dynamic

__all__ = ["FAILURES", "Call", "Lowered", "LoweringUnavailable", "Reference", "Written", "quiet", "tree_call"]

FAILURES = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors that exporters and compilers raise for a model that they cannot take, beside those of their own."""


class LoweringUnavailable(Exception):
    """This machine or this model does not allow the lowering. The message says what to type.

    It is no error of the run: the caller shows it and goes on without a latency.
    """


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A model in memory, on the CPU: the source of a lowering, and the outputs that a runtime must reproduce.

    Attributes:
        call: inputs [B, ...] to outputs.
        source: the input of a lowering: a float module in eval mode or a PT2E program. None for TorchScript, which has
            integer kernels of its own and cannot be lowered.
        half: bf16 or fp16 where that is the model's precision.
        dynamic: dimensions of the inputs that vary besides the batch.
    """

    call: Call
    source: nn.Module | ExportedProgram | None
    half: str | None = None
    dynamic: Dynamic = field(default_factory=dict)

    @property
    def quantized(self) -> bool:
        """True where the source computes with quantized numbers: converted models are programs, float ones modules."""
        return isinstance(self.source, ExportedProgram)


@dataclass(frozen=True)
class Lowered:
    """A model in a runtime.

    Attributes:
        name: "openvino", "onnxruntime", "inductor"; "eager" or "torchscript" for a model that runs unchanged.
        call: inputs [B, ...] on the CPU, such as normalized images, to outputs, for any B >= 1.
    """

    name: str
    call: Call


@dataclass(frozen=True)
class Written:
    """A model written in another format and read back in the format's runtime.

    Attributes:
        files: bytes by suffix, as {"xml": ..., "bin": ...}; the first is the one to open.
        call: inputs [B, ...] on the CPU, such as normalized images, to outputs, for any B >= 1.
        runtime: name and version of the runtime that `call` uses.
        usage: Python that runs the first file by its runtime alone, for the manifest. FILE is its path, and `images` a
            NumPy array, float32 [B, C, H, W], normalized; `inputs` a dict of arrays by leaf name, where the model takes
            several. The last of its statements is the outputs, or a list of them.
    """

    files: dict[str, bytes]
    call: Call
    runtime: str
    usage: str


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides progress lines and warnings of exporters and compilers inside the block; errors still raise."""
    sink = io.StringIO()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
