"""Location of an error of tracing or of preparing a graph: the module, and the line of its forward."""

from __future__ import annotations

import inspect
import linecache
import re
import traceback
from pathlib import Path

from torch import nn
from torch.fx import Node

from dist_train.errors import QuantizationError, first_line
from dist_train.quantization.fx_nodes import module_of

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in \w+\n\s*(?P<text>.*)')


def error_location(model: nn.Module, error: BaseException) -> str:
    """Finds the innermost forward of `model`'s modules that led to an error of tracing.

    Args:
        error: of torch.fx, whose traceback contains the model's code; or of torch.export, which carries the stack that
            it traced.

    Returns:
        As `head.body, models.py line 12: if x.mean() > 0`; "" where no module is found.
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


def cannot_trace(tracer: str, model: nn.Module, error: BaseException, others: str) -> QuantizationError:
    """Returns the error for a model that `tracer` cannot trace; `others` says which backend might."""
    return QuantizationError(
        f"{tracer} cannot trace {error_location(model, error) or type(model).__name__}: {first_line(error)}",
        "make forward free of branches and shapes that depend on values: torch.where chooses between two results; "
        f"{others}; eager traces nothing, and needs a model with stubs of its own",
    )


def graph_error_location(error: BaseException) -> tuple[str, str]:
    """Finds the node of a graph that was processed when `error` was raised.

    Returns:
        The node's layer and a phrase for messages, as (`head.body`, ` at head.body, models.py line 12: x = F.relu(x)`).
        Both are "" where no node is found. The line is missing where only torch's own code was traced.
    """
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        nodes = [value for value in frame.f_locals.values() if isinstance(value, Node)]
        if not nodes:
            continue
        node = nodes[-1]
        layer = str(node.target) if node.op == "call_module" else module_of(node)
        written = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
        own = [each for each in written if "torch" not in Path(each["file"]).parts]
        places = [layer or node.name]
        if own:
            places.append(f"{Path(own[-1]['file']).name} line {own[-1]['line']}: {own[-1]['text'].strip()}")
        return layer, f" at {', '.join(places)}"
    return "", ""


def _covers(kind: type[nn.Module], line: int) -> bool:
    try:
        lines, first = inspect.getsourcelines(kind.forward)
    except (OSError, TypeError):  # typed at a prompt
        return False
    return first <= line < first + len(lines)
