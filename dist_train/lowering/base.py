"""What a lowering gives, and how it says that it cannot."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor


class LoweringUnavailable(Exception):
    """This machine or this model does not allow the lowering. The message is a sentence for the user, with what to type.

    No error of the run: the caller shows it and goes on without a latency.
    """


@dataclass(frozen=True)
class Lowered:
    """A model in a fast runtime.

    name: "openvino", "inductor", or "eager" and "torchscript" for a model that runs as it is.
    call: float32 [B, C, H, W] on the CPU, normalised -> float32 [B, classes], for any B >= 1.
    """

    name: str
    call: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Written:
    """A model in another format, and what was written read back in its runtime.

    files: bytes by suffix, as {"xml": ..., "bin": ...}; the first is the one to open.
    call: float32 [B, C, H, W] on the CPU, normalised -> float32, for any B >= 1.
    runtime: name and version of the runtime that `call` uses.
    usage: how a program opens the file.
    """

    files: dict[str, bytes]
    call: Callable[[Tensor], Tensor]
    runtime: str
    usage: str


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the progress lines and warnings of exporters and compilers from the user's terminal; errors still raise."""
    sink = io.StringIO()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
