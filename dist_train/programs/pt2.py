"""An exported program as bytes (a `.pt2` archive): equal in every process, and refused where it can carry code.

From reading torch 2.14's `torch/export/pt2_archive/_package.py` and `torch/_export/serde/serialize.py`:

- Pickled weights, constants and example inputs are unpickled with `weights_only=False`.
- Compiled libraries are loaded.
- Symbolic expressions go through `sympy.sympify`, which calls `eval`.
- Guard code is executed.
- Operators are looked up by attribute from `torch`.

Our own files have none of these, so `load_program` refuses them. This narrows the risk and does not remove it: load
programs only from a source you trust.
"""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Importing this registers the operators quantized_decomposed.*, which programs need; torchao is not needed.
from torch.ao.quantization.fx._decomposed import quantized_decomposed_lib  # noqa: F401
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from dist_train.errors import ArtifactError, first_line
from dist_train.programs.modes import inline_modes, mode_blocks

OPERATORS = "torch.ao.quantization.fx._decomposed"
"""The module of torch that registers the operators of int8 programs, which every reader of such a file imports."""

# All of node.meta that torch.export.save keeps besides shapes. The first two hold object ids and addresses of the
# exporting process, the third its file paths. None is needed to run the program.
_TRACES = ("from_node", "nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn", "custom")

_RECORD = re.compile(
    r"data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|data/sample_inputs/model\.pt"
    r"|models/model\.json"
    r"|archive_format|archive_version|byteorder|\.data/(version|serialization_id)"
)
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|quantized_decomposed)\.\w+\.\w+"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_)"
    r"|torch\.sym_(int|float|not|max|min|ite)"
)
_EXPRESSION = re.compile(  # sympy's srepr: no attributes, no strings but the names of symbols
    r"(Symbol\('[su]\d+'(, \w+=(True|False))*\)|[su](?=\d)|\d"
    r"|Integer|Add|Mul|Pow|FloorDiv|PythonMod|Mod|CeilDiv|Max|Min|[-+*/(), ])+"
)


def _refuse(what: str) -> ArtifactError:
    return ArtifactError(
        f"the exported program holds {what}, which is refused because it can carry code",
        "export a model without custom operators; load files only from a source you trust",
    )


def _expressions(tree: Any) -> Iterator[str]:
    """Yields every symbolic expression in the JSON of a program."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == "expr_str":
                yield value
            else:
                yield from _expressions(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _expressions(value)


def check_archive(data: bytes) -> None:
    """Checks a `.pt2` archive without deserializing it by torch.

    Raises ArtifactError where it is no archive, or holds anything that our own exports never hold.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            records = {name.partition("/")[2]: archive.read(name) for name in names}
        if len(records) != len(names):
            raise _refuse("two files of one name")
        for name in records:
            if not _RECORD.fullmatch(name):
                raise _refuse(f"the file {name!r}")
        payloads = [json.loads(records[f"data/{kind}/model_{kind}_config.json"]) for kind in ("weights", "constants")]
        model = json.loads(records["models/model.json"])
        nodes = model["graph_module"]["graph"]["nodes"]
        pickled = [key for payload in payloads for key, entry in payload["config"].items() if entry["use_pickle"]]
        targets = [node["target"] for node in nodes]
        metadata = [key for node in nodes for key in node["metadata"]]
        symbols = list(model["range_constraints"])
        guards = model["guards_code"]
        example = records["data/sample_inputs/model.pt"]
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"this is not an exported program (.pt2): {error!r}", "copy it again from where it was exported"
        ) from error
    if pickled:
        raise _refuse(f"the pickled tensor {pickled[0]!r}")
    if example:
        raise _refuse("pickled example inputs")
    if guards:
        raise _refuse(f"guard code ({guards[0]!r})")
    if metadata:
        raise _refuse(f"metadata of nodes ({metadata[0]!r})")
    for target in targets:
        if not _OPERATOR.fullmatch(target):
            raise _refuse(f"the operator {target!r}")
    for expression in [*symbols, *_expressions(model)]:
        if not isinstance(expression, str) or not _EXPRESSION.fullmatch(expression):
            raise _refuse(f"the expression {str(expression)[:80]!r}")


def has_integers(data: bytes) -> bool:
    """True where the program of an archive needs the operators that `OPERATORS` registers."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return any(
            b"torch.ops.quantized_decomposed." in archive.read(name)
            for name in archive.namelist()
            if name.endswith("models/model.json")
        )


def export_program(model: nn.Module, example: Tensor) -> ExportedProgram:
    """Exports a model in eval mode on the CPU, with a dynamic batch size, for inference: see `inline_modes`.

    example: [B, ...]; only its shape without B and its dtype count. Raises as `torch.export.export` does.
    """
    program = _exported(model, example)
    if not any(mode_blocks(program.graph_module)):
        return program
    module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    inline_modes(module)
    return _exported(module, example)


def _exported(model: nn.Module, example: Tensor) -> ExportedProgram:
    zeros = torch.zeros((2, *example.shape[1:]), dtype=example.dtype)  # one row would make the batch size a constant
    return torch.export.export(model, (zeros,), dynamic_shapes=({0: Dim("batch", min=1)},))


@contextmanager
def _without_traces(program: ExportedProgram) -> Iterator[None]:
    """Hides metadata that differs between processes, and the example batch (user data), inside the block."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    hidden = [
        (node.meta, {key: node.meta.pop(key) for key in _TRACES if key in node.meta})
        for graph in graphs
        for node in graph.nodes
    ]
    example = program.example_inputs
    program.example_inputs = None
    try:
        yield
    finally:
        program.example_inputs = example
        for meta, traces in hidden:
            meta.update(traces)


def program_bytes(program: ExportedProgram) -> bytes:
    """Serializes `program` as a `.pt2` archive: equal bytes for equal programs, in every process and on every machine.

    Traces and the example batch are left out. `program` itself is not changed.

    Raises ArtifactError where `load_program` would refuse the result.
    """
    buffer = io.BytesIO()
    with _without_traces(program), warnings.catch_warnings():
        # Warns about channels_last weights: torch then writes the storage and the strides, which is right on the CPU.
        warnings.filterwarnings("ignore", "No complete tensor found")
        torch.export.save(program, buffer)
    data = buffer.getvalue()
    check_archive(data)
    return data


def load_program(data: bytes) -> ExportedProgram:
    """Loads a program from the bytes of `program_bytes`. Only for bytes from a source you trust; see the module's docs.

    Raises ArtifactError where the archive may carry code, or where this torch cannot read it.
    """
    check_archive(data)
    try:
        return torch.export.load(io.BytesIO(data))
    except RuntimeError as error:
        raise ArtifactError(
            f"torch {torch.__version__} cannot read the exported program: {first_line(error)}",
            "compare with `versions` in manifest.json, and pip install that torch",
        ) from error
