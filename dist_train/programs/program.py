"""A model as bytes, of either kind, and how to open it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dist_train import trees
from dist_train.programs.operators import modules_of
from dist_train.programs.pt2 import OPERATORS, has_integers, load_program
from dist_train.programs.signature import tree_of
from dist_train.programs.torchscript import load_script, script_engine
from dist_train.trees import Tree

_SUFFIXES = {"pt2": "pt2", "torchscript": "ts"}


@dataclass(frozen=True)
class Program:
    """A deployed model as bytes.

    Attributes:
        kind: "pt2" (torch.export) or "torchscript" (traced); decides how `data` is read.
        data: the bytes of `model.pt2` or `model.ts`.
        extra: further files that belong to it, by name, such as the state_dict of an FX model.
    """

    kind: Literal["pt2", "torchscript"]
    data: bytes
    extra: dict[str, bytes] = field(default_factory=dict)

    @property
    def suffix(self) -> str:
        """Suffix of the program's file, without the dot."""
        return _SUFFIXES[self.kind]

    @property
    def usage(self) -> str:
        """Python that runs the program's file by torch alone, as `Written.usage`."""
        return self.usage_for([""])

    def usage_for(self, names: Sequence[str], outputs: Sequence[str] = ("",)) -> str:
        """As `usage`, for inputs and outputs of these names: "" is one tensor, numbers are positions."""
        foreign = "".join(f"import {module}; " for module in modules_of(self.data))
        if self.kind == "torchscript":
            engine = f"torch.backends.quantized.engine = {script_engine(self.data)!r}"
            return f"import torch; {foreign}{engine}; {called('torch.jit.load(FILE).eval()', names, outputs)}"
        needed = f"import {OPERATORS}; " if has_integers(self.data) else ""
        return f"import torch; {foreign}{needed}{called('torch.export.load(FILE).module()', names, outputs)}"

    @property
    def extra_usage(self) -> dict[str, str]:
        """Python that reads each extra file, by name: tensors of all kinds, without code."""
        return dict.fromkeys(sorted(self.extra), "import torch; torch.load(FILE, weights_only=True)")

    @property
    def lowers(self) -> bool:
        """True where other runtimes can take the program; TorchScript holds integer kernels and is its own runtime."""
        return self.kind == "pt2"


def called(model: str, names: Sequence[str], outputs: Sequence[str] = ("",)) -> str:
    """Returns Python that calls `model` with NumPy arrays: `images`, or the entries of a dict `inputs` by leaf name."""
    before, after = ("", ".detach()") if list(outputs) == [""] else ("torch.set_grad_enabled(False); ", "")
    if list(names) == [""]:
        return f"{before}{model}(torch.from_numpy(images)){after}"
    inputs = tree_of(names, [f"torch.from_numpy(inputs[{name!r}])" for name in names])
    args, kwargs = trees.arguments(inputs)
    parts = [_written(each) for each in args] + [f"{name}={_written(each)}" for name, each in kwargs.items()]
    return f"{before}{model}({', '.join(parts)}){after}"


def _written(tree: Tree) -> str:
    """Returns Python for a tree whose leaves are Python."""
    if isinstance(tree, dict):
        return f"{{{', '.join(f'{key!r}: {_written(each)}' for key, each in tree.items())}}}"
    if isinstance(tree, tuple):
        return f"({''.join(f'{_written(each)}, ' for each in tree)})"
    return str(tree)


Call = Callable[..., Tree]
"""A model as a function of a tree of inputs, `call(inputs)`; or of its parts, as the module is called."""


def tree_call(model: Callable[..., Any]) -> Call:
    """Returns a model as a function of a tree of inputs, whose outputs are `trees.plain`."""

    def call(*args: Any, **kwargs: Any) -> Tree:
        whole = len(args) == 1 and not kwargs
        return trees.plain(trees.call(model, args[0]) if whole else model(*args, **kwargs))

    return call


def open_program(program: Program) -> Call:
    """Opens a program as a function on the CPU: contiguous inputs [B, ...] to the model's outputs.

    Raises ArtifactError as `load_program` and `load_script` do. Only for bytes from a source you trust.
    """
    if program.kind == "torchscript":
        return tree_call(load_script(program.data))
    return tree_call(load_program(program.data).module())
