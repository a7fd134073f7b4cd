"""Fingerprints of models: every operator of a forward pass with its literals, shapes and parameters.

A checkpoint holds tensors by name. Changed code may use the same names: another stride, another activation, another
order of layers. Such a model would load without an error and compute something else.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dist_train import trees
from dist_train.errors import RunDirError
from dist_train.trees import Tree

_CONSTANT_SIZE = 16  # up to so many elements, a constant that forward creates is written out
_SHOWN = 5  # differences that a message shows


@dataclass(frozen=True)
class Operation:
    """One operator call.

    Attributes:
        layer: path of the innermost module that called it; only for messages, so that a module may be renamed.
        name: of the operator, such as `convolution`.
        arguments: by their names in the schema: a literal, or the name and shape of a parameter or buffer. For another
            tensor, its shape and the number of operations since it was made.
    """

    layer: str
    name: str
    arguments: dict[str, str]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Operation) and (self.name, self.arguments) == (other.name, other.arguments)

    def __hash__(self) -> int:
        return hash((self.name, *self.arguments.items()))

    def __str__(self) -> str:
        return f"{self.layer or 'forward'}: {self.name}"


@torch.no_grad()
def fingerprint(model: nn.Module, example: Tree) -> list[list[Any]]:
    """Records the operators of a forward pass in training mode, then of one in eval mode.

    Training mode shows the settings of dropout and batch norms. Nothing is changed: the passes use copies of the
    buffers, and the global generator is restored.

    Args:
        example: [B, ...], on the model's device.

    Returns:
        for each operation a list of layer, name and arguments (see `Operation`), in JSON's types. It does not depend on
        the process, the device or the values of parameters, unless forward branches on them.
    """
    mode, operations = model.training, list[Operation]()
    for training in (True, False):
        model.train(training)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        named = {id(tensor): name for name, tensor in [*model.named_parameters(), *buffers.items()]}
        with torch.random.fork_rng(devices=[]), _layers(model) as path, _Recorder(named, path, example) as recorder:
            torch.func.functional_call(model, buffers, *trees.arguments(example))
        operations += recorder.operations
    model.train(mode)
    return [[each.layer, each.name, each.arguments] for each in operations]


def differences(recorded: Sequence[Sequence[Any]], found: Sequence[Sequence[Any]]) -> list[str]:
    """Lists the first differences of two fingerprints: `layer2.0.conv1: convolution stride [1, 1] -> [2, 2]`."""
    before, after = ([Operation(*each) for each in side] for side in (recorded, found))
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    lines: list[str] = []
    for kind, first, last, start, end in matcher.get_opcodes():
        if kind != "equal":
            lines += _changed(before[first:last], after[start:end])
    lines = list(dict.fromkeys(lines))  # an operation of both modes appears twice
    return lines[:_SHOWN] + ([f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else [])


def _changed(before: Sequence[Operation], after: Sequence[Operation]) -> Iterator[str]:
    """Compares operations pairwise: changed arguments where the names are equal, else both names."""
    for old, new in zip(before, after, strict=False):
        if old.name != new.name:
            yield f"{new}: it was {old.name}" if old.layer == new.layer else f"{old} -> {new}"
            continue
        keys = [key for key in {**old.arguments, **new.arguments} if old.arguments.get(key) != new.arguments.get(key)]
        yield f"{new} " + ", ".join(
            f"{key} {old.arguments.get(key, 'none')} -> {new.arguments.get(key, 'none')}" for key in keys
        )
    yield from (f"{old}: it is gone" for old in before[len(after) :])
    yield from (f"{new}: it is new" for new in after[len(before) :])


@contextmanager
def _layers(model: nn.Module) -> Iterator[list[str]]:
    """Tracks the running module's path, as a stack with the innermost module last."""
    path = [""]
    with ExitStack() as hooks:
        for name, module in model.named_modules():

            def enter(module: nn.Module, args: Any, name: str = name) -> None:
                path.append(name)

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                path.pop()

            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        yield path


class _Recorder(TorchDispatchMode):
    """Records every operator that is called in this mode."""

    def __init__(self, named: Mapping[int, str], path: Sequence[str], example: Tree) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._named, self._path = named, path
        self._made: dict[int, int] = {id(leaf): 0 for leaf in trees.leaves(example)}
        self._alive: list[Tensor] = []  # an id may be given again once its tensor is gone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema.arguments
        defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
        given = {argument.name: value for argument, value in zip(schema, args, strict=False)}
        arguments = {key: self._text(value) for key, value in (defaults | given | (kwargs or {})).items()}
        outputs = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.").removesuffix(".default")
        self.operations.append(Operation(self._path[-1], name, {k: v for k, v in arguments.items() if v}))
        for tensor in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            if isinstance(tensor, Tensor):
                self._made[id(tensor)] = len(self.operations)
                self._alive.append(tensor)
        return outputs

    def _text(self, value: Any) -> str:
        """Formats an argument; empty where it depends on the device or the process."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self._text(each) for each in value)}]"
        return "" if isinstance(value, (torch.device, torch.Generator)) or value is None else str(value)

    def _tensor(self, tensor: Tensor) -> str:
        shape = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
        if id(tensor) in self._named:
            return f"{self._named[id(tensor)]} {shape}"
        if id(tensor) in self._made:
            return f"{shape} of {len(self.operations) - self._made[id(tensor)]} before"
        return f"{tensor.tolist()} {shape}" if tensor.numel() <= _CONSTANT_SIZE else shape


FLOAT, PREPARED = "float", "prepared"


_CHANGED = {
    FLOAT: "the model's code computes something else than when this run began",
    PREPARED: "quantization prepares another model than when this run began: "
    "the backend, its rules or the libraries changed",
}


class SameModel:
    """Fingerprints of a run's models, kept with every checkpoint.

    Operators have other names on other devices and in other versions of torch. If these changed, nothing is compared.
    """

    def __init__(self) -> None:
        self._where = {"torch": torch.__version__.partition("+")[0], "device": "cpu"}
        self._recorded: dict[str, Any] = {}
        self._found: dict[str, Any] = {}

    def require(self, name: str, model: nn.Module, example: Tree) -> None:
        """Takes the fingerprint of the `FLOAT` or `PREPARED` model, as built, before any state is loaded.

        Args:
            example: [B, ...], on the model's device.

        Raises:
            RunDirError: the restored checkpoint has another fingerprint of that name; shows the first differences.
        """
        self._where["device"] = trees.first_leaf(example).device.type
        self._found[name] = fingerprint(model, example)
        self._compare(name)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes the fingerprints of a checkpoint, as `state_dict` gave them.

        Raises:
            RunDirError: a model's fingerprint differs from the one that was taken before.
        """
        if state["where"] == self._where:
            self._recorded = dict(state["models"])
            for name in self._found:
                self._compare(name)

    def state_dict(self) -> dict[str, Any]:
        return {"where": dict(self._where), "models": self._recorded | self._found}

    def _compare(self, name: str) -> None:
        recorded, found = self._recorded.get(name), self._found[name]
        if recorded is not None and recorded != found:
            lines = "".join(f"\n    {line}" for line in differences(recorded, found))
            raise RunDirError(
                f"{_CHANGED[name]}:{lines}",
                "undo the change to resume the run, or start a new one with --run.name NEW or --run.dir DIR",
            )
