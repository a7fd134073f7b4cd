"""Which module, and which line of its forward, an error of tracing comes from."""

from __future__ import annotations

import inspect
import linecache
import traceback
from pathlib import Path

from torch import nn


def where(model: nn.Module, error: BaseException) -> str:
    """`head.body, models.py line 12: if x.mean() > 0`: the innermost forward of a module of `model` that led to `error`, else "".

    error: of torch.fx, whose traceback goes through the model's own code, or of torch.export, which brings the stack that it traced.
    """
    traced = getattr(error, "real_stack", None)
    frames = (
        [(frame.filename, frame.lineno) for frame in traced]
        if traced
        else [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    )
    for file, line in reversed(frames):
        for name, module in model.named_modules():
            code = getattr(type(module).forward, "__code__", None)
            if code is None or code.co_filename != file or not _covers(type(module), line):
                continue
            text = linecache.getline(file, line).strip().rstrip(":")
            return f"{name or type(module).__name__}, {Path(file).name} line {line}: {text}"
    return ""


def _covers(kind: type[nn.Module], line: int) -> bool:
    try:
        lines, first = inspect.getsourcelines(kind.forward)
    except (OSError, TypeError):  # typed at a prompt
        return False
    return first <= line < first + len(lines)
