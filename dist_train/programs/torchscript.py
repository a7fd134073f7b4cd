"""A traced model as bytes (a TorchScript archive), equal in every process, with the integer kernels that it needs.

A TorchScript file is a program: it may read and write files, also while it is loaded, and its archive is unpickled.
Operators and classes that do so are refused by their names. That is no proof of a file that was made to harm: load
such files only from a source you trust.
"""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_train import trees
from dist_train.errors import ArtifactError, QuantizationError, first_line
from dist_train.programs.archive import check_script, read_records
from dist_train.programs.signature import rows
from dist_train.trees import Tree
from dist_train.untrusted import BeyondLimits

_MANGLED = re.compile(rb"___torch_mangle_(\d+)")  # a counter of the process makes the names of classes unique
_TRACES = (".debug_pkl", ".data/serialization_id")  # the tracing process's file paths; a hash of the file names
_ENGINE = "engine"
_WHEN = (1980, 1, 1, 0, 0, 0)


@contextmanager
def integer_kernels(engine: str) -> Iterator[None]:
    """Sets the process's engine inside the block: weights are packed for it, and some operators read it at each call.

    engine: one of torch.backends.quantized.supported_engines.
    """
    before = torch.backends.quantized.engine
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.backends.quantized.engine = engine
    # Integer kernels on the CPU are deterministic. Torch would warn about memory that they resize before writing it.
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.backends.quantized.engine = before
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])


@contextmanager
def _without_deprecation() -> Iterator[None]:
    """Silences the deprecation of torch.jit: its successor, torch.export, cannot take packed integer weights."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", "`torch.jit", category)
        # Torch warns once a process that quantized tensors are deprecated. Triggered here, inside the filter: loading
        # would trigger it from C++, which ignores Python's filters.
        warnings.simplefilter("ignore", UserWarning)
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)
        yield


@torch.no_grad()
def trace(model: nn.Module, example: Tree) -> torch.jit.ScriptModule:
    """Traces and freezes `model`, in eval mode: parameters become constants, modules become one function.

    Args:
        example: tree of real rows [B, ...], as the model takes it; of floats only shapes and dtypes count.

    Raises:
        QuantizationError: the traced model's outputs are wrong for batch sizes that it was not traced with.
    """
    generator = torch.Generator().manual_seed(0)
    with _without_deprecation(), warnings.catch_warnings():
        # Warns about branches on shapes; whether they matter is measured below.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        args, kwargs = trees.arguments(rows(example, 2))
        given: dict[str, Any] = {"example_kwarg_inputs": kwargs} if kwargs else {"example_inputs": args}
        # Not strict where the model returns a dict.
        strict = isinstance(example, Tensor) and isinstance(trees.plain(model(*args)), Tensor)
        traced = torch.jit.trace(model, **given, check_trace=False, strict=strict)
        # Without numeric optimization: folding batch norms here would change the outputs.
        frozen = torch.jit.freeze(traced, optimize_numerics=False)
    for count in (1, 3):
        inputs = trees.map_leaves(lambda leaf: _drawn(leaf, generator), rows(example, count))
        try:
            same = _equal(trees.call(frozen, inputs), trees.call(model, inputs))
        except RuntimeError:  # a shape that does not fit
            same = False
        if not same:
            raise QuantizationError(
                f"the traced model's outputs differ from those of {type(model).__name__} for a batch of {count}",
                "make forward free of branches and shapes that depend on the data or the batch size, "
                "or --qat.backend pt2e",
            )
    return frozen


def _drawn(leaf: Tensor, generator: torch.Generator) -> Tensor:
    """Returns random floats for a leaf of floats. Integers, such as indices of an embedding, stay as they are."""
    if not leaf.is_floating_point():
        return leaf
    return torch.rand(leaf.shape, generator=generator).to(leaf.dtype)


def _equal(one: Tree, other: Tree) -> bool:
    pairs = zip(trees.leaves(trees.plain(one)), trees.leaves(trees.plain(other)), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def script_bytes(script: torch.jit.ScriptModule, engine: str) -> bytes:
    """Serializes the result of `trace`: equal bytes for equal models, in every process.

    engine: the integer kernels that `load_script` sets while it loads and during each call.
    """
    buffer = io.BytesIO()
    with _without_deprecation():
        torch.jit.save(script, buffer)
    with zipfile.ZipFile(buffer) as archive:
        records = {name: archive.read(name) for name in archive.namelist() if not name.endswith(_TRACES)}
    records[f"{next(iter(records)).partition('/')[0]}/extra/{_ENGINE}"] = engine.encode()
    numbers = {
        int(number) for text in [*records.values(), *map(str.encode, records)] for number in _MANGLED.findall(text)
    }
    order = {number: index for index, number in enumerate(sorted(numbers))}

    def renumbered(text: bytes) -> bytes:
        return _MANGLED.sub(lambda match: b"___torch_mangle_%d" % order[int(match[1])], text)

    result = io.BytesIO()
    with zipfile.ZipFile(result, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            text = "/constants/" not in name and "/data/" not in name  # the others are the bytes of tensors
            archive.writestr(
                zipfile.ZipInfo(renumbered(name.encode()).decode(), _WHEN), renumbered(data) if text else data
            )
    return result.getvalue()


def script_engine(data: bytes) -> str:
    """Returns the engine whose integer kernels the bytes of `script_bytes` need.

    Raises zipfile.BadZipFile or KeyError where these are other bytes.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        name = next((name for name in archive.namelist() if name.endswith(f"/extra/{_ENGINE}")), "")
        return archive.read(name).decode()


def load_script(data: bytes) -> Callable[..., Tree]:
    """Loads a model from the bytes of `script_bytes`, as a function on the CPU. Only from a source you trust.

    Raises:
        ArtifactError: this is no such archive, this torch cannot read it or lacks its integer kernels, or its code
            names an operator that does more than compute.
    """
    try:
        check_script(read_records(data))
        engine = script_engine(data)
        if engine not in torch.backends.quantized.supported_engines:
            raise ArtifactError(
                f"the model needs the integer kernels {engine!r}, which this torch does not have",
                f"convert it again with --qat.engine {' or '.join(torch.backends.quantized.supported_engines)}",
            )
        with integer_kernels(engine), _without_deprecation():
            script = torch.jit.load(io.BytesIO(data), map_location="cpu").eval()
    except (zipfile.BadZipFile, BeyondLimits, KeyError, RuntimeError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"torch {torch.__version__} cannot read the TorchScript model: {first_line(error)}",
            "copy it again from where it was exported; compare with `versions` in manifest.json",
        ) from error

    def call(*args: Any, **kwargs: Any) -> Tree:
        with integer_kernels(engine):
            return script(*args, **kwargs)

    return call
